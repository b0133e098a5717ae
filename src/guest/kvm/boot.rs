//! Puts the program into guest RAM and the vCPUs at its entry.
//!
//! Guest-physical memory: descriptor tables, code and status pages below 64 KiB, page tables from there on, and behind
//! them, from the next 2 MiB on, what the program uses. The program sees that part as one dense window of virtual memory,
//! so that the holes between RAM regions do not concern its loops; the rest is mapped where it is.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::guest::GuestError;
use crate::guest::program::{Program, ProgramConfig};
use crate::layout::RamLayout;
use crate::memory::{GuestMemory, Mapping};
use crate::sys::kvm::program::{
    CHUNK, K1, K2, SPURIOUS_VECTOR, STATUS_BASE, TICK_VECTOR, TICKS_PER_SECOND, code, cycle, status,
};
use crate::units::{Bytes, PAGE_SIZE};

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const CODE: u64 = 0x3000;
const TABLES: u64 = 0x1_0000;
/// Where the window begins in the guest's virtual memory: behind every address that is mapped where it is.
const WINDOW: u64 = 1 << 40;
/// The interrupt controllers' addresses, fixed by KVM.
const IOAPIC: u64 = 0xfec0_0000;
const LAPIC: u64 = 0xfee0_0000;

const BLOCK: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// The fewest pages a vCPU's program makes sense with.
const FEWEST_PAGES: u64 = 64;

/// Page table entries (Intel SDM volume 3, 4.5): present, writable, and accessed and dirty from the start, so that walks
/// do not write to them.
const TABLE: u64 = 0x63;
const LARGE: u64 = 0xe3;
const UNCACHED: u64 = 0x18;

/// Where everything is in one guest's memory.
#[derive(Debug)]
struct Plan {
    /// Physical addresses of the 2 MiB blocks of the window: first block and number, in order.
    blocks: Vec<(u64, u64)>,
    /// Pages of the window that the program uses.
    pages: u64,
}

impl Plan {
    fn new(layout: &RamLayout, vcpus: u64, program: &ProgramConfig) -> Result<Self, GuestError> {
        let reserved = (TABLES + table_pages(layout.total_bytes()) * PAGE_SIZE).next_multiple_of(BLOCK);
        let mut blocks = Vec::new();
        for region in layout.regions() {
            let start = region.start.0.max(reserved).next_multiple_of(BLOCK);
            let end = (region.start.0 + region.bytes) / BLOCK * BLOCK;
            if start < end {
                blocks.push((start, (end - start) / BLOCK));
            }
        }
        let window: u64 = blocks.iter().map(|(_, count)| count * BLOCK).sum();
        let wanted = program.touch_bytes.unwrap_or(u64::MAX).saturating_sub(reserved).min(window);
        let fewest = FEWEST_PAGES * vcpus;
        if reserved > layout.regions()[0].bytes || wanted / PAGE_SIZE < fewest {
            let needed = Bytes(reserved + fewest * PAGE_SIZE);
            return Err(GuestError::new(format!(
                "the KVM guest's program needs at least {needed} to use; give it more memory or more to touch"
            )));
        }
        Ok(Self { blocks, pages: wanted / PAGE_SIZE })
    }
}

/// Page table pages for a window of so many bytes: the root, two levels for low memory and the interrupt controllers, and
/// a page per GiB and per 512 GiB of the window, started ones counted.
fn table_pages(window: u64) -> u64 {
    4 + window.div_ceil(GIB) + window.div_ceil(512 * GIB)
}

/// Whether a program can run in this layout; [`load`] fails where this does.
pub(super) fn check(layout: &RamLayout, vcpus: u64, program: &ProgramConfig) -> Result<(), GuestError> {
    Plan::new(layout, vcpus, program).map(drop)
}

/// Writes the program and all that it needs into fresh guest RAM.
pub(super) fn load(memory: &GuestMemory, vcpus: u64, program: &ProgramConfig) -> Result<(), GuestError> {
    let plan = Plan::new(memory.layout(), vcpus, program)?;
    let low = &memory.mappings()[0];
    write_descriptors(low);
    low.write(CODE, code().bytes);
    write_page_tables(low, &plan);
    for cpu in 0..vcpus {
        write_status(low, cpu, vcpus, program, plan.pages);
    }
    Ok(())
}

