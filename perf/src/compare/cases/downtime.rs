//! A guest that writes its memory all the time: how long it stands still, and how long the whole move takes.
//!
//! Both guests have 1 GiB, use the same part of it, and write two words of every page of that part in turn, so many pages in
//! each tick of 4 ms, and halt in between. QEMU's runs the program below under TCG, because KVM without hardware support runs
//! none that starts in real mode; pageferry's runs its own under KVM, which also checks every page that it writes.

use std::time::Duration;

use super::Setup;
use crate::measure::{CaseResult, Sample, Way, in_turns};
use crate::memory::at_hand;
use crate::network::Scratch;
use crate::ours::demo;
use crate::qemu::{Migration, Ram, migrate};

const MEMORY: u64 = 1 << 30;
/// Where QEMU's guest begins to write.
const FIRST: u32 = 2 << 20;
/// How much memory the guests use.
const USED: u32 = 256 << 20;
/// Pages in a tick of 4 ms: 51 x 250 x 4 KiB = 50 MiB/s.
const PAGES: u32 = 51;
const RATE: &str = "52224000";
/// Until QEMU's guest has written every page once: 256 MiB at 50 MiB/s, and what TCG takes to begin.
const ONCE_AROUND: Duration = Duration::from_secs(7);

/// Where the program is in the first MiB, and where it begins there.
const SEGMENT_OFFSET: usize = 0xf000;
/// A processor begins at the last 16 bytes of its BIOS.
const RESET_OFFSET: usize = 0xfff0;

/// A BIOS that is nothing but the guest's program. In 16 bits: load the tables, protected mode (`cr0` bit 0), far jump. In 32:
/// flat segments, the LAPIC's timer every 4,000,000 ns on vector 0x20; then for ever: `hlt`; `ecx` = pages of a tick;
/// `[edi]` and `[edi + 4088]` = ++`ebx`; `edi` += 4096, back to the first page at the end. The handler ends the interrupt.
/// Behind it the descriptors, and as the last three words the first address, the end, and the pages of a tick.
#[rustfmt::skip]
const PROGRAM: [u8; 208] = [
    0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0xb8, 0xf0, 0x2e, 0x66, 0x0f, 0x01, 0x1e, 0xbe, 0xf0, 0x0f,
    0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x1f, 0xf0, 0x0f, 0x00, 0x10, 0x00, 0x66,
    0xb8, 0x08, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0x00, 0x00, 0xc7, 0x05,
    0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, 0xc7, 0x05, 0xe0, 0x03, 0xe0, 0xfe, 0x0b, 0x00,
    0x00, 0x00, 0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x20, 0x00, 0x02, 0x00, 0xc7, 0x05, 0x80, 0x03,
    0xe0, 0xfe, 0x00, 0x09, 0x3d, 0x00, 0x8b, 0x3d, 0xc4, 0xf0, 0x0f, 0x00, 0x31, 0xdb, 0xfb, 0xf4,
    0x8b, 0x0d, 0xcc, 0xf0, 0x0f, 0x00, 0x43, 0x89, 0x1f, 0x89, 0x9f, 0xf8, 0x0f, 0x00, 0x00, 0x81,
    0xc7, 0x00, 0x10, 0x00, 0x00, 0x3b, 0x3d, 0xc8, 0xf0, 0x0f, 0x00, 0x72, 0x06, 0x8b, 0x3d, 0xc4,
    0xf0, 0x0f, 0x00, 0x49, 0x75, 0xe0, 0xeb, 0xd7, 0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0x00, 0x00,
    0x00, 0x00, 0xcf, 0x8d, 0x74, 0x26, 0x00, 0x90, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00,
    0x88, 0xf0, 0x10, 0x00, 0x00, 0x8e, 0x0f, 0x00, 0x17, 0x00, 0x98, 0xf0, 0x0f, 0x00, 0x07, 0x01,
    0xb0, 0xef, 0x0f, 0x00, 0x00, 0x00, 0x20, 0x00, 0x00, 0x00, 0x20, 0x10, 0x33, 0x00, 0x00, 0x00,
];

