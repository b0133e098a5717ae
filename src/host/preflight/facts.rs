//! What a host knows of itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::{HostFacts, MemoryFacts, Versions};
use crate::guest::{OLDEST_STATE_VERSION, STATE_VERSION};
use crate::host::guests::why_no_kvm;
use crate::host::network::Offer;
use crate::session::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, RdmaSupport};

/// At least this much as a limit means that there is none (version 1 of control groups writes the largest number of pages).
const NO_LIMIT: u64 = 1 << 62;

/// Where the kernel tells of the host.
#[derive(Clone, Debug)]
pub struct Sources {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys/fs/cgroup`, where control groups are mounted.
    pub cgroup: PathBuf,
}

impl Default for Sources {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroup: "/sys/fs/cgroup".into() }
    }
}

/// What the daemon knows of its host and the kernel does not.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The host's name.
    pub name: String,
    /// The addresses that its host file allows.
    pub offers: Vec<Offer>,
    /// What was promised to guests on their way here and is not in use yet, in bytes.
    pub promised: u64,
    /// Slots for incoming migrations that are free.
    pub free_incoming: u32,
    /// How many there are.
    pub max_incoming: u32,
    /// Whether it does without proof of who asks.
    pub insecure: bool,
    /// Whether its host file demands that memory is encrypted on its way.
    pub requires_encryption: bool,
}

/// Why a host does not know itself.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// The file about memory cannot be read.
    #[error("reading how much memory this host has: {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It does not say how much memory there is.
    #[error("{} has no line \"MemAvailable: NUMBER kB\"; Linux 3.14 or newer is needed", path.display())]
    MemAvailable {
        /// Which file.
        path: PathBuf,
    },
}

/// Everything that another host asks for.
///
/// # Errors
/// [`FactsError`] when it is not known how much memory there is.
pub fn gather(known: Known, sources: &Sources) -> Result<HostFacts, FactsError> {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Ok(HostFacts {
        name: known.name,
        versions: versions(),
        offers: known.offers,
        memory: memory(known.promised, sources)?,
        why_no_kvm: why_no_kvm(),
        no_rdma: RdmaSupport::of_this_host().absent().map(str::to_owned),
        processor: processor(sources),
        free_incoming: known.free_incoming,
        max_incoming: known.max_incoming,
        clock: clock.map_or(0.0, |since| since.as_secs_f64()),
        insecure: known.insecure,
        requires_encryption: known.requires_encryption,
        takes_encrypted: !known.insecure,
        takes_qemu: true,
    })
}

/// The versions that this program speaks.
#[must_use]
pub fn versions() -> Versions {
    Versions {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        oldest_protocol: OLDEST_PROTOCOL_VERSION,
        newest_protocol: PROTOCOL_VERSION,
        guest_state: STATE_VERSION,
        oldest_guest_state: OLDEST_STATE_VERSION,
    }
}

/// The memory of this host, as far as this process may use it.
///
/// # Errors
/// [`FactsError`] when the kernel does not say how much there is.
pub fn memory(promised: u64, sources: &Sources) -> Result<MemoryFacts, FactsError> {
    let path = sources.proc.join("meminfo");
    let text = fs::read_to_string(&path).map_err(|cause| FactsError::Read { path: path.clone(), cause })?;
    let available = available(&text).ok_or(FactsError::MemAvailable { path })?;
    Ok(MemoryFacts { available, cgroup_left: cgroup_left(sources), memlock: memlock(), promised })
}

/// `MemAvailable`, in bytes (`proc_meminfo(5)`).
fn available(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What may be locked; nothing where there is no limit (`mlock(2)`).
fn memlock() -> Option<u64> {
    let lifted = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if lifted { None } else { getrlimit(Resource::Memlock).current }
}

/// What the control groups of this process leave: the least of its own group and all above it; nothing where none has a
/// limit.
fn cgroup_left(sources: &Sources) -> Option<u64> {
    let groups = fs::read_to_string(sources.proc.join("self/cgroup")).ok()?;
    // cgroups(7): "number:controllers:path", with number 0 and no controllers in version 2.
    let fields = groups.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    });
    let of = |(controllers, path): (&str, &str)| match controllers {
        "" => left_above(&sources.cgroup, path, &VERSION_2),
        _ if controllers.split(',').any(|name| name == "memory") => {
            left_above(&sources.cgroup.join("memory"), path, &VERSION_1)
        }
        _ => None,
    };
    fields.filter_map(of).min()
}

/// How a version of control groups names its files.
struct CgroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// The line in `memory.stat` of files' pages that are dropped first when memory is needed.
    reclaimable: &'static str,
}

const VERSION_1: CgroupFiles = CgroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const VERSION_2: CgroupFiles =
    CgroupFiles { limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file" };

/// From the group at `path` up to the mount itself, which in a container is the container's own group.
fn left_above(mount: &Path, path: &str, files: &CgroupFiles) -> Option<u64> {
    let path = Path::new(path.trim_start_matches('/'));
    path.ancestors().filter_map(|group| left_in(&mount.join(group), files)).min()
}

fn left_in(group: &Path, files: &CgroupFiles) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number.
    let limit = number(files.limit).filter(|limit| *limit < NO_LIMIT)?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        if name == files.reclaimable { value.trim().parse().ok() } else { None }
    });
    let used = number(files.usage)?.saturating_sub(reclaimable.unwrap_or(0));
    Some(limit.saturating_sub(used))
}

/// The processor's vendor and model, or its architecture where the kernel names neither.
#[must_use]
pub fn processor(sources: &Sources) -> String {
    let text = fs::read_to_string(sources.proc.join("cpuinfo")).unwrap_or_default();
    let field = |wanted: &str| {
        let value = |line: &str| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == wanted).then(|| value.trim().to_owned())
        };
        text.lines().find_map(value).filter(|value| !value.is_empty())
    };
    match (field("vendor_id"), field("model name")) {
        (Some(vendor), Some(model)) => format!("{vendor} {model}"),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => std::env::consts::ARCH.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A machine made of files.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new(files: &[(&str, &str)]) -> Self {
            let this = Self(tempfile::tempdir().unwrap());
            this.write(
                "proc/meminfo",
                "MemTotal: 9 kB\nMemFree:  1 kB\nMemAvailable:   2048 kB\nBuffers: 3 kB\n",
            );
            for (name, text) in files {
                this.write(name, text);
            }
            this
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn sources(&self) -> Sources {
            Sources { proc: self.0.path().join("proc"), cgroup: self.0.path().join("cgroup") }
        }

        fn left(&self) -> Option<u64> {
            memory(7, &self.sources()).unwrap().cgroup_left
        }
    }

    #[test]
    fn this_host_knows_itself() {
        let known = Known { name: "here".into(), promised: 3, free_incoming: 1, ..Known::default() };
        let facts = gather(known, &Sources::default()).unwrap();
        assert_eq!((facts.name.as_str(), facts.memory.promised, facts.free_incoming), ("here", 3, 1));
        assert!(facts.memory.available > 16 * MIB);
        assert!(facts.clock > 1.7e9);
        assert!(facts.processor.len() > 3);
        assert_eq!(facts.versions.program, env!("CARGO_PKG_VERSION"));
        assert!(facts.versions.oldest_protocol <= facts.versions.newest_protocol);
        assert!(facts.versions.oldest_guest_state <= facts.versions.guest_state);
        assert_eq!(facts.why_no_kvm.is_none(), fs::File::options().write(true).open("/dev/kvm").is_ok());
    }

    #[test]
    fn memory_is_what_is_available_not_what_is_free() {
        let machine = Machine::new(&[]);
        let facts = memory(7, &machine.sources()).unwrap();
        assert_eq!((facts.available, facts.promised, facts.cgroup_left), (2 * MIB, 7, None));
    }

    #[test]
    fn memory_that_is_not_told_is_an_error_that_names_the_file() {
        let machine = Machine::new(&[("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: much\n")]);
        let said = memory(0, &machine.sources()).unwrap_err().to_string();
        assert!(said.contains("proc/meminfo has no line \"MemAvailable: NUMBER kB\""), "{said}");
        fs::remove_file(machine.0.path().join("proc/meminfo")).unwrap();
        assert!(matches!(memory(0, &machine.sources()), Err(FactsError::Read { .. })));
    }

    #[test]
    fn the_tightest_group_on_the_way_up_counts() {
        let machine = Machine::new(&[
            ("proc/self/cgroup", "0::/a/b/c\n"),
            ("cgroup/a/memory.max", "1000000\n"),
            ("cgroup/a/memory.current", "990000\n"),
            ("cgroup/a/memory.stat", "anon 1\ninactive_file 40000\nactive_file 5\n"),
            ("cgroup/a/b/memory.max", "max\n"),
            ("cgroup/a/b/memory.current", "5\n"),
            ("cgroup/a/b/c/memory.max", "300000\n"),
            ("cgroup/a/b/c/memory.current", "100000\n"),
        ]);
        assert_eq!(machine.left(), Some(50_000));
        machine.write("cgroup/a/b/c/memory.current", "400000\n");
        assert_eq!(machine.left(), Some(0));
        for group in ["a", "a/b/c"] {
            machine.write(&format!("cgroup/{group}/memory.max"), "max\n");
        }
        assert_eq!(machine.left(), None);
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_mount() {
        let machine = Machine::new(&[
            ("proc/self/cgroup", "0::/\n"),
            ("cgroup/memory.max", "1000\n"),
            ("cgroup/memory.current", "10\n"),
        ]);
        assert_eq!(machine.left(), Some(990));
        // The host's path, which is not mounted in the container.
        machine.write("proc/self/cgroup", "0::/system.slice/docker-1234.scope\n");
        assert_eq!(machine.left(), Some(990));
    }

    #[test]
    fn version_1_is_read_too() {
        let machine = Machine::new(&[
            ("proc/self/cgroup", "9:name=systemd:/x\n5:cpu,memory:/vm\n4:devices:/\n0::/\n"),
            ("cgroup/memory/vm/memory.limit_in_bytes", "1000\n"),
            ("cgroup/memory/vm/memory.usage_in_bytes", "600\n"),
            ("cgroup/memory/vm/memory.stat", "inactive_file 1\ntotal_inactive_file 100\n"),
            ("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cgroup/memory/memory.usage_in_bytes", "600\n"),
        ]);
        assert_eq!(machine.left(), Some(500));
    }

    #[test]
    fn a_processor_is_named_as_far_as_it_is_known() {
        for (cpuinfo, name) in [
            ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon: 5\n", "GenuineIntel Xeon: 5"),
            ("vendor_id : IBM/S390\n", "IBM/S390"),
            ("model name:\n", std::env::consts::ARCH),
            ("", std::env::consts::ARCH),
        ] {
            let machine = Machine::new(&[("proc/cpuinfo", cpuinfo)]);
            assert_eq!(processor(&machine.sources()), name);
        }
    }
}
