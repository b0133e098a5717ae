//! Real processes: `pageferry demo` with both guests, in both modes, with everything that can go wrong on the way.
#![allow(clippy::panic, reason = "a test")]

mod demo;
mod faults;
mod moves;
mod usage;
