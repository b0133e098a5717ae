//! The guest as a whole: it runs, stops, moves, and notices whatever is done to its memory.

use std::time::Instant;

use super::*;
use crate::dirty::TrackerKind;
use crate::guest::program::ProgramConfig;
use crate::memory::Backing;
use crate::testing::{Need, require};
use crate::units::{PAGE_SIZE, PageIndex, Run};

const SIZE: u64 = 4 << 20;

fn config(program: Program, threads: u32) -> ProcessConfig {
    ProcessConfig {
        bytes: SIZE,
        backing: Backing::Memfd,
        huge: HugePages::No,
        threads,
        program: ProgramConfig { program, bytes_per_second: 8 << 20, touch_bytes: None, seed: 11 },
        fill: Fill::Half,
        tracker: TrackerKind::Pagemap,
    }
}

/// A guest that writes nothing more of its own accord after its warm-up.
fn still(threads: u32) -> ProcessConfig {
    let mut config = config(Program::Uniform, threads);
    config.program.bytes_per_second = 0;
    config
}

fn wait_for(what: &str, mut met: impl FnMut() -> bool) {
    let start = Instant::now();
    while !met() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited too long for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn started(config: ProcessConfig) -> ProcessGuest {
    let mut guest = ProcessGuest::new(config).unwrap();
    guest.resume().unwrap();
    wait_for("the warm-up", || guest.warmed_up());
    guest
}

fn goes_on(guest: &mut ProcessGuest) {
    let before = guest.report();
    wait_for("heartbeats and writes", || {
        let now = guest.report();
        now.heartbeats > before.heartbeats + 5 && now.writes > before.writes + 5
    });
}

fn copy_ram(from: &ProcessGuest, to: &ProcessGuest) {
    for run in from.touched().unwrap().runs() {
        let mut bytes = Vec::new();
        from.memory.read_run(run, &mut bytes);
        to.memory.write_run(run, &bytes);
    }
}

fn whole_ram(guest: &ProcessGuest) -> Vec<u8> {
    let mut bytes = Vec::new();
    guest.memory.read_run(Run::new(0, guest.config.bytes / PAGE_SIZE), &mut bytes);
    bytes
}

/// What a migration does to a guest.
fn moved(mut source: ProcessGuest) -> ProcessGuest {
    source.pause().unwrap();
    let mut destination = ProcessGuest::skeleton(&Guest::config(&source).unwrap(), HugePages::No).unwrap();
    copy_ram(&source, &destination);
    destination.load_state(&source.save_state().unwrap(), Duration::ZERO).unwrap();
    assert_eq!(destination.report(), source.report());
    destination.resume().unwrap();
    destination
}

#[test]
fn each_program_runs_and_finds_its_memory_right() {
    for (program, fill) in [
        (Program::Uniform, Fill::Half),
        (Program::Hotset, Fill::Random),
        (Program::Stream, Fill::Text),
        (Program::Uniform, Fill::Stamp),
    ] {
        let mut guest = started(ProcessConfig { fill, ..config(program, 2) });
        goes_on(&mut guest);
        let report = guest.verify_all().unwrap();
        assert_eq!(report.corrupt, 0, "{}", guest.console());
        let data = guest.plan.share(1).end;
        assert!(report.verified >= data, "{report:?} with {data} pages");
        assert!(guest.console().starts_with("heartbeat "));
    }
}

#[test]
fn an_idle_guest_writes_nothing_but_its_heartbeat() {
    let mut guest = started(config(Program::Idle, 2));
    wait_for("heartbeats", || guest.report().heartbeats > 10);
    let report = guest.verify_all().unwrap();
    assert_eq!((report.writes, report.corrupt), (0, 0));
    guest.pause().unwrap();
    assert_eq!(guest.touched().unwrap().len(), 1);
}

#[test]
fn pause_stops_the_writing_and_resume_goes_on() {
    let mut guest = started(config(Program::Uniform, 3));
    for _ in 0..5 {
        guest.pause().unwrap();
        guest.pause().unwrap();
        let (ram, report) = (whole_ram(&guest), guest.report());
        std::thread::sleep(Duration::from_millis(20));
        assert!(whole_ram(&guest) == ram, "the memory changed during the pause");
        assert_eq!(guest.report(), report);
        assert!(guest.verify_all().unwrap_err().to_string().contains("resume it first"));
        guest.resume().unwrap();
        assert!(guest.save_state().unwrap_err().to_string().contains("pause it first"));
        goes_on(&mut guest);
    }
    assert_eq!(guest.verify_all().unwrap().corrupt, 0);
}

#[test]
fn it_moves_ten_times_and_goes_on_where_it_was() {
    for (threads, backing, program) in
        [(1, Backing::Memfd, Program::Uniform), (3, Backing::Anonymous, Program::Hotset)]
    {
        let mut guest = started(ProcessConfig { backing, ..config(program, threads) });
        for _ in 0..10 {
            guest = moved(guest);
            goes_on(&mut guest);
            let report = guest.verify_all().unwrap();
            assert_eq!(report.corrupt, 0, "{}", guest.console());
        }
    }
}

#[test]
fn it_moves_in_the_middle_of_its_warm_up() {
    let mut guest =
        ProcessGuest::new(ProcessConfig { bytes: 64 << 20, ..config(Program::Stream, 2) }).unwrap();
    guest.resume().unwrap();
    wait_for("the first writes", || guest.report().writes > 0);
    let mut guest = moved(guest);
    wait_for("the warm-up", || guest.warmed_up());
    goes_on(&mut guest);
    assert_eq!(guest.verify_all().unwrap().corrupt, 0, "{}", guest.console());
}

#[test]
fn dirty_pages_make_an_equal_copy() {
    if !require(&[Need::Uffd]) {
        return;
    }
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let mut source = started(ProcessConfig { backing, ..config(Program::Uniform, 2) });
        let mut tracker = source.dirty_tracker().unwrap();
        tracker.start().unwrap();
        let destination = ProcessGuest::skeleton(&Guest::config(&source).unwrap(), HugePages::No).unwrap();
        copy_ram(&source, &destination);
        for round in 0..4 {
            let before = source.report().writes;
            if round < 3 {
                wait_for("writes", || source.report().writes > before + 20);
            } else {
                source.pause().unwrap();
            }
            let mut dirty = PageSet::empty(SIZE / PAGE_SIZE);
            tracker.drain(&mut dirty).unwrap();
            assert!(round == 3 || dirty.len() > 10, "{} dirty pages in round {round}", dirty.len());
            for run in dirty.runs() {
                let mut bytes = Vec::new();
                source.memory.read_run(run, &mut bytes);
                destination.memory.write_run(run, &bytes);
            }
        }
        assert!(whole_ram(&source) == whole_ram(&destination), "a dirty page was not told");
        tracker.stop().unwrap();
    }
}

