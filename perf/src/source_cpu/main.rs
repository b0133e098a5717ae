//! How much CPU the source spends to send a GiB of guest memory: pageferry in tcp mode against a loop of `write(2)`, once
//! over a socket as the host gives it to any program, once over one that is set up as pageferry's are.
//!
//! All send the same memory (random bytes in a memfd) over loopback to a process of their own that receives into memory
//! which is populated already. They take turns, so that what else the machine does meets both. CPU is that of the sending
//! process alone, all its threads, user and system.

mod sink;
mod source;

use std::io::Write;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use pageferry::layout::RamLayout;
use pageferry::memory::{Backing, GuestMemory, HugePages};
use pageferry::units::{Bytes, PAGE_SIZE, Run};
use serde::Serialize;

use crate::source::Cost;

const GIB: f64 = (1u64 << 30) as f64;

#[derive(Parser)]
#[command(about = "CPU seconds a GiB at the source: pageferry's tcp mode against a loop of write(2)")]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// How much memory is sent each time, in MiB
    #[arg(long, default_value_t = 1024)]
    mebibytes: u64,
    /// How often each side is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How many channels pageferry uses
    #[arg(long, default_value_t = 2)]
    channels: usize,
}

#[derive(Subcommand)]
enum Role {
    /// The receiving process, which the program starts itself
    #[command(hide = true)]
    Sink { way: Way, bytes: u64 },
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    WriteLoop,
    TunedWriteLoop,
    Pageferry,
}

/// What is printed.
#[derive(Serialize)]
struct Comparison {
    bytes: u64,
    channels: usize,
    write_loop: Side,
    tuned_write_loop: Side,
    pageferry_tcp: Side,
    /// Median of pageferry's CPU seconds a GiB over the write loop's: smaller is better.
    cpu_ratio: f64,
    /// The same over those of the loop whose socket is set up as pageferry's.
    cpu_ratio_tuned: f64,
}

/// One side, a number a measurement.
#[derive(Serialize)]
struct Side {
    cpu_seconds_per_gib_median: f64,
    gib_per_second_median: f64,
    cpu_seconds_per_gib: Vec<f64>,
    gib_per_second: Vec<f64>,
}

impl Side {
    fn of(costs: &[Cost], bytes: u64) -> Self {
        let gib = bytes as f64 / GIB;
        let cpu_seconds_per_gib: Vec<f64> = costs.iter().map(|cost| cost.cpu.as_secs_f64() / gib).collect();
        let gib_per_second: Vec<f64> = costs.iter().map(|cost| gib / cost.elapsed.as_secs_f64()).collect();
        Self {
            cpu_seconds_per_gib_median: median(&cpu_seconds_per_gib),
            gib_per_second_median: median(&gib_per_second),
            cpu_seconds_per_gib,
            gib_per_second,
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        Some(Role::Sink { way, bytes }) => sink::run(way, bytes),
        None => compare(&arguments),
    }
}

fn compare(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        arguments.mebibytes > 0 && arguments.rounds > 0,
        "--mebibytes and --rounds are at least 1"
    );
    let bytes = arguments.mebibytes << 20;
    const WAYS: [Way; 3] = [Way::WriteLoop, Way::TunedWriteLoop, Way::Pageferry];
    eprintln!("sending {} {} times by each of {} ways", Bytes(bytes), arguments.rounds, WAYS.len());
    let memory = random_memory(bytes)?;
    let mut costs = [const { Vec::new() }; 3];
    // The first turn of each warms sockets, pipes and the kernel up, and is not counted.
    for turn in 0..=arguments.rounds {
        for (way, costs) in WAYS.into_iter().zip(&mut costs) {
            let sink = sink::Sink::start(way, bytes)?;
            let cost = source::send(way, &memory, &sink, arguments.channels)
                .with_context(|| format!("sending by {way:?}"))?;
            if turn > 0 {
                eprintln!(
                    "{way:?}: {:.3} CPU s, {:.3} s",
                    cost.cpu.as_secs_f64(),
                    cost.elapsed.as_secs_f64()
                );
                costs.push(cost);
            }
        }
    }
    let [write_loop, tuned_write_loop, pageferry_tcp] = costs.map(|costs| Side::of(&costs, bytes));
    let ratio_to = |side: &Side| pageferry_tcp.cpu_seconds_per_gib_median / side.cpu_seconds_per_gib_median;
    let (cpu_ratio, cpu_ratio_tuned) = (ratio_to(&write_loop), ratio_to(&tuned_write_loop));
    eprintln!(
        "pageferry {:.3} CPU s/GiB: {cpu_ratio:.2} of the write loop's {:.3}, {cpu_ratio_tuned:.2} of the tuned one's {:.3}",
        pageferry_tcp.cpu_seconds_per_gib_median,
        write_loop.cpu_seconds_per_gib_median,
        tuned_write_loop.cpu_seconds_per_gib_median,
    );
    let comparison = Comparison {
        bytes,
        channels: arguments.channels,
        write_loop,
        tuned_write_loop,
        pageferry_tcp,
        cpu_ratio,
        cpu_ratio_tuned,
    };
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &comparison)?;
    Ok(writeln!(out)?)
}

/// Memory of random bytes in a memfd, as a guest's is.
fn random_memory(bytes: u64) -> anyhow::Result<GuestMemory> {
    let memory = empty_memory(bytes)?;
    let mut state = 0x853c_49e6_748f_ea9b_u64;
    let mut page = vec![0; PAGE_SIZE as usize];
    for index in 0..bytes / PAGE_SIZE {
        for word in page.chunks_exact_mut(8) {
            // xorshift64 (Marsaglia 2003): no compressor and no deduplication finds anything in it.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        memory.write_run(Run::new(index, 1), &page);
    }
    Ok(memory)
}

fn empty_memory(bytes: u64) -> anyhow::Result<GuestMemory> {
    let layout = RamLayout::flat(bytes)?;
    GuestMemory::allocate(layout, Backing::Memfd, HugePages::No).context("cannot map the memory")
}
