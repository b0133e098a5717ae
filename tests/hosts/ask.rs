//! What several tests want to know of a host or an answer.

use std::process::Output;

use serde_json::Value;

use crate::lab::Host;

/// A program's exit code, and what it wrote to stdout and stderr.
pub(crate) fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Runs a program on a host that has to succeed.
#[track_caller]
pub(crate) fn on(host: &Host, words: &str) -> String {
    let (code, stdout, stderr) = said(&host.exec(words));
    assert_eq!(code, 0, "{words} at {}: {stderr}", host.side);
    stdout
}

/// The elements of a JSON array.
#[track_caller]
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("no list: {value:#}"))
}

/// The channels of a migration on an interface of the source: how many, how many of them were lost, and their bytes.
pub(crate) fn channels(migration: &Value, interface: &str) -> (usize, usize, u64) {
    let on_it: Vec<&Value> =
        list(&migration["channels"]).iter().filter(|channel| channel["interface"] == interface).collect();
    let lost = on_it.iter().filter(|channel| channel["lost"] == true).count();
    let bytes = on_it.iter().map(|channel| channel["bytes"].as_u64().unwrap_or(0)).sum();
    (on_it.len(), lost, bytes)
}

/// How an interface takes part in a migration under way.
pub(crate) fn link(migration: &Value, interface: &str) -> Option<Value> {
    let links = migration["progress"]["links"].as_array()?;
    links.iter().find(|link| link["interface"] == interface).cloned()
}

/// The check of this name, in the answer of `pageferry check`.
#[track_caller]
pub(crate) fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let found = list(&report["checks"]).iter().find(|check| check["name"] == name);
    found.unwrap_or_else(|| panic!("no check {name}: {report:#}"))
}

/// The names of the checks that failed.
pub(crate) fn failed(report: &Value) -> Vec<&str> {
    let checks = list(&report["checks"]).iter().filter(|check| check["status"] == "failed");
    checks.filter_map(|check| check["name"].as_str()).collect()
}

/// Begins a migration that has to end well, and answers its account.
#[track_caller]
pub(crate) fn moved(host: &Host, name: &str, flags: &str) -> Value {
    let id = host.begin(name, flags);
    let report = host.over(&id);
    assert_eq!(report["state"], "completed", "{report:#}");
    report
}

/// Has a daemon read its host file again, and waits until it has. Answers what it logged about that.
#[track_caller]
pub(crate) fn reload(host: &Host) -> String {
    let before = host.log().len();
    host.signal("HUP");
    host.wait_for("the host file to be read again", |host| {
        let news = host.log().split_off(before);
        let done = news.contains("the host file was read again") || news.contains("is not taken over");
        done.then_some(news)
    })
}
