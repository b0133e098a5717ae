//! `pageferry cancel` at each phase, on each side, and while a migration waits.

use std::process::Stdio;
use std::time::Instant;

use serde_json::Value;

use crate::inside::{PHASES, Side};
use crate::lab::{Lab, is_here};

#[test]
fn before_the_commit_a_cancelled_guest_stays_and_after_it_the_guest_moves() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::running("");
    for side in Side::BOTH {
        for phase in PHASES {
            let what = format!("cancelled at the {} at {phase}", side.word());
            lab.back_at_alpha("vm");
            let before = lab.at(side).faults();
            let mut migrate = lab
                .alpha
                .command(&format!("migrate vm --to beta --json --{}-fault stall:2@{phase}", side.word()));
            let migrate = migrate.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it starts");
            lab.at(side).next_fault(before, &what);
            let began = Instant::now();
            let (code, answer) = lab.at(side).json("cancel vm");
            assert_eq!(code, 0, "{what}: {answer:#}");
            let output = migrate.wait_with_output().expect("it ends");
            let told: Value = serde_json::from_slice(&output.stdout)
                .unwrap_or_else(|error| panic!("{what}: {error}: {output:?}"));
            let id = told["id"].as_str().expect("it has an identifier");
            let accounts = lab.both_over(id, &what);
            eprintln!(
                "{what}: {} after {:.1} s: {}; {}",
                told["state"],
                began.elapsed().as_secs_f64(),
                accounts[0]["cause"],
                accounts[1]["cause"]
            );
            if ["journaled", "committed", "finished"].contains(&phase) {
                assert_eq!(
                    (output.status.code(), &told["state"]),
                    (Some(0), &"completed".into()),
                    "{what}: {told:#}"
                );
                assert_eq!(lab.alpha.guest_state("vm"), "none", "{what}");
                lab.beta.check_whole("vm");
            } else {
                assert_eq!(
                    (output.status.code(), &told["state"]),
                    (Some(1), &"rolled_back".into()),
                    "{what}: {told:#}"
                );
                for account in &accounts {
                    let cause = account["cause"].as_str().unwrap_or_default();
                    assert!(cause.contains("cancelled"), "{what}: {account:#}");
                }
                assert_eq!(lab.beta.guest_state("vm"), "none", "{what}");
                lab.alpha.check_whole("vm");
            }
            lab.check_tidy(&what);
            // What is over cannot be cancelled.
            let (code, answer) = lab.at(side).json(&format!("cancel {id}"));
            assert_eq!(code, 1, "{what}: {answer:#}");
            let said = answer["error"].as_str().unwrap_or_default();
            assert!(said.contains("is under way"), "{what}: {answer:#}");
        }
    }
}

#[test]
fn a_migration_that_waits_is_cancelled_at_once() {
    if !is_here() {
        return;
    }
    for (busy, note) in [(Side::Source, "waits for a slot"), (Side::Destination, "waits for the destination")]
    {
        let mut lab = Lab::up("");
        lab.at(busy).configure("max_migrations = 1");
        lab.alpha.start();
        lab.beta.start();
        lab.alpha.start_guest("vm", "");
        lab.alpha.start_guest("other", "");
        let before = lab.alpha.faults();
        let moving = lab.alpha.begin("vm", "--to beta --source-fault stall:4@pre-copy");
        lab.alpha.next_fault(before, note);
        let mut migrate = lab.alpha.command("migrate other --to beta --wait --json");
        let migrate = migrate.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it starts");
        lab.alpha.wait_for(note, |host| {
            let waiting = host.migration("other")?;
            (waiting["progress"]["note"].as_str()?.starts_with(note)).then_some(())
        });
        let answer = lab.alpha.done("cancel other");
        let said = answer["what"].as_str().unwrap_or_default();
        assert!(said.contains("is cancelled; other goes on here"), "{answer:#}");
        let output = migrate.wait_with_output().expect("it ends");
        let told: Value = serde_json::from_slice(&output.stdout).expect("its account");
        assert_eq!((output.status.code(), &told["state"]), (Some(1), &"rolled_back".into()), "{told:#}");
        assert_eq!(told["cause"], "it was cancelled", "{told:#}");
        lab.alpha.check_whole("other");
        let accounts = lab.both_over(&moving, note);
        assert_eq!(accounts[0]["state"], "completed", "{accounts:#?}");
        lab.alpha.done("migrate other --to beta");
        lab.beta.check_whole("other");
        lab.check_tidy(note);
    }
}
