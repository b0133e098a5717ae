//! What tests share: skipping with a reason when a machine lacks a device, and failing where it must not.
//!
//! Two variables steer it. `PAGEFERRY_REQUIRE=kvm,uffd` names the needs that this machine is supposed to have: a test that
//! misses one of them fails instead of being skipped. `PAGEFERRY_SKIP_LOG=FILE` gets a line for each skip, so that
//! `scripts/test` can say at its end what was not tested.

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::sys::userfaultfd::{Features, Stops, Userfaultfd};

/// The oldest QEMU that the adapter is made for (multifd and the mapped RAM that it builds on).
const OLDEST_QEMU: u32 = 10;

/// Something that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `/dev/kvm` opens for reading and writing.
    Kvm,
    /// userfaultfd with asynchronous write protection, hence `PAGEMAP_SCAN` as a dirty tracker.
    Uffd,
    /// Network namespaces can be made: `CAP_SYS_ADMIN` and a kernel that has them.
    Netns,
    /// `qemu-system-x86_64` of version 10 or newer.
    Qemu,
    /// Soft-RoCE: the module is loaded, or `PAGEFERRY_RXE_ROOT` names an unpacked kernel package that has it.
    Rxe,
}

impl Need {
    /// Every need.
    pub const ALL: [Self; 5] = [Self::Kvm, Self::Uffd, Self::Netns, Self::Qemu, Self::Rxe];

    /// The word for it in `PAGEFERRY_REQUIRE`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Uffd => "uffd",
            Self::Netns => "netns",
            Self::Qemu => "qemu",
            Self::Rxe => "rxe",
        }
    }

    /// Why this machine does not have it, or `None` when it does.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        match self {
            Self::Kvm => {
                let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
                opened.err().map(|error| format!("/dev/kvm does not open: {error}"))
            }
            Self::Uffd => {
                let features = Features::ASYNC.and(Features::UNPOPULATED).and(Features::SHARED_AND_HUGETLB);
                let opened = Userfaultfd::open(Stops::UserSpace, features);
                opened.err().map(|error| match error.source() {
                    Some(cause) => format!("{error}: {cause}"),
                    None => error.to_string(),
                })
            }
            Self::Netns => missing_namespaces(),
            Self::Qemu => missing_qemu(),
            Self::Rxe => missing_rxe(),
        }
    }
}

/// Whether a test that needs all of `what` can run here. Where it cannot, says so on stderr and in the skip log, and the
/// test returns at once:
///
/// ```
/// use pageferry::testing::{Need, require};
/// if !require(&[Need::Kvm]) {
///     return;
/// }
/// ```
///
/// # Panics
/// If something is missing that `PAGEFERRY_REQUIRE` names, or if it names a word that is no need.
#[must_use]
pub fn require(what: &[Need]) -> bool {
    let required = required(&std::env::var("PAGEFERRY_REQUIRE").unwrap_or_default());
    for need in what {
        if let Some(reason) = need.missing() {
            assert!(
                !required.contains(need),
                "this machine must have {} (PAGEFERRY_REQUIRE), but {reason}",
                need.name()
            );
            note_skip(&format!("SKIP {}: needs {}: {reason}", test_name(), need.name()));
            return false;
        }
    }
    true
}

/// The needs in a comma-separated list.
fn required(list: &str) -> Vec<Need> {
    let words = list.split(',').map(str::trim).filter(|word| !word.is_empty());
    words
        .filter_map(|word| {
            let need = Need::ALL.into_iter().find(|need| need.name() == word);
            assert!(need.is_some(), "PAGEFERRY_REQUIRE names {word:?}; it takes kvm, uffd, netns, qemu, rxe");
            need
        })
        .collect()
}

