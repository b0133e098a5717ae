//! Both of KVM's sources of dirty pages, and the page map, over one guest that writes what it is told to.

use super::*;
use crate::dirty::kvm_ring::{KvmRingTracker, RingHarvester};
use crate::dirty::pagemap::PagemapTracker;
use crate::layout::RamRegion;
use crate::memory::snapshot::{MemoryDigest, Snapshot};
use crate::memory::{Backing, GuestMemory, HugePages};
use crate::sys::kvm::Vcpu;
use crate::testing::{Need, require};
use crate::units::{GuestAddress, PAGE_SIZE, Run};
use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{Kvm, VcpuExit};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// The guest writes to this many pages from each of [`BASES`] on. The bitmaps do not begin at a multiple of 64 pages.
const PAGES: u64 = 512;
const REGIONS: [(u64, u64); 2] = [(0, PAGES + 37), (1 << 30, PAGES)];
/// Where the guest writes, as the guest and as we count it.
const BASES: [(u64, u64); 2] = [(37 * PAGE_SIZE, 37), (1 << 30, PAGES + 37)];

/// 32-bit code: `ecx` times, steps the generator in `eax` and stores it into the page of `edi` that it names; then halts.
const CODE: [u8; 32] = [
    0x69, 0xc0, 0x0d, 0x66, 0x19, 0x00, // imul eax, eax, 1664525
    0x05, 0x5f, 0xf3, 0x6e, 0x3c, // add eax, 1013904223
    0x89, 0xc3, // mov ebx, eax
    0xc1, 0xeb, 0x08, // shr ebx, 8
    0x81, 0xe3, 0x00, 0xf0, 0x1f, 0x00, // and ebx, (PAGES - 1) << 12
    0x01, 0xfb, // add ebx, edi
    0x89, 0x03, // mov [ebx], eax
    0x49, // dec ecx
    0x75, 0xe3, // jnz to the start
    0xf4, // hlt
    0xeb, 0xe0, // jmp to the start
];
const CODE_AT: u64 = 0x1000;

/// What the guest writes: the same generator.
fn step(state: u32) -> (u32, u64) {
    let state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (state, u64::from(state >> 8) / PAGE_SIZE % PAGES)
}

struct TestGuest {
    memory: GuestMemory,
    vcpu: Vcpu,
    harvester: Option<RingHarvester>,
    state: u32,
    full_rings: u32,
}

