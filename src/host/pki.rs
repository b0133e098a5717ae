//! Certificates for those who have no authority of their own: one that is a file, and hosts that it vouches for.

mod authority;
mod commands;
#[cfg(test)]
mod tests;

pub use authority::{Authority, Issued, PkiError};
pub use commands::{init, issue};

/// How long a new authority is valid, in days: ten years, longer than most hosts last.
pub const AUTHORITY_DAYS: u32 = 3652;
/// How long a host's certificate is valid, in days, when nobody says: two years and a month to replace it in.
pub const HOST_DAYS: u32 = 760;