/// The BIOS of QEMU's guest.
fn bios() -> Vec<u8> {
    let mut rom = vec![0; 64 << 10];
    let numbers = PROGRAM.len() - 12;
    rom[SEGMENT_OFFSET..][..numbers].copy_from_slice(&PROGRAM[..numbers]);
    for (index, number) in [FIRST, FIRST + USED, PAGES].into_iter().enumerate() {
        rom[SEGMENT_OFFSET + numbers + index * 4..][..4].copy_from_slice(&number.to_le_bytes());
    }
    // jmp 0xf000:0xf000
    rom[RESET_OFFSET..][..5].copy_from_slice(&[0xea, 0x00, 0xf0, 0x00, 0xf0]);
    rom
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let rom = setup.directory.join("program.rom");
    std::fs::write(&rom, bios())?;
    let (outgoing, incoming) = (Scratch::shared("outgoing"), Scratch::shared("arriving"));
    let (rom, used) = (rom.display().to_string(), USED.to_string());
    let machine = ["-accel".to_owned(), "tcg".into(), "-bios".into(), rom];
    let qemu = Way::new("qemu 2", Setup::takes(MEMORY), || {
        let sample = migrate(&Migration {
            source: Ram::File(outgoing.path().to_owned()),
            destination: Ram::File(incoming.path().to_owned()),
            bytes: MEMORY,
            channels: 2,
            compression: "none",
            address: "127.0.0.1:7439",
            source_prefix: &[],
            destination_prefix: &[],
            machine: &machine,
            runs_for: Some(ONCE_AROUND),
            directory: &setup.directory,
        });
        for file in [&outgoing, &incoming] {
            let _ = std::fs::remove_file(file.path());
        }
        sample
    });
    let ours = Way::new("pageferry 2", Setup::takes(MEMORY), || {
        let fixed = ["--guest", "kvm", "--program", "stream", "--memory", "1GiB", "--mode", "tcp"];
        let varied = ["--channels", "2", "--touch", &used, "--dirty-rate", RATE];
        demo(&setup.binary, &[&fixed[..], &varied[..]].concat())
    });
    let sides = in_turns(&[qemu, ours], setup.runs, at_hand)?;
    let how = "1 GiB, 256 MiB of it in use, all of which the guest writes page after page at 50 MiB/s; both may stand still for \
               300 ms; QEMU tells its own downtime, pageferry what the guest saw";
    let mut result = CaseResult { case: "downtime".into(), how: how.into(), sides, ratios: Vec::new() };
    let figures = |name: &str, of: fn(&Sample) -> f64| result.side(name).map(|side| side.figures(of));
    let downtime = |sample: &Sample| sample.downtime_seconds.unwrap_or(f64::NAN);
    let downtimes = (figures("pageferry 2", downtime), figures("qemu 2", downtime));
    let total = |sample: &Sample| sample.seconds;
    let totals = (figures("pageferry 2", total), figures("qemu 2", total));
    result.ratio("dirtying guest: downtime / QEMU's", downtimes, None);
    result.ratio("dirtying guest: total time / QEMU's", totals, None);
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_where_a_processor_begins() {
        let rom = bios();
        assert_eq!(rom.len(), 64 << 10);
        assert_eq!(rom[RESET_OFFSET..][..5], [0xea, 0x00, 0xf0, 0x00, 0xf0]);
        assert_eq!(rom[SEGMENT_OFFSET], 0xfa);
        // The numbers in the program are those that it was assembled with.
        assert_eq!(rom[SEGMENT_OFFSET..][..PROGRAM.len()], PROGRAM);
    }

    #[test]
    fn both_guests_write_at_the_same_rate() {
        assert_eq!(RATE.parse::<u32>().unwrap(), PAGES * 250 * 4096);
    }
}