impl TestGuest {
    fn new(kvm: &Kvm, mode: DirtyMode) -> (Self, Arc<VirtualMachine>) {
        let regions =
            REGIONS.map(|(start, pages)| RamRegion { start: GuestAddress(start), bytes: pages * PAGE_SIZE });
        let layout = RamLayout::new(regions.to_vec()).unwrap();
        let memory = GuestMemory::allocate(layout, Backing::Memfd, HugePages::No).unwrap();
        memory.mappings()[0].write(CODE_AT, &CODE);
        let machine = Arc::new(VirtualMachine::create(kvm, mode).unwrap());
        for (index, region) in regions.iter().enumerate() {
            machine.add_memory(region.start, memory.shared_mappings(), index).unwrap();
        }
        let vcpu = machine.create_vcpu(0).unwrap();
        let mut sregs = vcpu.state().get_sregs().unwrap();
        sregs.cr0 |= 1;
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 8);
            (segment.db, segment.g, segment.s, segment.present, segment.type_) = (1, 1, 1, 1, 3);
        }
        sregs.cs.type_ = 11;
        vcpu.state().set_sregs(&sregs).unwrap();
        let harvester = matches!(mode, DirtyMode::Ring { .. }).then(|| {
            RingHarvester::new(&machine, memory.layout(), vec![vcpu.dirty_ring().unwrap()]).unwrap()
        });
        (Self { memory, vcpu, harvester, state: 1, full_rings: 0 }, machine)
    }

    /// Has the guest write `count` times from base number `base` on; answers the pages.
    fn write(&mut self, base: usize, count: u64) -> BTreeSet<u64> {
        let mut written = BTreeSet::new();
        let mut left = count;
        while left > 0 {
            // KVM that interprets the guest looks at the ring between batches only, and has 64 entries in reserve.
            let batch = left.min(32);
            written.extend(self.write_batch(base, batch));
            left -= batch;
        }
        written
    }

    /// The same without a pause.
    fn write_batch(&mut self, base: usize, count: u64) -> BTreeSet<u64> {
        let mut regs = self.vcpu.state().get_regs().unwrap();
        (regs.rip, regs.rflags, regs.rcx) = (CODE_AT, 2, count);
        (regs.rax, regs.rdi) = (u64::from(self.state), BASES[base].0);
        self.vcpu.state().set_regs(&regs).unwrap();
        let mut written = BTreeSet::new();
        for _ in 0..count {
            let (state, page) = step(self.state);
            written.insert(BASES[base].1 + page);
            self.state = state;
        }
        for _ in 0..4096 {
            match self.vcpu.run().unwrap() {
                VcpuExit::Hlt => return written,
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                    self.full_rings += 1;
                    self.harvester.as_ref().expect("only a ring can be full").ring_full(0).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("the guest does not get on");
    }
}

const MODES: [DirtyMode; 4] = [
    DirtyMode::Log { initially_set: false },
    DirtyMode::Log { initially_set: true },
    DirtyMode::Ring { entries: 256 },
    DirtyMode::None,
];

/// A guest in each mode, with its tracker; page map where KVM does not track.
fn guests() -> Vec<(TestGuest, Box<dyn DirtyTracker>)> {
    if !require(&[Need::Kvm, Need::Uffd]) {
        return Vec::new();
    }
    let kvm = Kvm::new().unwrap();
    MODES
        .into_iter()
        .filter(|mode| match VirtualMachine::create(&kvm, *mode) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                eprintln!("SKIP {mode:?}: {error}");
                false
            }
            _ => true,
        })
        .map(|mode| {
            let (guest, machine) = TestGuest::new(&kvm, mode);
            let tracker: Box<dyn DirtyTracker> = match mode {
                DirtyMode::None => Box::new(PagemapTracker::new(&guest.memory).unwrap()),
                DirtyMode::Log { .. } => {
                    Box::new(KvmLogTracker::new(&machine, guest.memory.layout()).unwrap())
                }
                DirtyMode::Ring { .. } => Box::new(KvmRingTracker::new(guest.harvester.clone().unwrap())),
            };
            (guest, tracker)
        })
        .collect()
}

fn drained(tracker: &mut dyn DirtyTracker, memory: &GuestMemory) -> BTreeSet<u64> {
    let mut dirty = PageSet::empty(memory.layout().total_pages());
    tracker.drain(&mut dirty).unwrap();
    dirty.runs().flat_map(|run| run.start.0..run.end()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn tells_once_exactly_what_the_guest_wrote(
        rounds in prop::collection::vec(prop::collection::vec((0..2usize, 1..200u64), 0..4), 1..5),
    ) {
        for (mut guest, mut tracker) in guests() {
            guest.write(0, 40);
            tracker.start().unwrap();
            prop_assert_eq!(drained(&mut *tracker, &guest.memory), BTreeSet::new());
            for round in &rounds {
                let mut oracle = BTreeSet::new();
                for &(base, count) in round {
                    oracle.extend(guest.write(base, count));
                }
                let told = drained(&mut *tracker, &guest.memory);
                prop_assert!(
                    told == oracle,
                    "{}: {:?} lost, {:?} never written",
                    tracker.kind().name(),
                    oracle.difference(&told).collect::<Vec<_>>(),
                    told.difference(&oracle).collect::<Vec<_>>()
                );
            }
            tracker.stop().unwrap();
        }
    }
}

#[test]
fn a_copy_made_while_the_guest_writes_is_whole() {
    for (mut guest, mut tracker) in guests() {
        let memory = guest.memory.clone();
        tracker.start().unwrap();
        let mut copy = vec![0u8; memory.layout().total_bytes() as usize];
        let mut take = |set: &PageSet| {
            for run in set.runs() {
                let mut bytes = Vec::new();
                memory.read_run(run, &mut bytes);
                let at = (run.start.0 * PAGE_SIZE) as usize;
                copy[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    guest.write(turn % 2, 300);
                }
            });
            take(&memory.touched().unwrap());
            let mut dirty = PageSet::empty(memory.layout().total_pages());
            for _ in 0..10 {
                dirty.clear();
                tracker.drain(&mut dirty).unwrap();
                take(&dirty);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap();
            dirty.clear();
            tracker.drain(&mut dirty).unwrap();
            take(&dirty);
        });
        let mut all = Vec::new();
        memory.read_run(Run::new(0, memory.layout().total_pages()), &mut all);
        assert!(copy == all, "{}: the copy differs from the memory", tracker.kind().name());
    }
}

