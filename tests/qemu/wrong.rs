//! What is wrong before anything moves: one clear message each, and the guest goes on.

use std::path::PathBuf;

use serde_json::json;

use crate::ferry::{Ferry, move_to};
use crate::is_here;
use crate::vm::{MEMFD, Vm, one_account};

/// The account of a destination that does not even begin to wait.
fn refused(vm: &Vm, words: &str) {
    let (destination, _) = Ferry::destination(vm, "");
    destination.end().rolled_back(words);
}

#[test]
fn each_wrong_thing_has_one_clear_message() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let vm = Vm::running(here, "vm", MEMFD);

    let missing = PathBuf::from("/nowhere/vm.qmp");
    Ferry::source_in(None, &missing, "--to 127.0.0.1:9")
        .end()
        .rolled_back("no QEMU answers at /nowhere/vm.qmp");
    Ferry::source(&vm, 9, "")
        .end()
        .rolled_back("cannot connect over 127.0.0.1:9; check that pageferry listens there");

    // One that listens already cannot be told of multifd, and one that runs takes no guest.
    let address = format!("unix:{}", here.join("listens").display());
    let listens = Vm::start(here, "early", MEMFD, &["-incoming", &address]);
    let (destination, port) = Ferry::destination(&listens, "");
    Ferry::source(&vm, port, "").end().rolled_back("start it with -incoming defer");
    destination.end().rolled_back("start it with -incoming defer");
    refused(&vm, "start it with -incoming defer");

    let waits = Vm::waiting(here, "waits", MEMFD);
    Ferry::source(&waits, 9, "").end().rolled_back("has none to give");

    let small = "memory-backend-memfd,id=ram0,size=128M,share=on";
    let (_small, source, destination) = move_to(here, &vm, "small", small, "");
    let words = "RAM block ram0 has 256 MiB at the source and 128 MiB at the destination";
    source.rolled_back(words);
    destination.rolled_back(words);

    // Two clients at one QMP socket.
    let other = pageferry::guest::qemu::qmp::Qmp::connect(&vm.qmp).expect("a client");
    Ferry::source(&vm, 9, "").end().rolled_back("serves one client at a time");
    drop(other);

    vm.ask(
        "migrate-set-capabilities",
        &json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] }),
    );
    Ferry::source(&vm, 9, "").end().rolled_back("x-ignore-shared");
    vm.ticks_on();
}

/// Has QEMU encrypt its own channels.
fn encrypts(vm: &Vm, endpoint: &str) {
    vm.ask("object-add", &json!({ "qom-type": "tls-creds-anon", "id": "tls0", "endpoint": endpoint }));
    vm.ask("migrate-set-parameters", &json!({ "tls-creds": "tls0" }));
}

#[test]
fn what_qemu_encrypts_itself_is_carried_unseen() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let vm = Vm::running(here, "vm", MEMFD);
    encrypts(&vm, "client");

    let (_plain, source, destination) = move_to(here, &vm, "plain", MEMFD, "");
    source.rolled_back("TLS is set in QEMU (tls-creds) at the source only");
    destination.rolled_back("TLS is set in QEMU (tls-creds) at the source only");

    let to = Vm::waiting(here, "to", MEMFD);
    encrypts(&to, "server");
    let (destination, port) = Ferry::destination(&to, "");
    let source = Ferry::source(&vm, port, "").end();
    source.completed();
    destination.end().completed();
    let because = source.result["relay_because"].as_str().unwrap_or_default();
    assert!(because.contains("QEMU encrypts its channels itself"), "{source:?}");
    to.ticks_on();
    one_account(&[vm.console(), to.console()]);
}
