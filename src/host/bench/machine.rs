//! What a machine is, and what the kernel tells of this process.

use serde::{Deserialize, Serialize};

use crate::host::preflight::facts::{self, Sources};
use crate::units::PAGE_SIZE;

/// Facts of a machine that a figure means nothing without.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Processors that this process may use.
    pub cores: usize,
    /// Their vendor and model.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: facts::processor(&Sources::default()),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }
}

/// How much more memory this process may take: what the machine has available, and its control groups leave.
pub(super) fn memory_left() -> Result<u64, facts::FactsError> {
    let memory = facts::memory(0, &Sources::default())?;
    Ok(memory.cgroup_left.map_or(memory.available, |left| left.min(memory.available)))
}

/// Memory of this process, in bytes; 0 where the kernel does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    /// Its own: heap and stacks.
    pub(super) private: u64,
    /// Of memfds, such as the RAM that is sent and received.
    pub(super) shared: u64,
}

impl Resident {
    /// As `/proc/self/status` has it (`proc_pid_status(5)`).
    pub(super) fn now() -> Self {
        Self::of(&std::fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    fn of(status: &str) -> Self {
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib: Option<u64> =
                value.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse().ok());
            kib.unwrap_or(0).saturating_mul(1024)
        };
        Self { private: field("RssAnon"), shared: field("RssShmem") }
    }
}

/// The most private memory since a moment, beyond what there was then. It is looked at now and then.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeakMemory {
    before: Resident,
    most: u64,
}

impl PeakMemory {
    pub(super) fn start() -> Self {
        let before = Resident::now();
        Self { before, most: before.private }
    }

    /// Looks. Answers how much shared memory has come since the beginning.
    pub(super) fn look(&mut self) -> u64 {
        let now = Resident::now();
        self.most = self.most.max(now.private);
        now.shared.saturating_sub(self.before.shared)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.most - self.before.private
    }
}

/// How many page faults this process has had, major ones included; 0 where the kernel does not tell.
pub(super) fn page_faults() -> u64 {
    faults_of(&std::fs::read_to_string("/proc/self/stat").unwrap_or_default())
}

/// Fields 10 and 12 of `proc_pid_stat(5)`; the name before them may hold spaces and ends with the last parenthesis.
fn faults_of(stat: &str) -> u64 {
    let Some((_, rest)) = stat.rsplit_once(')') else { return 0 };
    let field = |number: usize| rest.split_whitespace().nth(number - 3).and_then(|field| field.parse().ok());
    field(10).unwrap_or(0u64) + field(12).unwrap_or(0)
}

/// What memory takes besides itself at a receiving end, per byte of it: bitmaps of what was written and what is in use.
pub(super) fn bookkeeping(memory_bytes: u64) -> u64 {
    memory_bytes / (PAGE_SIZE * 8) * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_and_process_are_known() {
        let machine = Machine::this();
        assert!(machine.cores >= 1 && machine.cpu.len() > 3 && machine.kernel.contains('.'), "{machine:?}");
        assert!(memory_left().unwrap() > 1 << 20);
        let (faults, mut peak) = (page_faults(), PeakMemory::start());
        assert!(faults > 0 && Resident::now().private > 0);
        let taken = std::hint::black_box(vec![1u8; 32 << 20]);
        peak.look();
        drop(taken);
        peak.look();
        assert!(peak.bytes() >= 31 << 20, "{}", peak.bytes());
        assert!(page_faults() > faults);
    }

    #[test]
    fn the_kernels_files_are_read() {
        let status = "Name:\tx\nRssAnon:\t     204 kB\nRssFile:\t 3 kB\nRssShmem:\t  8 kB\n";
        assert_eq!(Resident::of(status), Resident { private: 204 << 10, shared: 8 << 10 });
        assert_eq!(Resident::of("RssAnon: much kB"), Resident::default());
        assert_eq!(faults_of("12 (a) b) (c) S 1 2 3 4 5 6 70 8 9 0 0"), 79);
        assert_eq!(faults_of(""), 0);
    }
}
