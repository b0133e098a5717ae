//! Why RDMA cannot be used: every way in which it can be absent has its own words.

use std::error::Error;
use std::net::IpAddr;
use std::path::Path;

use rustix::fs::{Access, access};
use rustix::io::Errno;

use crate::sys::verbs::{PortState, Transport, VerbsError};

/// Why something cannot be used for RDMA. As JSON it is an object of `code`, which does not change, and `text`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// libibverbs is not installed.
    #[error("{0}")]
    LibraryMissing(String),
    /// libibverbs is too old.
    #[error("{0}")]
    LibraryTooOld(String),
    /// The kernel has no user-space verbs.
    #[error(
        "the kernel offers no RDMA to programs; load its module ib_uverbs (modprobe ib_uverbs), or run a kernel that has it"
    )]
    KernelWithoutVerbs,
    /// The kernel has devices that the library does not know.
    #[error("libibverbs has no driver for {0}; install rdma-core's drivers (Debian: ibverbs-providers)")]
    NoDriver(String),
    /// There is none.
    #[error(
        "this host has no RDMA device; a network card with RDMA needs its kernel module, and soft-RoCE is made by \
         `rdma link add rxe0 type rxe netdev INTERFACE`"
    )]
    NoDevice,
    /// There are devices, and none can be used.
    #[error("none of this host's RDMA devices can be used")]
    NoUsableDevice,
    /// The device's node is missing.
    #[error("/dev/infiniband/{0} is not there; udev makes it, and a container needs it passed in")]
    NodeMissing(String),
    /// The device's node is closed to this user.
    #[error(
        "this user may not open /dev/infiniband/{0} for reading and writing; it is root's, or its group's"
    )]
    NotPermitted(String),
    /// The device, or asking it something, failed.
    #[error("{0}")]
    Failed(String),
    /// The device is no RoCE device.
    #[error("the device speaks {0}, and a migration needs RoCE v2")]
    WrongTransport(&'static str),
    /// A port is not up.
    #[error("the port is {0}; it has to be active: is the cable in, and the interface up?")]
    PortNotActive(&'static str),
    /// A port is not Ethernet.
    #[error("the port's link layer is not Ethernet, and a migration needs RoCE v2")]
    NotEthernet,
    /// A port has no address that can be used.
    #[error(
        "the port has no RoCE v2 GID of an IP address that others reach; give its interface an address (link-local ones do not count)"
    )]
    NoUsableGid,
    /// A path does not lead over a device.
    #[error("none of its RDMA devices has the address {0}, which the path uses")]
    NotAtAddress(IpAddr),
    /// No port of the device can be used.
    #[error("none of the device's ports can be used")]
    NoUsablePort,
    /// The limit on locked memory is too small.
    #[error(
        "this process may lock {limit} bytes of memory, and RDMA needs {needed} of it locked; raise the limit (ulimit -l, LimitMEMLOCK= of \
         the service), or give the process CAP_IPC_LOCK"
    )]
    MemlockTooSmall {
        /// What it may lock.
        limit: u64,
        /// What is needed.
        needed: u64,
    },
}

impl Reason {
    /// A word for programs, which does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::LibraryMissing(_) => "library-missing",
            Self::LibraryTooOld(_) => "library-too-old",
            Self::KernelWithoutVerbs => "kernel-without-verbs",
            Self::NoDriver(_) => "no-driver",
            Self::NoDevice => "no-device",
            Self::NoUsableDevice => "no-usable-device",
            Self::NodeMissing(_) => "node-missing",
            Self::NotPermitted(_) => "not-permitted",
            Self::Failed(_) => "failed",
            Self::WrongTransport(_) => "wrong-transport",
            Self::PortNotActive(_) => "port-not-active",
            Self::NotEthernet => "not-ethernet",
            Self::NoUsableGid => "no-usable-gid",
            Self::NotAtAddress(_) => "not-at-address",
            Self::NoUsablePort => "no-usable-port",
            Self::MemlockTooSmall { .. } => "memlock-too-small",
        }
    }

    /// Why a port in this state cannot be used, if so.
    pub(super) fn of_state(state: PortState) -> Option<Self> {
        match state {
            PortState::Active => None,
            PortState::Down => Some(Self::PortNotActive("down")),
            PortState::Starting => Some(Self::PortNotActive("coming up")),
            PortState::Other(_) => Some(Self::PortNotActive("in an unknown state")),
        }
    }

    /// Why a device of this transport cannot be used, if so.
    pub(super) fn of_transport(transport: Transport) -> Option<Self> {
        match transport {
            Transport::InfiniBand => None,
            Transport::Iwarp => Some(Self::WrongTransport("iWARP")),
            Transport::Other => Some(Self::WrongTransport("a transport of its own")),
        }
    }
}