#[test]
fn the_gap_spans_the_move_and_is_forgotten_when_told() {
    let mut guest = started(config(Program::Uniform, 2));
    guest.pause().unwrap();
    guest.reset_gap();
    assert_eq!(guest.report().longest_gap, Duration::ZERO);
    std::thread::sleep(Duration::from_millis(150));
    let mut guest = moved(guest);
    goes_on(&mut guest);
    assert!(guest.report().longest_gap >= Duration::from_millis(150));
    guest.reset_gap();
    let gap = guest.report().longest_gap;
    assert!(gap < Duration::from_millis(150), "{gap:?}");
}

/// Has damage done to the paused, warmed-up guest and answers what it says of it.
fn after(config: ProcessConfig, damage: impl FnOnce(&mut ProcessGuest)) -> (SelfReport, String) {
    let mut guest = started(config);
    guest.pause().unwrap();
    guest.console();
    damage(&mut guest);
    guest.resume().unwrap();
    let report = guest.verify_all().unwrap();
    (report, guest.console())
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let (report, console) = after(still(2), |_| ());
    assert_eq!(report.corrupt, 0);
    assert!(!console.contains("DAMAGE"), "{console}");
}

#[test]
fn a_flipped_bit_is_found() {
    let (report, console) = after(still(3), |guest| {
        let at = guest.plan.page(700).0 * PAGE_SIZE + 3000;
        let ram = &guest.memory.mappings()[0];
        ram.store(at, ram.load(at) ^ 1 << 40);
    });
    assert_eq!(report.corrupt, 1, "{console}");
    assert!(console.contains("corrupt: wrong at byte 3000"), "{console}");
}

#[test]
fn a_lost_page_is_found() {
    let (report, console) = after(still(1), |guest| {
        guest.memory.zero_run(Run { start: guest.plan.page(5), pages: 2 });
    });
    assert_eq!(report.corrupt, 2, "{console}");
    assert!(console.contains("lost: it is empty"), "{console}");
}

#[test]
fn pages_that_were_mixed_up_are_found() {
    let (report, console) = after(still(1), |guest| {
        let mut bytes = Vec::new();
        guest.memory.read_run(Run { start: guest.plan.page(5), pages: 1 }, &mut bytes);
        guest.memory.write_run(Run { start: guest.plan.page(6), pages: 1 }, &bytes);
    });
    assert_eq!(report.corrupt, 1, "{console}");
}

/// Lets the guest run until the page has been written again, and answers what the page and its entry were before.
fn overwritten(guest: &mut ProcessGuest, data: u64) -> (Vec<u8>, u64) {
    let page = Run { start: guest.plan.page(data), pages: 1 };
    let mut old = Vec::new();
    guest.memory.read_run(page, &mut old);
    let entry = guest.memory.mappings()[0].load(Plan::entry(data));
    guest.resume().unwrap();
    wait_for("the page to be written again", || guest.memory.mappings()[0].load(Plan::entry(data)) != entry);
    guest.pause().unwrap();
    (old, entry)
}

