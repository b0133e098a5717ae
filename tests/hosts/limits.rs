//! How many guests move at a time, how they share what the host may send, and when a host file takes effect.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::ask::{list, reload, said};
use crate::lab::{Host, Lab, PATIENCE, is_here};

const MIB: u64 = 1 << 20;

fn start_small(host: &Host, name: &str) {
    host.done(&format!("guest start --name {name} --memory 32MiB --dirty-rate 256KiB"));
}

/// Runs a migration that is refused; answers why.
#[track_caller]
fn refused(host: &Host, words: &str) -> String {
    let (code, report) = host.json(words);
    assert_eq!((code, &report["state"]), (1, &"rolled_back".into()), "{words}: {report:#}");
    report["cause"].as_str().expect("there is a cause").to_owned()
}

#[test]
fn a_migration_beyond_the_limit_is_refused_or_waits() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::up("--rate none");
    lab.alpha.configure("max_migrations = 1");
    lab.beta.configure("max_migrations = 2");
    lab.alpha.start();
    lab.beta.start();
    start_small(&lab.alpha, "a");
    start_small(&lab.alpha, "b");
    // Alpha sends one at a time, and then takes in one at a time.
    for (here, there, limited) in [(&lab.alpha, &lab.beta, "this host"), (&lab.beta, &lab.alpha, "alpha")] {
        let to = there.side;
        let first = here.begin("a", &format!("--to {to} --mode tcp --bandwidth 8MiB"));
        here.in_phase(&first, "pre-copy");
        let why = refused(here, &format!("migrate b --to {to} --mode tcp"));
        assert!(why.contains("max_migrations") && why.contains(limited) && why.contains('1'), "{why}");
        assert_eq!(here.guest_state("b"), "running");
        let waiting = here.begin("b", &format!("--to {to} --mode tcp --wait"));
        let note = here.wait_for("it to wait", |host| {
            let migration = host.migration(&waiting)?;
            let note = migration["progress"]["note"].as_str()?.to_owned();
            (migration["state"] == "waiting").then_some(note)
        });
        assert!(note.contains("waits for") && note.contains("max_migrations"), "{note}");
        assert_eq!(here.migration(&first).expect("it is known")["state"], "running", "it ended too soon");
        let both = [here.over(&first), here.over(&waiting)];
        for report in &both {
            assert_eq!(report["state"], "completed", "{report:#}");
        }
        assert!(both[0]["ended_at"].as_f64() <= both[1]["started_at"].as_f64(), "{both:#?}");
        there.check_whole("a");
        there.check_whole("b");
    }
    // One that waits can be cancelled, and one more has its place in the queue.
    let first = lab.alpha.begin("a", "--to beta --mode tcp --bandwidth 8MiB");
    lab.alpha.in_phase(&first, "pre-copy");
    let waiting = lab.alpha.begin("b", "--to beta --wait");
    lab.alpha.done(&format!("cancel {waiting}"));
    let report = lab.alpha.over(&waiting);
    assert_eq!(report["state"], "rolled_back", "{report:#}");
    assert_eq!(lab.alpha.over(&first)["state"], "completed");
    assert_eq!(lab.alpha.guest_state("b"), "running");
}

#[test]
fn four_at_once_share_what_the_host_may_send() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::up("--rate none");
    lab.alpha.configure("max_migrations = 4\nbandwidth_cap = \"16MiB/s\"");
    lab.beta.configure("max_migrations = 4");
    lab.alpha.start();
    lab.beta.start();
    let names = ["a", "b", "c", "d"];
    for name in names {
        start_small(&lab.alpha, name);
    }
    let sent = lab.alpha.sent_by("pf0") + lab.alpha.sent_by("pf1");
    let began = Instant::now();
    let ids = names.map(|name| lab.alpha.begin(name, "--to beta --mode tcp"));
    let running = |host: &Host| {
        let all = host.done("status");
        let rates: Vec<u64> = list(&all).iter().filter_map(rate).collect();
        (rates.len() == names.len()).then_some(rates)
    };
    lab.alpha.wait_for("all four to send", running);
    // Whoever was first had more until the last came.
    std::thread::sleep(Duration::from_millis(1500));
    let mut sums = vec![0; names.len()];
    let mut looks = 0;
    while looks < 10 {
        let Some(rates) = running(&lab.alpha) else { break };
        sums.iter_mut().zip(rates).for_each(|(sum, rate)| *sum += rate);
        looks += 1;
        std::thread::sleep(Duration::from_millis(150));
    }
    assert!(looks >= 5, "they were over too soon");
    let reports = ids.map(|id| lab.alpha.over(&id));
    let (sent, took) = (lab.alpha.sent_by("pf0") + lab.alpha.sent_by("pf1") - sent, began.elapsed());
    let average: Vec<u64> = sums.iter().map(|sum| sum / looks).collect();
    println!("four at once: {average:?} bytes a second, {} MiB in {took:?}", sent / MIB);
    let (least, most) = (average.iter().min().unwrap(), average.iter().max().unwrap());
    assert!(*least > 0 && *most <= least * 2, "{average:?}");
    let all = sent as f64 / took.as_secs_f64() / MIB as f64;
    assert!(all < 16.0 * 1.25, "{all} MiB/s together");
    for (name, report) in names.iter().zip(&reports) {
        assert_eq!(report["state"], "completed", "{report:#}");
        lab.beta.check_whole(name);
    }
}

