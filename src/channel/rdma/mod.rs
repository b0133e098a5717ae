//! RDMA: which devices there are, and whether a migration can use them.

pub mod devices;
mod reason;

pub use reason::Reason;
