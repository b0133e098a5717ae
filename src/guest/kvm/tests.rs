use super::*;
use crate::guest::program::Program;
use crate::sys::kvm::program::cycle;
use crate::testing::{Need, require};

mod moving;

use moving::moved;

const MIB: u64 = 1 << 20;

fn config(program: Program, vcpus: u32) -> KvmConfig {
    KvmConfig {
        layout: pc_layout(16 * MIB).unwrap(),
        huge: HugePages::No,
        vcpus,
        program: ProgramConfig { program, bytes_per_second: 40 * MIB, touch_bytes: None, seed: 7 },
        tracker: TrackerKind::Log,
    }
}

fn started(config: &KvmConfig) -> KvmGuest {
    let mut guest = KvmGuest::new(config).unwrap();
    guest.resume().unwrap();
    wait_for("the warm-up", || guest.warmed_up());
    guest
}

/// Waits for something that a guest does in well under a second when it has a processor to itself.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_for_writes(guest: &mut KvmGuest, more: u64) {
    let from = guest.report().writes;
    wait_for("a write", || guest.report().writes >= from + more);
}

#[test]
fn every_program_runs_and_finds_its_memory_right() {
    if !require(&[Need::Kvm]) {
        return;
    }
    for (program, vcpus) in
        Program::ALL.into_iter().flat_map(|program| [(program, 1), (program, 2), (program, 3)])
    {
        let mut guest = started(&config(program, vcpus));
        let before = guest.report();
        if program != Program::Idle {
            wait_for_writes(&mut guest, 5_000);
        }
        wait_for("a heartbeat", || guest.report().heartbeats >= before.heartbeats + 10);
        assert_eq!(program == Program::Idle, guest.report().writes == before.writes);
        let report = guest.verify_all().unwrap();
        assert_eq!(report.corrupt, 0, "{program:?} {vcpus}");
        assert!(report.verified >= before.verified + 3000, "{program:?} {report:?}");
        let console = guest.console();
        assert!(
            console.starts_with("pageferry guest: started\npageferry guest: heartbeat 1, writes"),
            "{console}"
        );
    }
}

fn copy_memory(from: &KvmGuest, to: &KvmGuest) {
    let mut bytes = Vec::new();
    for run in from.touched().unwrap().runs() {
        bytes.clear();
        from.memory().read_run(run, &mut bytes);
        to.memory().write_run(run, &bytes);
    }
}

#[test]
fn a_page_that_is_lost_stale_torn_or_foreign_is_noticed() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let page = crate::units::PageIndex(1000);
    let run = crate::units::Run { start: page, pages: 1 };
    let mut slow = config(Program::Uniform, 1);
    slow.program.bytes_per_second = 8 * MIB;
    let mut guest = started(&slow);
    // Slow enough that nothing is written twice below: 14 MiB at 8 MiB/s.
    guest.pause().unwrap();
    let mut old = vec![0; 4096];
    guest.memory().read_page(page, &mut old);
    guest.resume().unwrap();
    wait_for("the page's next write", || {
        let mut now = vec![0; 4096];
        guest.memory().read_page(page, &mut now);
        now[..8] != old[..8] && now[4088..] != old[4088..]
    });
    guest.pause().unwrap();
    let mut right = vec![0; 4096];
    guest.memory().read_page(page, &mut right);
    let mut torn = right.clone();
    torn[2048..].copy_from_slice(&old[2048..]);
    let mut foreign = vec![0; 4096];
    guest.memory().read_page(crate::units::PageIndex(page.0 + 1), &mut foreign);
    let mut corrupt = 0;
    for (what, bytes) in [("lost", vec![0; 4096]), ("stale", old), ("torn", torn), ("foreign", foreign)] {
        guest.pause().unwrap();
        guest.memory().write_run(run, &bytes);
        guest.resume().unwrap();
        let report = guest.verify_all().unwrap();
        assert!(report.corrupt > corrupt, "a {what} page: {report:?}");
        corrupt = report.corrupt;
        guest.pause().unwrap();
        guest.memory().write_run(run, &right);
    }
    let console_tells =
        |guest: &mut KvmGuest| guest.console().contains(", corrupt ") && guest.report().corrupt > 0;
    assert!(console_tells(&mut guest));
}

