//! Guests of QEMU that move through the daemons of two hosts.

use std::time::Duration;

use serde_json::Value;

use crate::hosts::{Host, kill, named, two};
use crate::is_here;
use crate::vm::{MEMFD, PRIVATE, Vm, one_account, until};

/// A move that does not end by itself: the guest writes faster than that.
const SLOWLY: &str = "--mode tcp --bandwidth 24MiB";
/// The same, which ends when what is left is what the guest writes in two passes.
const SLOWLY_TO_ITS_END: &str = "--mode tcp --bandwidth 24MiB --downtime-limit 3s";

fn after(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// That both hosts tell that a guest stayed, and that it goes on at the source.
fn stayed(vm: &Vm, to: &Vm, accounts: [&Value; 2], words: &str) {
    for account in accounts {
        assert_eq!(account["state"], "rolled_back", "{account:#}");
    }
    let cause = accounts[0]["cause"].as_str().unwrap_or_default();
    assert!(cause.contains(words), "{words:?}: {:#}", accounts[0]);
    vm.ticks_on();
    assert_eq!(to.console(), "", "a guest ran at the destination");
}

#[test]
fn a_live_guest_moves_through_two_daemons_in_each_mode() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let (alpha, beta) = two(here, "downtime_limit = \"1s\"", "");
    let mut vm = Vm::running(here, "vm0", MEMFD);
    let mut consoles = Vec::new();
    for (number, (ram, mode)) in
        [(MEMFD, "tcp"), (MEMFD, "compression"), (PRIVATE, "compression")].into_iter().enumerate()
    {
        let to = Vm::waiting(here, &format!("vm{}", number + 1), ram);
        let (code, checks) = alpha.json(&format!("check {} --to beta --incoming {}", named(&vm), named(&to)));
        assert_eq!((code, &checks["ok"]), (0, &true.into()), "{checks:#}");
        let (code, moved) = alpha.moves(&vm, &to, &format!("--mode {mode}"));
        assert_eq!((code, &moved["state"]), (0, &"completed".into()), "{moved:#}");
        assert_eq!(moved["mode_requested"], mode, "{moved:#}");
        assert_eq!(moved["guest_kind"], "qemu", "{moved:#}");
        assert_eq!((&moved["guest"], &moved["cause"]), (&named(&vm).into(), &Value::Null), "{moved:#}");
        assert!(moved["downtime_seconds"].as_f64().is_some_and(|time| time > 0.0), "{moved:#}");
        assert!(moved["memory_bytes"].as_u64() >= Some(256 << 20), "{moved:#}");
        let carried: u64 = moved["channels"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|channel| channel["bytes"].as_u64())
            .sum();
        assert!(carried > 1 << 20, "{moved:#}");
        let whole = moved["warnings"].to_string().contains("carried whole");
        assert_eq!(whole, ram == PRIVATE, "{moved:#}");
        let id = moved["id"].as_str().expect("an identifier");
        let theirs = beta.over(id);
        assert_eq!(
            (&theirs["state"], &theirs["guest"]),
            (&"completed".into(), &named(&to).into()),
            "{theirs:#}"
        );
        to.ticks_on();
        consoles.push(vm.console());
        vm = to;
        alpha.is_tidy();
        beta.is_tidy();
        assert!(alpha.run(&format!("report {id} --output {}", here.join("page").display())).status.success());
    }
    consoles.push(vm.console());
    one_account(&consoles);
    let metrics = alpha.json("history").1;
    assert_eq!(metrics.as_array().map(Vec::len), Some(3), "{metrics:#}");
}

/// The only failed check of an answer, by its name and finding.
fn only_failure(answer: &Value) -> (String, String) {
    let checks = answer["checks"].as_array().or(answer["failed_checks"].as_array());
    let checks = checks.unwrap_or_else(|| panic!("{answer:#}"));
    let failed: Vec<&Value> = checks.iter().filter(|check| check["status"] == "failed").collect();
    let [only] = failed[..] else { panic!("{answer:#}") };
    let text = |field: &str| only[field].as_str().unwrap_or_default().to_owned();
    assert!(!text("advice").is_empty(), "{answer:#}");
    (text("name"), text("finding"))
}

