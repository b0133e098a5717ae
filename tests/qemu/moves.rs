//! Guests that arrive.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::ferry::{Ferry, move_to};
use crate::is_here;
use crate::vm::{MEMFD, PRIVATE, Vm, one_account};

#[test]
fn a_live_guest_moves_in_every_way_and_goes_on_without_a_gap() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let mut vm = Vm::running(here, "vm0", MEMFD);
    let mut consoles = Vec::new();
    let ways: [(&str, &str, bool); 8] = [
        (MEMFD, "--mode tcp", true),
        (MEMFD, "--mode compression --multifd-channels 1", true),
        (MEMFD, "--mode tcp --no-return-path --multifd-channels 4", true),
        (MEMFD, "--mode compression --no-return-path --channels 1", true),
        (MEMFD, "--mode tcp --whole-packets --multifd-channels 4", false),
        (PRIVATE, "--mode compression --whole-packets --no-return-path", false),
        (PRIVATE, "--mode tcp --multifd-channels 1", false),
        (MEMFD, "--mode compression --channels 4 --multifd-channels 4", false),
    ];
    for (number, (ram, flags, placed)) in ways.into_iter().enumerate() {
        let (next, source, destination) = move_to(here, &vm, &format!("vm{}", number + 1), ram, flags);
        println!("{flags}: {}", source.result);
        source.completed();
        destination.completed();
        let blocks = source.result["placed_blocks"].as_array().expect("a list").len();
        assert_eq!(blocks, usize::from(placed), "{flags}: {source:?}");
        assert!(placed || source.result["relay_because"].is_string(), "{flags}: {source:?}");
        assert_eq!(source.result["guest_status_here"], "postmigrate");
        assert!(source.result["downtime_seconds"].as_f64().is_some(), "{source:?}");
        next.ticks_on();
        // The one that it left writes nothing any more.
        consoles.push(vm.console());
        vm = next;
    }
    consoles.push(vm.console());
    one_account(&consoles);
}

/// Random pages, text, and holes, in a file; the same for both ends' sizes.
fn fill(path: &Path, bytes: u64) {
    let mut file = fs::File::create(path).expect("a file");
    let mut random = fs::File::open("/dev/urandom").expect("random bytes");
    let half = bytes / 2;
    std::io::copy(&mut std::io::Read::take(&mut random, half), &mut file).expect("random pages");
    file.set_len(bytes).expect("its length");
    file.write_all(&b"text that compresses well ".repeat(1 << 20)).expect("text");
    file.write_all_at(&[7; 100], bytes - 100).expect("the last page");
}

fn same(one: &Path, other: &Path) -> bool {
    std::process::Command::new("cmp").arg(one).arg(other).status().expect("cmp starts").success()
}

#[test]
fn a_paused_guest_has_the_same_gibibyte_at_both_ends_and_stays_paused() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let here = directory.path();
    for (number, flags) in ["--mode tcp", "--mode compression --no-return-path", "--mode tcp --whole-packets"]
        .into_iter()
        .enumerate()
    {
        let file = |side: &str| here.join(format!("{side}{number}.ram"));
        let ram = |side: &str| {
            format!("memory-backend-file,id=ram0,size=1G,share=on,mem-path={}", file(side).display())
        };
        fill(&file("a"), 1 << 30);
        let b = fs::File::create(file("b")).expect("a file");
        b.set_len(1 << 30).expect("its length");
        // What the destination's file held before must not shine through where the guest has zeros. QEMU itself, which copies
        // whole packets, takes it that a file is fresh.
        if !flags.contains("--whole-packets") {
            b.write_all_at(&[9; 8192], 900 << 20).expect("an old page");
            (&b).write_all(&vec![0xff; 64 << 20]).expect("old pages");
        }
        let source = Vm::start(here, &format!("a{number}"), &ram("a"), &["-S"]);
        let (destination, ended, _) = move_to_waiting(here, &source, &format!("b{number}"), &ram("b"), flags);
        println!("{flags}: {}", ended.result);
        // As the guest of the source, which never ran.
        assert_eq!(destination.status(), "prelaunch");
        assert!(same(&file("a"), &file("b")), "{flags}: the RAM files differ");
        drop((source, destination));
        fs::remove_file(file("a")).and_then(|()| fs::remove_file(file("b"))).expect("files");
    }
}

fn move_to_waiting(
    here: &Path,
    source: &Vm,
    name: &str,
    ram: &str,
    flags: &str,
) -> (Vm, crate::ferry::Ended, crate::ferry::Ended) {
    let (vm, ended, other) = move_to(here, source, name, ram, flags);
    ended.completed();
    other.completed();
    (vm, ended, other)
}

#[test]
fn a_secret_that_both_know_lets_a_guest_in_and_no_other() {
    if !is_here() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let secret = |name: &str, digit: &str| {
        let path = here.join(name);
        fs::write(&path, format!("{}\n", digit.repeat(64))).expect("a secret");
        format!("--secret-file {}", path.display())
    };
    let (right, wrong) = (secret("right", "a"), secret("wrong", "b"));
    let vm = Vm::running(here, "a", MEMFD);
    let to = Vm::waiting(here, "b", MEMFD);
    let (destination, port) = Ferry::destination(&to, &right);
    for flags in ["", wrong.as_str()] {
        Ferry::source(&vm, port, flags)
            .end()
            .rolled_back("the secret that the migration begins with is wrong");
    }
    vm.ticks_on();
    Ferry::source(&vm, port, &right).end().completed();
    destination.end().completed();
    to.ticks_on();
    one_account(&[vm.console(), to.console()]);
}