#[test]
fn a_stale_page_is_found() {
    let (report, console) = after(config(Program::Stream, 1), |guest| {
        let (old, _) = overwritten(guest, 9);
        guest.memory.write_run(Run { start: guest.plan.page(9), pages: 1 }, &old);
    });
    assert_eq!(report.corrupt, 1, "{console}");
    assert!(console.contains("stale: it is as write 10 left it"), "{console}");
}

#[test]
fn a_stale_page_with_a_stale_table_is_found() {
    let (report, console) = after(config(Program::Stream, 1), |guest| {
        let (old, entry) = overwritten(guest, 9);
        guest.memory.write_run(Run { start: guest.plan.page(9), pages: 1 }, &old);
        guest.memory.mappings()[0].store(Plan::entry(9), entry);
    });
    assert_eq!(report.corrupt, 1, "{console}");
    assert!(console.contains("the table of its writes"), "{console}");
}

#[test]
fn a_lost_table_is_found() {
    let (report, console) = after(still(1), |guest| guest.memory.zero_run(Run::new(1, 1)));
    assert_eq!(report.corrupt, 512 + 1, "{console}");
    assert!(console.contains("the table names write 0"), "{console}");
}

#[test]
fn a_running_guest_finds_damage_without_being_asked() {
    let mut guest = started(config(Program::Uniform, 2));
    guest.pause().unwrap();
    let page = guest.plan.page(100);
    guest.memory.zero_run(Run { start: page, pages: 1 });
    guest.resume().unwrap();
    wait_for("the guest to come by", || guest.report().corrupt == 1);
    assert!(guest.console().contains(&format!("page {} is lost", page.0)));
}

#[test]
fn a_state_that_does_not_belong_to_the_memory_is_found() {
    for threads in [1, 3] {
        // A state older than the memory.
        let (report, console) = after(config(Program::Uniform, threads), |guest| {
            let old = guest.save_state().unwrap();
            guest.resume().unwrap();
            goes_on(guest);
            guest.pause().unwrap();
            guest.load_state(&old, Duration::ZERO).unwrap();
        });
        assert!(report.corrupt > 0 && console.contains("its state is of write"), "{console}");
        // A memory older than the state.
        let (report, console) = after(config(Program::Uniform, threads), |guest| {
            let old = whole_ram(guest);
            guest.resume().unwrap();
            goes_on(guest);
            guest.pause().unwrap();
            guest.memory.write_run(Run::new(0, SIZE / PAGE_SIZE), &old);
        });
        assert!(report.corrupt > 0 && console.contains("its state is of write"), "{console}");
        // A guest that was started anew over memory that has been moved.
        let mut source = started(config(Program::Uniform, threads));
        source.pause().unwrap();
        let mut anew = ProcessGuest::skeleton(&Guest::config(&source).unwrap(), HugePages::No).unwrap();
        copy_ram(&source, &anew);
        anew.resume().unwrap();
        wait_for("the warm-up", || anew.warmed_up());
        assert!(anew.report().corrupt > 0);
    }
}

#[test]
fn a_state_that_was_refused_leaves_the_guest_as_it_was() {
    let mut guest = started(config(Program::Uniform, 2));
    guest.pause().unwrap();
    let report = guest.report();
    let state = guest.save_state().unwrap();
    for length in 0..state.len() {
        assert!(guest.load_state(&state[..length], Duration::ZERO).is_err(), "{length} of {}", state.len());
    }
    assert_eq!(guest.report(), report);
    guest.resume().unwrap();
    goes_on(&mut guest);
    assert_eq!(guest.verify_all().unwrap().corrupt, 0);
}

#[test]
fn throttling_is_bounded_and_leaves_a_heartbeat() {
    let mut guest = started(config(Program::Uniform, 2));
    assert!(guest.throttle(100).unwrap_err().to_string().contains("100 %"));
    guest.throttle(99).unwrap();
    goes_on(&mut guest);
    guest.pause().unwrap();
    guest.resume().unwrap();
    guest.throttle(0).unwrap();
    goes_on(&mut guest);
    assert_eq!(guest.verify_all().unwrap().corrupt, 0);
}

#[test]
fn a_large_guest_costs_what_it_uses() {
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let mut large = ProcessConfig { bytes: 64 << 30, backing, ..config(Program::Uniform, 2) };
        large.program.touch_bytes = Some(SIZE);
        let mut guest = started(large);
        goes_on(&mut guest);
        assert_eq!(guest.verify_all().unwrap().corrupt, 0);
        let touched = guest.touched().unwrap();
        assert!(touched.len() <= SIZE / PAGE_SIZE && touched.len() >= SIZE / PAGE_SIZE - 1);
        assert!(!touched.contains(PageIndex(SIZE / PAGE_SIZE)));
    }
}