#[test]
fn tracking_stops_and_starts_again_clean() {
    for (mut guest, mut tracker) in guests() {
        let none = BTreeSet::new();
        for _ in 0..2 {
            tracker.start().unwrap();
            // More than a ring holds: what is left in it must not stop the guest later.
            guest.write(0, 400);
            tracker.stop().unwrap();
            tracker.stop().unwrap();
            guest.write(1, 400);
            tracker.start().unwrap();
            assert_eq!(drained(&mut *tracker, &guest.memory), none, "{}", tracker.kind().name());
            guest.write(1, 5);
            tracker.start().unwrap();
            assert_eq!(drained(&mut *tracker, &guest.memory), none, "a second start is clean too");
            tracker.stop().unwrap();
        }
    }
}

#[test]
fn a_full_ring_is_emptied_by_its_vcpu() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let kvm = Kvm::new().unwrap();
    let (mut guest, _machine) = TestGuest::new(&kvm, DirtyMode::Ring { entries: 256 });
    let mut tracker = KvmRingTracker::new(guest.harvester.clone().unwrap());
    tracker.start().unwrap();
    // Nobody but the vCPU looks at the ring.
    tracker.unwatch();
    let written = guest.write(0, 1000);
    assert!(guest.full_rings > 0 && written.len() > 256, "{} {}", guest.full_rings, written.len());
    assert!(drained(&mut tracker, &guest.memory) == written);
}

/// What happens on a kernel that looks at the ring too late; on others, this ring never overruns.
#[test]
fn an_overrun_is_told_and_the_guest_gets_on() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let kvm = Kvm::new().unwrap();
    let (mut guest, _machine) = TestGuest::new(&kvm, DirtyMode::Ring { entries: 256 });
    let mut tracker = KvmRingTracker::new(guest.harvester.clone().unwrap());
    tracker.start().unwrap();
    tracker.unwatch();
    let written = guest.write_batch(0, 3000);
    let mut dirty = PageSet::empty(guest.memory.layout().total_pages());
    let result = tracker.drain(&mut dirty);
    assert!(written.iter().all(|page| dirty.contains(crate::units::PageIndex(*page))), "{result:?}");
    guest.write(0, 2000);
    tracker.start().unwrap();
    tracker.unwatch();
    let written = guest.write(1, 1000);
    assert!(drained(&mut tracker, &guest.memory) == written, "the ring is in step again");
}

#[test]
fn a_snapshot_holds_up_vcpus_and_leaves_the_log_alone() {
    for (mut guest, mut tracker) in guests() {
        if matches!(tracker.kind(), TrackerKind::Pagemap) {
            continue;
        }
        let memory = guest.memory.clone();
        guest.write(0, 1000);
        guest.write(1, 1000);
        tracker.start().unwrap();
        let expected = MemoryDigest::of_paused(&memory).unwrap();
        let snapshot = match Snapshot::begin(&memory) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return eprintln!("SKIP: {error}");
            }
            begun => begun.unwrap(),
        };
        let mut written = guest.write(0, 200);
        written.extend(guest.write(1, 200));
        assert_eq!(snapshot.finish().unwrap(), expected);
        assert_ne!(MemoryDigest::of_paused(&memory).unwrap(), expected);
        assert!(drained(&mut *tracker, &memory) == written);
    }
}

#[test]
fn a_machine_of_another_kind_or_shape_is_named() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let kvm = Kvm::new().unwrap();
    let (guest, machine) = TestGuest::new(&kvm, DirtyMode::None);
    let layout = guest.memory.layout();
    let error = KvmLogTracker::new(&machine, layout).unwrap_err();
    assert!(error.to_string().contains("without a dirty log"), "{error}");
    let error = RingHarvester::new(&machine, layout, Vec::new()).unwrap_err();
    assert!(error.to_string().contains("without dirty rings"), "{error}");
    let error = KvmLogTracker::new(&machine, &RamLayout::flat(1 << 20).unwrap()).unwrap_err();
    assert!(error.to_string().contains("slot 0"), "{error}");
}
