//! RDMA on a real driver. A test boots hosts with soft-RoCE (`scripts/rxe-testbed`), puts this very program in, and runs others of
//! it there: those of [`inside`] and [`lying`] in one host, with the program's account of every way in which RDMA can be absent;
//! those of [`moving`] and [`relaying`] in two. Each boot takes a while, so there are few.

#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

mod hosts;
mod inside;
mod lying;
mod moving;
mod relaying;

use std::process::{Command, Output};

use pageferry::testing::{Need, require};

/// Takes RDMA apart piece by piece, and asks the program after each.
const TAKE_APART: &str = r#"
ask() { echo "== $1"; shift; "$@" pageferry rdma devices; echo "code $?"; }
user() { su -s /bin/sh nobody -c "$*"; }
ask usable env
ask json sh -c 'exec "$0" "$@" --json'
ulimit -l 64; ask user user
echo "== memlock"; ulimit -l 1024
user pageferry demo --mode rdma --guest process --memory 16MiB --dirty-rate 1MiB --path 10.78.0.1-10.78.0.1 --json --state-dir /tmp/nobody
echo "code $?"; ulimit -l unlimited
ip link set pf0 down; ask down env; ip link set pf0 up
ip address flush dev pf0; ask address env
chmod 600 /dev/infiniband/uverbs0; ask permission user
mv /usr/lib/x86_64-linux-gnu/libibverbs /tmp/drivers; ask driver env; mv /tmp/drivers /usr/lib/x86_64-linux-gnu/libibverbs
rm /dev/infiniband/uverbs0; ask node env
rdma link del rxe0; ask device env
rmmod rdma_rxe rdma_ucm ib_uverbs; ask kernel env
mv /usr/lib/x86_64-linux-gnu/libibverbs.so.1 /tmp; ask library env
"#;

/// Each part of it, and what the program must say there.
const ANSWERS: &[(&str, &str, &[&str])] = &[
    (
        "usable",
        "0",
        &["RDMA can be used", "rxe0 (/dev/infiniband/uverbs0): usable", "10.78.0.1 on pf0, roce-v2: usable"],
    ),
    ("json", "0", &["\"name\": \"rxe0\"", "\"reason\": null", "\"address\": \"10.78.0.1\""]),
    ("user", "0", &["may lock 65536 bytes"]),
    (
        "memlock",
        "0",
        &["\"mode_used\":\"tcp\"", "this process may lock 1048576 bytes of memory, and RDMA needs"],
    ),
    ("down", "1", &["RDMA cannot be used: the port is down"]),
    ("address", "1", &["RDMA cannot be used: the port has no RoCE v2 GID"]),
    ("permission", "1", &["this user may not open /dev/infiniband/uverbs0"]),
    ("driver", "1", &["no driver for uverbs0"]),
    ("node", "1", &["/dev/infiniband/uverbs0 is not there"]),
    ("device", "1", &["this host has no RDMA device"]),
    ("kernel", "1", &["load its module ib_uverbs"]),
    ("library", "1", &["the RDMA library libibverbs.so.1 does not load", "No such file or directory"]),
];

/// This program, to be put in, and the one under test.
fn put() -> [String; 4] {
    let this = std::env::current_exe().expect("the path of this test");
    let program = format!("{}:/usr/bin/pageferry", env!("CARGO_BIN_EXE_pageferry"));
    ["--put".to_owned(), program, "--put".to_owned(), format!("{}:/usr/bin/inside", this.display())]
}

fn testbed(arguments: &[&str], script: &str) -> Output {
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rxe-testbed"))
        .args(["run", "--time", "560"])
        .args(arguments)
        .args(["--", script])
        .output()
        .expect("the script starts")
}

/// Runs tests of [`moving`] on host 1 of two, whose daemons run. One that does not end well shows what they have logged.
fn in_two_hosts(which: &str, passed: usize) {
    let script = format!(
        "daemons && inside --ignored --test-threads=1 --nocapture {which} 2>&1
        code=$?
        [ $code = 0 ] || for host in 1 2; do echo \"== the daemon of host $host\"; on $host 'cat /var/log/pageferry.log'; done
        exit $code"
    );
    let put = put();
    let mut options = vec!["--hosts", "2", "--rails", "2"];
    options.extend(put.iter().map(String::as_str));
    let output = testbed(&options, &script);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    assert!(stdout.contains(&format!("test result: ok. {passed} passed")), "{stdout}\n{stderr}");
    println!("{stdout}");
}

#[test]
fn guests_move_between_two_hosts_by_rdma_and_without_it() {
    if require(&[Need::Rxe, Need::Qemu]) {
        in_two_hosts("--skip twenty moving::", 9);
    }
}