fn write_descriptors(low: &Mapping) {
    // A 64-bit code segment and a data segment (SDM volume 3, 3.4.5).
    low.store(GDT + 8, 0x00af_9b00_0000_ffff);
    low.store(GDT + 16, 0x00cf_9300_0000_ffff);
    let program = code();
    let gates = (0..32).map(|vector| (vector, program.fault));
    let gates = gates.chain([(TICK_VECTOR, program.tick), (SPURIOUS_VECTOR, program.spurious)]);
    for (vector, offset) in gates {
        // An interrupt gate (SDM volume 3, 6.14.1); code lies below 64 KiB, so the higher parts of its address are 0.
        low.store(IDT + vector * 16, (CODE + offset) | 8 << 16 | 0x8e00 << 32);
    }
}

fn write_page_tables(low: &Mapping, plan: &Plan) {
    let (root, low_directories, low_pages, device_pages) =
        (TABLES, TABLES + PAGE_SIZE, TABLES + 2 * PAGE_SIZE, TABLES + 3 * PAGE_SIZE);
    low.store(root, low_directories | TABLE);
    low.store(low_directories, low_pages | TABLE);
    low.store(low_directories + 3 * 8, device_pages | TABLE);
    let reserved = (TABLES + table_pages(plan.pages * PAGE_SIZE) * PAGE_SIZE).div_ceil(BLOCK);
    for block in 0..reserved {
        low.store(low_pages + block * 8, block * BLOCK | LARGE);
    }
    for device in [IOAPIC, LAPIC] {
        low.store(device_pages + device % GIB / BLOCK * 8, device | LARGE | UNCACHED);
    }
    let used = (plan.pages * PAGE_SIZE).div_ceil(BLOCK);
    let directories = TABLES + 4 * PAGE_SIZE;
    let pages = directories + (used * BLOCK).div_ceil(512 * GIB) * PAGE_SIZE;
    let addresses = plan.blocks.iter().flat_map(|&(start, count)| (0..count).map(move |n| start + n * BLOCK));
    for (block, address) in (0..used).zip(addresses) {
        // 512 blocks to a page of blocks, 512 of those to a directory: the tables of a level lie one after the other.
        low.store(pages + block * 8, address | LARGE);
        low.store(directories + block / 512 * 8, (pages + block / 512 * PAGE_SIZE) | TABLE);
        let (slot, directory) = (WINDOW / (512 * GIB) + block / (512 * 512), block / (512 * 512));
        low.store(root + slot * 8, (directories + directory * PAGE_SIZE) | TABLE);
    }
}

fn write_status(low: &Mapping, cpu: u64, vcpus: u64, program: &ProgramConfig, pages: u64) {
    let at = STATUS_BASE + cpu * PAGE_SIZE;
    let share = pages / vcpus;
    let first = cpu * share;
    let mine = if cpu + 1 == vcpus { pages - first } else { share };
    let cycles = cycles(program, first, mine, vcpus);
    low.store(at + status::CPU, cpu);
    low.store(at + status::VCPUS, vcpus);
    low.store(at + status::PRINT_AT, 1);
    low.store(at + status::WARMING, cycles.iter().filter(|cycle| cycle.pages > 0).count() as u64);
    cycles[0].write(low, at + status::CYCLE_0);
    cycles[1].write(low, at + status::CYCLE_1);
}

/// A share of the window that is visited in one order.
#[derive(Clone, Copy, Debug)]
struct Cycle {
    first: u64,
    pages: u64,
    step: u64,
    quota: u64,
    chunk: u64,
}

/// What the program means for a vCPU that has `pages` pages of the window from `first` on.
fn cycles(program: &ProgramConfig, first: u64, pages: u64, vcpus: u64) -> [Cycle; 2] {
    // In 1/65536 of a page per tick; more than 2^32 pages a tick is as fast as it goes.
    let quota =
        u128::from(program.bytes_per_second) * 65536 / u128::from(PAGE_SIZE * TICKS_PER_SECOND * vcpus);
    let quota = u64::try_from(quota).unwrap_or(u64::MAX).min(1 << 48);
    let scattered = |pages| scattered_step(pages, program.seed);
    let whole = Cycle { first, pages, step: scattered(pages), quota, chunk: CHUNK };
    let none = Cycle { first, pages: 0, step: 0, quota: 0, chunk: 0 };
    match program.program {
        Program::Idle => [Cycle { step: 1, quota: 0, ..whole }, none],
        Program::Uniform => [whole, none],
        Program::Stream => [Cycle { step: 1, ..whole }, none],
        Program::Hotset => {
            let hot = pages / 10;
            let cold = pages - hot;
            [
                Cycle {
                    pages: hot,
                    step: scattered(hot),
                    quota: quota * 9 / 10,
                    chunk: CHUNK * 9 / 10,
                    ..whole
                },
                Cycle {
                    first: first + hot,
                    pages: cold,
                    step: scattered(cold),
                    quota: quota / 10,
                    chunk: CHUNK / 10,
                },
            ]
        }
    }
}

