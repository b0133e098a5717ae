//! The two pageferries of a move.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::vm::{PATIENCE, Vm};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pageferry");

/// A running `pageferry relay`.
pub(crate) struct Ferry {
    child: Child,
    stderr: BufReader<ChildStderr>,
    heard: String,
    ended: bool,
}

/// How one ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) result: Value,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn cause(&self) -> String {
        format!("{} {}", self.result["cause"].as_str().unwrap_or_default(), self.stderr)
    }

    /// That the guest has moved.
    pub(crate) fn completed(&self) -> &Self {
        assert_eq!((self.code, self.result["outcome"].as_str()), (Some(0), Some("completed")), "{self:?}");
        self
    }

    /// That it goes on at the source, because of something with these words.
    pub(crate) fn rolled_back(&self, words: &str) -> &Self {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert!(self.cause().contains(words), "{words:?} is not in {self:?}");
        self
    }
}

impl Ferry {
    fn start(mut command: Command, flags: &str) -> Self {
        command.args(flags.split_whitespace()).args(["--json"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("pageferry starts");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        Self { child, stderr, heard: String::new(), ended: false }
    }

    /// The end that waits; answers when it listens, with its port.
    pub(crate) fn destination(vm: &Vm, flags: &str) -> (Self, u16) {
        Self::destination_in(None, vm, "--listen 127.0.0.1:0", flags)
    }

    pub(crate) fn destination_in(namespace: Option<&str>, vm: &Vm, listen: &str, flags: &str) -> (Self, u16) {
        let mut command = program(namespace);
        command.args(["relay", "destination", "--qmp"]).arg(&vm.qmp);
        let mut ferry = Self::start(command, &format!("{listen} {flags}"));
        // Its first words say where it listens.
        let mut line = String::new();
        ferry.stderr.read_line(&mut line).expect("its stderr");
        let port = line.split_once(':').and_then(|(_, rest)| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        });
        ferry.heard.push_str(&line);
        (ferry, port.unwrap_or_default())
    }

    /// The end that has the guest.
    pub(crate) fn source(vm: &Vm, port: u16, flags: &str) -> Self {
        Self::source_in(None, &vm.qmp, &format!("--to 127.0.0.1:{port} {flags}"))
    }

    pub(crate) fn source_in(namespace: Option<&str>, qmp: &PathBuf, flags: &str) -> Self {
        let mut command = program(namespace);
        command.args(["relay", "source", "--qmp"]).arg(qmp);
        Self::start(command, flags)
    }

    /// Waits until QEMU has begun: what is told of a move with `--verbose` says so.
    pub(crate) fn has_begun(&mut self) {
        while !self.heard.contains("QEMU active") {
            let mut line = String::new();
            let read = self.stderr.read_line(&mut line).expect("its stderr");
            self.heard.push_str(&line);
            assert!(read > 0, "pageferry has ended before QEMU began: {}", self.heard);
        }
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the state of a child") {
                break status;
            }
            if began.elapsed() > PATIENCE {
                self.kill();
                panic!("pageferry has not ended within {PATIENCE:?}: {}", self.heard);
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        self.ended = true;
        let mut stdout = String::new();
        self.child.stdout.take().expect("a pipe").read_to_string(&mut stdout).expect("its stdout");
        self.stderr.read_to_string(&mut self.heard).expect("its stderr");
        let result = serde_json::from_str(&stdout).unwrap_or(Value::Null);
        Ended { code: status.code(), result, stderr: std::mem::take(&mut self.heard) }
    }

    pub(crate) fn kill(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.ended = true;
    }

    /// SIGINT, as by a person.
    pub(crate) fn interrupt(&self) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-INT", &pid]).status().expect("kill starts");
        assert!(sent.success());
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
        }
    }
}

fn program(namespace: Option<&str>) -> Command {
    match namespace {
        None => Command::new(PROGRAM),
        Some(namespace) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", namespace, PROGRAM]);
            command
        }
    }
}

/// Moves a guest to a new machine; answers that machine and what both ends said.
pub(crate) fn move_to(directory: &Path, from: &Vm, name: &str, ram: &str, flags: &str) -> (Vm, Ended, Ended) {
    let to = Vm::waiting(directory, name, ram);
    let (destination, port) = Ferry::destination(&to, "");
    let source = Ferry::source(from, port, flags).end();
    (to, source, destination.end())
}
