//! What goes on inside the two hosts, seen from outside: which faults have come, and which processes hold guests.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::lab::{Host, Lab};

/// The points at which faults come, in order.
pub(crate) const PHASES: [&str; 7] =
    ["set-up", "pre-copy", "stop-and-copy", "ready", "journaled", "committed", "finished"];

/// An end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Side {
    pub(crate) const BOTH: [Self; 2] = [Self::Source, Self::Destination];

    /// As `--source-fault` and `--destination-fault` have it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl Lab {
    /// The host at this end of a migration from alpha to beta.
    pub(crate) fn at(&mut self, side: Side) -> &mut Host {
        match side {
            Side::Source => &mut self.alpha,
            Side::Destination => &mut self.beta,
        }
    }

    /// Whatever runs is known, and nothing else is left: each slot free, one process for each guest that runs.
    #[track_caller]
    pub(crate) fn check_tidy(&self, what: &str) {
        for host in [&self.alpha, &self.beta] {
            let info = host.done("host");
            assert_eq!((&info["outgoing"], &info["incoming"]), (&0.into(), &0.into()), "{what}: {info:#}");
            let known = host.done("guest list");
            let running = known.as_array().expect("a list").iter().filter(|guest| !guest["pid"].is_null());
            let running = running.count();
            host.wait_for(&format!("{what}: only the processes of {running} guests"), |host| {
                (host.holders().len() == running).then_some(())
            });
        }
    }

    /// The end of a migration from alpha to beta, which both hosts tell alike: the account of each.
    #[track_caller]
    pub(crate) fn both_over(&self, id: &str, what: &str) -> [Value; 2] {
        self.alpha.over(id);
        self.beta.over(id);
        // The host whose process has died is the last to know, and by then has told the other.
        let (ours, theirs) = (self.alpha.over(id), self.beta.over(id));
        assert_eq!(ours["state"], theirs["state"], "{what}: {ours:#}\n{theirs:#}");
        assert!(
            (&ours["direction"], &theirs["direction"]) == (&"outgoing".into(), &"incoming".into()),
            "{what}: {ours:#}\n{theirs:#}"
        );
        for (host, account) in [(&self.alpha, &ours), (&self.beta, &theirs)] {
            let kept = host.done("history --limit 1000");
            let kept = kept.as_array().expect("a list").iter().filter(|kept| kept["id"] == *id).count();
            assert_eq!(kept, 1, "{what}: {} keeps it {kept} times", host.side);
            let completed = account["state"] == "completed";
            assert_eq!(account["cause"].is_null(), completed, "{what}: {account:#}");
        }
        [ours, theirs]
    }

    /// Has a guest run at alpha, whole, wherever it was before.
    #[track_caller]
    pub(crate) fn back_at_alpha(&self, name: &str) {
        match self.beta.guest_state(name).as_str() {
            "running" => {
                self.beta.done(&format!("migrate {name} --to alpha"));
            }
            "lost" => {
                self.beta.done(&format!("guest stop {name}"));
            }
            state => assert_eq!(state, "none", "{name} at beta"),
        }
        if self.alpha.guest_state(name) == "lost" {
            self.alpha.done(&format!("guest stop {name}"));
        }
        if self.alpha.guest_state(name) == "none" {
            self.alpha.start_guest(name, "");
        }
    }
}

impl Host {
    fn files(&self) -> std::path::PathBuf {
        self.config().parent().expect("it is in a directory").to_owned()
    }

    /// How many faults have come in the processes that hold, or held, guests of this host.
    pub(crate) fn faults(&self) -> usize {
        let logs = fs::read_dir(self.files().join("state/log")).expect("there are logs");
        let count =
            |path: &Path| fs::read_to_string(path).unwrap_or_default().matches("injecting a fault").count();
        logs.flatten().map(|entry| count(&entry.path())).sum()
    }

    /// Waits for one more fault than there were.
    #[track_caller]
    pub(crate) fn next_fault(&self, before: usize, what: &str) {
        self.wait_for(&format!("{what}: the fault"), |host| (host.faults() > before).then_some(()));
    }

    /// The processes that hold guests of this host.
    pub(crate) fn holders(&self) -> Vec<u32> {
        let state = self.files().join("state").to_string_lossy().into_owned();
        let is_ours = |pid: u32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            words.contains("\0holder\0") && words.contains(&state)
        };
        let all = fs::read_dir("/proc").expect("there is /proc").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| is_ours(*pid)).collect()
    }
}
