//! Guests that move.

use crate::demo::{Demo, Guest};

fn moves_under_each_program(guest: Guest, mode: &str) {
    if !guest.is_here() {
        return;
    }
    for program in ["idle", "uniform", "hotset", "stream"] {
        let demo = Demo::run(guest, &format!("--mode {mode} --program {program} --dirty-rate 40MiB"));
        demo.check_completed();
        demo.check("mode_used", mode);
        // Also an idle guest writes its heartbeat.
        assert!(demo.rounds() > 1, "{program}: {:#}", demo.report["rounds"]);
        let downtime = demo.report["downtime_seconds"].as_f64().expect("the guest saw it");
        assert!(downtime > 0.0, "{program}: {downtime}");
    }
}

#[test]
fn a_kvm_guest_moves_under_each_program_by_tcp() {
    moves_under_each_program(Guest::Kvm, "tcp");
}

#[test]
fn a_kvm_guest_moves_under_each_program_compressed() {
    moves_under_each_program(Guest::Kvm, "compression");
}

#[test]
fn a_process_guest_moves_under_each_program_by_tcp() {
    moves_under_each_program(Guest::Process, "tcp");
}

#[test]
fn a_process_guest_moves_under_each_program_compressed() {
    moves_under_each_program(Guest::Process, "compression");
}

#[test]
fn a_kvm_guest_moves_with_each_dirty_tracker() {
    if !Guest::Kvm.is_here() {
        return;
    }
    for tracker in ["log", "ring", "pagemap"] {
        let demo = Demo::run(Guest::Kvm, &format!("--dirty-tracker {tracker} --mode tcp"));
        demo.check_completed();
        demo.check("dirty_tracker", tracker);
    }
}

#[test]
fn a_kvm_guest_with_four_vcpus_moves() {
    if Guest::Kvm.is_here() {
        Demo::run(Guest::Kvm, "--vcpus 4 --program hotset").check_completed();
    }
}

#[test]
fn guests_move_back_and_forth_ten_times() {
    for guest in Guest::ALL.into_iter().filter(|guest| guest.is_here()) {
        for mode in ["tcp", "compression"] {
            let demo = Demo::run(guest, &format!("--moves 10 --mode {mode} --dirty-rate 20MiB"));
            demo.check_completed();
            demo.check("moves", 10);
        }
    }
}

#[test]
fn without_rdma_another_mode_is_used_and_the_reason_said() {
    if !Guest::Process.is_here() {
        return;
    }
    for (mode, used) in [("rdma", "tcp"), ("auto", "compression")] {
        let demo = Demo::run(Guest::Process, &format!("--mode {mode}"));
        demo.check_completed();
        demo.check("mode_requested", mode);
        demo.check("mode_used", used);
        assert!(demo.text("mode_reason").contains("RDMA"), "{}", demo.text("mode_reason"));
    }
}

#[test]
fn several_paths_carry_one_migration() {
    if !Guest::Process.is_here() {
        return;
    }
    let flags = "--path 127.0.0.2-127.0.0.3 --path 127.0.0.4-127.0.0.5 --channels 4";
    let demo = Demo::run(Guest::Process, flags);
    demo.check_completed();
    let channels = demo.report["channels"].as_array().expect("a list");
    assert_eq!(channels.len(), 4);
    for pair in [("127.0.0.2:", "127.0.0.3:"), ("127.0.0.4:", "127.0.0.5:")] {
        let on_path = |channel: &&serde_json::Value| {
            channel["local"].as_str().is_some_and(|local| local.starts_with(pair.0))
                && channel["remote"].as_str().is_some_and(|remote| remote.starts_with(pair.1))
        };
        assert_eq!(channels.iter().filter(on_path).count(), 2, "{channels:#?}");
    }
}

#[test]
fn untouched_memory_is_not_sent() {
    if !Guest::Process.is_here() {
        return;
    }
    // The flag given later wins over the memory of all the others.
    let demo = Demo::run(Guest::Process, "--touch 16MiB --program idle --mode tcp");
    demo.check_completed();
    let sent = demo.report["wire_bytes"].as_u64().expect("a number");
    assert!((16 << 20..20 << 20).contains(&sent), "{sent} bytes for 16 MiB in use");
}

#[test]
fn a_guest_that_does_not_converge_is_handled_as_the_host_says() {
    if !Guest::Process.is_here() {
        return;
    }
    // A limit that no handover can keep, so that every round is one too many.
    let hopeless = "--dirty-rate 400MiB --downtime-limit 1ms --max-rounds 2 --mode tcp";
    let cancelled = Demo::run(Guest::Process, &format!("{hopeless} --on-no-convergence cancel"));
    cancelled.check_rolled_back("2 rounds are the limit");
    let switched = Demo::run(Guest::Process, &format!("{hopeless} --on-no-convergence switch"));
    switched.check_completed();
    let throttled = Demo::run(Guest::Process, &format!("{hopeless} --on-no-convergence throttle"));
    let warned = throttled.report["warnings"].to_string();
    assert!(warned.contains("20 % of its vCPU time"), "{warned}");
    throttled.check("guest_check", "ok");
}
