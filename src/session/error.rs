//! What can go wrong in a session.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::channel::ChannelError;
use crate::codec::CodecError;
use crate::wire::data::{ChannelId, MAX_CHANNELS};
use crate::wire::link::LinkFrameError;
use crate::wire::preamble::{PreambleError, RefusalCode};

/// Why a session, a link or a listener could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No path was given.
    #[error("no path to the destination was given")]
    NoPath,
    /// The connection did not come about.
    #[error("cannot connect over {path}; check that pageferry listens there and that no firewall is between")]
    Connect {
        /// Which path.
        path: String,
        /// What the kernel says.
        #[source]
        cause: io::Error,
    },
    /// The connection broke, or was silent, before both sides had agreed what it is for.
    #[error("{remote} did not answer as a pageferry does")]
    Handshake {
        /// The other side.
        remote: SocketAddr,
        /// What the kernel says.
        #[source]
        cause: io::Error,
    },
    /// One of both sides does not prove which host it is, or is not trusted by the other.
    #[error("{remote} is not trusted, or does not trust this host: {why}")]
    Untrusted {
        /// The other side.
        remote: SocketAddr,
        /// In words.
        why: String,
    },
    /// The other side's first bytes are wrong.
    #[error("{remote} does not fit this side")]
    Preamble {
        /// The other side.
        remote: SocketAddr,
        /// What is wrong with them.
        #[source]
        cause: PreambleError,
    },
    /// The other side refuses.
    #[error("{remote} refuses: {text}")]
    Refused {
        /// The other side.
        remote: SocketAddr,
        /// Why, for the program.
        code: RefusalCode,
        /// Why, in its words.
        text: String,
    },
    /// A connection was made, but no channel of it.
    #[error("the data channel to {remote} cannot be set up")]
    Channel {
        /// The other side.
        remote: SocketAddr,
        /// Why.
        #[source]
        cause: ChannelError,
    },
    /// A path has no RDMA at this end.
    #[error("no RDMA: {0}")]
    NoRdma(String),
    /// Payload on a path has to be encrypted, and cannot be.
    #[error("no encryption: {0}")]
    NoEncryption(String),
    /// A data channel was lost.
    #[error("the data channel with {remote} was lost")]
    ChannelLost {
        /// The other side.
        remote: SocketAddr,
        /// Why.
        #[source]
        cause: Arc<ChannelError>,
    },
    /// The source gave the channel up.
    #[error("the source gave the data channel up")]
    Fenced,
    /// A barrier on a channel says that this very channel was given up.
    #[error("data channel {channel} says of itself that it was given up")]
    FencesItself {
        /// Which.
        channel: ChannelId,
    },
    /// Compressed pages could not be taken apart, or the codec has no memory.
    #[error("compressed pages cannot be used")]
    Codec(#[from] CodecError),
    /// Not one data channel opened.
    #[error("none of the {tried} data channels could be opened")]
    NoChannel {
        /// How many were tried.
        tried: usize,
        /// Why the first one did not.
        #[source]
        first: Box<SessionError>,
    },
    /// The last data channel was lost.
    #[error("no data channel is left")]
    AllChannelsLost {
        /// Why the last one was lost; `None` when that was in an earlier round.
        #[source]
        last: Option<Arc<ChannelError>>,
    },
    /// The other side refuses the pages, or says of them what cannot be, so that no channel to it is of use.
    #[error("no page can be placed at {remote} any more")]
    NotPlaceable {
        /// The other side.
        remote: SocketAddr,
        /// Why.
        #[source]
        cause: Arc<ChannelError>,
    },
    /// The session was ended by this side.
    #[error("the session was ended")]
    Ended,
    /// More channels than a migration may have had in all.
    #[error("a migration cannot have more than {MAX_CHANNELS} data channels, lost ones included")]
    TooManyChannels,
    /// Nothing can listen there.
    #[error("cannot listen on {address}; check that this host has the address and that the port is free")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// What the kernel says.
        #[source]
        cause: io::Error,
    },
    /// The kernel gives no more threads.
    #[error("cannot start the thread {what}")]
    Thread {
        /// Its name.
        what: String,
        /// What the kernel says.
        #[source]
        cause: io::Error,
    },
    /// The connection of a control link broke.
    #[error("the control connection broke")]
    LinkBroken(#[source] io::Error),
    /// Nothing came over a control link, not even a heartbeat.
    #[error("the peer was silent on the control connection for {seconds} s")]
    LinkSilent {
        /// For how long.
        seconds: u64,
    },
    /// The peer broke the protocol of the control link.
    #[error("the peer sent a wrong control frame")]
    LinkFrame(#[source] LinkFrameError),
    /// A message went missing, or something was confirmed that was never sent.
    #[error("the peer's count of control messages is wrong: {0}")]
    LinkCount(#[from] super::control_state::CountError),
    /// The peer said goodbye.
    #[error("the peer closed the control link")]
    ClosedByPeer,
    /// The connection was lost before there was a secret to resume it with.
    #[error("the control connection was lost before it could be resumed")]
    NotResumable(#[source] Box<SessionError>),
    /// The connection did not come back in time.
    #[error("the control connection did not come back within {seconds} s")]
    GaveUp {
        /// How long was tried.
        seconds: u64,
        /// Why it was lost, or the last attempt failed.
        #[source]
        last: Box<SessionError>,
    },
    /// A question or an answer that is too long, or an answer that does not come.
    #[error("asking {remote} failed")]
    Query {
        /// Who was asked.
        remote: SocketAddr,
        /// What happened.
        #[source]
        cause: io::Error,
    },
}
