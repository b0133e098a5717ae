//! Two hosts of the testbed as the tests in them see them: this one, and the other by the testbed's `on`.

use std::fmt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

pub(crate) const MIB: u64 = 1 << 20;
/// Whatever a test waits for comes within this, or never: the hosts are emulated.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);

/// A host, by its number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Host(u8);

pub(crate) const HERE: Host = Host(1);
pub(crate) const THERE: Host = Host(2);

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host{}", self.0)
    }
}

/// Takes away filters, and puts back devices that are gone, as a test leaves them that failed.
const RAILS_AS_AT_FIRST: &str = "
for n in 0 1; do
    tc qdisc del dev pf$n clsact 2>/dev/null
    [ -e /sys/class/infiniband/rxe$n ] || rdma link add rxe$n type rxe netdev pf$n || exit
    until grep -q ACTIVE /sys/class/infiniband/rxe$n/ports/1/state; do sleep 0.1; done
done";

/// Makes both hosts as they were when they had booted, whatever a test has left.
#[track_caller]
pub(crate) fn as_at_first() {
    HERE.sh("wire 0 on && wire 1 on");
    for host in [HERE, THERE] {
        host.sh(RAILS_AS_AT_FIRST);
        for migration in host.listed("status", "id") {
            // It may be over by now, or be the other host's to cancel.
            host.json(&format!("cancel {migration}"));
        }
    }
    for host in [HERE, THERE] {
        host.wait_for("the end of migrations", || host.listed("status", "id").is_empty().then_some(()));
        for guest in host.listed("guest list", "name") {
            host.done(&format!("guest stop {guest}"));
        }
    }
}

impl Host {
    pub(crate) fn other(self) -> Self {
        Self(3 - self.0)
    }

    fn run(self, script: &str) -> Output {
        let mut command = if self == HERE { Command::new("sh") } else { Command::new("on") };
        let first = if self == HERE { "-c".to_owned() } else { self.0.to_string() };
        command.args([&first, script]).output().expect("a shell starts")
    }

    /// Runs a shell command, and answers what it says.
    #[track_caller]
    pub(crate) fn sh(self, script: &str) -> String {
        let output = self.run(script);
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{script} at {self}: {}\n{stdout}\n{stderr}", output.status);
        stdout.into_owned()
    }

    /// Runs a command of the program, and reads its JSON, with the exit code.
    #[track_caller]
    pub(crate) fn json(self, words: &str) -> (i32, Value) {
        let output = self.run(&format!("pageferry {words} --json"));
        let stdout = String::from_utf8_lossy(&output.stdout);
        let value = serde_json::from_str(&stdout).unwrap_or_else(|error| {
            panic!(
                "{words} at {self}: no JSON ({error}): {stdout}; {}",
                String::from_utf8_lossy(&output.stderr)
            )
        });
        (output.status.code().unwrap_or(-1), value)
    }

    /// The same for a command that has to succeed.
    #[track_caller]
    pub(crate) fn done(self, words: &str) -> Value {
        let (code, value) = self.json(words);
        assert_eq!(code, 0, "{words} at {self}: {value:#}");
        value
    }

    /// What the elements of a list have in this field.
    #[track_caller]
    fn listed(self, words: &str, field: &str) -> Vec<String> {
        let list = self.done(words);
        let list = list.as_array().expect("a list");
        list.iter().filter_map(|element| Some(element[field].as_str()?.to_owned())).collect()
    }

    /// The state of the guest here, or `none`.
    pub(crate) fn guest_state(self, name: &str) -> String {
        let guests = self.done("guest list");
        let guest = guests.as_array().expect("a list").iter().find(|guest| guest["name"] == name).cloned();
        guest.map_or("none".into(), |guest| guest["state"].as_str().expect("a state").to_owned())
    }

