//! QEMU's multifd with zstd against pageferry's compression: the RAM of a booted Linux guest, over loopback and 1 Gbit/s.

use anyhow::Context;

use super::{PAIRS, Setup};
use crate::measure::{CaseResult, Goal, Sample, Way, in_turns};
use crate::memory;
use crate::network::{DESTINATION, Lab, Scratch};
use crate::ours::{Bench, Between, bench};
use crate::qemu::{Migration, Ram, migrate};

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let image = setup.booted.as_ref().context("the RAM of a booted guest is missing; --booted names it")?;
    let bytes = std::fs::metadata(image)?.len();
    let lab = Lab::up(&setup.root, &setup.binary, "1gbit")?;
    let incoming = Scratch::shared("incoming");
    let none: Vec<String> = Vec::new();
    let between = Between {
        source_prefix: &lab.source_prefix,
        destination_prefix: &lab.destination_prefix,
        address: DESTINATION,
    };
    let mut ways = Vec::new();
    for slow in [true, false] {
        let link = if slow { "1 Gbit/s" } else { "loopback" };
        let prefixes = if slow { (&lab.source_prefix, &lab.destination_prefix) } else { (&none, &none) };
        let address = if slow { format!("{DESTINATION}:7439") } else { "127.0.0.1:7439".to_owned() };
        let channels: &[u32] = if setup.quick { &[2] } else { &[1, 2] };
        for &channels in channels {
            // What is compared is measured several times a turn: single moves differ by a third.
            let zstd = if slow { PAIRS } else { 1 };
            for compression in std::iter::repeat_n("zstd", zstd).chain(["none"]) {
                let (address, incoming) = (address.clone(), incoming.path().to_owned());
                ways.push(Way::new(format!("qemu {link} {compression} {channels}"), move || {
                    let sample = migrate(&Migration {
                        source: Ram::File(image.clone()),
                        destination: Ram::File(incoming.clone()),
                        bytes,
                        channels,
                        compression,
                        address: &address,
                        source_prefix: prefixes.0,
                        destination_prefix: prefixes.1,
                        machine: &["-accel".into(), "tcg".into()],
                        runs_for: None,
                        directory: &setup.directory,
                    });
                    let _ = std::fs::remove_file(&incoming);
                    sample
                }));
            }
            let modes = if slow { vec!["compression"; PAIRS] } else { in_pairs(PAIRS).collect() };
            for mode in modes.into_iter().chain(slow.then_some("tcp")) {
                ways.push(Way::new(format!("pageferry {link} {mode} {channels}"), move || {
                    bench(&Bench {
                        binary: &setup.binary,
                        mode,
                        channels,
                        fill: Setup::fill(image),
                        bytes,
                        warm: false,
                        between: slow.then_some(between),
                    })
                }));
            }
        }
    }
    // Memory that compression finds nothing in, on a link faster than it.
    for mode in in_pairs(PAIRS) {
        ways.push(Way::new(format!("pageferry random {mode} 2"), move || {
            bench(&Bench {
                binary: &setup.binary,
                mode,
                channels: 2,
                fill: Setup::fill(&setup.random),
                bytes: setup.bytes,
                warm: false,
                between: None,
            })
        }));
    }
    // Both the copy of the image that bench sends and the memory that arrives.
    let sides = in_turns(&ways, setup.runs, || memory::at_hand(bytes.max(setup.bytes) * 5 / 2))?;
    let how = "rates are of the guest's whole memory; the number is that of channels";
    let mut result = CaseResult { case: "compression".into(), how: how.into(), sides, ratios: Vec::new() };
    let rate = Sample::gib_per_second;
    let (of, cpu) = (rates(&result, rate), rates(&result, Sample::source_cpu_per_gib));
    let best = |name: &str| {
        of.iter().filter(|(known, _)| known.starts_with(name)).map(|(_, rate)| *rate).reduce(f64::max)
    };
    let best_cpu = |name: &str| {
        let fastest =
            of.iter().filter(|(known, _)| known.starts_with(name)).max_by(|a, b| a.1.total_cmp(&b.1))?;
        cpu.iter().find(|(known, _)| *known == fastest.0).map(|(_, cpu)| *cpu)
    };
    let pair = |of: &dyn Fn(&str) -> Option<f64>, above: &str, below: &str| (of(above), of(below));
    let (ours, theirs) = ("pageferry 1 Gbit/s compression", "qemu 1 Gbit/s zstd");
    result.ratio(
        "1 Gbit/s: compression rate / QEMU zstd's",
        pair(&best, ours, theirs),
        Some(Goal::AtLeast(1.5)),
    );
    result.ratio(
        "1 Gbit/s: compression source CPU / QEMU zstd's",
        pair(&best_cpu, ours, theirs),
        Some(Goal::AtMost(0.5)),
    );
    result.ratio("1 Gbit/s: compression rate / tcp's", pair(&best, ours, "pageferry 1 Gbit/s tcp"), None);
    let (ours, tcp) = ("pageferry loopback compression", "pageferry loopback tcp");
    result.ratio("loopback: compression rate / QEMU zstd's", pair(&best, ours, "qemu loopback zstd"), None);
    result.ratio("loopback: compression rate / tcp's", pair(&best, ours, tcp), Some(Goal::AtLeast(0.95)));
    let (ours, tcp) = ("pageferry random compression", "pageferry random tcp");
    result.ratio(
        "loopback, random: compression rate / tcp's",
        pair(&best, ours, tcp),
        Some(Goal::AtLeast(0.95)),
    );
    Ok(result)
}

fn in_pairs(pairs: usize) -> impl Iterator<Item = &'static str> {
    ["compression", "tcp"].into_iter().cycle().take(2 * pairs)
}

fn rates(result: &CaseResult, of: fn(&Sample) -> f64) -> Vec<(String, f64)> {
    result.sides.iter().map(|side| (side.name.clone(), side.median(of))).collect()
}
