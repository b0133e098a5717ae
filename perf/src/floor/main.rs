//! The floor: the cheapest known way to move the bytes of a file to another process over loopback, and nothing else. What a
//! migration does besides (headers, batches, receipts, looking for zeros) is what it costs more than this.
//!
//! The sender hands the pages of the file to the socket without copying them, by `sendfile(2)` or by `vmsplice(2)` and
//! `splice(2)`. The receiver copies what comes once, into memory that is populated already, in huge pages if the kernel has
//! some. Each connection carries its own part of the file. Prints one JSON object.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use pageferry::channel::tcp;
use pageferry::layout::RamLayout;
use pageferry::memory::huge::HugeFiller;
use pageferry::memory::{Backing, GuestMemory, HugePages, Mapping};
use pageferry::sys::scatter::{self, MemorySlice};
use pageferry::sys::socket::set_receive_low_water;
use pageferry::units::{PAGE_SIZE, Run};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use rustix::time::{ClockId, clock_gettime};

/// What one call hands to the kernel: as much as a pipe holds.
const CHUNK: u64 = 1 << 20;
/// The receiver is woken for this much.
const WAKE_BYTES: u32 = 256 << 10;

#[derive(Parser)]
#[command(about = "The cheapest known way to move a file's bytes to another process over loopback")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Sends a file to a receiver that this program starts
    Send {
        #[arg(long)]
        file: PathBuf,
        #[arg(long)]
        way: Way,
        #[arg(long, default_value_t = 2)]
        channels: u64,
    },
    #[command(hide = true)]
    Receive { bytes: u64, channels: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    Sendfile,
    Vmsplice,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().role {
        Role::Send { file, way, channels } => {
            ensure!((1..=64).contains(&channels), "--channels {channels}: 1 to 64");
            send(&file, way, channels)
        }
        Role::Receive { bytes, channels } => receive(bytes, channels),
    }
}

fn process_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The part of the bytes that a connection carries: whole MiB but for the last.
fn part(bytes: u64, channels: u64, index: u64) -> (u64, u64) {
    let each = (bytes / channels).next_multiple_of(CHUNK);
    let start = (each * index).min(bytes);
    (start, (each * (index + 1)).min(bytes) - start)
}

struct Receiver {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
    address: SocketAddr,
}

impl Receiver {
    fn start(bytes: u64, channels: u64) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["receive", &bytes.to_string(), &channels.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the receiver")?;
        let mut said = BufReader::new(child.stdout.take().context("its stdout is a pipe")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        let address = line.trim().parse().with_context(|| format!("the receiver said '{line}'"))?;
        Ok(Self { child, said, address })
    }

    /// Processor time that it used, once it is done.
    fn cpu_seconds(&mut self) -> anyhow::Result<f64> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        line.trim().parse().with_context(|| format!("the receiver said '{line}'"))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(path: &Path, way: Way, channels: u64) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let bytes = file.metadata()?.len();
    ensure!(bytes > 0 && bytes.is_multiple_of(PAGE_SIZE), "{}: not whole pages", path.display());
    let writable = File::options().read(true).write(true).open(path)?;
    let mapping = Mapping::shared_file(writable.into(), 0, bytes)?;
    let mut receiver = Receiver::start(bytes, channels)?;
    let streams = (0..channels)
        .map(|_| tcp::connect(None, receiver.address, None, Duration::from_secs(10)))
        .collect::<std::io::Result<Vec<_>>>()?;
    let (began, cpu) = (Instant::now(), process_cpu());
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let threads: Vec<_> = streams
            .into_iter()
            .zip(0..)
            .map(|(stream, index)| {
                let (start, length) = part(bytes, channels, index);
                let (file, mapping) = (&file, &mapping);
                scope.spawn(move || {
                    match way {
                        Way::Sendfile => by_sendfile(&stream, file, start, length),
                        Way::Vmsplice => by_vmsplice(&stream, mapping, start, length),
                    }?;
                    // The receiver says so when it has everything.
                    let mut stream = stream;
                    anyhow::Ok(stream.read_exact(&mut [0])?)
                })
            })
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a sending thread panicked"))??;
        }
        Ok(())
    })?;
    let (seconds, cpu) = (began.elapsed().as_secs_f64(), (process_cpu() - cpu).as_secs_f64());
    let answer = serde_json::json!({
        "bytes": bytes,
        "seconds": seconds,
        "source_cpu_seconds": cpu,
        "destination_cpu_seconds": receiver.cpu_seconds()?,
    });
    println!("{answer}");
    Ok(())
}