/// Guest memory a second, once it moves.
fn rate(migration: &Value) -> Option<u64> {
    let progress = &migration["progress"];
    (progress["phase"] == "pre-copy").then(|| progress["bytes_per_second"].as_u64()).flatten()
}

#[test]
fn a_host_file_holds_for_what_begins_after_it_was_read() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::up("--rate none");
    lab.alpha
        .configure("bandwidth_cap = \"8MiB/s\"\nperformance_option = \"tcp\"\ndowntime_limit = \"200ms\"");
    lab.alpha.start();
    lab.beta.start();
    start_small(&lab.alpha, "a");
    start_small(&lab.alpha, "b");
    let first = lab.alpha.begin("a", "--to beta");
    lab.alpha.in_phase(&first, "pre-copy");
    lab.alpha.reconfigure("bandwidth_cap = \"8MiB/s\"", "bandwidth_cap = \"1GiB/s\"");
    lab.alpha.reconfigure("\"tcp\"", "\"compression\"");
    lab.alpha.reconfigure("\"200ms\"", "\"500ms\"");
    let news = reload(&lab.alpha);
    assert!(news.contains("the host file was read again"), "{news}");
    let second = lab.alpha.over(&lab.alpha.begin("b", "--to beta"));
    let still = lab.alpha.migration(&first).expect("it is known");
    assert_eq!(still["state"], "running", "the cap that it began with does not hold: {still:#}");
    let first = lab.alpha.over(&first);
    for (report, mode, limit) in [(&first, "tcp", 0.2), (&second, "compression", 0.5)] {
        assert_eq!(
            (&report["state"], &report["mode_used"]),
            (&"completed".into(), &mode.into()),
            "{report:#}"
        );
        assert_eq!(report["downtime_limit_seconds"], limit, "{report:#}");
    }
    let seconds = first["total_seconds"].as_f64().expect("it took some time");
    assert!(seconds > 3.0, "32 MiB at 8 MiB/s took {seconds} s");

    // A host file that is wrong changes nothing, and is named with its line.
    let right = std::fs::read_to_string(lab.alpha.config()).expect("the host file is there");
    lab.alpha.reconfigure("\"500ms\"", "500");
    lab.alpha.reconfigure("\"compression\"", "\"tcp\"");
    let news = reload(&lab.alpha);
    let place = format!("{}:3: downtime_limit", lab.alpha.config().display());
    assert!(news.contains(&place) && news.contains("is not taken over"), "{news}");
    // Commands read it, too, to find the daemon.
    std::fs::write(lab.alpha.config(), right).expect("the host file is written");
    start_small(&lab.alpha, "c");
    let third = lab.alpha.over(&lab.alpha.begin("c", "--to beta"));
    let held = (&third["state"], &third["downtime_limit_seconds"], &third["mode_used"]);
    assert_eq!(held, (&"completed".into(), &0.5.into(), &"compression".into()), "{third:#}");

    only_one_daemon_has_a_state_directory(&lab);
}

fn only_one_daemon_has_a_state_directory(lab: &Lab) {
    let text = std::fs::read_to_string(lab.beta.config()).expect("the host file is there");
    let other = lab.beta.config().with_file_name("other.toml");
    let socket = |name: &str| format!("{}\"", lab.beta.config().with_file_name(name).display());
    std::fs::write(&other, text.replace(&socket("socket"), &socket("other"))).expect("it is written");
    let began = Instant::now();
    let serve = format!("{} serve --config {}", env!("CARGO_BIN_EXE_pageferry"), other.display());
    let (code, stdout, stderr) = said(&lab.beta.exec(&serve));
    assert!(began.elapsed() < PATIENCE);
    let pid = lab.beta.done("host")["pid"].as_u64().expect("it has a process");
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains(&format!("(process {pid})")) && stderr.contains("state_dir"), "{stderr}");
    lab.beta.check_whole("a");
}
