//! One connection on one path that places runs of pages in the destination's memory. A new wire is one file here.
//!
//! A channel is asked to place runs, never to write bytes, so that a wire that writes remote memory by itself fits: the
//! runs are addresses on both sides. Its three parts at the source belong to different threads: [`ChannelSource`] pushes,
//! [`ChannelReceipts`] waits for what the destination confirms, and [`ChannelLink`] can cut it off at any time.

mod frames;
#[cfg(feature = "rdma")]
pub mod rdma;
pub mod sealed;
pub mod tcp;
mod tcp_destination;
mod tcp_source;

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::units::{RoundId, Run};
use crate::wire::data::{BarrierId, ChannelId, FrameError, Receipt};

/// What a push put on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The number that the destination's confirmation will name, rising by 1.
    pub sequence: u64,
    /// Bytes that it took, headers included.
    pub wire_bytes: u64,
}

/// The source's end of a channel, as the thread that pushes sees it.
///
/// Runs are as [`crate::wire::data`] wants them: rising, apart, none over a border between regions, at most
/// [`crate::wire::data::MAX_RUNS`] and, unless they are zero, [`crate::wire::data::MAX_BATCH_PAGES`] pages in one push.
/// Each push returns when the wire has taken it, which is before the destination has it.
pub trait ChannelSource: Send {
    /// Pages as they are, without a copy where the wire can. What arrives is what they hold some time before the
    /// destination confirms it.
    ///
    /// # Errors
    /// The channel is of no use any more; what was pushed and not confirmed may or may not arrive.
    fn push_pages(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError>;

    /// Pages that were compressed together.
    ///
    /// # Errors
    /// As [`ChannelSource::push_pages`].
    fn push_packed(&mut self, round: RoundId, runs: &[Run], packed: &[u8]) -> Result<Pushed, ChannelError>;

    /// Pages that hold zero bytes.
    ///
    /// # Errors
    /// As [`ChannelSource::push_pages`].
    fn push_zeros(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError>;

    /// A barrier, which the destination confirms when everything before it is in memory and nothing of the `fenced`
    /// channels can arrive any more.
    ///
    /// # Errors
    /// As [`ChannelSource::push_pages`].
    fn push_barrier(
        &mut self,
        barrier: BarrierId,
        round: RoundId,
        fenced: &[ChannelId],
    ) -> Result<Pushed, ChannelError>;

    /// Bytes that the wire has taken and the peer's machine does not have yet; `None` where that cannot be known.
    fn backlog(&self) -> Option<u64>;
}

/// The source's end of a channel, as the thread that waits for confirmations sees it.
pub trait ChannelReceipts: Send {
    /// Waits for the next one, as long as the link is good.
    ///
    /// # Errors
    /// The channel is of no use any more. A [`Receipt::Error`] of the peer is [`ChannelError::Peer`].
    fn next(&mut self) -> Result<Receipt, ChannelError>;
}

/// A handle on a channel that any thread may have.
pub trait ChannelLink: Send + Sync + std::fmt::Debug {
    /// This end.
    fn local(&self) -> SocketAddr;
    /// The other end.
    fn remote(&self) -> SocketAddr;
    /// What carries the pages.
    fn carrier(&self) -> Carrier;
    /// Cuts it off: whoever waits for it on either side gets an error. A wire that writes memory by itself does so no more
    /// when this returns. Idempotent.
    fn shut(&self);
}

/// What carries the pages of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A TCP connection, as it is.
    Tcp,
    /// A TCP connection whose bytes are encrypted.
    Sealed,
    /// An RDMA queue pair.
    Rdma {
        /// The device of this end, such as `mlx5_0`.
        device: String,
        /// Its port, from 1.
        port: u8,
        /// The address that it uses.
        gid: Ipv6Addr,
    },
}

impl Carrier {
    /// Whether nobody on the way can read the pages.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Sealed)
    }
}

/// A channel that was just opened at the source.
pub struct OpenChannel {
    /// For the thread that pushes.
    pub source: Box<dyn ChannelSource>,
    /// For the thread that waits for confirmations.
    pub receipts: Box<dyn ChannelReceipts>,
    /// For everyone.
    pub link: Arc<dyn ChannelLink>,
}

/// A channel that the destination has just accepted.
pub struct AcceptedChannel {
    /// For the thread that receives.
    pub receiver: Box<dyn ChannelReceiver>,
    /// For everyone.
    pub link: Arc<dyn ChannelLink>,
}

