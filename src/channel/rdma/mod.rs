//! The RDMA channel: the source writes pages into the destination's memory, and no processor copies them.
//!
//! A channel is a reliable queue pair and the TCP connection that it was agreed on. Over the queue pair go writes, and behind
//! the writes of a frame its header as a message, which so comes after them; the destination's receive buffers are the
//! credit. Over the connection go what the destination confirms, the keys of its memory, and, since a queue pair that is
//! idle never notices, the probes that tell when the peer is gone.
//!
//! `posting` and `pieces` decide, without I/O; `registered` has guest RAM on the devices; `fabric` is what a device must do,
//! and `device` does it.

mod destination;
pub mod device;
pub mod devices;
mod error;
pub mod fabric;
mod link;
mod pieces;
mod posting;
mod reason;
mod registered;
mod shared;
mod source;

#[cfg(test)]
pub(crate) mod emulated;

pub use destination::accept;
pub use error::RdmaError;
pub use reason::Reason;
pub use registered::{AboutToExpose, RdmaMemory};
pub use source::open;

use std::time::Duration;

use fabric::Retries;

/// How RDMA channels behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RdmaOptions {
    /// Payload bytes of a packet at most: 256 to 4096. The ports of both ends may carry less.
    pub mtu: u32,
    /// Requests that a queue pair holds; the device may hold fewer.
    pub queue_depth: u32,
    /// How long an answer to a packet may take: 4.096 us times two to the power of it, 1 to 31.
    pub timeout: u8,
    /// How often a packet is sent again before the queue pair fails, 0 to 6: 7 means for ever to some devices.
    pub retries: u8,
    /// How long the peer may be silent on the connection when it owes something before it counts as lost.
    pub link_timeout: Duration,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        // 4.096 us x 2^18 = 1.07 s, seven times: silence is noticed about as soon as on TCP. A shorter time fails queue pairs of
        // software devices that are only slow; a port that goes down is noticed at once either way.
        Self { mtu: 4096, queue_depth: 512, timeout: 18, retries: 6, link_timeout: Duration::from_secs(10) }
    }
}

impl RdmaOptions {
    fn retries(&self) -> Retries {
        // By ibv_modify_qp(3), 12 is 0.64 ms. Credits keep the peer from ever not being ready.
        Retries {
            timeout: self.timeout.clamp(1, 31),
            retries: self.retries.min(6),
            not_ready_retries: 6,
            not_ready_timer: 12,
        }
    }
}

/// Bytes of a frame's header and table at most, in registered memory: 32 + 12 KiB, rounded up to whole pages.
const SLOT_BYTES: u64 = 16 << 10;
/// Frames under way at most: 1 MiB of slots at each end, and 64 MiB of pages.
const FRAMES: u32 = 64;
