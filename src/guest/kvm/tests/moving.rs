//! What moves: between machines of this process, with the memory copied by hand.

use super::*;

/// Moves a guest within this process, as a migration does: configuration, memory in use, state.
pub(super) fn moved(from: &mut KvmGuest) -> KvmGuest {
    from.pause().unwrap();
    let paused = Instant::now();
    let mut to = KvmGuest::skeleton(&from.config().unwrap(), HugePages::No, TrackerKind::Log).unwrap();
    copy_memory(from, &to);
    let state = from.save_state().unwrap();
    to.load_state(&state, paused.elapsed()).unwrap();
    to
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
        wait_for("the walk", || guest.statuses(status::VERIFY_SEEN).all(|seen| seen == u64::from(request)));
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
    wait_for("the walk's end", || guest.statuses(status::VERIFY_DONE).all(|done| done == u64::from(request)));
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
