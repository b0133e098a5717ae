//! The receiving process, and the handle to it at the source.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use clap::ValueEnum;
use crossbeam_channel::unbounded;
use pageferry::memory::GuestMemory;
use pageferry::session::{DestinationSession, Listener, ListenerEvent, ListenerOptions};
use pageferry::sys::scatter::{self, MemorySlice};
use pageferry::units::{PAGE_SIZE, Run};

use crate::source::{MIGRATION, PATIENCE, SECRET};
use crate::{Way, empty_memory};

/// A receiving process, which ends when this is dropped.
pub(crate) struct Sink {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Sink {
    pub(crate) fn start(way: Way, bytes: u64) -> anyhow::Result<Self> {
        let way = way.to_possible_value().context("every way has a name")?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["sink", way.get_name(), &bytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the receiving process")?;
        let mut line = String::new();
        let said = child.stdout.take().context("its stdout is a pipe")?;
        BufReader::new(said).read_line(&mut line)?;
        let address = line.trim().parse().with_context(|| format!("the receiving process said '{line}'"));
        match address {
            Ok(address) => Ok(Self { child, address }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the receiving process does: populates memory, says where it listens, receives once.
pub(crate) fn run(way: Way, bytes: u64) -> anyhow::Result<()> {
    std::thread::spawn(|| {
        // The source holds the other end: when it is gone, so are we.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let memory = empty_memory(bytes)?;
    memory.zero_run(Run::new(0, bytes / PAGE_SIZE));
    match way {
        Way::WriteLoop | Way::TunedWriteLoop => receive_plainly(&memory, bytes),
        Way::Pageferry => receive_by_session(memory),
    }
}

fn listens_at(address: SocketAddr) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{address}")?;
    Ok(out.flush()?)
}

fn receive_plainly(memory: &GuestMemory, bytes: u64) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listens_at(listener.local_addr()?)?;
    let (mut stream, _) = listener.accept()?;
    let mut slices: Vec<MemorySlice<'_>> = memory.memory_slices(Run::new(0, bytes / PAGE_SIZE)).collect();
    while !slices.is_empty() {
        let came = scatter::readv(&stream, &slices)?;
        anyhow::ensure!(came > 0, "the source hung up early");
        scatter::advance(&mut slices, came as u64);
    }
    Ok(stream.write_all(&[1])?)
}

fn receive_by_session(memory: GuestMemory) -> anyhow::Result<()> {
    let (sender, incoming) = unbounded();
    let listener =
        Listener::bind(&["127.0.0.1:0".parse::<SocketAddr>()?], ListenerOptions::default(), sender)?;
    listens_at(listener.local_addresses()[0])?;
    let ListenerEvent::NewMigration { link, .. } = incoming.recv_timeout(PATIENCE)? else {
        bail!("the source was to begin a migration");
    };
    let (sender, link_events) = unbounded();
    let link = link.accept(sender)?;
    link.set_secret(SECRET);
    let (sender, _events) = unbounded();
    let session = DestinationSession::new(memory, MIGRATION, sender);
    listener.register(MIGRATION, SECRET, &session, &link);
    link.send(b"ready".to_vec());
    // Until the source has what it wants and ends this process.
    while link_events.recv().is_ok() {}
    Ok(())
}
