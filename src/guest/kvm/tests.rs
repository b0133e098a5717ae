use super::*;
use crate::guest::program::Program;
use crate::testing::{Need, require};

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

/// Moves a guest within this process, as a migration does: configuration, memory in use, state.
fn moved(from: &mut KvmGuest) -> KvmGuest {
    from.pause().unwrap();
    let paused = Instant::now();
    let mut to = KvmGuest::skeleton(&from.config().unwrap(), HugePages::No, TrackerKind::Log).unwrap();
    copy_memory(from, &to);
    let state = from.save_state().unwrap();
    to.load_state(&state, paused.elapsed()).unwrap();
    to
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
fn a_moved_guest_goes_on_where_it_was() {
    if !require(&[Need::Kvm]) {
        return;
    }
    for (program, vcpus) in [(Program::Uniform, 1), (Program::Hotset, 2), (Program::Stream, 4)] {
        let mut guest = started(&config(program, vcpus));
        for hop in 0..10 {
            wait_for_writes(&mut guest, 300);
            let mut next = moved(&mut guest);
            let there = guest.report();
            drop(guest);
            assert_eq!(next.report(), there, "what it has counted moves with its memory");
            next.resume().unwrap();
            wait_for("a heartbeat", || next.report().heartbeats > there.heartbeats + 2);
            wait_for_writes(&mut next, 300);
            let report = next.verify_all().unwrap();
            assert_eq!(report.corrupt, 0, "{program:?} hop {hop}");
            assert!(report.writes >= there.writes + 300);
            guest = next;
        }
        // The serial port moves too: the next line is on its way within a second of the guest's time.
        wait_for("a line on the console", || guest.console().contains("corrupt 0\n"));
    }
}

#[test]
fn a_move_in_the_middle_of_warm_up_or_verification_is_no_different() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let large = KvmConfig { layout: pc_layout(64 * MIB).unwrap(), ..config(Program::Uniform, 2) };
    let mut guest = KvmGuest::new(&large).unwrap();
    guest.resume().unwrap();
    wait_for("a write", || guest.report().writes > 0);
    let mut guest = moved(&mut guest);
    assert!(!guest.warmed_up());
    guest.resume().unwrap();
    wait_for("the warm-up", || guest.warmed_up());
    // A walk takes some 100 ms, which a busy machine may let pass before the guest is paused.
    let request = (0..50).find_map(|_| {
        let request = guest.devices().request_verify();
        wait_for("the walk", || guest.statuses(status::VERIFY_SEEN).all(|seen| seen == request.into()));
        guest.pause().unwrap();
        let walking = guest.statuses(status::WALK).any(|walk| walk != 0);
        if !walking {
            guest.resume().unwrap();
        }
        walking.then_some(request)
    });
    let request = request.expect("a guest that is paused in its walk");
    let mut guest = moved(&mut guest);
    guest.resume().unwrap();
    wait_for("the walk's end", || guest.statuses(status::VERIFY_DONE).all(|done| done == request.into()));
    assert_eq!(guest.verify_all().unwrap().corrupt, 0);
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
fn the_gap_is_the_pause_as_the_guest_sees_it() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut guest = started(&config(Program::Uniform, 1));
    guest.reset_gap();
    guest.pause().unwrap();
    guest.reset_gap();
    std::thread::sleep(Duration::from_millis(300));
    let mut guest = moved(&mut guest);
    let from = guest.report().heartbeats;
    guest.resume().unwrap();
    wait_for("heartbeats", || guest.report().heartbeats > from + 3);
    assert!(guest.report().longest_gap >= Duration::from_millis(300), "{:?}", guest.report());
    guest.reset_gap();
    let from = guest.report().heartbeats;
    wait_for("heartbeats", || guest.report().heartbeats > from + 3);
    assert!(guest.report().longest_gap < Duration::from_millis(300), "{:?}", guest.report());
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

fn shorten(part: &mut Vec<u8>) {
    part.truncate(part.len() - 1);
}

#[test]
fn a_state_that_is_damaged_is_refused_and_names_the_part() {
    use prost::Message;
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut guest = started(&config(Program::Idle, 2));
    assert!(guest.save_state().unwrap_err().to_string().contains("must be paused"));
    assert!(guest.load_state(&[], Duration::ZERO).unwrap_err().to_string().contains("must be paused"));
    guest.pause().unwrap();
    let bytes = guest.save_state().unwrap();
    let mut other = KvmGuest::skeleton(&guest.config().unwrap(), HugePages::No, TrackerKind::Log).unwrap();
    let mut refused = |text: &str, damage: fn(&mut state::MachineState)| {
        let mut damaged = state::MachineState::decode(&bytes[..]).unwrap();
        damage(&mut damaged);
        let error = other.load_state(&damaged.encode_to_vec(), Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains(text), "{error:?} does not say {text:?}");
    };
    refused("version 9", |state| state.version = 9);
    refused("of 1 vCPUs", |state| state.vcpus.truncate(1));
    refused("more than the", |state| state.pit = vec![0; 1 << 20]);
    refused("first PIC", |state| shorten(&mut state.pic_master));
    refused("second PIC", |state| shorten(&mut state.pic_slave));
    refused("IOAPIC", |state| shorten(&mut state.ioapic));
    refused("timer", |state| state.pit.clear());
    refused("clock", |state| state.clock.push(0));
    refused("devices are missing", |state| state.devices = None);
    refused("serial registers", |state| state.devices.as_mut().unwrap().serial.clear());
    refused("mp_state", |state| shorten(&mut state.vcpus[1].mp_state));
    refused("its regs", |state| shorten(&mut state.vcpus[1].regs));
    refused("its sregs", |state| shorten(&mut state.vcpus[1].sregs));
    refused("xsave", |state| state.vcpus[1].xsave.truncate(100));
    refused("xcrs", |state| shorten(&mut state.vcpus[1].xcrs));
    refused("debug registers", |state| shorten(&mut state.vcpus[1].debug_regs));
    refused("LAPIC", |state| shorten(&mut state.vcpus[1].lapic));
    refused("events", |state| shorten(&mut state.vcpus[1].events));
    refused("MSR 0x12345", |state| {
        state.vcpus[0].msrs.push(state::Msr { index: 0x12345, value: 1 });
    });
    for cut in [1, bytes.len() / 2, bytes.len() - 1] {
        let error = other.load_state(&bytes[..cut], Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("the KVM guest's state"), "{error}");
    }
    // After all that, the right one still fits.
    copy_memory(&guest, &other);
    other.load_state(&bytes, Duration::ZERO).unwrap();
    other.resume().unwrap();
    let from = guest.report().heartbeats;
    wait_for("a heartbeat", || other.report().heartbeats > from);
}

#[test]
fn a_processor_that_lacks_a_feature_is_named() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let guest = KvmGuest::new(&config(Program::Idle, 1)).unwrap();
    let mut asks_more = guest.config.clone();
    // No processor has all of these; bit 16 of leaf 1's ECX is reserved.
    let leaf = asks_more.cpuid.iter_mut().find(|leaf| leaf.function == 1).unwrap();
    leaf.ecx |= 1 << 16;
    let error = KvmGuest::skeleton(&asks_more.encode(), HugePages::No, TrackerKind::Log).unwrap_err();
    assert!(
        error.to_string().contains("lacks") && error.to_string().contains("CPUID 0x1.0 Ecx bit 16"),
        "{error}"
    );
    let mut liar = guest.config.clone();
    liar.vcpus = 200;
    let error = KvmGuest::skeleton(&liar.encode(), HugePages::No, TrackerKind::Log).unwrap_err();
    assert!(error.to_string().contains("not 200"), "{error}");
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
    for config in [with_holes, sparse] {
        let mut guest = started(&config);
        wait_for_writes(&mut guest, 3000);
        let touched = guest.touched().unwrap().len() * PAGE_SIZE;
        assert!(touched < 40 * MIB, "{touched}");
        let mut guest = moved(&mut guest);
        guest.resume().unwrap();
        assert_eq!(guest.verify_all().unwrap().corrupt, 0);
    }
}

