//! QEMU's multifd against pageferry's tcp mode, over loopback: 2 GiB of random bytes in a shared file.

use super::{Setup, pageferry};
use crate::measure::{CaseResult, Sample, Way, in_turns};
use crate::network::Scratch;
use crate::qemu::{Migration, Ram, migrate};
use crate::ratio::{Figures, Goal};

const CHANNELS: [u32; 3] = [1, 2, 4];

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let incoming = Scratch::shared("incoming");
    let (mut ways, takes) = (Vec::new(), Setup::takes(setup.bytes));
    let channels = if setup.quick { &CHANNELS[1..2] } else { &CHANNELS[..] };
    for &channels in channels {
        for (name, destination) in
            [("file", Ram::File(incoming.path().to_owned())), ("private", Ram::Private)]
        {
            ways.push(Way::new(format!("qemu {name} {channels}"), takes, move || {
                let sample = migrate(&Migration {
                    source: Ram::File(setup.random.clone()),
                    destination: destination.clone(),
                    bytes: setup.bytes,
                    channels,
                    compression: "none",
                    address: "127.0.0.1:7439",
                    source_prefix: &[],
                    destination_prefix: &[],
                    machine: &["-accel".into(), "tcg".into()],
                    runs_for: None,
                    directory: &setup.directory,
                });
                // Its memory goes back to the machine, as that of everyone else does.
                if let Ram::File(path) = &destination {
                    let _ = std::fs::remove_file(path);
                }
                sample
            }));
        }
        ways.push(pageferry(channels.to_string(), setup.tcp(channels, false)));
    }
    let sides = in_turns(&ways, setup.runs, |takes| setup.prepare(takes))?;
    let how = "fresh memory at the destination; QEMU's is a file in shared memory as at the source (file), or private with \
               transparent huge pages (private); pageferry's a file in shared memory; the number is that of channels";
    let mut result = CaseResult { case: "throughput".into(), how: how.into(), sides, ratios: Vec::new() };
    let rate = Sample::gib_per_second;
    let best = |begins: &str| result.best(begins, rate).map(|side| side.figures(rate));
    let (ours, file, private) = (best("pageferry"), best("qemu file"), best("qemu private"));
    let cpu = |begins: &str| result.best(begins, rate).map(|side| side.figures(Sample::source_cpu_per_gib));
    let (our_cpu, file_cpu, private_cpu) = (cpu("pageferry"), cpu("qemu file"), cpu("qemu private"));
    let engine = result
        .best("pageferry", rate)
        .map(|side| side.samples.iter().filter_map(|sample| sample.engine_bytes).max().unwrap_or(0) as f64)
        .map(Figures::exact);
    let allowed = (64 << 20) as f64 + setup.bytes as f64 / 1e4;
    result.ratio(
        "tcp rate / QEMU multifd's best, shared memory",
        (ours.clone(), file),
        Some(Goal::AtLeast(3.0)),
    );
    result.ratio("tcp rate / QEMU multifd's best, private memory", (ours, private), Some(Goal::AtLeast(3.0)));
    result.ratio(
        "tcp source CPU / QEMU multifd's, shared memory",
        (our_cpu.clone(), file_cpu),
        Some(Goal::AtMost(0.2)),
    );
    result.ratio(
        "tcp source CPU / QEMU multifd's, private memory",
        (our_cpu, private_cpu),
        Some(Goal::AtMost(0.2)),
    );
    result.ratio(
        "engine memory / (64 MiB + 0.01 % of RAM)",
        (engine, Some(Figures::exact(allowed))),
        Some(Goal::AtMost(1.0)),
    );
    Ok(result)
}
