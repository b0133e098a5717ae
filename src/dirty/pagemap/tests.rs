use super::*;
use crate::layout::{RamLayout, RamRegion};
use crate::memory::huge::HugeFiller;
use crate::memory::snapshot::{MemoryDigest, Snapshot};
use crate::memory::{Backing, HugePages, Mapping};
use crate::testing::{Need, require};
use crate::units::{GuestAddress, PAGE_SIZE, PageIndex, Run};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// Two regions, so that numbers and offsets differ; more than 2 MiB each, so that page tables do too.
const REGION: u64 = 700;

fn memory(backing: Backing, huge: HugePages) -> GuestMemory {
    let region = |start| RamRegion { start: GuestAddress(start), bytes: REGION * PAGE_SIZE };
    let layout = RamLayout::new(vec![region(0), region(1 << 32)]).unwrap();
    GuestMemory::allocate(layout, backing, huge).unwrap()
}

fn write(memory: &GuestMemory, page: u64, value: u64) {
    let place = memory.layout().place(PageIndex(page)).unwrap();
    memory.mappings()[place.region].store(place.offset, value);
}

fn drained(tracker: &mut PagemapTracker, memory: &GuestMemory) -> BTreeSet<u64> {
    let mut dirty = PageSet::empty(memory.layout().total_pages());
    tracker.drain(&mut dirty).unwrap();
    dirty.runs().flat_map(|run| run.start.0..run.end()).collect()
}

fn started(memory: &GuestMemory) -> PagemapTracker {
    let mut tracker = PagemapTracker::new(memory).unwrap();
    tracker.start().unwrap();
    tracker
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn tells_once_exactly_what_was_written(
        before in prop::collection::vec(0..2 * REGION, 0..60),
        rounds in prop::collection::vec(prop::collection::vec(0..2 * REGION, 0..60), 1..6),
    ) {
        if !require(&[Need::Uffd]) {
            return Ok(());
        }
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = memory(backing, HugePages::No);
            for &page in &before {
                write(&memory, page, 1);
            }
            let mut tracker = started(&memory);
            prop_assert_eq!(drained(&mut tracker, &memory), BTreeSet::new());
            for round in &rounds {
                for &page in round {
                    write(&memory, page, 2);
                }
                prop_assert_eq!(drained(&mut tracker, &memory), round.iter().copied().collect());
            }
            tracker.stop().unwrap();
        }
    }
}

/// What pre-copy stands on: the touched pages, then the drained pages, each read after the drain, are the memory.
fn copy_equals_memory_at_the_end(memory: &GuestMemory, pages: u64) {
    let stop = AtomicBool::new(false);
    let mut tracker = started(memory);
    let mut copy = vec![0u8; memory.layout().total_bytes() as usize];
    let mut take = |memory: &GuestMemory, set: &PageSet| {
        for run in set.runs() {
            let mut bytes = Vec::new();
            memory.read_run(run, &mut bytes);
            let at = (run.start.0 * PAGE_SIZE) as usize;
            copy[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut state = 1u64;
            while !stop.load(Ordering::Relaxed) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                write(memory, (state >> 33) % pages, state);
            }
        });
        take(memory, &memory.touched().unwrap());
        for _ in 0..10 {
            let mut dirty = PageSet::empty(memory.layout().total_pages());
            tracker.drain(&mut dirty).unwrap();
            take(memory, &dirty);
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        let mut dirty = PageSet::empty(memory.layout().total_pages());
        tracker.drain(&mut dirty).unwrap();
        take(memory, &dirty);
    });
    let mut all = Vec::new();
    memory.read_run(Run::new(0, memory.layout().total_pages()), &mut all);
    assert!(copy == all, "the copy differs from the memory");
}

#[test]
fn a_copy_made_while_another_thread_writes_is_whole() {
    if !require(&[Need::Uffd]) {
        return;
    }
    for (backing, huge) in [
        (Backing::Anonymous, HugePages::No),
        (Backing::Memfd, HugePages::No),
        (Backing::Anonymous, HugePages::Transparent),
    ] {
        let memory = memory(backing, huge);
        for page in 0..REGION {
            write(&memory, page, 1);
        }
        copy_equals_memory_at_the_end(&memory, 2 * REGION);
    }
}

/// Memory of huge pages from the pool, or `None` where the pool has too few.
fn hugetlb(backing: Backing) -> Option<GuestMemory> {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.ok().and_then(|free| free.trim().parse::<u64>().ok()).unwrap_or(0) < 8 {
        eprintln!("SKIP: fewer than 8 huge pages of 2 MiB in the pool");
        return None;
    }
    GuestMemory::allocate(RamLayout::flat(8 << 20).unwrap(), backing, HugePages::Hugetlb).ok()
}

#[test]
fn huge_pages_are_told_whole() {
    if !require(&[Need::Uffd]) {
        return;
    }
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let Some(memory) = hugetlb(backing) else { return };
        write(&memory, 3, 1);
        assert_eq!(memory.touched().unwrap().runs().collect::<Vec<_>>(), [Run::new(0, 512)]);
        let mut tracker = started(&memory);
        assert_eq!(drained(&mut tracker, &memory), BTreeSet::new());
        write(&memory, 700, 1);
        assert_eq!(drained(&mut tracker, &memory), (512..1024).collect());
        write(&memory, 3, 1);
        assert_eq!(drained(&mut tracker, &memory), (0..512).collect());
        drop(tracker);
        copy_equals_memory_at_the_end(&memory, 2048);
    }
}

