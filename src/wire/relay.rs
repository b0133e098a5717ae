//! Messages of a relay: what two pageferries tell each other while they carry the migration of a hypervisor that has its own
//! protocol. Protobuf over the control link, as [`super::control`]; the numbers of the bodies do not meet, so either side of
//! one protocol names what it cannot understand of the other.
//!
//! The hypervisor's connections are *streams*, numbered by the source in the order of their first bytes. Each has a window
//! ([`STREAM_WINDOW`]) in each direction, so that nothing waits without a bound.

mod proto;

use prost::Message as _;

use super::control::{DecodeError, MAX_TEXT_BYTES};
use crate::layout::MAX_REGIONS;

/// The most bytes of a stream in one message.
pub const MAX_STREAM_BYTES: usize = 64 << 10;
/// The most bytes of a stream under way that the other side has not said it has passed on.
pub const STREAM_WINDOW: u64 = 1 << 20;
/// The most streams: a main channel and 255 multifd channels, the most that QEMU takes.
pub const MAX_STREAMS: u32 = 256;
/// The longest header of a packet.
pub const MAX_PACKET_HEADER: usize = 4096;
/// The largest packet that is carried whole.
pub const MAX_PACKET_BYTES: u32 = 16 << 20;
/// The most RAM blocks in an offer.
pub const MAX_BLOCKS: usize = 1024;

/// A RAM block, as the source has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its name in the hypervisor's stream.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Whether it is guest RAM that a person gave the guest, and has to be the same at the destination.
    pub backend: bool,
    /// Whether the source can place its pages.
    pub shared: bool,
}

/// The source says what is coming; its first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The hypervisor and its version, for people.
    pub hypervisor: String,
    /// The RAM blocks.
    pub blocks: Vec<Block>,
    /// How many multifd channels the hypervisor uses.
    pub channels: u32,
    /// Whether the destination answers on the main channel.
    pub return_path: bool,
    /// Whether the hypervisor encrypts its channels itself.
    pub tls: bool,
    /// Whether pages may be placed; whole packets are carried otherwise.
    pub placement: bool,
    /// Length of the memory that packets are carried through.
    pub staging_bytes: u64,
    /// The transfer mode that the source's host asks for.
    pub mode: String,
    /// Names of optional abilities that the source has.
    pub capabilities: Vec<String>,
}

/// The destination waits for channels.
#[derive(Clone, PartialEq, Eq)]
pub struct Answer {
    /// What every further connection of this migration proves that it knows.
    pub secret: [u8; 32],
    /// The hypervisor at the destination and its version, for people.
    pub hypervisor: String,
    /// The numbers of the blocks whose pages it places, rising; at most [`MAX_REGIONS`] less one.
    pub placed: Vec<u32>,
    /// Why it does not place the pages of the guest's RAM, where it does not.
    pub because: String,
    /// Names of optional abilities that the destination has.
    pub capabilities: Vec<String>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("placed", &self.placed).finish_non_exhaustive()
    }
}

/// A message of a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayMessage {
    /// Source: here is what is coming.
    Offer(Offer),
    /// Destination: ready for it.
    Answer(Answer),
    /// Either: bytes of a stream, in order.
    Bytes {
        /// Which stream.
        stream: u32,
        /// At most [`MAX_STREAM_BYTES`], not none.
        bytes: Vec<u8>,
    },
    /// Either: nothing more comes in this direction of the stream.
    End {
        /// Which stream.
        stream: u32,
    },
    /// Source: bytes of a stream that end with a packet's content, which lies in the staging memory.
    Packet {
        /// Which stream.
        stream: u32,
        /// What comes before the content; at most [`MAX_PACKET_HEADER`].
        header: Vec<u8>,
        /// Where in the staging memory the content begins, in pages.
        page: u32,
        /// Its length, at most [`MAX_PACKET_BYTES`].
        bytes: u32,
    },
    /// Either: so many bytes of a stream, contents of packets not counted, have been passed on.
    Passed {
        /// Which stream.
        stream: u32,
        /// How many more.
        bytes: u64,
    },
    /// Destination: the staging memory from this page on may be used again, for as many pages as the packet there had.
    Free {
        /// The page.
        page: u32,
    },
    /// Destination: the hypervisor there has everything, and does not run the guest.
    Loaded,
    /// Source: the hypervisor here has given the guest up, and this side will not let it run again.
    Commit {
        /// Whether the guest is to run; it was paused at the source otherwise, and stays so.
        run: bool,
    },
    /// Destination: the guest is there for good, and runs if it was to.
    Running,
    /// Destination: the guest was not let run in spite of a commit, and never will be; the source may have it back.
    Fenced(String),
    /// Either: the migration is over because of this. Not sent once `Commit` may have been.
    Abort(String),
}