#[test]
fn a_restarted_guest_is_noticed() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut guest = started(&config(Program::Idle, 1));
    guest.pause().unwrap();
    guest.machine.boot().unwrap();
    guest.resume().unwrap();
    wait_for("the guest's complaint", || guest.report().corrupt > 0);
}

#[test]
fn a_paused_guest_stands_still() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut guest = started(&config(Program::Uniform, 2));
    for _ in 0..5 {
        wait_for_writes(&mut guest, 100);
        guest.pause().unwrap();
        guest.pause().unwrap();
        let (report, before) = (guest.report(), contents(&guest));
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(guest.report(), report);
        assert!(contents(&guest) == before, "a paused guest's memory has changed");
        guest.save_state().unwrap();
        assert!(contents(&guest) == before, "saving has changed memory");
        guest.resume().unwrap();
        guest.resume().unwrap();
    }
    assert_eq!(guest.verify_all().unwrap().corrupt, 0);
}

#[test]
fn a_throttled_guest_writes_less() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut fast = config(Program::Uniform, 1);
    fast.program.bytes_per_second = 200 * MIB;
    let mut guest = started(&fast);
    let mut written = |percent| {
        guest.throttle(percent).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let before = guest.report().writes;
        std::thread::sleep(Duration::from_millis(1000));
        guest.report().writes - before
    };
    let (full, little) = (written(0), written(95));
    assert!(little < full / 3, "{little} of {full}");
    assert!(guest.throttle(100).unwrap_err().to_string().contains("not 100"));
    guest.pause().unwrap();
}

#[test]
fn memory_beyond_holes_and_large_sparse_memory_work() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let region = |start, bytes| RamRegion { start: GuestAddress(start), bytes };
    let scattered = RamLayout::new(vec![
        region(0, 16 * MIB),
        region(64 * MIB, 3 * MIB),
        region(4 << 30, 5 * MIB),
        region(1 << 40, 4 * MIB),
    ]);
    let mut with_holes = config(Program::Uniform, 2);
    with_holes.layout = scattered.unwrap();
    let mut sparse = config(Program::Hotset, 2);
    sparse.layout = pc_layout(64 << 30).unwrap();
    sparse.program.touch_bytes = Some(32 * MIB);
    let huge = KvmConfig { huge: HugePages::Transparent, ..config(Program::Stream, 1) };
    for config in [with_holes, sparse, huge] {
        let mut guest = started(&config);
        wait_for_writes(&mut guest, 3000);
        let touched = guest.touched().unwrap().len() * PAGE_SIZE;
        assert!(touched < 40 * MIB, "{touched}");
        let mut guest = moved(&mut guest);
        guest.resume().unwrap();
        assert_eq!(guest.verify_all().unwrap().corrupt, 0);
    }
}

/// Reads all memory of a small guest.
fn contents(guest: &KvmGuest) -> Vec<u8> {
    let mut bytes = Vec::new();
    guest.memory().read_run(crate::units::Run::new(0, guest.memory().layout().total_pages()), &mut bytes);
    bytes
}

