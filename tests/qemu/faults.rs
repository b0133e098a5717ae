//! What breaks on the way: the guest goes on at the source, and at no other place.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pageferry::testing::{Need, require};

use crate::ferry::{Ended, Ferry};
use crate::is_here;
use crate::vm::{MEMFD, PRIVATE, Vm, one_account};

/// A move that can be met at its beginning and in its middle: the guest writes faster than that, so it does not end by itself.
const SLOWLY: &str = "--mode tcp --max-bandwidth 24MiB --verbose";

/// The same, which ends when what is left is what the guest writes in two passes.
const SLOWLY_TO_ITS_END: &str = "--mode tcp --max-bandwidth 24MiB --downtime-limit 3s --verbose";

fn after(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// Both ends, under way.
struct Move {
    to: Vm,
    source: Ferry,
    destination: Ferry,
}

fn begin(here: &Path, vm: &Vm, name: &str, ram: &str, flags: &str) -> Move {
    let to = Vm::waiting(here, name, ram);
    let (destination, port) = Ferry::destination(&to, "");
    let mut source = Ferry::source(vm, port, flags);
    source.has_begun();
    Move { source, destination, to }
}

/// That the guest is where it was, and that the copy which was begun never ran.
fn goes_on(vm: &Vm, to: &Vm) {
    vm.ticks_on();
    assert_eq!(to.console(), "", "a guest ran at the destination");
}

#[test]
fn whatever_dies_the_guest_goes_on_at_the_source() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let vm = Vm::running(here, "vm", MEMFD);
    for (number, moment) in [0, 1500, 3000].into_iter().enumerate() {
        let flags = if number == 1 { format!("{SLOWLY} --no-return-path") } else { SLOWLY.to_owned() };
        let ram = if number == 2 { PRIVATE } else { MEMFD };
        let begin = |what: &str| begin(here, &vm, &format!("{what}{number}"), ram, &flags);

        let mut source_dies = begin("s");
        after(moment);
        source_dies.source.kill();
        let ended = source_dies.destination.end();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        goes_on(&vm, &source_dies.to);

        let mut destination_dies = begin("d");
        after(moment);
        destination_dies.destination.kill();
        destination_dies.source.end().rolled_back("");
        goes_on(&vm, &destination_dies.to);

        let mut qemu_dies = begin("q");
        after(moment);
        qemu_dies.to.kill();
        qemu_dies.source.end().rolled_back("QEMU has closed its QMP socket");
        assert_eq!(qemu_dies.destination.end().code, Some(1));
        goes_on(&vm, &qemu_dies.to);

        let cancelled = begin("c");
        after(moment);
        cancelled.source.interrupt();
        cancelled.source.end().rolled_back("the migration was cancelled");
        cancelled.destination.end().rolled_back("the migration was cancelled");
        goes_on(&vm, &cancelled.to);

        let mut waiting = begin("w");
        after(moment);
        waiting.destination.interrupt();
        waiting.destination.end().rolled_back("the migration was cancelled");
        waiting.source.end().rolled_back("the migration was cancelled");
        goes_on(&vm, &waiting.to);
        // A copy that must not run is ended.
        crate::vm::until("the destination QEMU's end", || waiting.to.has_ended());
    }
    // After all of that it still can move.
    let last = begin(here, &vm, "last", MEMFD, SLOWLY_TO_ITS_END);
    last.source.end().completed();
    last.destination.end().completed();
    last.to.ticks_on();
    one_account(&[vm.console(), last.to.console()]);
}

#[test]
fn a_source_qemu_that_dies_is_named_and_nothing_runs_elsewhere() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut vm = Vm::running(directory.path(), "vm", MEMFD);
    let under_way = begin(directory.path(), &vm, "to", MEMFD, SLOWLY);
    after(1500);
    vm.kill();
    let ended = under_way.source.end();
    assert_eq!(ended.code, Some(5), "the guest is lost: {ended:?}");
    assert!(ended.cause().contains("QEMU has closed its QMP socket"), "{ended:?}");
    assert_eq!(under_way.destination.end().code, Some(1));
    assert_eq!(under_way.to.console(), "");
}

/// Two hosts' networks, which two links join.
struct Links(String);

impl Links {
    fn up() -> Self {
        let links = Self(format!("q{}", std::process::id()));
        links.script("up --insecure --rate 400mbit --binary ", env!("CARGO_BIN_EXE_pageferry"));
        links
    }

    fn script(&self, words: &str, more: &str) {
        let (command, flags) = words.split_once(' ').unwrap_or((words, ""));
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/netns-lab");
        let mut lab = Command::new(script);
        lab.arg(command).args(["--name", &self.0]).args(flags.split_whitespace());
        let output =
            lab.args(Some(more).filter(|more| !more.is_empty())).output().expect("the script starts");
        assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn side(&self, side: &str) -> String {
        format!("{}-{side}", self.0)
    }

    fn begin(&self, here: &Path, vm: &Vm, name: &str, flags: &str) -> Move {
        let to = Vm::waiting(here, name, MEMFD);
        let listen = "--listen 10.77.0.2 --listen 10.77.1.2";
        let (destination, _) = Ferry::destination_in(Some(&self.side("beta")), &to, listen, "");
        let ways = "--to 10.77.0.1-10.77.0.2 --to 10.77.1.1-10.77.1.2";
        let mut source = Ferry::source_in(Some(&self.side("alpha")), &vm.qmp, &format!("{ways} {flags}"));
        source.has_begun();
        Move { to, source, destination }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/netns-lab");
        let down = Command::new(script).args(["down", "--kill", "--name", &self.0]).output();
        if let Err(error) = down {
            eprintln!("the links stay: {error}");
        }
    }
}

fn interfaces(ended: &Ended) -> Vec<String> {
    let channels = ended.result["channels"].as_array().cloned().unwrap_or_default();
    let with_bytes = channels.iter().filter(|channel| channel["bytes"].as_u64() > Some(0));
    let mut names: Vec<String> =
        with_bytes.filter_map(|channel| channel["interface"].as_str().map(str::to_owned)).collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn a_move_over_two_networks_survives_the_loss_of_one_and_not_of_both() {
    if !is_here() || !require(&[Need::Netns]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let links = Links::up();
    let vm = Vm::running(here, "vm", MEMFD);

    let both = links.begin(here, &vm, "none", SLOWLY);
    after(1500);
    links.script("link down 0", "");
    links.script("link down 1", "");
    both.source.end().rolled_back("");
    goes_on(&vm, &both.to);
    drop((both.destination, both.to));
    links.script("link up 0", "");
    links.script("link up 1", "");

    let one = links.begin(here, &vm, "one", SLOWLY_TO_ITS_END);
    after(1500);
    links.script("link down 1", "");
    let ended = one.source.end();
    ended.completed();
    one.destination.end().completed();
    assert_eq!(interfaces(&ended), ["pf0", "pf1"], "{ended:?}");
    let warnings = ended.result["warnings"].to_string();
    assert!(warnings.contains("was lost"), "{warnings}");
    one.to.ticks_on();
    one_account(&[vm.console(), one.to.console()]);
}
