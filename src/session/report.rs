//! What a session tells: its events and statistics.

use std::net::SocketAddr;

use super::error::SessionError;
use super::mode::TransferMode;
use super::path::Path;
pub use crate::channel::Carrier;
use crate::pageset::PageSet;
use crate::units::RoundId;
use crate::wire::data::ChannelId;

/// What happens in a source session.
#[derive(Debug)]
pub enum SessionEvent {
    /// A round is over: every page of it is in the destination's memory, and nothing of it is under way any more.
    Placed {
        /// Which.
        round: RoundId,
        /// What it took.
        stats: RoundStats,
    },
    /// A channel did not open or was lost. The others go on.
    ChannelLost {
        /// Its number.
        channel: ChannelId,
        /// Its path.
        path: Path,
        /// Why.
        cause: SessionError,
    },
    /// A channel of a path that had lost one is open again, under another number.
    ChannelReturned {
        /// Its number.
        channel: ChannelId,
        /// Its path.
        path: Path,
        /// How long the path lacked it.
        after: std::time::Duration,
    },
    /// Pages are carried by something else from now on: TCP where RDMA was lost or is not to be had, or RDMA again.
    CarrierChanged {
        /// [`TransferMode::Tcp`] or [`TransferMode::Rdma`].
        to: TransferMode,
        /// Why, as a sentence.
        reason: String,
    },
    /// A path takes no part: RDMA carries the pages, and there is none on it.
    PathLeftOut {
        /// Which.
        path: Path,
        /// Why.
        reason: String,
    },
    /// The last channel was lost within a round; the round is over.
    Failed {
        /// Why.
        cause: SessionError,
        /// The pages of the round that the destination has not confirmed.
        owed: PageSet,
    },
}

/// What a round took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// Pages sent, zero pages among them. Those of a lost channel were sent again and count again.
    pub pages: u64,
    /// Pages that held only zero bytes, of which only the numbers were sent.
    pub zero_pages: u64,
    /// Bytes of the other pages, before compression.
    pub payload_bytes: u64,
    /// Bytes that were sent, headers included.
    pub wire_bytes: u64,
}

/// How a channel stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelStats {
    /// Its number.
    pub id: ChannelId,
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The interface of this end, where the address belongs to one.
    pub interface: Option<String>,
    /// The way that it was opened on, as its dialler would name it.
    pub path: Path,
    /// Bytes that went over it, headers included.
    pub bytes: u64,
    /// Whether it is in use.
    pub alive: bool,
    /// How it transfers.
    pub mode: TransferMode,
    /// What carries its pages.
    pub carrier: Carrier,
}

/// How a session stands.
#[derive(Clone, Debug)]
pub struct SessionStats {
    /// Each channel that ever opened.
    pub channels: Vec<ChannelStats>,
    /// Pages that the destination has confirmed, over all rounds.
    pub placed_pages: u64,
    /// Pages of the round under way that it has not confirmed.
    pub remaining_pages: u64,
    /// Bytes sent over all channels, headers included.
    pub wire_bytes: u64,
    /// How pages are carried now.
    pub mode: TransferMode,
    /// Why it is not RDMA, where it should be.
    pub mode_reason: Option<String>,
    /// For how long not one channel has lived.
    pub none_for: Option<std::time::Duration>,
}
