//! What RDMA this host has, for whoever chooses a mode or shows it.

pub use crate::channel::rdma::Reason;
pub use crate::channel::rdma::devices::{Gid, Limits, MemoryLock, Port, RdmaDevice, RdmaDevices};
