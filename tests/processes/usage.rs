//! Wrong input: one clear error, a code that is not 0, nothing lost.

use crate::demo::{Demo, Guest, pageferry};

#[track_caller]
fn refused(words: &str, code: i32, expected: &[&str]) {
    let output = pageferry(words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words}: {said}");
    assert!(output.stdout.is_empty(), "{words}: {}", String::from_utf8_lossy(&output.stdout));
    for part in expected {
        assert!(said.contains(part), "{words}: {said:?} should say {part:?}");
    }
    assert!(!said.contains("panicked"), "{words}: {said}");
}

#[test]
fn wrong_flags_are_named() {
    refused("demo --mode warp", 2, &["warp", "tcp, compression, rdma, auto"]);
    refused("demo --memory 0", 2, &["--memory", "needs some memory"]);
    refused("demo --memory lots", 2, &["lots"]);
    refused("demo --guest vmware", 2, &["vmware", "kvm, process"]);
    refused("demo --path here-there", 2, &["here-there"]);
    refused("demo --source-fault oops", 2, &["oops", "kill@POINT"]);
    refused("ferry", 2, &["ferry"]);
}

#[test]
fn a_path_that_cannot_be_bound_is_named() {
    // 192.0.2.0/24 is for documentation (RFC 5737) and on no interface; binding it is refused here, nothing is sent.
    refused("demo --guest process --memory 16MiB --path 127.0.0.1-192.0.2.77", 1, &["192.0.2.77"]);
}

#[test]
fn a_state_directory_that_cannot_be_is_named() {
    refused(
        "demo --guest process --memory 16MiB --state-dir /proc/nowhere",
        1,
        &["/proc/nowhere", "state directory"],
    );
}

#[test]
fn a_guest_larger_than_any_is_refused() {
    refused("demo --guest process --memory 100000GiB", 1, &["64 TiB"]);
}

#[test]
fn no_memory_at_the_destination_leaves_the_guest_at_the_source() {
    if !Guest::Process.is_here() {
        return;
    }
    let demo = Demo::run(Guest::Process, "--destination-fault no-memory@set-up");
    demo.check_rolled_back("of memory and this host has");
}
