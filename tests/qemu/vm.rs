//! A QEMU for a test, and the guest in it. It goes away with the test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use pageferry::guest::qemu::qmp::Qmp;
use serde_json::{Value, json};

/// Whatever a test waits for comes within this, or never: a guest that is emulated on a busy machine boots slowly.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(100);

/// Waits until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what} has not come within {PATIENCE:?}");
        std::thread::sleep(LOOK);
    }
}

/// What the RAM is made of: an object that `-machine memory-backend=ram0` takes.
pub(crate) const MEMFD: &str = "memory-backend-memfd,id=ram0,size=256M,share=on";
pub(crate) const PRIVATE: &str = "memory-backend-ram,id=ram0,size=256M";

/// Kernel and initial file system, by `scripts/qemu-guest`.
fn guest() -> &'static BTreeMap<String, String> {
    static GUEST: OnceLock<BTreeMap<String, String>> = OnceLock::new();
    GUEST.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/qemu-guest");
        let output = Command::new(script).output().expect("the script starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("paths");
        text.lines()
            .filter_map(|line| line.split_once('='))
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .collect()
    })
}

pub(crate) struct Vm {
    child: Child,
    pub(crate) qmp: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// A machine without anything running in it: `more` says what is different.
    pub(crate) fn start(directory: &Path, name: &str, ram: &str, more: &[&str]) -> Self {
        let file = |kind: &str| directory.join(format!("{name}.{kind}"));
        let (qmp, console, log) = (file("qmp"), file("console"), file("log"));
        let megabytes = if ram.contains("size=1G") {
            "1024"
        } else if ram.contains("size=128M") {
            "128"
        } else {
            "256"
        };
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max"])
            .args(["-nodefaults", "-no-reboot", "-display", "none", "-machine", "q35,memory-backend=ram0"])
            .args(["-m", megabytes, "-object", ram])
            .args(["-kernel", &guest()["kernel"], "-initrd", &guest()["initrd"]])
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check",
            ])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).expect("a log"));
        let child = command.spawn().expect("QEMU starts");
        let vm = Self { child, qmp, console, log };
        until("QEMU's QMP socket", || vm.qmp.exists());
        vm
    }

    /// A guest that has begun to work.
    pub(crate) fn running(directory: &Path, name: &str, ram: &str) -> Self {
        let vm = Self::start(directory, name, ram, &[]);
        vm.ticks_on();
        vm
    }

    /// A machine that waits for a guest.
    pub(crate) fn waiting(directory: &Path, name: &str, ram: &str) -> Self {
        Self::start(directory, name, ram, &["-incoming", "defer"])
    }

    /// What its guest has written to its console.
    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// What QEMU itself has said.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn last_tick(&self) -> u32 {
        let console = self.console();
        assert!(!console.contains("CORRUPT"), "{console}");
        // The last line may be half written.
        let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let ticks = whole.lines().filter_map(|line| line.trim().strip_prefix("tick "));
        ticks.filter_map(|tick| tick.parse().ok()).next_back().unwrap_or_default()
    }

    /// Waits until the guest has done two more passes: the first may have been under way.
    pub(crate) fn ticks_on(&self) {
        let before = self.last_tick();
        until("the guest's next tick", || self.last_tick() >= before + 2);
    }

    /// Asks QEMU something, while nobody else has its socket.
    pub(crate) fn ask(&self, command: &str, arguments: &Value) -> Value {
        Qmp::connect(&self.qmp).and_then(|mut qmp| qmp.execute(command, arguments)).expect("QEMU answers")
    }

    pub(crate) fn status(&self) -> String {
        self.ask("query-status", &json!({}))["status"].as_str().unwrap_or_default().to_owned()
    }

    pub(crate) fn kill(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the state of a child").is_some()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("== {}\n{}\n{}", self.console.display(), self.console(), self.log());
        }
    }
}

/// That what a guest wrote to one console after the other is one account without a gap: each pass once, none corrupt.
pub(crate) fn one_account(consoles: &[String]) {
    let account = consoles.concat();
    assert!(!account.contains("CORRUPT"), "{account}");
    let ticks = account.lines().filter_map(|line| line.trim().strip_prefix("tick "));
    let ticks: Vec<u32> = ticks.filter_map(|tick| tick.parse().ok()).collect();
    let expected: Vec<u32> = (1..=ticks.len() as u32).collect();
    // The last line may be half written, which makes another number of it.
    let whole = ticks.len().saturating_sub(1);
    assert!(whole > 0 && ticks[..whole] == expected[..whole], "{account}");
}