/// What came in at the destination.
#[derive(Debug)]
pub enum Arrival<'a> {
    /// Pages, which are in memory already.
    Placed {
        /// How many.
        pages: u64,
    },
    /// Pages that were compressed together; the session takes them apart.
    Packed {
        /// Which, checked against the memory.
        runs: &'a [Run],
        /// How many.
        pages: u64,
        /// The compressed bytes.
        packed: &'a [u8],
    },
    /// Pages that hold zero bytes.
    Zeros {
        /// Which, checked against the memory.
        runs: &'a [Run],
        /// How many.
        pages: u64,
    },
    /// A barrier.
    Barrier {
        /// Its number.
        barrier: BarrierId,
        /// The channels that the source gave up.
        fenced: Vec<ChannelId>,
    },
}

/// An [`Arrival`], with what all of them have.
#[derive(Debug)]
pub struct Arrived<'a> {
    /// The number to confirm.
    pub sequence: u64,
    /// Bytes that it took on the wire.
    pub wire_bytes: u64,
    /// How long it took to put its pages into memory, the wait for their bytes not counted.
    pub placing: Duration,
    /// What it is.
    pub what: Arrival<'a>,
}

/// The destination's end of a channel.
pub trait ChannelReceiver: Send {
    /// Waits for the next frame, as long as the link is good. `about_to_place` is told the runs, checked against the memory,
    /// before the first byte of them is written; a frame that breaks a rule writes nothing.
    ///
    /// # Errors
    /// The channel is of no use any more. Of the runs that were told last, some pages may be written in part.
    fn next(&mut self, about_to_place: &mut dyn FnMut(&[Run])) -> Result<Arrived<'_>, ChannelError>;

    /// Tells the source something.
    ///
    /// # Errors
    /// The channel is of no use any more.
    fn confirm(&mut self, receipt: &Receipt) -> Result<(), ChannelError>;
}

/// Why a channel is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A socket or pipe could not be made ready.
    #[error("the socket of a data channel cannot be set up")]
    SetUp(#[source] io::Error),
    /// The network, or the peer's kernel, did not take bytes.
    #[error("sending on a data channel failed")]
    Send(#[source] io::Error),
    /// The network broke.
    #[error("receiving on a data channel failed")]
    Receive(#[source] io::Error),
    /// The peer closed it between two frames.
    #[error("the peer closed the data channel")]
    Closed,
    /// The peer closed it within a frame.
    #[error("the peer closed the data channel {got} bytes into a part of {expected}")]
    CutShort {
        /// Bytes that came.
        got: u64,
        /// Bytes that were announced.
        expected: u64,
    },
    /// The peer sent the beginning of a frame and nothing more.
    #[error("the peer stopped within a frame, {got} bytes into a part of {expected}, for {seconds} s")]
    Stalled {
        /// Bytes that came.
        got: u64,
        /// Bytes that were announced.
        expected: u64,
        /// How long was waited.
        seconds: u64,
    },
    /// The peer broke the protocol.
    #[error("the peer sent a wrong data frame")]
    Frame(#[source] FrameError),
    /// The peer confirmed something that was never sent.
    #[error("the peer confirms frame {got}, but only {sent} were sent")]
    ConfirmsTooMuch {
        /// What it confirmed.
        got: u64,
        /// What was sent.
        sent: u64,
    },
    /// The peer confirmed a barrier that was never sent.
    #[error("the peer confirms barrier {got}, which was not sent")]
    ConfirmsBarrier {
        /// What it confirmed.
        got: u64,
    },
    /// RDMA is not to be had, or failed.
    #[cfg(feature = "rdma")]
    #[error(transparent)]
    Rdma(#[from] rdma::RdmaError),
    /// The peer says why it gives the channel up.
    #[error("the destination refuses the data: {0}")]
    Peer(String),
}

impl ChannelError {
    /// Whether the peer broke the protocol, so that the migration must end, rather than a link that broke.
    #[must_use]
    pub fn is_violation(&self) -> bool {
        #[cfg(feature = "rdma")]
        if let Self::Rdma(error) = self {
            return error.is_violation();
        }
        matches!(
            self,
            Self::Frame(_) | Self::ConfirmsTooMuch { .. } | Self::ConfirmsBarrier { .. } | Self::Peer(_)
        )
    }
}

/// An error with everything below it, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        // Some libraries repeat their cause in their own words.
        let more = below.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = below.source();
    }
    text
}
