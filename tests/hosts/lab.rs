//! Two hosts for a test, and what can be done to them. They go away with the test, and every process on them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use pageferry::testing::{Need, require};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pageferry");
/// Whatever a test waits for comes within this, or never.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

/// Whether this machine has what two hosts and a guest need.
pub(crate) fn is_here() -> bool {
    require(&[Need::Netns, Need::Kvm, Need::Uffd])
}

/// Two hosts, `alpha` and `beta`.
pub(crate) struct Lab {
    name: String,
    directory: PathBuf,
    pub(crate) alpha: Host,
    pub(crate) beta: Host,
}

impl Lab {
    /// Makes the hosts, with their daemons not running yet. `flags` are those of `scripts/netns-lab up`.
    pub(crate) fn up(flags: &str) -> Self {
        let name = format!("h{}", std::process::id());
        let directory = PathBuf::from(format!("/run/pageferry-lab-{name}"));
        let host = |side: &'static str| Host {
            side,
            namespace: format!("{name}-{side}"),
            directory: directory.join(side),
            daemon: None,
        };
        let (alpha, beta) = (host("alpha"), host("beta"));
        let lab = Self { name, directory, alpha, beta };
        lab.script(&format!("up --binary {PROGRAM} {flags}"));
        lab
    }

    /// The same, with both daemons running.
    pub(crate) fn running(flags: &str) -> Self {
        let mut lab = Self::up(flags);
        lab.alpha.start();
        lab.beta.start();
        lab
    }

    /// Runs `scripts/netns-lab`.
    pub(crate) fn script(&self, words: &str) -> String {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/netns-lab");
        let (command, flags) = words.split_once(' ').unwrap_or((words, ""));
        let output = Command::new(script)
            .arg(command)
            .args(["--name", &self.name, "--dir"])
            .arg(&self.directory)
            .args(flags.split_whitespace())
            .output()
            .expect("the script starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "netns-lab {words}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Makes a certificate authority and certificates anew or elsewhere: where the lab keeps them.
    pub(crate) fn pki(&self) -> PathBuf {
        self.directory.join("pki")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in [&self.alpha, &self.beta] {
                eprintln!("== what {}'s daemon logged\n{}", host.side, host.log());
            }
        }
        // Waited for here: the script would take a dead child of this process for one that lives on.
        for host in [&mut self.alpha, &mut self.beta] {
            if let Some(mut daemon) = host.daemon.take() {
                let _ = daemon.kill();
                let _ = daemon.wait();
            }
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/netns-lab");
        let down = Command::new(script)
            .args(["down", "--kill", "--name", &self.name, "--dir"])
            .arg(&self.directory)
            .output();
        if !down.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("the lab {} is left over: {down:?}", self.name);
        }
    }
}

/// One of the two.
pub(crate) struct Host {
    pub(crate) side: &'static str,
    namespace: String,
    directory: PathBuf,
    daemon: Option<Child>,
}

impl Host {
    /// The host file.
    pub(crate) fn config(&self) -> PathBuf {
        self.directory.join("host.toml")
    }

    /// Adds lines at the top of the host file, before any table.
    pub(crate) fn configure(&self, lines: &str) {
        let before = fs::read_to_string(self.config()).expect("the host file is there");
        fs::write(self.config(), format!("{lines}\n{before}")).expect("the host file is written");
    }

    /// Replaces a part of the host file.
    pub(crate) fn reconfigure(&self, part: &str, by: &str) {
        let before = fs::read_to_string(self.config()).expect("the host file is there");
        assert!(before.contains(part), "{part:?} in {before}");
        fs::write(self.config(), before.replace(part, by)).expect("the host file is written");
    }