/// Where KVM has no hardware to offset a guest's counter with, the guest sees the host's, and writes are lost.
fn keeps_time_stamp_counters() -> bool {
    const FAR: u64 = 1 << 60;
    let mut guest = KvmGuest::new(&config(Program::Idle, 1)).unwrap();
    let mut state = state::decode(&guest.save_state().unwrap(), 1).unwrap();
    let tsc = state.vcpus[0].msrs.iter_mut().find(|msr| msr.index == state::MSR_TSC).unwrap();
    tsc.value = FAR;
    guest.load_state(&prost::Message::encode_to_vec(&state), Duration::ZERO).unwrap();
    let state = state::decode(&guest.save_state().unwrap(), 1).unwrap();
    state.vcpus[0].msrs.iter().any(|msr| msr.index == state::MSR_TSC && msr.value >= FAR)
}

#[test]
fn every_part_of_the_state_arrives_and_the_counters_go_on() {
    use prost::Message;
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut guest = started(&config(Program::Uniform, 2));
    wait_for_writes(&mut guest, 1000);
    guest.pause().unwrap();
    let saved = guest.save_state().unwrap();
    let mut other = KvmGuest::skeleton(&guest.config().unwrap(), HugePages::No, TrackerKind::Log).unwrap();
    let keeps_counters = keeps_time_stamp_counters();
    other.load_state(&saved, Duration::from_secs(100)).unwrap();
    let decoded = |bytes: &[u8]| state::MachineState::decode(bytes).unwrap();
    let (saved, arrived) = (decoded(&saved), decoded(&other.save_state().unwrap()));
    let clock = |state: &state::MachineState| u64::from_ne_bytes(state.clock[..8].try_into().unwrap());
    let went_on = Duration::from_nanos(clock(&arrived) - clock(&saved));
    assert!((95..130).contains(&went_on.as_secs()), "{went_on:?}");
    for (before, after) in saved.vcpus.iter().zip(&arrived.vcpus) {
        let tsc =
            |vcpu: &state::VcpuState| vcpu.msrs.iter().find(|msr| msr.index == state::MSR_TSC).unwrap().value;
        if keeps_counters && guest.config.tsc_khz > 0 {
            let seconds = (tsc(after) - tsc(before)) / 1000 / u64::from(guest.config.tsc_khz);
            assert!((95..130).contains(&seconds), "{seconds}");
        }
        let without_tsc = |vcpu: &state::VcpuState| {
            let msrs = vcpu.msrs.iter().filter(|msr| msr.index != state::MSR_TSC).copied().collect();
            state::VcpuState { msrs, ..vcpu.clone() }
        };
        assert!(before.msrs.len() > 10);
        assert_eq!(without_tsc(after), without_tsc(before));
    }
    assert_eq!((&arrived.pic_master, &arrived.pic_slave), (&saved.pic_master, &saved.pic_slave));
    assert_eq!(arrived.devices, saved.devices);
    // The channels' counters and modes; behind each, the kernel's own time of when it was loaded.
    assert_eq!(arrived.pit[..16], saved.pit[..16]);
    let redirections = |state: &state::MachineState| state.ioapic[32..].to_vec();
    assert_eq!(redirections(&arrived), redirections(&saved));
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
