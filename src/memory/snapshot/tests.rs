use super::*;
use crate::layout::{RamLayout, RamRegion};
use crate::memory::{Backing, HugePages};
use crate::testing::{Need, require};
use crate::units::GuestAddress;

/// Not a multiple of a huge page, so that some pages are in one and some are not.
const REGION: u64 = 1700;

fn memory(backing: Backing, huge: HugePages) -> GuestMemory {
    let region = |start| RamRegion { start: GuestAddress(start), bytes: REGION * PAGE_SIZE };
    let layout = RamLayout::new(vec![region(0), region(1 << 32)]).unwrap();
    GuestMemory::allocate(layout, backing, huge).unwrap()
}

fn write(memory: &GuestMemory, page: u64, value: u64) {
    let place = memory.layout().place(PageIndex(page)).unwrap();
    memory.mappings()[place.region].store(place.offset, value);
}

/// Whether the kernel lets this user hold up everyone's writes.
fn allowed() -> bool {
    if !require(&[Need::Uffd]) {
        return false;
    }
    let open = Userfaultfd::open(Stops::Everyone, Features::WRITE_PROTECT);
    if let Err(error) = &open {
        eprintln!("SKIP: {error}");
    }
    open.is_ok()
}

fn kinds() -> Vec<GuestMemory> {
    let mut kinds = vec![
        memory(Backing::Anonymous, HugePages::No),
        memory(Backing::Memfd, HugePages::No),
        memory(Backing::Anonymous, HugePages::Transparent),
    ];
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let layout = RamLayout::flat(8 << 20).unwrap();
        match GuestMemory::allocate(layout, backing, HugePages::Hugetlb) {
            Ok(memory) if free_huge_pages() >= 4 => kinds.push(memory),
            _ => eprintln!("SKIP: no huge pages in the pool"),
        }
    }
    kinds
}

fn free_huge_pages() -> u64 {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.ok().and_then(|free| free.trim().parse().ok()).unwrap_or(0)
}

#[test]
fn the_digest_is_that_of_the_instant_whatever_is_written_later() {
    if !allowed() {
        return;
    }
    for memory in kinds() {
        let total = memory.layout().total_pages();
        for page in (0..total).filter(|page| page % 3 != 0) {
            write(&memory, page, page % 5);
        }
        let expected = MemoryDigest::of_paused(&memory).unwrap();
        let stop = AtomicBool::new(false);
        let mut writes = 0;
        let digest = std::thread::scope(|scope| {
            let snapshot = Snapshot::begin(&memory).unwrap();
            let writer = scope.spawn(|| {
                let mut state = 1u64;
                let mut writes = 0;
                // On a busy machine it may begin only when all is over.
                while writes == 0 || !stop.load(Ordering::Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    write(&memory, (state >> 33) % total, state);
                    writes += 1;
                }
                writes
            });
            let digest = snapshot.finish();
            stop.store(true, Ordering::Relaxed);
            writes = writer.join().unwrap();
            digest.unwrap()
        });
        assert_eq!(digest, expected);
        assert!(writes > 0);
        assert_ne!(MemoryDigest::of_paused(&memory).unwrap(), expected, "the writer wrote");
    }
}

#[test]
fn zero_pages_count_as_untouched_ones_and_places_matter() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let [a, b] = [Backing::Anonymous, Backing::Memfd].map(|backing| memory(backing, HugePages::No));
    a.zero_run(Run::new(5, 100));
    assert_eq!(MemoryDigest::of_paused(&a).unwrap(), MemoryDigest::default());
    for page in [1, REGION + 1] {
        write(&a, page, 7);
        write(&b, page, 7);
    }
    let digest = MemoryDigest::of_paused(&a).unwrap();
    assert_eq!(digest, MemoryDigest::of_paused(&b).unwrap());
    assert_eq!(digest.nonzero_pages, 2);
    write(&b, 1, 0);
    write(&b, 2, 7);
    let moved = MemoryDigest::of_paused(&b).unwrap();
    assert!(moved != digest && moved.nonzero_pages == 2, "a page that lies elsewhere is another digest");
}

#[test]
fn a_dropped_snapshot_lets_the_guest_go() {
    if !allowed() {
        return;
    }
    let memory = memory(Backing::Memfd, HugePages::No);
    for page in 0..2 * REGION {
        write(&memory, page, 1);
    }
    drop(Snapshot::begin(&memory).unwrap());
    for page in 0..2 * REGION {
        write(&memory, page, 2);
    }
    let snapshot = Snapshot::begin(&memory).unwrap();
    assert_eq!(snapshot.finish().unwrap().nonzero_pages, 2 * REGION);
}

#[test]
fn an_error_lets_the_guest_go() {
    if !allowed() {
        return;
    }
    let memory = memory(Backing::Memfd, HugePages::No);
    write(&memory, 0, 1);
    let features = Features::WRITE_PROTECT.and(Features::SHARED_AND_HUGETLB);
    let mut sweep = Sweep {
        memory: memory.clone(),
        uffd: Userfaultfd::open(Stops::Everyone, features).unwrap(),
        left: memory.touched().unwrap(),
        huge: PageSet::empty(2 * REGION),
    };
    sweep.protect().unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&memory, 0, 2));
        // Nobody serves the fault; what an error in the sweep leads to is that it is dropped.
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!writer.is_finished());
        drop(sweep);
        writer.join().unwrap();
    });
}
