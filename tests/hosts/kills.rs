//! `kill -9` of a guest's process and of a daemon, at each phase, on each side: never two running copies, and none that is lost
//! without a word.

use serde_json::Value;

use crate::inside::{PHASES, Side};
use crate::lab::{Host, Lab, is_here};

/// How a migration ends, and where the guest is then: what alpha and beta say of it.
type Ending = (&'static str, &'static str, &'static str);

const MOVED: Ending = ("completed", "none", "running");
const STAYED: Ending = ("rolled_back", "running", "none");
const LOST_AT_SOURCE: Ending = ("lost", "lost", "none");
const LOST_AT_DESTINATION: Ending = ("lost", "none", "lost");

#[track_caller]
fn check_ending(lab: &Lab, id: &str, (state, at_alpha, at_beta): Ending, what: &str) {
    let accounts = lab.both_over(id, what);
    assert_eq!(accounts[0]["state"], state, "{what}: {:#}\n{:#}", accounts[0], accounts[1]);
    let seen = (lab.alpha.guest_state("vm"), lab.beta.guest_state("vm"));
    assert_eq!((seen.0.as_str(), seen.1.as_str()), (at_alpha, at_beta), "{what}: {accounts:#?}");
    for host in [&lab.alpha, &lab.beta] {
        match host.guest_state("vm").as_str() {
            "running" => host.check_whole("vm"),
            "lost" => {
                for account in &accounts {
                    let cause = account["cause"].as_str().unwrap_or_default();
                    assert!(cause.contains("process") && cause.contains("ended"), "{what}: {account:#}");
                }
                let note = host.done("guest show vm")["note"].clone();
                assert!(note.as_str().is_some_and(|note| note.contains("guest stop vm")), "{what}: {note}");
            }
            _ => {}
        }
    }
    lab.check_tidy(what);
}

fn kill_process(pid: u64) {
    let killed = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status();
    assert!(killed.expect("kill starts").success(), "process {pid} is not there to be killed");
}

#[test]
fn a_guests_process_that_is_killed_leaves_one_owner_or_a_guest_that_is_known_to_be_lost() {
    if !is_here() {
        return;
    }
    let lab = Lab::running("");
    for side in Side::BOTH {
        for phase in PHASES {
            let what = format!("the {}'s process is killed at {phase}", side.word());
            lab.back_at_alpha("vm");
            let ending = match (side, phase) {
                // From the journal on the destination may run it, whatever happens here.
                (Side::Source, "journaled" | "committed" | "finished") => MOVED,
                (Side::Source, _) => LOST_AT_SOURCE,
                // From the journal on it may have run here.
                (Side::Destination, "journaled" | "committed" | "finished") => LOST_AT_DESTINATION,
                (Side::Destination, _) => STAYED,
            };
            let began = std::time::Instant::now();
            let id = lab.alpha.begin("vm", &format!("--to beta --{}-fault kill@{phase}", side.word()));
            let accounts = lab.both_over(&id, &what);
            eprintln!(
                "{what}: {} after {:.1} s: {}; {}",
                accounts[0]["state"],
                began.elapsed().as_secs_f64(),
                accounts[0]["cause"],
                accounts[1]["cause"]
            );
            check_ending(&lab, &id, ending, &what);
        }
    }
    lab.back_at_alpha("vm");
    lab.alpha.check_whole("vm");
}

#[test]
fn a_daemon_that_is_killed_finds_everything_again() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::running("");
    for side in Side::BOTH {
        for (number, phase) in PHASES.into_iter().enumerate() {
            // Back while the process still stands at that point, or only when all is over.
            let soon = number % 2 == 0;
            let back = if soon { "at once" } else { "after the end" };
            let what = format!("the {}'s daemon is killed at {phase} and is back {back}", side.word());
            lab.back_at_alpha("vm");
            let before = lab.at(side).faults();
            let id = lab.alpha.begin("vm", &format!("--to beta --{}-fault stall:2@{phase}", side.word()));
            lab.at(side).next_fault(before, &what);
            let began = std::time::Instant::now();
            lab.at(side).kill();
            if !soon {
                match side {
                    Side::Source => lab.beta.over(&id),
                    Side::Destination => lab.alpha.over(&id),
                };
            }
            lab.at(side).start();
            let accounts = lab.both_over(&id, &what);
            eprintln!("{what}: {} after {:.1} s", accounts[0]["state"], began.elapsed().as_secs_f64());
            check_ending(&lab, &id, MOVED, &what);
        }
    }
    both_daemons_at_once(&mut lab);
    a_daemon_while_nothing_moves(&mut lab);
}

fn both_daemons_at_once(lab: &mut Lab) {
    let what = "both daemons are killed in pre-copy";
    lab.back_at_alpha("vm");
    let before = lab.alpha.faults();
    let id = lab.alpha.begin("vm", "--to beta --source-fault stall:2@pre-copy");
    lab.alpha.next_fault(before, what);
    lab.alpha.kill();
    lab.beta.kill();
    lab.alpha.start();
    lab.beta.start();
    check_ending(lab, &id, MOVED, what);
}