/// A step of about a thirteenth of the pages that has no factor in common with them: it reaches every page once before it
/// comes back to the first, and seldom has to wrap around, which costs the guest instructions.
fn scattered_step(pages: u64, seed: u64) -> u64 {
    let near = pages / 13 + seed % (pages / 64).max(1);
    (near.max(1)..).find(|&step| greatest_common_divisor(step, pages) == 1).unwrap_or(1)
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

impl Cycle {
    fn write(self, low: &Mapping, at: u64) {
        let base = WINDOW + self.first * PAGE_SIZE;
        let (span, step) = (self.pages * PAGE_SIZE, self.step * PAGE_SIZE);
        for (field, value) in [
            (cycle::BASE, base),
            (cycle::END, base + span),
            (cycle::SPAN, span),
            (cycle::SPAN_CHECKSUM, span.wrapping_mul(K2)),
            (cycle::STEP, step),
            (cycle::STEP_CHECKSUM, step.wrapping_mul(K2)),
            (cycle::POSITION, base),
            (cycle::CHECKSUM, base.wrapping_mul(K2).wrapping_add(K1)),
            // A cycle without pages has nothing to warm up.
            (cycle::SEQUENCE, if self.pages > 0 { 1 } else { 2 }),
            (cycle::BASE_CHECKSUM, base.wrapping_mul(K2)),
            (cycle::LEFT, self.pages),
            (cycle::PAGES, self.pages),
            (cycle::QUOTA, self.quota),
            (cycle::CHUNK, self.chunk),
        ] {
            low.store(at + field, value);
        }
    }
}

/// The general registers at the program's entry.
pub(super) fn registers(cpu: u64) -> kvm_regs {
    let page = STATUS_BASE + cpu * PAGE_SIZE;
    kvm_regs { rip: CODE + code().entry, rsp: page + PAGE_SIZE, r15: page, rflags: 2, ..Default::default() }
}

/// Long mode with our tables; everything else as the vCPU has it after its reset.
pub(super) fn system_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 16,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, db: 0, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // Hardware enters a 64-bit guest only with a busy 64-bit TSS; nothing reads it, the program has one privilege level.
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 4095);
    // Protected mode with paging, numeric errors native; physical address extension; long mode enabled and active.
    sregs.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1;
    sregs.cr3 = TABLES;
    sregs.cr4 = 1 << 5;
    sregs.efer = 1 << 10 | 1 << 8;
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_scattered_order_reaches_every_page(pages in 6..3000u64, seed: u64) {
            let step = scattered_step(pages, seed);
            let mut seen = vec![false; pages as usize];
            for n in 0..pages {
                seen[(n * step % pages) as usize] = true;
            }
            prop_assert!(step < pages && seen.iter().all(|seen| *seen), "{pages} {step}");
        }
    }

    #[test]
    fn the_window_leaves_out_holes_and_what_is_reserved() {
        use crate::layout::RamRegion;
        use crate::units::GuestAddress;
        let region = |start, bytes| RamRegion { start: GuestAddress(start), bytes };
        let layout = RamLayout::new(vec![region(0, 16 << 20), region(4 * GIB, BLOCK + 4096)]).unwrap();
        let mut config =
            ProgramConfig { program: Program::Uniform, bytes_per_second: 0, touch_bytes: None, seed: 0 };
        let plan = Plan::new(&layout, 1, &config).unwrap();
        assert_eq!(plan.blocks, [(BLOCK, 7), (4 * GIB, 1)]);
        assert_eq!(plan.pages, 8 * 512);
        config.touch_bytes = Some(3 << 20);
        assert_eq!(Plan::new(&layout, 1, &config).unwrap().pages, 256);
        config.touch_bytes = Some(BLOCK);
        assert!(Plan::new(&layout, 1, &config).unwrap_err().to_string().contains("2.25 MiB"));
    }
}