fn by_sendfile(stream: &TcpStream, file: &File, start: u64, length: u64) -> anyhow::Result<()> {
    let (mut at, end) = (start, start + length);
    while at < end {
        let length = CHUNK.min(end - at) as usize;
        let moved = rustix::fs::sendfile(stream, file, Some(&mut at), length)?;
        ensure!(moved > 0, "the file became shorter");
    }
    Ok(())
}

fn by_vmsplice(stream: &TcpStream, mapping: &Mapping, start: u64, length: u64) -> anyhow::Result<()> {
    let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setpipe_size(&to, CHUNK as usize)?;
    let (mut at, end) = (start, start + length);
    while at < end {
        let slice = MemorySlice::new(mapping, at, CHUNK.min(end - at));
        let mut inside = scatter::vmsplice(&to, &[slice])?;
        at += inside as u64;
        while inside > 0 {
            inside -= splice(&from, None, stream, None, inside, SpliceFlags::MOVE | SpliceFlags::MORE)?;
        }
    }
    Ok(())
}

fn receive(bytes: u64, channels: u64) -> anyhow::Result<()> {
    std::thread::spawn(|| {
        // The sender holds the other end: when it is gone, so are we.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let memory = GuestMemory::allocate(RamLayout::flat(bytes)?, Backing::Memfd, HugePages::Transparent)?;
    let all = Run::new(0, bytes / PAGE_SIZE);
    HugeFiller::default().prepare(&memory, &[all], |_| true);
    memory.zero_run(all);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let streams =
        (0..channels).map(|_| Ok(listener.accept()?.0)).collect::<std::io::Result<Vec<TcpStream>>>()?;
    let cpu = process_cpu();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let threads: Vec<_> = streams
            .into_iter()
            .zip(0..)
            .map(|(stream, index)| {
                let (start, length) = part(bytes, channels, index);
                let memory = &memory;
                scope.spawn(move || take(stream, memory, Run::new(start / PAGE_SIZE, length / PAGE_SIZE)))
            })
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a receiving thread panicked"))??;
        }
        Ok(())
    })?;
    println!("{}", (process_cpu() - cpu).as_secs_f64());
    std::io::stdout().flush()?;
    // Until the sender has read that.
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

fn take(mut stream: TcpStream, memory: &GuestMemory, run: Run) -> anyhow::Result<()> {
    let mut left: Vec<MemorySlice<'_>> =
        if run.pages == 0 { Vec::new() } else { memory.memory_slices(run).collect() };
    while !left.is_empty() {
        let wanted: u64 = left.iter().map(MemorySlice::bytes).sum();
        set_receive_low_water(&stream, u64::from(WAKE_BYTES).min(wanted) as u32)?;
        let came = scatter::readv(&stream, &left)?;
        ensure!(came > 0, "the sender hung up early");
        scatter::advance(&mut left, came as u64);
    }
    Ok(stream.write_all(&[1])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for (bytes, channels) in [(1 << 20, 1), (7 << 20, 2), (3 << 20, 8), ((5 << 20) + 4096, 3)] {
            let mut next = 0;
            for index in 0..channels {
                let (start, length) = part(bytes, channels, index);
                assert!(length == 0 || start == next, "{bytes} by {channels}");
                next += length;
            }
            assert_eq!(next, bytes);
        }
    }
}
