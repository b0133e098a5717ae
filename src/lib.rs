//! pageferry moves the memory of a running virtual machine to another host.

pub mod channel;
pub mod codec;
pub mod dirty;
pub mod engine;
pub mod guest;
#[cfg(feature = "cli")]
pub mod host;
pub mod layout;
pub mod memory;
pub mod migration;
pub mod pageset;
pub mod session;
pub mod sys;
#[doc(hidden)]
pub mod testing;
pub mod units;
pub mod wire;
