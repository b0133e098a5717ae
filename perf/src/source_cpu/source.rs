//! The sending side, and what it costs.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::bail;
use crossbeam_channel::unbounded;
use pageferry::channel::tcp;
use pageferry::memory::GuestMemory;
use pageferry::pageset::PageSet;
use pageferry::session::encryption::EncryptionPolicy;
use pageferry::session::{
    ControlLink, ControlOptions, LinkEvent, Opening, Path, RdmaSupport, SessionEvent, SourceOptions,
    SourceSession, TransferMode,
};
use pageferry::sys::scatter::{self, MemorySlice};
use pageferry::units::RoundId;
use pageferry::wire::preamble::{MigrationId, Secret};
use rustix::time::{ClockId, clock_gettime};

use crate::Way;
use crate::sink::Sink;

/// What a plain loop hands to each `write(2)`.
const CHUNK: u64 = 1 << 20;

/// Longer than any step takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Each sink takes one migration, so its name and its secret need not be drawn.
pub(crate) const MIGRATION: MigrationId = MigrationId([1; 16]);
pub(crate) const SECRET: Secret = Secret([1; 32]);

/// What sending all memory once took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Of all threads of this process, user and system.
    pub(crate) cpu: Duration,
    pub(crate) elapsed: Duration,
}

/// Sends all memory to the sink and waits until it has it.
pub(crate) fn send(way: Way, memory: &GuestMemory, sink: &Sink, channels: usize) -> anyhow::Result<Cost> {
    let (start, cpu) = (Instant::now(), process_cpu());
    match way {
        Way::WriteLoop => {
            let stream = TcpStream::connect(sink.address)?;
            stream.set_nodelay(true)?;
            send_plainly(memory, stream)?;
        }
        Way::TunedWriteLoop => {
            let stream = tcp::connect(None, sink.address, None, PATIENCE)?;
            tcp::tune(&stream, PATIENCE)?;
            send_plainly(memory, stream)?;
        }
        Way::Pageferry => send_by_session(memory, sink, channels)?,
    }
    Ok(Cost { cpu: process_cpu() - cpu, elapsed: start.elapsed() })
}

/// CLOCK_PROCESS_CPUTIME_ID: as getrusage(RUSAGE_SELF), in nanoseconds instead of ticks.
fn process_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn send_plainly(memory: &GuestMemory, mut stream: TcpStream) -> anyhow::Result<()> {
    for mapping in memory.mappings() {
        for offset in (0..mapping.bytes()).step_by(CHUNK as usize) {
            let mut chunk = vec![MemorySlice::new(mapping, offset, CHUNK.min(mapping.bytes() - offset))];
            while !chunk.is_empty() {
                let went = scatter::writev(&stream, &chunk)?;
                scatter::advance(&mut chunk, went as u64);
            }
        }
    }
    Ok(stream.read_exact(&mut [0])?)
}

/// As the engine does it: a control link first, channels when the destination is ready, one round of every page.
fn send_by_session(memory: &GuestMemory, sink: &Sink, channels: usize) -> anyhow::Result<()> {
    let path = Path::to(sink.address);
    let (sender, link_events) = unbounded();
    let link = ControlLink::dial(&[path], MIGRATION, &Opening::default(), ControlOptions::default(), sender)?;
    link.set_secret(SECRET);
    match link_events.recv_timeout(PATIENCE)? {
        LinkEvent::Message(_) => {}
        other => bail!("the sink was to say that it is ready, and {other:?} came"),
    }
    let options = SourceOptions {
        migration: MIGRATION,
        secret: SECRET,
        paths: vec![path],
        channels,
        memory: memory.clone(),
        mode: TransferMode::Tcp,
        encryption: EncryptionPolicy::default(),
        rdma: RdmaSupport::off("TCP is measured"),
        reopen: None,
        rate_caps: pageferry::session::caps::RateCaps::default(),
        link_timeout: PATIENCE,
        cut: None,
    };
    let (sender, events) = unbounded();
    let session = SourceSession::open(options, sender)?;
    session.place(RoundId(0), PageSet::full(memory.layout().total_pages()));
    match events.recv_timeout(PATIENCE)? {
        SessionEvent::Placed { .. } => {}
        other => bail!("the round did not go through: {other:?}"),
    }
    session.close();
    Ok(())
}