impl Reason {
    /// Why the library lists no device, by what `/sys/class/infiniband_verbs` below `root` has. It leaves out devices without a
    /// node or a driver, and says nothing of them; newer ones list none instead of failing where the kernel has no verbs.
    pub(super) fn of_no_device(root: &Path) -> Self {
        let Ok(entries) = std::fs::read_dir(root.join("sys/class/infiniband_verbs")) else {
            return Self::KernelWithoutVerbs;
        };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut nodes: Vec<String> = names.filter(|name| name.starts_with("uverbs")).collect();
        nodes.sort();
        match nodes.iter().find(|node| !root.join("dev/infiniband").join(node).exists()) {
            _ if nodes.is_empty() => Self::NoDevice,
            Some(missing) => Self::NodeMissing(missing.clone()),
            None => Self::NoDriver(nodes.join(", ")),
        }
    }
}

impl From<VerbsError> for Reason {
    fn from(error: VerbsError) -> Self {
        match &error {
            VerbsError::NoLibrary { .. } => Self::LibraryMissing(with_cause(&error)),
            VerbsError::TooOld { .. } => Self::LibraryTooOld(with_cause(&error)),
            VerbsError::NoUverbs(_) => Self::KernelWithoutVerbs,
            VerbsError::Open { node, .. } => {
                // The library answers ENOENT for a node that is closed to this user too, so the node itself is asked.
                match access(format!("/dev/infiniband/{node}"), Access::READ_OK | Access::WRITE_OK) {
                    Err(Errno::NOENT) => Self::NodeMissing(node.clone()),
                    Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => Self::NotPermitted(node.clone()),
                    _ => Self::Failed(with_cause(&error)),
                }
            }
            _ => Self::Failed(with_cause(&error)),
        }
    }
}

fn with_cause(error: &VerbsError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

impl serde::Serialize for Reason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut object = serializer.serialize_struct("Reason", 2)?;
        object.serialize_field("code", self.code())?;
        object.serialize_field("text", &self.to_string())?;
        object.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_verbs_is_not_taken_for_a_missing_library() {
        let reason = Reason::from(VerbsError::NoUverbs(Errno::NOSYS.into()));
        assert_eq!(reason.code(), "kernel-without-verbs");
        assert!(reason.to_string().contains("ib_uverbs"), "{reason}");
    }

    #[test]
    fn an_empty_list_is_explained_by_what_the_kernel_has() {
        let root = tempfile::tempdir().unwrap();
        let reason = || Reason::of_no_device(root.path());
        assert_eq!(reason(), Reason::KernelWithoutVerbs);
        let class = root.path().join("sys/class/infiniband_verbs");
        std::fs::create_dir_all(&class).unwrap();
        std::fs::write(class.join("abi_version"), "6").unwrap();
        assert_eq!(reason(), Reason::NoDevice);
        std::fs::create_dir(class.join("uverbs0")).unwrap();
        assert_eq!(reason(), Reason::NodeMissing("uverbs0".into()));
        std::fs::create_dir_all(root.path().join("dev/infiniband/uverbs0")).unwrap();
        assert_eq!(reason(), Reason::NoDriver("uverbs0".into()));
    }

    #[test]
    fn a_node_that_is_not_there_is_named() {
        let error = VerbsError::Open {
            device: "rxe0".into(),
            node: "uverbs-that-is-not-there".into(),
            source: Errno::NOENT.into(),
        };
        assert_eq!(Reason::from(error), Reason::NodeMissing("uverbs-that-is-not-there".into()));
    }

    #[test]
    fn every_state_but_active_is_a_reason() {
        assert_eq!(Reason::of_state(PortState::Active), None);
        for state in [PortState::Down, PortState::Starting, PortState::Other(5)] {
            assert_eq!(Reason::of_state(state).map(|reason| reason.code()), Some("port-not-active"));
        }
    }
}
