//! Stock QEMUs whose guests move through pageferry. A live guest copies and checks data and says so on its console; a paused one
//! has a file for its RAM, to be compared.

#![allow(clippy::panic, reason = "a test")]

mod daemons;
mod faults;
mod ferry;
mod hosts;
mod moves;
mod vm;
mod wrong;

/// Whether this machine has QEMU.
fn is_here() -> bool {
    pageferry::testing::require(&[pageferry::testing::Need::Qemu])
}
