//! QEMU's multifd with zstd against pageferry's compression: the RAM of a booted Linux guest, over loopback and 1 Gbit/s.

use anyhow::Context;

use super::{CLOSE_PAIRS, PAIRS, Setup, pageferry};
use crate::measure::{CaseResult, Sample, Way, alternating, in_turns};
use crate::network::{DESTINATION, Lab, Scratch};
use crate::ours::{Bench, Between};
use crate::qemu::{Migration, Ram, migrate};
use crate::ratio::Goal;

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
    let over_gigabit = |mode, channels| {
        let (binary, fill, between) = (&setup.binary, Setup::fill(image), Some(between));
        let what = Bench { binary, mode, channels, fill, bytes, warm: false, between };
        pageferry(format!("1 Gbit/s {mode} {channels}"), what)
    };
    // What is compared is measured several times a turn: single moves differ by a third.
    let (pairs, close_pairs) = if setup.quick { (1, 1) } else { (PAIRS, CLOSE_PAIRS) };
    let mut ways = Vec::new();
    for &channels in if setup.quick { &[2][..] } else { &[1, 2] } {
        for is_qemu in alternating([true, false], pairs) {
            ways.push(if is_qemu {
                qemu(Link::Gigabit, "zstd", channels)
            } else {
                over_gigabit("compression", channels)
            });
        }
        ways.extend([qemu(Link::Gigabit, "none", channels), over_gigabit("tcp", channels)]);
        ways.extend([qemu(Link::Loopback, "zstd", channels), qemu(Link::Loopback, "none", channels)]);
    }
    // A link faster than any compressor; in random bytes it finds nothing.
    for (name, image, bytes) in [("booted", image, bytes), ("random", &setup.random, setup.bytes)] {
        for (state, warm) in [("fresh", false), ("populated", true)] {
            for mode in alternating(["compression", "tcp"], close_pairs) {
                let (binary, fill) = (&setup.binary, Setup::fill(image));
                let what = Bench { binary, mode, channels: 2, fill, bytes, warm, between: None };
                ways.push(pageferry(format!("loopback {name} {state} {mode} 2"), what));
            }
        }
    }
    let sides = in_turns(&ways, setup.runs, |takes| setup.prepare(takes))?;
    let how = "rates are of the guest's whole memory; over loopback pageferry's of the booted guest or of random bytes, into fresh \
               memory or into memory that is populated already; the number is that of channels";
    let mut result = CaseResult { case: "compression".into(), how: how.into(), sides, ratios: Vec::new() };
    let (rate, cpu) = (Sample::gib_per_second, Sample::source_cpu_per_gib);
    let (ours, theirs) = ("pageferry 1 Gbit/s compression", "qemu 1 Gbit/s zstd");
    let (rates, cpus) = (result.of_best(ours, theirs, rate), result.of_best(ours, theirs, cpu));
    result.ratio("1 Gbit/s: compression rate / QEMU zstd's", rates, Some(Goal::AtLeast(1.5)));
    result.ratio("1 Gbit/s: compression source CPU / QEMU zstd's", cpus, Some(Goal::AtMost(0.5)));
    let tcp = result.of_best(ours, "pageferry 1 Gbit/s tcp", rate);
    result.ratio("1 Gbit/s: compression rate / tcp's", tcp, None);
    let zstd = result.of_best("pageferry loopback booted fresh compression", "qemu loopback zstd", rate);
    result.ratio("loopback: compression rate / QEMU zstd's", zstd, None);
    for name in ["booted", "random"] {
        for state in ["fresh", "populated"] {
            let side = |mode| format!("pageferry loopback {name} {state} {mode}");
            let rates = result.of_best(&side("compression"), &side("tcp"), rate);
            let what = format!("loopback, {name}, {state} memory: compression rate / tcp's");
            result.ratio(&what, rates, Some(Goal::AtLeast(0.95)));
        }
    }
    Ok(result)
}
