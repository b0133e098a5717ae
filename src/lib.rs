//! pageferry moves the memory of a running virtual machine to another host.

pub mod codec;
pub mod dirty;
pub mod guest;
#[cfg(feature = "cli")]
pub mod host;
pub mod layout;
pub mod memory;
pub mod migration;
pub mod pageset;
pub mod sys;
#[doc(hidden)]
pub mod testing;
pub mod units;
pub mod wire;
