//! pageferry moves the memory of a running virtual machine to another host.

pub mod dirty;
pub mod guest;
pub mod layout;
pub mod memory;
pub mod pageset;
pub mod sys;
#[doc(hidden)]
pub mod testing;
pub mod units;