/// Where this machine's QEMU has its firmware.
fn firmware() -> Option<String> {
    let output = Command::new("qemu-system-x86_64").args(["-L", "help"]).output().ok()?;
    let directories = String::from_utf8(output.stdout).ok()?;
    let mut files = directories.lines().map(|directory| format!("{directory}/bios-256k.bin"));
    files.find(|file| std::path::Path::new(file).exists())
}

#[test]
fn a_stock_qemu_is_relayed_by_rdma() {
    if !require(&[Need::Rxe, Need::Qemu]) {
        return;
    }
    let qemu = String::from_utf8(Command::new("which").arg("qemu-system-x86_64").output().unwrap().stdout);
    let qemu = format!("{}:/usr/bin/qemu-system-x86_64", qemu.unwrap().trim());
    let firmware =
        format!("{}:/root/firmware/bios-256k.bin", firmware().expect("QEMU has firmware for a PC"));
    let put = put();
    let mut options =
        vec!["--hosts", "2", "--rails", "2", "--memory", "1024", "--put", &qemu, "--put", &firmware];
    options.extend(put.iter().map(String::as_str));
    let output = testbed(&options, "inside --ignored --test-threads=1 --nocapture relaying:: 2>&1");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    assert!(stdout.contains("test result: ok. 1 passed"), "{stdout}\n{stderr}");
    println!("{stdout}");
}

/// In hosts of their own, whose devices and daemons have done nothing else.
#[test]
fn twenty_migrations_by_rdma_leave_nothing_behind() {
    if require(&[Need::Rxe, Need::Qemu]) {
        in_two_hosts("moving::twenty", 1);
    }
}

#[test]
fn soft_roce_does_what_a_migration_asks_of_it() {
    if !require(&[Need::Rxe, Need::Qemu]) {
        return;
    }
    let script = format!(
        "rdma resource show >/tmp/before\ninside --ignored --test-threads=1 --skip locked inside:: lying:: || exit 1\n\
         (ulimit -l 64; su -s /bin/sh nobody -c 'inside --ignored locked') || exit 1\n\
         rdma resource show >/tmp/after\ncmp /tmp/before /tmp/after || {{ cat /tmp/before /tmp/after; exit 1; }}\n{TAKE_APART}"
    );
    let output = testbed(&put().each_ref().map(String::as_str), &script);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    for passed in ["test result: ok. 5 passed", "test result: ok. 1 passed"] {
        assert!(stdout.contains(passed), "{stdout}\n{stderr}");
    }
    for (part, code, words) in ANSWERS {
        let (_, rest) =
            stdout.split_once(&format!("== {part}\n")).unwrap_or_else(|| panic!("{part}: {stdout}"));
        let answer = rest.split("\n== ").next().unwrap_or(rest);
        assert!(answer.trim_end().ends_with(&format!("code {code}")), "{part}: {answer}\n{stderr}");
        for word in *words {
            assert!(answer.contains(word), "{part}: {word:?} is not in {answer}\n{stderr}");
        }
    }
}

#[test]
fn the_testbed_ends_with_the_code_and_the_files_of_its_command() {
    if !require(&[Need::Rxe, Need::Qemu]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let to = directory.path().to_str().expect("a path in UTF-8");
    let script = "echo one; echo two >&2; wire 1 off; sleep 1; rdma link >/tmp/links; on 2 'echo from $(hostname) >/tmp/two'
        ping -c 1 -W 2 host2 >/dev/null && exit 7";
    let options =
        ["--hosts", "2", "--rails", "2", "--quiet", "--get", "/tmp/links", "--get", "2:/tmp/two", "--to", to];
    let output = testbed(&options, script);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "one\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "two\n");
    let read =
        |name| std::fs::read_to_string(directory.path().join(name)).expect("a file that was brought back");
    assert_eq!(read("two"), "from host2\n");
    let links = read("links");
    assert!(links.contains("rxe0/1 state ACTIVE") && links.contains("rxe1/1 state DOWN"), "{links}");
}

/// A host without rdma-core must be able to start the program.
#[test]
fn the_program_is_not_linked_to_the_library() {
    let program = env!("CARGO_BIN_EXE_pageferry");
    let output =
        Command::new("readelf").args(["-d", program]).output().expect("readelf, which a C compiler brings");
    let needed = String::from_utf8_lossy(&output.stdout);
    assert!(needed.contains("libc.so.6"), "{needed}");
    assert!(!needed.contains("verbs") && !needed.contains("rdma"), "{needed}");
}