    /// The guest runs here and nowhere else, and finds its memory whole.
    #[track_caller]
    pub(crate) fn check_whole(self, name: &str) {
        let states = (self.guest_state(name), self.other().guest_state(name));
        assert_eq!((states.0.as_str(), states.1.as_str()), ("running", "none"), "{name} at {self}");
        let seen = self.done(&format!("guest verify {name}"));
        assert_eq!(seen["seen"]["corrupt"], 0, "{seen:#}");
    }

    /// Begins to move a guest to the other host, and answers the migration's identifier.
    #[track_caller]
    pub(crate) fn begin(self, name: &str, flags: &str) -> String {
        let to = self.other();
        let begun = self
            .done(&format!("migrate {name} --to {to} --mode rdma --channels 1 --verify --detach {flags}"));
        begun["id"].as_str().expect("it has an identifier").to_owned()
    }

    /// Moves a guest to the other host, which has to end well, and answers the account.
    #[track_caller]
    pub(crate) fn moved(self, name: &str, flags: &str) -> Value {
        let to = self.other();
        let report =
            self.done(&format!("migrate {name} --to {to} --mode rdma --channels 1 --verify {flags}"));
        assert_eq!(
            (&report["state"], &report["ram_equal"]),
            (&"completed".into(), &true.into()),
            "{report:#}"
        );
        report
    }

    pub(crate) fn migration(self, id: &str) -> Value {
        self.done(&format!("status {id}"))
    }

    /// Waits until a migration is over, and answers its account.
    #[track_caller]
    pub(crate) fn over(self, id: &str) -> Value {
        self.wait_for(&format!("the end of {id}"), || {
            let migration = self.migration(id);
            let over = ["completed", "rolled_back", "lost"].iter().any(|state| migration["state"] == *state);
            over.then_some(migration)
        })
    }

    /// Waits until each of these interfaces has carried so much for a migration.
    #[track_caller]
    pub(crate) fn wait_for_bytes(self, id: &str, interfaces: &[&str], bytes: u64) {
        self.wait_for(&format!("{bytes} bytes on {interfaces:?}"), || {
            let migration = self.migration(id);
            assert!(migration["ended_at"].is_null(), "it is over: {migration:#}");
            interfaces.iter().all(|interface| carried(&migration, interface) >= bytes).then_some(())
        });
    }

    /// Waits for something.
    #[track_caller]
    pub(crate) fn wait_for<T>(self, what: &str, look: impl Fn() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            assert!(began.elapsed() < PATIENCE, "waited in vain for {what} at {self}");
            std::thread::sleep(LOOK);
        }
    }

    /// Nothing is held on any RDMA device of this host: neither queue pairs nor completion queues, regions nor domains.
    #[track_caller]
    pub(crate) fn check_devices_are_free(self) {
        let held = || {
            let shown = self.sh("rdma resource show");
            let held = shown.lines().any(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                // One queue pair is the kernel's own (GSI), with its domain and its completion queue.
                let count = |what: &str| {
                    let at = words.iter().position(|word| *word == what)?;
                    words.get(at + 1)?.parse::<u32>().ok()
                };
                count("qp") > Some(1)
                    || count("cq") > Some(1)
                    || count("pd") > Some(1)
                    || count("mr") > Some(0)
            });
            (!held).then_some(())
        };
        self.wait_for("devices that nobody uses", held);
    }
}

/// What an interface has carried so far for a migration under way.
pub(crate) fn carried(migration: &Value, interface: &str) -> u64 {
    let links = migration["progress"]["links"].as_array();
    let found = links.and_then(|links| links.iter().find(|link| link["interface"] == interface));
    found.and_then(|link| link["bytes"].as_u64()).unwrap_or(0)
}

/// The channels on an interface: how many, how many of them were lost, and their bytes.
pub(crate) fn channels(report: &Value, interface: &str) -> (usize, usize, u64) {
    let all = report["channels"].as_array().expect("a list");
    let on_it: Vec<&Value> = all.iter().filter(|channel| channel["interface"] == interface).collect();
    let lost = on_it.iter().filter(|channel| channel["lost"] == true).count();
    (on_it.len(), lost, on_it.iter().filter_map(|channel| channel["bytes"].as_u64()).sum())
}