#[test]
fn every_tracker_tells_every_page_that_changed() {
    if !require(&[Need::Kvm, Need::Uffd]) {
        return;
    }
    for (kind, vcpus) in [(TrackerKind::Log, 1), (TrackerKind::Ring, 2), (TrackerKind::Pagemap, 2)] {
        let mut guest = started(&KvmConfig { tracker: kind, ..config(Program::Hotset, vcpus) });
        let mut tracker = guest.dirty_tracker().unwrap();
        assert_eq!(tracker.kind(), kind);
        guest.pause().unwrap();
        tracker.start().unwrap();
        let mut before = contents(&guest);
        for round in 0..5 {
            guest.resume().unwrap();
            wait_for_writes(&mut guest, 500);
            guest.pause().unwrap();
            let after = contents(&guest);
            let mut dirty = PageSet::empty(guest.memory().layout().total_pages());
            tracker.drain(&mut dirty).unwrap();
            let changed = (0..dirty.capacity()).filter(|&page| {
                let page = page as usize * 4096..(page as usize + 1) * 4096;
                before[page.clone()] != after[page]
            });
            let changed: Vec<u64> = changed.collect();
            let missed: Vec<_> =
                changed.iter().filter(|&&page| !dirty.contains(crate::units::PageIndex(page))).collect();
            assert!(missed.is_empty(), "{kind:?} round {round}: {missed:?} of {}", changed.len());
            assert!(changed.len() > 50, "{kind:?} {}", changed.len());
            // KVM maps pages for writing that the guest has only read so far, and the page tables show that as a write.
            let exact = kind != TrackerKind::Pagemap;
            assert!(!exact || dirty.len() <= changed.len() as u64 + 16, "{kind:?} {}", dirty.len());
            before = after;
        }
        tracker.stop().unwrap();
        guest.resume().unwrap();
        assert_eq!(guest.verify_all().unwrap().corrupt, 0);
    }
    let mut guest =
        KvmGuest::new(&KvmConfig { tracker: TrackerKind::Synthetic, ..config(Program::Idle, 1) }).unwrap();
    let Err(error) = guest.dirty_tracker() else { panic!("a synthetic tracker of a KVM guest") };
    assert!(error.to_string().contains("synthetic"), "{error}");
}

#[test]
fn a_vcpu_that_fills_its_ring_has_it_emptied() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut fast = config(Program::Stream, 1);
    fast.layout = pc_layout(600 * MIB).unwrap();
    fast.tracker = TrackerKind::Ring;
    // Nobody drains during the first pass, which writes twice as many pages as the ring has entries.
    let mut guest = KvmGuest::new(&fast).unwrap();
    let mut tracker = guest.dirty_tracker().unwrap();
    tracker.start().unwrap();
    guest.resume().unwrap();
    wait_for("the warm-up", || guest.warmed_up());
    guest.pause().unwrap();
    let mut dirty = PageSet::empty(guest.memory().layout().total_pages());
    tracker.drain(&mut dirty).unwrap();
    assert!(dirty.len() > 598 * MIB / PAGE_SIZE, "{}", dirty.len());
}

#[test]
fn a_guest_that_takes_an_exception_says_so() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut guest = started(&config(Program::Uniform, 2));
    wait_for("an exception", || {
        // The next page that it writes lies where nothing is mapped; again, should it have been in the midst of writing.
        guest.memory().mappings()[0].store(STATUS_BASE + status::CYCLE_0 + cycle::POSITION, 1 << 44);
        guest.machine.fault().is_err()
    });
    let error = guest.verify_all().unwrap_err().to_string();
    assert!(error.contains("cannot run: the guest took an exception"), "{error}");
    guest.pause().unwrap();
    assert!(guest.save_state().unwrap_err().to_string().contains("exception"));
    assert!(guest.resume().unwrap_err().to_string().contains("exception"));
}

#[test]
fn the_processor_of_a_guest_is_compared_without_making_it() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let kvm = machine::open_kvm().unwrap();
    let mut config = MachineConfig::of(&config(Program::Idle, 1), cpuid::supported(&kvm).unwrap()).unwrap();
    check_processor(&config.encode()).unwrap();

    // A bit that no processor has: "CPUID 0x1.0 Ecx bit 16" is reserved.
    let leaf = config.cpuid.iter_mut().find(|leaf| leaf.function == 1).unwrap();
    leaf.ecx |= 1 << 16;
    let unfit = check_processor(&config.encode()).unwrap_err();
    assert!(matches!(unfit, ProcessorError::Unfit(_)) && unfit.to_string().contains("Ecx bit 16"), "{unfit}");
    assert!(matches!(check_processor(b"no configuration"), Err(ProcessorError::Config(_))));
}
