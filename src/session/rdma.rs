//! What a session has for RDMA: this host's devices, or why none is used.

use std::fmt;

#[cfg(feature = "rdma")]
pub use crate::channel::rdma::devices::{Gid, Limits, MemoryLock, Port, RdmaDevice, RdmaDevices};
#[cfg(feature = "rdma")]
pub use crate::channel::rdma::{RdmaOptions, Reason, device::HostDevices, fabric::Fabric};

/// Whether a session may use RDMA, with which devices and how.
#[derive(Clone)]
pub struct RdmaSupport {
    absent: Option<String>,
    #[cfg(feature = "rdma")]
    on: Option<(std::sync::Arc<dyn Fabric>, RdmaOptions)>,
}

impl fmt::Debug for RdmaSupport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RdmaSupport({})", self.absent.as_deref().unwrap_or("on"))
    }
}

impl RdmaSupport {
    /// Not used, for this reason, which the other host is told.
    #[must_use]
    pub fn off(why: &str) -> Self {
        Self {
            absent: Some(why.to_owned()),
            #[cfg(feature = "rdma")]
            on: None,
        }
    }

    /// With the devices of this host, if it has one that can be used. Asks the kernel; takes a few milliseconds.
    #[must_use]
    pub fn of_this_host() -> Self {
        #[cfg(feature = "rdma")]
        return Self::with(std::sync::Arc::new(HostDevices), RdmaOptions::default());
        #[cfg(not(feature = "rdma"))]
        Self::off("this program was built without RDMA")
    }

    /// With these devices.
    #[cfg(feature = "rdma")]
    #[must_use]
    pub fn with(fabric: std::sync::Arc<dyn Fabric>, options: RdmaOptions) -> Self {
        let absent = fabric.reason().map(|reason| reason.to_string());
        Self { absent, on: Some((fabric, options)) }
    }

    /// Why it is not used; `None` when it may be.
    #[must_use]
    pub fn absent(&self) -> Option<&str> {
        self.absent.as_deref()
    }

    /// The devices, where it may be used.
    #[cfg(feature = "rdma")]
    pub(super) fn on(&self) -> Option<&(std::sync::Arc<dyn Fabric>, RdmaOptions)> {
        self.on.as_ref().filter(|_| self.absent.is_none())
    }
}
