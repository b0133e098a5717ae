//! Runs a migration: takes inputs from session, link and operator, applies the machine, performs its actions. Owns clocks and
//! threads. One function at each end: [`source::migrate`] and [`destination::receive`].

pub mod cancel;
pub mod cpu;
pub mod destination;
pub mod endpoint;
pub mod fault;
pub mod journal;
pub mod observe;
pub mod recovery;
#[cfg(feature = "qemu")]
pub mod relay;
pub mod source;
mod stall;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The wall clock, in nanoseconds since 1970; 0 for a clock set before that.
#[must_use]
pub fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A value drawn from the kernel's random source: a token, a secret, an identifier.
///
/// # Errors
/// The kernel's answer when it has none to give.
pub fn draw<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut value = [0; N];
    getrandom::fill(&mut value).map_err(std::io::Error::other)?;
    Ok(value)
}

pub use crate::session::chain;
