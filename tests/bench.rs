//! `pageferry bench`: both ends as real processes.
#![allow(clippy::panic, reason = "a test")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};

use pageferry::testing::{Need, require};
use serde_json::Value;

fn pageferry(words: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pageferry"))
        .args(words.split_whitespace())
        .env_remove("PAGEFERRY_LOG")
        .output()
        .expect("the program starts")
}

/// A measurement that went well, as JSON.
#[track_caller]
fn measured(words: &str) -> Value {
    let output = pageferry(&format!("{words} --json"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{words}: {stderr}");
    let report: Value =
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{words}: {error}: {stdout}"));
    for case in report["cases"].as_array().expect("cases") {
        assert_eq!(case["verified"], true, "{words}: {case:#}");
    }
    report
}

#[track_caller]
fn refused(words: &str, code: i32, expected: &[&str]) {
    let output = pageferry(words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words}: {said}");
    for part in expected {
        assert!(said.contains(part), "{words}: {said:?} should say {part:?}");
    }
    assert!(output.stdout.is_empty() && !said.contains("panicked"), "{words}: {said}");
}

/// A receiving end that listens at a port of its own.
struct Server {
    child: Child,
    at: String,
}

impl Server {
    fn start(flags: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pageferry"))
            .args(["bench", "server", "--listen", "127.0.0.1:0"])
            .args(flags.split_whitespace())
            .env_remove("PAGEFERRY_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
        let (_, rest) = line.split_once("Listening on ").unwrap_or_else(|| panic!("{line:?}"));
        let (at, warning) = rest.split_once(". ").unwrap_or_else(|| panic!("{line:?}"));
        assert!(warning.contains("does not ask who comes"), "{line:?}");
        Self { child, at: at.to_owned() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_mode_is_measured_and_what_cannot_be_says_why() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let report = measured("bench local --mode all --memory 64MiB --channels 1,3 --runs 2");
    let cases = report["cases"].as_array().expect("a list");
    let found: Vec<_> = cases
        .iter()
        .map(|case| (case["mode"].as_str().expect("a mode"), case["channels"].as_u64()))
        .collect();
    let expected = [("tcp", Some(1)), ("tcp", Some(3)), ("compression", Some(1)), ("compression", Some(3))];
    assert_eq!(found, expected);
    for case in cases {
        let figure = |name: &str| case[name].as_f64().unwrap_or_else(|| panic!("{name} of {case:#}"));
        assert_eq!(figure("bytes"), f64::from(64 << 20), "{case:#}");
        assert!(
            (64 << 20..66 << 20).contains(&(figure("wire_bytes") as u64)),
            "random bytes do not shrink: {case:#}"
        );
        for name in ["seconds", "bytes_per_second", "source_cpu_seconds", "destination_cpu_seconds"] {
            assert!(figure(name) > 0.0, "{name} of {case:#}");
        }
        let latency =
            |name: &str| case["latency_us"][name].as_u64().unwrap_or_else(|| panic!("{name}: {case:#}"));
        let rising = ["p50", "p90", "p99", "p999", "max"].map(latency);
        assert!(rising.is_sorted() && rising[0] > 0, "{case:#}");
        // 64 MiB in two runs; batches of 1 MiB at most.
        assert!(latency("count") >= 128, "{case:#}");
        assert!(figure("destination_page_faults") > 0.0, "{case:#}");
        assert!(case["engine_memory_bytes"]["source"].as_u64() < Some(64 << 20), "{case:#}");
        assert_eq!(case["interfaces"][0]["interface"], "lo", "{case:#}");
        assert_eq!(case["runs"].as_array().map(Vec::len), Some(2), "{case:#}");
        assert!(case["bottleneck_reason"].as_str().is_some_and(|reason| reason.len() > 20), "{case:#}");
        let split = &case["time_split"];
        let sum: f64 = ["scan_seconds", "compress_seconds", "send_seconds", "wait_seconds"]
            .map(|part| split[part].as_f64().expect("seconds"))
            .iter()
            .sum();
        assert!(sum > 0.0, "{case:#}");
    }
    assert_eq!(report["skipped"][0]["mode"], "rdma");
    assert!(report["skipped"][0]["reason"].as_str().is_some_and(|why| why.contains("RDMA")), "{report:#}");
    assert!(report["source"]["cores"].as_u64() >= Some(1), "{report:#}");
    refused("bench --mode rdma --memory 16MiB", 1, &["nothing can be measured: this host has no RDMA"]);
}

#[test]
fn each_fill_arrives_as_it_is() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let image = tempfile::NamedTempFile::new().expect("a file");
    let text: Vec<u8> = (0..5_000_001u32).map(|n| (n % 7 * (n >> 12)) as u8).collect();
    std::fs::write(image.path(), text).expect("it is written");
    let file = format!("file:{}", image.path().display());
    for (fill, wire_at_most) in
        [("zero", 1 << 20), ("text", 64 << 20), ("sparse:5%", 5 << 20), (file.as_str(), 6 << 20)]
    {
        let memory = if fill.starts_with("file") { "" } else { "--memory 64MiB" };
        let report = measured(&format!("bench --mode tcp,compression --channels 2 {memory} --fill {fill}"));
        for case in report["cases"].as_array().expect("a list") {
            assert!(case["wire_bytes"].as_u64() <= Some(wire_at_most + (1 << 16)), "{fill}: {case:#}");
            assert_eq!(case["fill"], fill);
        }
    }
}

#[test]
fn what_is_written_meanwhile_arrives_too_and_warm_memory_is_clean() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let dirty =
        "bench --mode tcp,compression --channels 2 --memory 64MiB --dirty-rate 20MiB --duration 700ms";
    let report = measured(dirty);
    for case in report["cases"].as_array().expect("a list") {
        assert!(case["rounds"].as_u64() > Some(2), "{case:#}");
        assert!(case["seconds"].as_f64() >= Some(0.7), "{case:#}");
    }
    // Twice into the same memory, of which the sender leaves most untouched.
    let again = measured("bench --mode tcp --channels 1 --memory 64MiB --fill sparse:25% --warm --runs 2");
    assert_eq!(again["cases"][0]["warm"], true);
    let repeated = measured("bench --mode tcp --channels 1 --memory 16MiB --duration 300ms");
    assert!(repeated["cases"][0]["bytes"].as_u64() > Some(16 << 20), "{repeated:#}");
}

#[test]
fn a_server_takes_one_client_after_the_other() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let server = Server::start("");
    for paths in ["", "--path 127.0.0.2-127.0.0.1"] {
        let report = measured(&format!("bench client {} --mode tcp --memory 16MiB {paths}", server.at));
        assert_eq!(report["one_machine"], false);
    }
    // Little of it is in use at the source, but all of it would be populated at the destination.
    let greedy = format!("bench client {} --mode tcp --memory 256GiB --fill sparse:0.02% --warm", server.at);
    refused(&greedy, 1, &["the other end refuses", "are left", "--memory"]);
    let fine = measured(&format!("bench client {} --mode tcp --channels 1 --memory 16MiB", server.at));
    assert_eq!(fine["cases"].as_array().map(Vec::len), Some(1));
    drop(server);
    let mut once = Server::start("--once");
    measured(&format!("bench client {} --mode tcp --channels 1 --memory 16MiB", once.at));
    let status = once.child.wait().expect("it ends");
    let mut said = String::new();
    let _ = once.child.stderr.take().expect("a pipe").read_to_string(&mut said);
    assert!(status.success(), "{status}: {said}");
}

#[test]
fn results_are_compared_swept_and_drawn() {
    if !require(&[Need::Uffd]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (baseline, page) = (dir.path().join("baseline.json"), dir.path().join("page.html"));
    let flags = "bench --mode tcp --channels 1 --memory 16MiB";
    let first = measured(flags);
    std::fs::write(&baseline, first.to_string()).expect("it is written");
    let report = measured(&format!("{flags} --compare {} --report {}", baseline.display(), page.display()));
    let ratio = report["comparison"][0]["bytes_per_second"].as_f64().expect("a ratio");
    let rate = |report: &Value| report["cases"][0]["bytes_per_second"].as_f64().expect("a rate");
    assert!((ratio - rate(&report) / rate(&first)).abs() < 1e-6, "{report:#}");
    let html = std::fs::read_to_string(&page).expect("a page");
    assert_eq!(html.matches("<svg ").count(), 3, "{html}");
    let output = pageferry("bench --mode tcp --channels 1,2 --memory 16MiB --sweep");
    let text = String::from_utf8_lossy(&output.stdout);
    for words in
        ["64 KiB", "4 MiB", "Best: tcp", "performance_option = \"tcp\"", "channels_per_path = ", "limited by"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }
    std::fs::write(&baseline, "{\"cases\": [").expect("it is written");
    refused(&format!("{flags} --compare {}", baseline.display()), 1, &["baseline.json", "no result"]);
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    refused("bench --fill noise", 2, &["noise", "sparse:5%"]);
    refused("bench --fill file:/nowhere/image --mode tcp", 1, &["/nowhere/image"]);
    refused("bench --memory 60TiB --mode tcp", 1, &["are left", "--memory"]);
    refused("bench --path 127.0.0.1-192.0.2.77 --memory 16MiB", 1, &["192.0.2.77"]);
    refused("bench --dirty-rate 1MiB", 2, &["--duration"]);
    // A port that nothing listens at: the first that is left for that (RFC 6335, tcpmux).
    refused("bench client 127.0.0.1:1 --memory 16MiB", 1, &["127.0.0.1:1"]);
    refused("bench client no.such.host.invalid --memory 16MiB", 1, &["no.such.host.invalid"]);
}
