//! Runs `pageferry demo --json` and reads what it says.

use std::process::{Command, Output};

use pageferry::testing::{Need, require};
use serde_json::Value;

/// Small, so that a guest has written all of it in under a second where vCPUs are emulated.
pub(crate) const MEMORY: &str = "64MiB";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    Kvm,
    Process,
}

impl Guest {
    pub(crate) const ALL: [Self; 2] = [Self::Kvm, Self::Process];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }

    /// Whether this machine has what the guest needs.
    pub(crate) fn is_here(self) -> bool {
        match self {
            Self::Kvm => require(&[Need::Kvm, Need::Uffd]),
            Self::Process => require(&[Need::Uffd]),
        }
    }
}

/// What a demonstration printed and how it ended.
pub(crate) struct Demo {
    pub(crate) exit: i32,
    pub(crate) report: Value,
    pub(crate) said: String,
}

impl Demo {
    pub(crate) fn run(guest: Guest, flags: &str) -> Self {
        let output = pageferry(&format!("demo --json --guest {} --memory {MEMORY} {flags}", guest.name()));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let report = serde_json::from_str(&stdout)
            .unwrap_or_else(|error| panic!("{flags}: no report ({error}): {stdout:?}; stderr: {said}"));
        Self { exit: output.status.code().unwrap_or(-1), report, said }
    }

    #[track_caller]
    pub(crate) fn check(&self, field: &str, expected: impl Into<Value>) {
        assert_eq!(self.report[field], expected.into(), "{field} of {:#}\n{}", self.report, self.said);
    }

    pub(crate) fn rounds(&self) -> usize {
        self.report["rounds"].as_array().map_or(0, Vec::len)
    }

    pub(crate) fn text(&self, field: &str) -> &str {
        self.report[field].as_str().unwrap_or_default()
    }

    /// The guest is where it should be, whole, and both memories were the same.
    #[track_caller]
    pub(crate) fn check_completed(&self) {
        self.check("outcome", "completed");
        self.check("guest_check", "ok");
        self.check("ram_equal", true);
        assert_eq!(self.exit, 0, "{:#}", self.report);
    }

    /// The guest goes on at the source, whole.
    #[track_caller]
    pub(crate) fn check_rolled_back(&self, cause: &str) {
        self.check("outcome", "rolled_back");
        self.check("guest_check", "ok");
        assert!(self.text("cause").contains(cause), "cause {cause:?} of {:#}", self.report);
        assert_eq!(self.exit, 1, "{:#}", self.report);
    }
}

/// Runs the program with these words.
pub(crate) fn pageferry(words: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pageferry"))
        .args(words.split_whitespace())
        .env_remove("PAGEFERRY_LOG")
        .output()
        .expect("the program starts")
}
