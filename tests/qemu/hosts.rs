//! Two daemons on one machine, which reach each other over loopback, with host files, guests' processes and records of their own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::vm::{Vm, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pageferry");

/// A host. Its daemon, and the processes that it started, go with it.
pub(crate) struct Host {
    pub(crate) name: &'static str,
    directory: PathBuf,
    daemon: Option<Child>,
}

/// Two hosts whose daemons run.
pub(crate) fn two(here: &Path, alpha: &str, beta: &str) -> (Host, Host) {
    // Tests run at the same time, each as a process of its own.
    let base = 20_000 + (std::process::id() % 100) as u16 * 100;
    (Host::start(here, "alpha", base, alpha), Host::start(here, "beta", base + 50, beta))
}

impl Host {
    fn start(here: &Path, name: &'static str, port: u16, more: &str) -> Self {
        let directory = here.join(name);
        fs::create_dir_all(&directory).expect("a directory");
        let peer = if name == "alpha" { ("beta", port + 50) } else { ("alpha", port - 50) };
        let file = format!(
            "name = \"{name}\"\nport = {port}\nmigration_ports = \"{}-{}\"\nstate_dir = \"{}\"\nsocket = \"{}\"\n{more}\n\
             [peers]\n{} = \"127.0.0.1:{}\"\n",
            port + 1,
            port + 40,
            directory.join("state").display(),
            directory.join("api.sock").display(),
            peer.0,
            peer.1
        );
        fs::write(directory.join("host.toml"), file).expect("a host file");
        let mut host = Self { name, directory, daemon: None };
        host.serve();
        host
    }

    /// Starts the daemon, and waits until it answers.
    pub(crate) fn serve(&mut self) {
        let log = File::options().create(true).append(true).open(self.directory.join("log")).expect("a log");
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--allow-faults", "--config"]).arg(self.directory.join("host.toml"));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.daemon = Some(command.spawn().expect("the daemon starts"));
        until("the daemon's answer", || self.run("host").status.success());
    }

    /// `kill -9`; what it started lives on.
    pub(crate) fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // It may have ended.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    pub(crate) fn run(&self, words: &str) -> Output {
        let mut command = Command::new(PROGRAM);
        command.args(words.split_whitespace()).arg("--config").arg(self.directory.join("host.toml"));
        command.output().expect("the command line starts")
    }

    /// A command's exit code and what it prints with `--json`.
    pub(crate) fn json(&self, words: &str) -> (i32, Value) {
        let output = self.run(&format!("{words} --json"));
        let value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        (output.status.code().unwrap_or(-1), value)
    }

    /// Moves a guest to beta and waits for the end.
    pub(crate) fn moves(&self, vm: &Vm, to: &Vm, flags: &str) -> (i32, Value) {
        self.json(&format!("migrate {} --to beta --incoming {} {flags}", named(vm), named(to)))
    }

    /// Begins to move a guest to beta, and answers the migration's identifier when QEMU sends.
    pub(crate) fn begin(&self, vm: &Vm, to: &Vm, flags: &str) -> String {
        let (code, begun) = self.moves(vm, to, &format!("{flags} --detach"));
        assert_eq!(code, 0, "{begun:#}");
        let id = begun["id"].as_str().expect("an identifier").to_owned();
        until("QEMU sends", || {
            let (_, now) = self.json(&format!("status {id}"));
            let over = ["rolled_back", "lost"].iter().any(|state| now["state"] == *state);
            assert!(!over, "{now:#}");
            now["progress"]["phase"] == "pre-copy"
        });
        id
    }

    /// A migration once it is over.
    pub(crate) fn over(&self, id: &str) -> Value {
        let mut last = Value::Null;
        until(&format!("the end of migration {id} at {}", self.name), || {
            last = self.json(&format!("status {id}")).1;
            ["completed", "rolled_back", "lost"].iter().any(|state| last["state"] == *state)
        });
        last
    }

    /// The process that carries the guest here.
    pub(crate) fn carrier(&self) -> String {
        let (_, guests) = self.json("guest list");
        let pid = guests[0]["pid"].as_u64();
        pid.unwrap_or_else(|| panic!("no process: {guests:#}")).to_string()
    }

    /// That nothing is left of any migration: no guest, no slot, no process.
    pub(crate) fn is_tidy(&self) {
        until(&format!("{} to be tidy", self.name), || {
            let (_, guests) = self.json("guest list");
            let (_, host) = self.json("host");
            guests == serde_json::json!([])
                && (host["outgoing"] == 0 && host["incoming"] == 0)
                && self.sockets().is_empty()
                && self.files("guests").is_empty()
                && self.files("migrations").is_empty()
        });
    }

    fn files(&self, what: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.directory.join("state").join(what)).expect("the state directory");
        entries.flatten().map(|entry| entry.path()).collect()
    }

    fn sockets(&self) -> Vec<PathBuf> {
        self.files("run")
    }
}

/// `qemu:PATH`.
pub(crate) fn named(vm: &Vm) -> String {
    format!("qemu:{}", vm.qmp.display())
}

/// `kill -9` to a process by its number.
pub(crate) fn kill(pid: &str) {
    let killed = Command::new("kill").args(["-9", pid]).status().expect("kill starts");
    assert!(killed.success());
}

impl Drop for Host {
    fn drop(&mut self) {
        // What it started ends by itself: it has no guest, and nobody is heard any more. Sooner, where there is a way to tell it.
        for socket in self.sockets() {
            use std::io::Write as _;
            if let Ok(mut process) = std::os::unix::net::UnixStream::connect(socket) {
                let _ = process.write_all(b"{\"command\":\"cancel\"}\n{\"command\":\"stop\"}\n");
            }
        }
        self.kill();
        if std::thread::panicking() {
            eprintln!("== {}\n{}", self.name, self.log());
            for log in self.files("log") {
                eprintln!("-- {}\n{}", log.display(), fs::read_to_string(&log).unwrap_or_default());
            }
        }
    }
}
