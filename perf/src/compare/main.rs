//! pageferry side by side with its peers: everything in turns, in one run, on one machine. Prints one table of ratios of
//! medians; keeps every sample with the machine's facts as JSON, and draws a plot. `scripts/perf-compare` installs what this
//! needs and calls it.

mod cases;
mod facts;
mod iperf;
mod measure;
mod memory;
mod network;
mod ours;
mod plot;
mod qemu;
mod ratio;
mod table;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::cases::{Case, Setup};
use crate::measure::CaseResult;
use crate::network::Scratch;

#[derive(Parser)]
#[command(
    name = "scripts/perf-compare",
    about = "pageferry side by side with its peers, in turns, in one run"
)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// What to compare; several with commas. All of them unless given
    #[arg(long = "case", value_enum, value_delimiter = ',')]
    cases: Vec<Case>,
    /// How many turns; what is compared closely is measured several times in each. Figures are medians
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// The random memory that is sent, in MiB
    #[arg(long, default_value_t = 2048)]
    mebibytes: u64,
    /// One run of little memory and few ways: shows that everything works, and nothing of speed
    #[arg(long)]
    quick: bool,
    /// The pageferry that is measured
    #[arg(long, default_value = "target/release/pageferry")]
    binary: PathBuf,
    /// The RAM of a booted Linux guest, for the case compression
    #[arg(long)]
    booted: Option<PathBuf>,
    /// Where FILE.json and FILE.svg go
    #[arg(long, default_value = "perf/results/tmp/compare")]
    output: PathBuf,
}

#[derive(Subcommand)]
enum Role {
    /// Takes memory from the machine and gives it back, which the program has itself do before each run
    #[command(hide = true)]
    Touch { bytes: u64 },
}

/// All that is kept of a run.
#[derive(Serialize)]
struct Kept<'a> {
    /// Seconds since 1970.
    measured_at: u64,
    machine: facts::Facts,
    mebibytes: u64,
    runs: usize,
    cases: &'a [CaseResult],
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        Some(Role::Touch { bytes }) => memory::touch(bytes),
        None => compare(&arguments),
    }
}

fn compare(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(arguments.runs > 0 && arguments.mebibytes > 0, "--runs and --mebibytes are at least 1");
    let (runs, mebibytes) = if arguments.quick {
        (1, arguments.mebibytes.min(256))
    } else {
        (arguments.runs, arguments.mebibytes)
    };
    let binary = arguments.binary.canonicalize();
    let binary = binary.with_context(|| format!("{}: build it first", arguments.binary.display()))?;
    let (directory, random, booted) =
        (Scratch::directory()?, Scratch::shared("random"), Scratch::shared("booted"));
    memory::random_image(random.path(), mebibytes << 20)?;
    if let Some(image) = &arguments.booted {
        std::fs::copy(image, booted.path()).with_context(|| format!("cannot copy {}", image.display()))?;
    }
    let setup = Setup {
        root: std::env::current_dir()?,
        directory: directory.path().to_owned(),
        random: random.path().to_owned(),
        bytes: mebibytes << 20,
        booted: arguments.booted.as_ref().map(|_| booted.path().to_owned()),
        binary,
        runs,
        quick: arguments.quick,
    };
    let chosen = if arguments.cases.is_empty() { &Case::ALL[..] } else { &arguments.cases };
    let mut results = Vec::new();
    for case in chosen {
        eprintln!("{}:", case.name());
        results.push(case.run(&setup).with_context(|| format!("case {}", case.name()))?);
        // What was measured is kept, whatever the next one comes to.
        keep(arguments, &setup, mebibytes, &results)?;
    }
    print!("{}", table::of(&results));
    Ok(())
}

fn keep(arguments: &Arguments, setup: &Setup, mebibytes: u64, results: &[CaseResult]) -> anyhow::Result<()> {
    if let Some(directory) = arguments.output.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let kept = Kept {
        measured_at: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        machine: facts::Facts::gather(&setup.binary),
        mebibytes,
        runs: setup.runs,
        cases: results,
    };
    std::fs::write(arguments.output.with_extension("json"), serde_json::to_string_pretty(&kept)? + "\n")?;
    std::fs::write(arguments.output.with_extension("svg"), plot::draw(results)?)?;
    Ok(())
}
