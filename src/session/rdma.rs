//! What a session has for RDMA: this host's devices, or why none is used.

use std::fmt;

use super::mode::TransferMode;

#[cfg(feature = "rdma")]
pub use crate::channel::rdma::devices::{Gid, Limits, MemoryLock, Port, RdmaDevice, RdmaDevices};
#[cfg(feature = "rdma")]
pub use crate::channel::rdma::{RdmaOptions, Reason, device::HostDevices, fabric::Fabric};

/// What can be chosen about RDMA on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RdmaTuning {
    /// Payload bytes of a packet at most: 256, 512, 1024, 2048 or 4096. The ports of both ends may carry less.
    pub mtu: u32,
    /// Requests that a queue pair holds, 16 to 4096; the device may hold fewer.
    pub queue_depth: u32,
    /// How long an answer to a packet may take: 4.096 us times two to the power of it, 1 to 31.
    pub timeout: u8,
    /// How often a packet is sent again before the queue pair fails, 0 to 6.
    pub retries: u8,
}

impl Default for RdmaTuning {
    fn default() -> Self {
        // 4.096 us x 2^18 = 1.07 s, seven times: silence is noticed about as soon as on TCP. A shorter time fails queue pairs of
        // software devices that are only slow; a port that goes down is noticed at once either way.
        Self { mtu: 4096, queue_depth: 512, timeout: 18, retries: 6 }
    }
}

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
        Self::of_this_host_with(&RdmaTuning::default())
    }

    /// The same, with other choices.
    #[must_use]
    pub fn of_this_host_with(tuning: &RdmaTuning) -> Self {
        #[cfg(feature = "rdma")]
        {
            let RdmaTuning { mtu, queue_depth, timeout, retries } = *tuning;
            let options = RdmaOptions { mtu, queue_depth, timeout, retries, ..RdmaOptions::default() };
            Self::with(std::sync::Arc::new(HostDevices), options)
        }
        #[cfg(not(feature = "rdma"))]
        {
            let _ = tuning;
            Self::off("this program was built without RDMA")
        }
    }

    /// What is used for a mode: these devices, or what this host has, where the mode asks for them.
    #[must_use]
    pub fn for_mode(mode: TransferMode, given: Option<&Self>) -> Self {
        match mode {
            TransferMode::Rdma | TransferMode::Auto => given.cloned().unwrap_or_else(Self::of_this_host),
            TransferMode::Tcp | TransferMode::Compression => Self::off(&format!("its mode is {mode}")),
        }
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