#[test]
fn what_is_wrong_is_said_once_and_clearly_and_the_guest_goes_on() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let (alpha, beta) = two(here, "", "");
    let vm = Vm::running(here, "vm", MEMFD);
    let waits = Vm::waiting(here, "waits", MEMFD);
    let small = Vm::waiting(here, "small", "memory-backend-memfd,id=ram0,size=128M,share=on");
    let address = format!("unix:{}", here.join("listens").display());
    let listens = Vm::start(here, "listens", MEMFD, &["-incoming", &address]);

    let check = |from: &str, to: &str| {
        let (code, report) = alpha.json(&format!("check {from} --to beta --incoming {to}"));
        assert_eq!(code, 1, "{report:#}");
        only_failure(&report)
    };
    for (from, to, name, words) in [
        ("qemu:/nowhere/vm.qmp", named(&waits), "qemu", "no QEMU answers at /nowhere/vm.qmp"),
        (&*named(&vm), "qemu:/nowhere/in.qmp".into(), "qemu", "beta: no QEMU answers at /nowhere/in.qmp"),
        (&named(&vm), named(&small), "qemu-ram", "256 MiB at the source and 128 MiB at beta"),
        (&named(&vm), named(&listens), "qemu", "start it with -incoming defer"),
        (&named(&waits), named(&waits), "qemu", "has none to give"),
    ] {
        let (check, finding) = check(from, &to);
        assert_eq!(check, name, "{finding}");
        assert!(finding.contains(words), "{words:?}: {finding}");
    }
    // A migration says the same, and nothing is left of it.
    let (code, answer) =
        alpha.json(&format!("migrate {} --to beta --incoming qemu:/nowhere/in.qmp", named(&vm)));
    assert_eq!((code, &answer["state"]), (1, &"rolled_back".into()), "{answer:#}");
    let cause = answer["cause"].as_str().unwrap_or_default();
    assert!(cause.contains("beta: no QEMU answers at /nowhere/in.qmp"), "{cause}");
    for (words, said) in [
        (format!("migrate {} --to beta", named(&vm)), "add --incoming qemu:PATH"),
        (format!("migrate {} --to beta --incoming {} --verify", named(&vm), named(&waits)), "--verify"),
        (format!("migrate qemu:vm --to beta --incoming {}", named(&waits)), "names no QEMU"),
        (format!("check vm --to beta --incoming {}", named(&waits)), "--incoming is for guests of QEMU"),
    ] {
        let (code, answer) = alpha.json(&words);
        assert_eq!(code, 1, "{words}: {answer:#}");
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.contains(said), "{words}: {error}");
    }
    alpha.is_tidy();
    beta.is_tidy();
    vm.ticks_on();
    // Whoever waited still does.
    let (code, moved) = alpha.moves(&vm, &waits, "--mode tcp --downtime-limit 2s");
    assert_eq!(code, 0, "{moved:#}");
    waits.ticks_on();
}

#[test]
fn whatever_is_cancelled_or_killed_the_guest_goes_on_at_one_side() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let (mut alpha, mut beta) = two(here, "", "");
    let vm = Vm::running(here, "vm", MEMFD);

    // Cancelled at either side; the waiting QEMU's copy is ended.
    for (number, at_source) in [true, false].into_iter().enumerate() {
        let mut to = Vm::waiting(here, &format!("cancel{number}"), MEMFD);
        let id = alpha.begin(&vm, &to, SLOWLY);
        let (code, again) = alpha.moves(&vm, &to, SLOWLY);
        assert_eq!(code, 1, "{again:#}");
        assert!(again["error"].to_string().contains("is being moved already"), "{again:#}");
        let (host, guest) = if at_source { (&alpha, named(&vm)) } else { (&beta, named(&to)) };
        let (code, answer) = host.json(&format!("cancel {guest}"));
        assert_eq!(code, 0, "{answer:#}");
        stayed(&vm, &to, [&alpha.over(&id), &beta.over(&id)], "cancelled");
        until("the end of the copy", || to.has_ended());
    }
    tidy(&alpha, &beta);

    // The process that carries it, at either side.
    for at_source in [true, false] {
        let to = Vm::waiting(here, &format!("carrier{at_source}"), MEMFD);
        let id = alpha.begin(&vm, &to, SLOWLY);
        after(500);
        kill(&if at_source { alpha.carrier() } else { beta.carrier() });
        stayed(&vm, &to, [&alpha.over(&id), &beta.over(&id)], "ended");
    }
    tidy(&alpha, &beta);

    // The QEMU that was to take it in.
    let mut to = Vm::waiting(here, "dies", MEMFD);
    let id = alpha.begin(&vm, &to, SLOWLY);
    to.kill();
    stayed(&vm, &to, [&alpha.over(&id), &beta.over(&id)], "QEMU has closed its QMP socket");

    // Daemon and process at once: what the daemon says when it is there again is asked of both QEMUs.
    for at_source in [true, false] {
        let to = Vm::waiting(here, &format!("both{at_source}"), MEMFD);
        let id = alpha.begin(&vm, &to, SLOWLY);
        let host = if at_source { &mut alpha } else { &mut beta };
        let carrier = host.carrier();
        host.kill();
        kill(&carrier);
        vm.ticks_on();
        host.serve();
        // A source whose destination's daemon takes its time to come back has ended it itself before it hears why.
        let words = if at_source { "ended" } else { "" };
        stayed(&vm, &to, [&alpha.over(&id), &beta.over(&id)], words);
    }
    tidy(&alpha, &beta);

    // A daemon alone is not missed.
    let to = Vm::waiting(here, "last", MEMFD);
    let id = alpha.begin(&vm, &to, SLOWLY_TO_ITS_END);
    alpha.kill();
    beta.kill();
    alpha.serve();
    beta.serve();
    for account in [alpha.over(&id), beta.over(&id)] {
        assert_eq!(account["state"], "completed", "{account:#}");
    }
    to.ticks_on();
    one_account(&[vm.console(), to.console()]);
    tidy(&alpha, &beta);
}