impl RelayMessage {
    /// The message as it travels.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        proto::Relay { body: Some(proto::Body::from(self)) }.encode_to_vec()
    }

    /// Reads a message and checks every bound.
    ///
    /// # Errors
    /// [`DecodeError`]: what was wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let limit = super::control::MAX_MESSAGE_BYTES as u64;
        at_most("a relay's message", bytes.len() as u64, limit)?;
        let relay = proto::Relay::decode(bytes).map_err(DecodeError::Malformed)?;
        Self::try_from(relay.body.ok_or(DecodeError::UnknownBody)?)
    }

    /// The message's name, for logs and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "Offer",
            Self::Answer(_) => "Answer",
            Self::Bytes { .. } => "Bytes",
            Self::End { .. } => "End",
            Self::Packet { .. } => "Packet",
            Self::Passed { .. } => "Passed",
            Self::Free { .. } => "Free",
            Self::Loaded => "Loaded",
            Self::Commit { .. } => "Commit",
            Self::Running => "Running",
            Self::Fenced(_) => "Fenced",
            Self::Abort(_) => "Abort",
        }
    }
}

fn at_most(what: &'static str, got: u64, limit: u64) -> Result<(), DecodeError> {
    if got > limit { Err(DecodeError::Length { what, got, limit }) } else { Ok(()) }
}

fn checked_text(what: &'static str, text: &str) -> Result<String, DecodeError> {
    at_most(what, text.len() as u64, MAX_TEXT_BYTES as u64)?;
    // It is shown to people.
    Ok(super::shown_text(text.as_bytes()))
}

fn checked_name(name: String) -> Result<String, DecodeError> {
    at_most("a RAM block's name", name.len() as u64, 255).map(|()| name)
}

fn checked_names(names: Vec<String>) -> Result<Vec<String>, DecodeError> {
    at_most("the list of capabilities", names.len() as u64, 64)?;
    names.into_iter().map(|name| checked_text("a capability", &name)).collect()
}

fn checked_stream(stream: u32) -> Result<u32, DecodeError> {
    at_most("the number of a stream", u64::from(stream), u64::from(MAX_STREAMS) - 1).map(|()| stream)
}

fn checked_offer(offer: proto::Offer) -> Result<Offer, DecodeError> {
    at_most("the list of RAM blocks", offer.blocks.len() as u64, MAX_BLOCKS as u64)?;
    at_most("the number of multifd channels", u64::from(offer.channels), u64::from(MAX_STREAMS) - 1)?;
    at_most("the staging memory", offer.staging_bytes, 1 << 30)?;
    let block = |block: proto::Block| {
        Ok(Block {
            name: checked_name(block.name)?,
            bytes: block.bytes,
            backend: block.backend,
            shared: block.shared,
        })
    };
    Ok(Offer {
        hypervisor: checked_text("the hypervisor", &offer.hypervisor)?,
        blocks: offer.blocks.into_iter().map(block).collect::<Result<_, DecodeError>>()?,
        channels: offer.channels,
        return_path: offer.return_path,
        tls: offer.tls,
        placement: offer.placement,
        staging_bytes: offer.staging_bytes,
        mode: checked_text("the mode", &offer.mode)?,
        capabilities: checked_names(offer.capabilities)?,
    })
}

fn checked_answer(answer: proto::Answer) -> Result<Answer, DecodeError> {
    at_most("the list of placed RAM blocks", answer.placed.len() as u64, MAX_REGIONS as u64 - 1)?;
    let got = answer.secret.len() as u64;
    let secret = answer.secret.try_into();
    Ok(Answer {
        secret: secret.map_err(|_| DecodeError::Length { what: "a secret", got, limit: 32 })?,
        hypervisor: checked_text("the hypervisor", &answer.hypervisor)?,
        placed: answer.placed,
        because: checked_text("a reason", &answer.because)?,
        capabilities: checked_names(answer.capabilities)?,
    })
}

#[cfg(test)]
mod tests;
