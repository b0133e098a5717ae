//! Stock QEMU, as it is installed: told what to do over QMP, its RAM mapped where it is shared memory, its multifd stream
//! understood. What moves the pages is [`crate::engine::relay`].
//!
//! [`qmp`] talks to a QEMU, [`settings`] prepares both ends, [`ram`] finds what backs each RAM block, [`multifd`] takes the
//! stream apart and does no I/O.

pub mod multifd;
#[cfg(feature = "qemu")]
pub mod qmp;
#[cfg(feature = "qemu")]
pub mod ram;
#[cfg(feature = "qemu")]
pub mod settings;

use std::fmt;

/// The oldest QEMU that is moved: the first that finds zero pages on the multifd channels (`zero-page-detection=multifd`).
/// Before it zero pages travel on the main channel, and could land after a newer page that was placed.
pub const OLDEST_QEMU: Version = Version { major: 9, minor: 0, micro: 0 };

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}