fn a_daemon_while_nothing_moves(lab: &mut Lab) {
    lab.back_at_alpha("vm");
    lab.alpha.start_guest("other", "");
    let (pid, doomed) = (lab.alpha.guest_pid("vm"), lab.alpha.guest_pid("other"));
    lab.alpha.kill();
    kill_process(doomed);
    lab.alpha.start();
    assert_eq!(lab.alpha.guest_pid("vm"), pid);
    lab.alpha.check_whole("vm");
    lab.alpha.wait_for("the dead guest to be known as lost", |host| {
        (host.guest_state("other") == "lost").then_some(())
    });
    let lost = lab.alpha.done("guest show other");
    let note = lost["note"].as_str().unwrap_or_default();
    assert!(note.contains("process ended") && lost["pid"].is_null(), "{lost:#}");
    lab.alpha.done("guest stop other");
    lab.alpha.start_guest("other", "");
    lab.alpha.done("migrate other --to beta");
    lab.beta.check_whole("other");
    lab.check_tidy("after a restart");
}

#[test]
fn a_daemon_that_is_killed_before_a_guest_moves_gives_the_migration_up() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::up("");
    lab.alpha.configure("max_migrations = 1");
    lab.alpha.start();
    lab.beta.start();
    lab.alpha.start_guest("vm", "");
    lab.alpha.start_guest("other", "");

    // One moves, and the other waits for its slot.
    let before = lab.alpha.faults();
    let moving = lab.alpha.begin("vm", "--to beta --source-fault stall:2@pre-copy");
    lab.alpha.next_fault(before, "the first moves");
    let waiting = lab.alpha.begin("other", "--to beta --wait");
    lab.alpha.wait_for("the second to wait", |host| {
        (host.migration(&waiting)?["state"] == "waiting").then_some(())
    });
    lab.alpha.kill();
    lab.alpha.start();
    gave_up(&lab.alpha, &waiting);
    check_ending(&lab, &moving, MOVED, "another waits for its slot");

    // It is being checked: the other host takes its time.
    lab.beta.signal("STOP");
    let checked = lab.alpha.begin("other", "--to beta");
    lab.alpha.wait_for("the checks", |host| (host.migration(&checked)?["state"] == "checking").then_some(()));
    lab.alpha.kill();
    lab.beta.signal("CONT");
    lab.alpha.start();
    gave_up(&lab.alpha, &checked);
    assert_eq!(lab.beta.guest_state("other"), "none");
    lab.check_tidy("after the checks were cut off");

    // Its process is killed while it waits.
    lab.back_at_alpha("vm");
    let before = lab.alpha.faults();
    let moving = lab.alpha.begin("vm", "--to beta --source-fault stall:2@pre-copy");
    lab.alpha.next_fault(before, "the first moves again");
    let waiting = lab.alpha.begin("other", "--to beta --wait");
    kill_process(lab.alpha.guest_pid("other"));
    let lost = lab.alpha.over(&waiting);
    assert_eq!(lost["state"], "lost", "{lost:#}");
    assert_eq!(lab.alpha.guest_state("other"), "lost");
    lab.alpha.done("guest stop other");
    check_ending(&lab, &moving, MOVED, "the one that waited for its slot is gone");
    lab.alpha.start_guest("other", "");
    lab.alpha.done("migrate other --to beta");
    lab.beta.check_whole("other");
}

#[track_caller]
fn gave_up(host: &Host, id: &str) {
    let account: Value = host.over(id);
    assert_eq!(account["state"], "rolled_back", "{account:#}");
    let cause = account["cause"].as_str().unwrap_or_default();
    assert!(cause.contains("the daemon was restarted before the guest began to move"), "{account:#}");
    host.check_whole("other");
}

#[test]
fn a_host_that_loses_daemon_and_guest_at_once_is_told_by_the_journals() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::running("");
    let cases = [
        (Side::Source, "ready", LOST_AT_SOURCE),
        (Side::Source, "journaled", MOVED),
        (Side::Source, "committed", MOVED),
        (Side::Destination, "pre-copy", STAYED),
        (Side::Destination, "ready", STAYED),
        (Side::Destination, "committed", LOST_AT_DESTINATION),
    ];
    for (side, phase, ending) in cases {
        let what = format!("daemon and process of the {} are killed at {phase}", side.word());
        lab.back_at_alpha("vm");
        let before = lab.at(side).faults();
        let id = lab.alpha.begin("vm", &format!("--to beta --{}-fault stall:20@{phase}", side.word()));
        lab.at(side).next_fault(before, &what);
        let pid = lab.at(side).guest_pid("vm");
        let began = std::time::Instant::now();
        lab.at(side).kill();
        kill_process(pid);
        lab.at(side).start();
        let accounts = lab.both_over(&id, &what);
        eprintln!(
            "{what}: {} after {:.1} s: {}; {}",
            accounts[0]["state"],
            began.elapsed().as_secs_f64(),
            accounts[0]["cause"],
            accounts[1]["cause"]
        );
        check_ending(&lab, &id, ending, &what);
    }
}
