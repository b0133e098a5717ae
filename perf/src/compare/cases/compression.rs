//! QEMU's multifd with zstd against pageferry's compression: the RAM of a booted Linux guest, over loopback and 1 Gbit/s.

use std::path::Path;

use anyhow::Context;

use super::{CLOSE_PAIRS, PAIRS, Setup};
use crate::measure::{CaseResult, Goal, Sample, Way, alternating, in_turns};
use crate::memory::at_hand;
use crate::network::{DESTINATION, Lab, Scratch};
use crate::ours::{Bench, Between, bench};
use crate::qemu::{Migration, Ram, migrate};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Link {
    Gigabit,
    Loopback,
}

impl Link {
    fn name(self) -> &'static str {
        match self {
            Self::Gigabit => "1 Gbit/s",
            Self::Loopback => "loopback",
        }
    }
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let image = setup.booted.as_ref().context("the RAM of a booted guest is missing; --booted names it")?;
    let bytes = std::fs::metadata(image)?.len();
    let lab = Lab::up(&setup.root, &setup.binary, "1gbit")?;
    let incoming = Scratch::shared("incoming");
    let between = Between {
        source_prefix: &lab.source_prefix,
        destination_prefix: &lab.destination_prefix,
        address: DESTINATION,
    };
    let slow_address = format!("{DESTINATION}:7439");
    let qemu = |link: Link, compression: &'static str, channels: u32| {
        let (address, prefixes) = match link {
            Link::Gigabit => (&*slow_address, (&*lab.source_prefix, &*lab.destination_prefix)),
            Link::Loopback => ("127.0.0.1:7439", (&[][..], &[][..])),
        };
        let incoming = incoming.path();
        Way::new(format!("qemu {} {compression} {channels}", link.name()), Setup::takes(bytes), move || {
            let sample = migrate(&Migration {
                source: Ram::File(image.clone()),
                destination: Ram::File(incoming.to_owned()),
                bytes,
                channels,
                compression,
                address,
                source_prefix: prefixes.0,
                destination_prefix: prefixes.1,
                machine: &["-accel".into(), "tcg".into()],
                runs_for: None,
                directory: &setup.directory,
            });
            let _ = std::fs::remove_file(incoming);
            sample
        })
    };
    let pageferry =
        |what: String, link: Link, mode: &'static str, channels: u32, image: &Path, bytes: u64| {
            let fill = Setup::fill(image);
            Way::new(format!("pageferry {what} {mode} {channels}"), Setup::takes(bytes), move || {
                let between = (link == Link::Gigabit).then_some(between);
                bench(&Bench {
                    binary: &setup.binary,
                    mode,
                    channels,
                    fill: fill.clone(),
                    bytes,
                    warm: false,
                    between,
                })
            })
        };
    let ours =
        |link: Link, mode, channels| pageferry(link.name().to_owned(), link, mode, channels, image, bytes);
    // What is compared is measured several times a turn: single moves differ by a third.
    let (pairs, close_pairs) = if setup.quick { (1, 1) } else { (PAIRS, CLOSE_PAIRS) };
    let mut ways = Vec::new();
    for &channels in if setup.quick { &[2][..] } else { &[1, 2] } {
        for is_qemu in alternating([true, false], pairs) {
            ways.push(if is_qemu {
                qemu(Link::Gigabit, "zstd", channels)
            } else {
                ours(Link::Gigabit, "compression", channels)
            });
        }
        ways.extend([qemu(Link::Gigabit, "none", channels), ours(Link::Gigabit, "tcp", channels)]);
        ways.extend([qemu(Link::Loopback, "zstd", channels), qemu(Link::Loopback, "none", channels)]);
    }
    for mode in alternating(["compression", "tcp"], close_pairs) {
        ways.push(ours(Link::Loopback, mode, 2));
    }
    // Memory that compression finds nothing in, on a link faster than it.
    for mode in alternating(["compression", "tcp"], close_pairs) {
        ways.push(pageferry("random".into(), Link::Loopback, mode, 2, &setup.random, setup.bytes));
    }
    let sides = in_turns(&ways, setup.runs, at_hand)?;
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

fn rates(result: &CaseResult, of: fn(&Sample) -> f64) -> Vec<(String, f64)> {
    result.sides.iter().map(|side| (side.name.clone(), side.median(of))).collect()
}