fn note_skip(line: &str) {
    eprintln!("{line}");
    let Some(path) = std::env::var_os("PAGEFERRY_SKIP_LOG") else { return };
    let opened = OpenOptions::new().create(true).append(true).open(&path);
    // One write, so that tests that run at the same time do not mix their lines.
    if let Err(error) = opened.and_then(|mut log| log.write_all(format!("{line}\n").as_bytes())) {
        eprintln!("the skip log {} cannot be written: {error}", path.display());
    }
}

fn test_name() -> String {
    // nextest runs each test in its own process, possibly on the main thread, and tells the name by this variable.
    std::env::var("NEXTEST_TEST_NAME")
        .unwrap_or_else(|_| std::thread::current().name().unwrap_or("a test").to_owned())
}

fn missing_namespaces() -> Option<String> {
    use rustix::thread::{CapabilitySet, capabilities};
    if !Path::new("/proc/self/ns/net").exists() {
        return Some("the kernel has no network namespaces (/proc/self/ns/net)".to_owned());
    }
    match capabilities(None) {
        Ok(sets) if sets.effective.contains(CapabilitySet::SYS_ADMIN) => None,
        Ok(_) => Some("making a network namespace takes CAP_SYS_ADMIN: run as root".to_owned()),
        Err(error) => Some(format!("the process's capabilities cannot be read: {error}")),
    }
}

fn missing_qemu() -> Option<String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").stdin(Stdio::null()).output();
    let text = match output {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => return Some(format!("qemu-system-x86_64 does not start: {error}")),
    };
    match qemu_major(&text) {
        Some(major) if major >= OLDEST_QEMU => None,
        Some(major) => Some(format!("qemu-system-x86_64 is of version {major}, older than {OLDEST_QEMU}")),
        None => Some(format!("qemu-system-x86_64 does not tell its version: {text:?}")),
    }
}

/// The major version in `QEMU emulator version 10.0.2 (Debian ...)`.
fn qemu_major(text: &str) -> Option<u32> {
    let (_, version) = text.split_once("version ")?;
    version.split('.').next()?.parse().ok()
}

fn missing_rxe() -> Option<String> {
    if Path::new("/sys/module/rdma_rxe").exists() {
        return None;
    }
    let Some(root) = std::env::var_os("PAGEFERRY_RXE_ROOT") else {
        return Some("the module rdma_rxe is not loaded and PAGEFERRY_RXE_ROOT is not set; `scripts/rxe-testbed fetch` \
             prints how to set it"
            .to_owned());
    };
    let modules = Path::new(&root).join("lib/modules");
    let has_module = std::fs::read_dir(&modules).is_ok_and(|releases| {
        releases.flatten().any(|release| release.path().join("kernel/drivers/infiniband/sw/rxe").is_dir())
    });
    (!has_module).then(|| format!("{} holds no kernel with the module rdma_rxe", modules.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_required_needs_is_read() {
        assert_eq!(required(""), []);
        assert_eq!(required(" kvm, uffd,"), [Need::Kvm, Need::Uffd]);
        let every = Need::ALL.map(Need::name).join(",");
        assert_eq!(required(&every), Need::ALL);
    }

    #[test]
    #[should_panic(expected = "PAGEFERRY_REQUIRE names \"kmv\"")]
    fn a_misspelt_need_is_not_silently_optional() {
        let _ = required("kmv");
    }

    #[test]
    fn qemu_versions_are_read() {
        assert_eq!(
            qemu_major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)\nCopyright"),
            Some(10)
        );
        assert_eq!(qemu_major("QEMU emulator version 7.2.17"), Some(7));
        assert_eq!(qemu_major("no such thing"), None);
    }

    #[test]
    fn a_need_that_the_files_contradict_is_missing() {
        assert_eq!(Need::Kvm.missing().is_none(), std::fs::File::open("/dev/kvm").is_ok());
        if Need::Uffd.missing().is_none() {
            // Whoever may make a userfaultfd can also read the pagemap that is scanned with it.
            assert!(std::fs::File::open("/proc/self/pagemap").is_ok());
        }
    }
}