#[test]
fn memory_filled_through_its_file_is_clean_and_can_be_read() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let whole = Mapping::memfd("whole", 64 * PAGE_SIZE, HugePages::No).unwrap();
    for page in 0..64 {
        whole.store(page * PAGE_SIZE, 1);
    }
    let file = whole.file().unwrap().0.try_clone_to_owned().unwrap();
    let fresh = Mapping::shared_file(file, 0, 64 * PAGE_SIZE).unwrap();
    let memory = GuestMemory::new(RamLayout::flat(64 * PAGE_SIZE).unwrap(), vec![fresh]).unwrap();
    let mut tracker = started(&memory);
    assert!((0..64).all(|page| !memory.is_zero_page(PageIndex(page))));
    assert_eq!(drained(&mut tracker, &memory), BTreeSet::new());
    write(&memory, 5, 2);
    assert_eq!(drained(&mut tracker, &memory), [5].into());
}

/// A file on a disk stands for every file whose written pages the kernel may take out of the page tables.
#[test]
fn a_written_page_that_was_evicted_is_told() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(64 * PAGE_SIZE).unwrap();
    let mapping = Mapping::shared_file(file.try_clone().unwrap().into(), 0, 64 * PAGE_SIZE).unwrap();
    let memory = GuestMemory::new(RamLayout::flat(64 * PAGE_SIZE).unwrap(), vec![mapping]).unwrap();
    for page in 0..32 {
        write(&memory, page, 1);
    }
    let mut tracker = started(&memory);
    for page in [3, 40] {
        write(&memory, page, 2);
    }
    // Clean pages are reclaimed at the first attempt.
    file.sync_all().unwrap();
    memory.mappings()[0].page_out().unwrap();
    let present = Query { all: Traits::PRESENT, ..Query::default() };
    let whole = MemorySlice::new(&memory.mappings()[0], 0, 64 * PAGE_SIZE);
    tracker.pagemap.scan(whole, present, |found| panic!("{found:?} was not evicted")).unwrap();
    let told = drained(&mut tracker, &memory);
    assert!(told.contains(&3) && told.contains(&40), "{told:?}");
    assert!(told.iter().all(|page| *page < 32 || *page == 40), "{told:?}");
}

#[test]
fn a_large_sparse_guest_is_tracked_where_it_is_in_use() {
    if !require(&[Need::Uffd]) {
        return;
    }
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let layout = RamLayout::flat(64 << 30).unwrap();
        let memory = GuestMemory::allocate(layout, backing, HugePages::No).unwrap();
        let pages: BTreeSet<u64> = (0..16 << 20).step_by(100_003).collect();
        for &page in &pages {
            write(&memory, page, 1);
        }
        let mut tracker = started(&memory);
        let touched = memory.touched().unwrap();
        assert_eq!(touched.len(), pages.len() as u64, "tracking populates nothing");
        assert_eq!(drained(&mut tracker, &memory), BTreeSet::new());
        let neighbours: BTreeSet<u64> = pages.iter().map(|page| page + 1).collect();
        for &page in &neighbours {
            write(&memory, page, 1);
        }
        assert_eq!(drained(&mut tracker, &memory), neighbours);
    }
}

#[test]
fn tracking_stops_and_starts_again_clean() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let memory = memory(Backing::Memfd, HugePages::No);
    let mut tracker = PagemapTracker::new(&memory).unwrap();
    assert!(tracker.drain(&mut PageSet::empty(2 * REGION)).is_err());
    tracker.start().unwrap();
    write(&memory, 1, 1);
    tracker.stop().unwrap();
    tracker.stop().unwrap();
    write(&memory, 2, 1);
    tracker.start().unwrap();
    write(&memory, 3, 1);
    assert_eq!(drained(&mut tracker, &memory), [3].into());
    write(&memory, 4, 1);
    tracker.start().unwrap();
    assert_eq!(drained(&mut tracker, &memory), BTreeSet::new(), "a second start is clean too");
}

#[test]
fn a_second_tracker_is_told_of_the_first() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let memory = memory(Backing::Anonymous, HugePages::No);
    let _first = started(&memory);
    let error = PagemapTracker::new(&memory).unwrap().start().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    assert!(error.to_string().contains("another userfaultfd"), "{error}");
}

#[test]
fn tracking_and_a_snapshot_exclude_each_other() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let memory = memory(Backing::Memfd, HugePages::No);
    write(&memory, 1, 1);
    let mut tracker = started(&memory);
    let error = Snapshot::begin(&memory).unwrap_err();
    if error.kind() == io::ErrorKind::PermissionDenied {
        return eprintln!("SKIP: {error}");
    }
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}");
    tracker.stop().unwrap();
    let snapshot = Snapshot::begin(&memory).unwrap();
    assert_eq!(snapshot.finish().unwrap(), MemoryDigest::of_paused(&memory).unwrap());
    tracker.start().unwrap();
}

/// Memory that arrived in huge pages is told page by page: shared memory is protected, and so mapped, in small pages.
#[test]
fn huge_pages_that_were_made_for_an_arrival_are_told_page_by_page() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let memory =
        GuestMemory::allocate(RamLayout::flat(8 << 20).unwrap(), Backing::Memfd, HugePages::Transparent)
            .unwrap();
    HugeFiller::default().prepare(&memory, &[Run::new(0, 1024)], |_| true);
    for page in 0..1024 {
        write(&memory, page, 1);
    }
    let mut tracker = started(&memory);
    assert_eq!(drained(&mut tracker, &memory), BTreeSet::new());
    write(&memory, 3, 1);
    write(&memory, 700, 1);
    assert_eq!(drained(&mut tracker, &memory), [3, 700].into());
    write(&memory, 4, 1);
    assert_eq!(drained(&mut tracker, &memory), [4].into());
    drop(tracker);
    copy_equals_memory_at_the_end(&memory, 2048);
}