    /// What the daemon has logged, over all its lives.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.join("daemon.log")).unwrap_or_default()
    }

    /// Starts the daemon, and waits until it answers.
    pub(crate) fn start(&mut self) {
        self.start_with("");
    }

    /// The same with more flags.
    pub(crate) fn start_with(&mut self, flags: &str) {
        self.spawn(flags);
        self.wait_for("the daemon to answer", |host| host.run("host").status.success().then_some(()));
    }

    /// Starts the daemon, which need not come up.
    pub(crate) fn spawn(&mut self, flags: &str) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.join("daemon.log"))
            .expect("the log opens");
        let child = Command::new("ip")
            .args(["netns", "exec", &self.namespace, PROGRAM, "serve", "--allow-faults", "--config"])
            .arg(self.config())
            .args(flags.split_whitespace())
            .env_remove("PAGEFERRY_CONFIG")
            .stdout(log.try_clone().expect("the log is shared"))
            .stderr(log)
            .spawn()
            .expect("the daemon starts");
        self.daemon = Some(child);
    }

    /// Waits for a daemon that ends by itself, and answers whether it ended well.
    pub(crate) fn ended(&mut self) -> bool {
        self.daemon.take().expect("it was started").wait().expect("it is waited for").success()
    }

    /// Sends the daemon a signal: `KILL`, `HUP`, `TERM`.
    pub(crate) fn signal(&self, signal: &str) {
        // `ip netns exec` becomes the program.
        let pid = self.daemon.as_ref().expect("it runs").id();
        let sent =
            Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status().expect("kill starts");
        assert!(sent.success(), "{signal} to {}", self.side);
    }

    /// Kills the daemon; its guests live on.
    pub(crate) fn kill(&mut self) {
        self.signal("KILL");
        self.ended();
    }

    /// Runs the command line against this host's daemon.
    pub(crate) fn run(&self, words: &str) -> Output {
        self.command(words).output().expect("the program starts")
    }

    /// The same, in the background.
    pub(crate) fn command(&self, words: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(words.split_whitespace())
            .env("PAGEFERRY_CONFIG", self.config())
            .env_remove("PAGEFERRY_LOG");
        command
    }

    /// Runs a command and reads its JSON, with the exit code.
    #[track_caller]
    pub(crate) fn json(&self, words: &str) -> (i32, Value) {
        let output = self.run(&format!("{words} --json"));
        let stdout = String::from_utf8_lossy(&output.stdout);
        let value = serde_json::from_str(&stdout).unwrap_or_else(|error| {
            panic!("{words}: no JSON ({error}): {stdout:?}; {}", String::from_utf8_lossy(&output.stderr))
        });
        (output.status.code().unwrap_or(-1), value)
    }

    /// Runs a command that has to succeed, and reads its JSON.
    #[track_caller]
    pub(crate) fn done(&self, words: &str) -> Value {
        let (code, value) = self.json(words);
        assert_eq!(code, 0, "{words}: {value:#}");
        value
    }

    /// Starts a small KVM guest that dirties its memory.
    #[track_caller]
    pub(crate) fn start_guest(&self, name: &str, flags: &str) {
        self.done(&format!("guest start --name {name} --memory 64MiB --dirty-rate 20MiB {flags}"));
    }

    /// The state of a guest here, or `none`.
    pub(crate) fn guest_state(&self, name: &str) -> String {
        let guests = self.done("guest list");
        let guest = guests.as_array().expect("a list").iter().find(|guest| guest["name"] == name).cloned();
        guest.map_or("none".into(), |guest| guest["state"].as_str().expect("a state").to_owned())
    }

    /// The guest runs here and finds its memory whole.
    #[track_caller]
    pub(crate) fn check_whole(&self, name: &str) {
        assert_eq!(self.guest_state(name), "running", "{name} at {}", self.side);
        let (code, seen) = self.json(&format!("guest verify {name}"));
        assert_eq!((code, &seen["seen"]["corrupt"]), (0, &Value::from(0)), "{seen:#}");
    }

    /// The process that holds a guest.
    pub(crate) fn guest_pid(&self, name: &str) -> u64 {
        self.done(&format!("guest show {name}"))["pid"].as_u64().expect("a process holds it")
    }

    /// The migration of a guest, under way or over.
    pub(crate) fn migration(&self, id: &str) -> Option<Value> {
        let (code, value) = self.json(&format!("status {id}"));
        (code == 0).then_some(value)
    }

    /// Begins to move a guest and answers the migration's identifier.
    #[track_caller]
    pub(crate) fn begin(&self, name: &str, flags: &str) -> String {
        let begun = self.done(&format!("migrate {name} --detach {flags}"));
        begun["id"].as_str().expect("it has an identifier").to_owned()
    }

    /// Waits until a migration is over here, and answers it.
    #[track_caller]
    pub(crate) fn over(&self, id: &str) -> Value {
        self.wait_for(&format!("the end of migration {id}"), |host| {
            let migration = host.migration(id)?;
            let over = ["completed", "rolled_back", "lost"].iter().any(|state| migration["state"] == *state);
            over.then_some(migration)
        })
    }

    /// Waits until a migration is in a phase.
    #[track_caller]
    pub(crate) fn in_phase(&self, id: &str, phase: &str) {
        self.wait_for(&format!("phase {phase}"), |host| {
            (host.migration(id)?["progress"]["phase"] == phase).then_some(())
        });
    }

    /// Waits for something.
    #[track_caller]
    pub(crate) fn wait_for<T>(&self, what: &str, look: impl Fn(&Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(seen) = look(self) {
                return seen;
            }
            assert!(began.elapsed() < PATIENCE, "{}: waited in vain for {what}\n{}", self.side, self.log());
            std::thread::sleep(LOOK);
        }
    }

    /// Bytes that an interface of this host has sent.
    pub(crate) fn sent_by(&self, interface: &str) -> u64 {
        let file = format!("/sys/class/net/{interface}/statistics/tx_bytes");
        let output = Command::new("ip")
            .args(["netns", "exec", &self.namespace, "cat", &file])
            .output()
            .expect("ip starts");
        String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or(0)
    }

    /// Runs a program on this host.
    pub(crate) fn exec(&self, words: &str) -> Output {
        let words = words.split_whitespace();
        Command::new("ip").args(["netns", "exec", &self.namespace]).args(words).output().expect("ip starts")
    }
}
