//! What can go wrong with verbs, one variant per operation.

use std::io;

/// Why RDMA does not work here, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum VerbsError {
    /// libibverbs does not load.
    #[error(
        "the RDMA library {library} does not load; install rdma-core's libibverbs (Debian: libibverbs1 ibverbs-providers)"
    )]
    NoLibrary {
        /// Its name.
        library: &'static str,
        /// What the dynamic loader says.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// libibverbs lacks a function.
    #[error("the RDMA library has no function {symbol}; install rdma-core 32 or newer")]
    TooOld {
        /// Which.
        symbol: &'static str,
    },
    /// The kernel has no user-space verbs.
    #[error(
        "the kernel offers no RDMA to programs; load its module ib_uverbs (modprobe ib_uverbs), or run a kernel that has it"
    )]
    NoUverbs(#[source] io::Error),
    /// The devices cannot be listed for another reason.
    #[error("the RDMA devices cannot be listed")]
    List(#[source] io::Error),
    /// A device does not open.
    #[error(
        "the RDMA device {device} does not open; /dev/infiniband/{node} must be there and open to this user for reading and writing"
    )]
    Open {
        /// Its name.
        device: String,
        /// The name of its node in `/dev/infiniband`.
        node: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A device is not there any more.
    #[error("the RDMA device {device} has vanished; was its module unloaded, or the soft-RoCE link deleted?")]
    Vanished {
        /// Its name.
        device: String,
    },
    /// A device does not tell its limits.
    #[error("the limits of the RDMA device cannot be read")]
    QueryDevice(#[source] io::Error),
    /// A port does not tell its state.
    #[error("the state of port {port} of the RDMA device cannot be read")]
    QueryPort {
        /// Its number, from 1.
        port: u8,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The addresses of a device cannot be read.
    #[error("the GIDs of the RDMA device cannot be read")]
    QueryGids(#[source] io::Error),
    /// No protection domain.
    #[error("the RDMA device gives no protection domain")]
    ProtectionDomain(#[source] io::Error),
    /// Memory cannot be registered.
    #[error("{bytes} bytes of memory cannot be registered with the RDMA device{}", memlock_hint(.source, *.bytes))]
    Register {
        /// How much.
        bytes: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A range is not inside a registered memory.
    #[error("bytes {offset:#x}+{bytes:#x} are outside a registered memory of {of:#x} bytes")]
    OutOfRange {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        bytes: u64,
        /// How long the memory is.
        of: u64,
    },
    /// No completion queue.
    #[error("the RDMA device gives no completion queue of {entries} entries")]
    CompletionQueue {
        /// How many were asked for.
        entries: u32,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Events of a completion queue cannot be asked for.
    #[error("events of the completion queue cannot be asked for")]
    Arm(#[source] io::Error),
    /// Events cannot be read.
    #[error("events of the RDMA device cannot be read")]
    Event(#[source] io::Error),
    /// Completions cannot be read: the queue overflowed, or the device is gone.
    #[error("completions cannot be read")]
    Poll(#[source] io::Error),
    /// No queue pair.
    #[error("the RDMA device gives no queue pair with these depths")]
    QueuePair(#[source] io::Error),
    /// A queue pair does not change its state.
    #[error("the queue pair does not become {to}")]
    Modify {
        /// What it should become.
        to: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The state of a queue pair cannot be read.
    #[error("the state of the queue pair cannot be read")]
    QueryQueuePair(#[source] io::Error),
    /// Work was not taken.
    #[error("the queue pair took only the first {posted} work requests")]
    Post {
        /// How many were taken; these will complete.
        posted: usize,
        /// Why the next was not.
        source: io::Error,
    },
}

/// `ENOMEM` is what a limit on locked memory looks like (ibv_reg_mr(3)).
fn memlock_hint(source: &io::Error, bytes: u64) -> String {
    if source.raw_os_error() == Some(libc::ENOMEM) {
        format!(
            "; registered memory is locked: allow this process at least that much (ulimit -l {}, LimitMEMLOCK=), or give it CAP_IPC_LOCK",
            bytes.div_ceil(1024)
        )
    } else {
        String::new()
    }
}

/// What a function says that answers 0, or an errno as its value (which some drivers negate), or -1 with errno set.
pub(super) fn check(answer: libc::c_int) -> Result<(), io::Error> {
    match answer {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        other => Err(io::Error::from_raw_os_error(other.saturating_abs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_may_not_be_locked_is_named_with_its_size() {
        let of = |errno| {
            VerbsError::Register { bytes: 64 << 20, source: io::Error::from_raw_os_error(errno) }.to_string()
        };
        assert!(of(libc::ENOMEM).contains("ulimit -l 65536"), "{}", of(libc::ENOMEM));
        assert!(!of(libc::EINVAL).contains("ulimit"), "{}", of(libc::EINVAL));
    }

    #[test]
    fn answers_are_errnos_of_either_sign() {
        assert!(check(0).is_ok());
        assert_eq!(check(libc::EINVAL).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(check(-libc::ENOSYS).unwrap_err().raw_os_error(), Some(libc::ENOSYS));
    }
}