#[test]
fn a_doubt_is_settled_by_asking_both_qemus() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let (alpha, beta) = two(here, "downtime_limit = \"2s\"", "");
    let mut vm = Vm::running(here, "vm", MEMFD);
    let mut consoles = Vec::new();
    // Wherever it is killed: the guest is complete at the destination, and was given up or is about to be.
    for (number, fault) in [
        "--source-fault kill@ready",
        "--source-fault kill@committed",
        "--source-fault kill@finished",
        "--destination-fault kill@ready",
        "--destination-fault kill@journaled",
        "--destination-fault kill@committed",
        "--destination-fault kill@finished",
    ]
    .into_iter()
    .enumerate()
    {
        let to = Vm::waiting(here, &format!("to{number}"), MEMFD);
        let id = alpha.begin(&vm, &to, &format!("--mode tcp {fault}"));
        for account in [alpha.over(&id), beta.over(&id)] {
            assert_eq!(account["state"], "completed", "{fault}: {account:#}");
            assert_eq!(account["cause"], Value::Null, "{fault}: {account:#}");
        }
        to.ticks_on();
        assert_eq!(vm.status(), "postmigrate", "{fault}");
        consoles.push(vm.console());
        vm = to;
        tidy(&alpha, &beta);
    }

    // The source has given it up, and somebody ends it at the destination, which has it whole.
    let mut to = Vm::waiting(here, "ended", MEMFD);
    let id = alpha.begin(&vm, &to, "--mode tcp --source-fault kill@ready");
    until("the doubt", || alpha.json(&format!("status {id}")).1["state"] == "in_doubt");
    let (code, answer) = beta.json(&format!("cancel {id}"));
    assert_eq!(code, 0, "{answer:#}");
    stayed(&vm, &to, [&alpha.over(&id), &beta.over(&id)], "");
    until("the end of the copy", || to.has_ended());
    tidy(&alpha, &beta);

    // The destination QEMU has ended, and may have run it: nobody but a person lets it run at the source.
    let mut to = Vm::waiting(here, "gone", MEMFD);
    let id = alpha.begin(&vm, &to, "--mode tcp --source-fault kill@ready");
    until("the doubt", || alpha.json(&format!("status {id}")).1["state"] == "in_doubt");
    kill(&beta.carrier());
    to.kill();
    assert_eq!(beta.over(&id)["state"], "lost");
    let word = || alpha.json(&format!("status {id}")).1;
    until("a word for people", || word()["cause"].to_string().contains("(cont)"));
    assert_eq!((vm.status(), &word()["state"]), ("postmigrate".into(), &"in_doubt".into()));
    vm.ask("cont", &serde_json::json!({}));
    let account = alpha.over(&id);
    assert_eq!(account["state"], "rolled_back", "{account:#}");
    vm.ticks_on();
    consoles.push(vm.console());
    one_account(&consoles);
    tidy(&alpha, &beta);
}

fn tidy(alpha: &Host, beta: &Host) {
    alpha.is_tidy();
    beta.is_tidy();
}

#[test]
fn a_guest_whose_qemu_dies_on_the_way_is_lost_and_both_hosts_say_so() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let (alpha, beta) = two(here, "", "");
    let mut vm = Vm::running(here, "vm", MEMFD);
    let to = Vm::waiting(here, "to", MEMFD);
    let id = alpha.begin(&vm, &to, SLOWLY);
    vm.kill();
    for account in [alpha.over(&id), beta.over(&id)] {
        assert_eq!(account["state"], "lost", "{account:#}");
        assert!(account["cause"].to_string().contains("the source QEMU has ended"), "{account:#}");
    }
    assert_eq!(to.console(), "");
    tidy(&alpha, &beta);
}
