use super::*;
use crate::guest::program::Program;
use crate::testing::{Need, require};

const MIB: u64 = 1 << 20;

fn config(program: Program, vcpus: u32) -> KvmConfig {
    KvmConfig {
        layout: pc_layout(16 * MIB).unwrap(),
        huge: HugePages::No,
        vcpus,
        program: ProgramConfig { program, bytes_per_second: 20 * MIB, touch_bytes: None, seed: 7 },
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
            wait_for_writes(&mut guest, 10_000);
        }
        wait_for("a heartbeat", || guest.report().heartbeats >= before.heartbeats + 10);
        let report = guest.verify_all().unwrap();
        eprintln!("{program:?} {vcpus} {report:?}");
        assert_eq!(report.corrupt, 0, "{program:?} {vcpus}");
        assert!(report.verified >= before.verified + 3000, "{program:?} {report:?}");
        let console = guest.console();
        assert!(
            console.starts_with("pageferry guest: started\npageferry guest: heartbeat 1, writes"),
            "{console}"
        );
    }
}
