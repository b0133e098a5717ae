//! The protobuf structures of a relay's messages, by their field numbers. A number is never used again for something else.

use super::{
    DecodeError, MAX_PACKET_BYTES, MAX_PACKET_HEADER, MAX_STREAM_BYTES, RelayMessage, at_most,
    checked_answer, checked_offer, checked_stream, checked_text,
};
use crate::wire::control::MAX_TEXT_BYTES;
use crate::wire::cut_text;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Relay {
    #[prost(oneof = "Body", tags = "32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43")]
    pub(super) body: Option<Body>,
}

// From 32 on: below are those of a migration of pageferry's own.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Body {
    #[prost(message, tag = "32")]
    Offer(Offer),
    #[prost(message, tag = "33")]
    Answer(Answer),
    #[prost(message, tag = "34")]
    Bytes(StreamBytes),
    #[prost(message, tag = "35")]
    End(End),
    #[prost(message, tag = "36")]
    Packet(Packet),
    #[prost(message, tag = "37")]
    Passed(Passed),
    #[prost(message, tag = "38")]
    Free(Free),
    #[prost(message, tag = "39")]
    Loaded(Nothing),
    #[prost(message, tag = "40")]
    Commit(Commit),
    #[prost(message, tag = "41")]
    Running(Nothing),
    #[prost(message, tag = "42")]
    Fenced(Text),
    #[prost(message, tag = "43")]
    Abort(Text),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Block {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(uint64, tag = "2")]
    pub(super) bytes: u64,
    #[prost(bool, tag = "3")]
    pub(super) backend: bool,
    #[prost(bool, tag = "4")]
    pub(super) shared: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Offer {
    #[prost(string, tag = "1")]
    pub(super) hypervisor: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) blocks: Vec<Block>,
    #[prost(uint32, tag = "3")]
    pub(super) channels: u32,
    #[prost(bool, tag = "4")]
    pub(super) return_path: bool,
    #[prost(bool, tag = "5")]
    pub(super) tls: bool,
    #[prost(bool, tag = "6")]
    pub(super) placement: bool,
    #[prost(uint64, tag = "7")]
    pub(super) staging_bytes: u64,
    #[prost(string, tag = "8")]
    pub(super) mode: String,
    #[prost(string, repeated, tag = "9")]
    pub(super) capabilities: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Answer {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) secret: Vec<u8>,
    #[prost(string, tag = "2")]
    pub(super) hypervisor: String,
    #[prost(uint32, repeated, tag = "3")]
    pub(super) placed: Vec<u32>,
    #[prost(string, tag = "4")]
    pub(super) because: String,
    #[prost(string, repeated, tag = "5")]
    pub(super) capabilities: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StreamBytes {
    #[prost(uint32, tag = "1")]
    pub(super) stream: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct End {
    #[prost(uint32, tag = "1")]
    pub(super) stream: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Packet {
    #[prost(uint32, tag = "1")]
    pub(super) stream: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) header: Vec<u8>,
    #[prost(uint32, tag = "3")]
    pub(super) page: u32,
    #[prost(uint32, tag = "4")]
    pub(super) bytes: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Passed {
    #[prost(uint32, tag = "1")]
    pub(super) stream: u32,
    #[prost(uint64, tag = "2")]
    pub(super) bytes: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Free {
    #[prost(uint32, tag = "1")]
    pub(super) page: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Commit {
    #[prost(bool, tag = "1")]
    pub(super) run: bool,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Nothing {}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Text {
    #[prost(string, tag = "1")]
    pub(super) text: String,
}

fn cut(text: &str) -> String {
    cut_text(text, MAX_TEXT_BYTES).to_owned()
}

impl From<&RelayMessage> for Body {
    fn from(message: &RelayMessage) -> Self {
        match message {
            RelayMessage::Offer(offer) => Self::Offer(Offer {
                hypervisor: cut(&offer.hypervisor),
                blocks: (offer.blocks.iter())
                    .map(|block| Block {
                        name: block.name.clone(),
                        bytes: block.bytes,
                        backend: block.backend,
                        shared: block.shared,
                    })
                    .collect(),
                channels: offer.channels,
                return_path: offer.return_path,
                tls: offer.tls,
                placement: offer.placement,
                staging_bytes: offer.staging_bytes,
                mode: cut(&offer.mode),
                capabilities: offer.capabilities.clone(),
            }),
            RelayMessage::Answer(answer) => Self::Answer(Answer {
                secret: answer.secret.to_vec(),
                hypervisor: cut(&answer.hypervisor),
                placed: answer.placed.clone(),
                because: cut(&answer.because),
                capabilities: answer.capabilities.clone(),
            }),
            RelayMessage::Bytes { stream, bytes } => {
                Self::Bytes(StreamBytes { stream: *stream, bytes: bytes.clone() })
            }
            RelayMessage::End { stream } => Self::End(End { stream: *stream }),
            RelayMessage::Packet { stream, header, page, bytes } => {
                Self::Packet(Packet { stream: *stream, header: header.clone(), page: *page, bytes: *bytes })
            }
            RelayMessage::Passed { stream, bytes } => Self::Passed(Passed { stream: *stream, bytes: *bytes }),
            RelayMessage::Free { page } => Self::Free(Free { page: *page }),
            RelayMessage::Loaded => Self::Loaded(Nothing {}),
            RelayMessage::Commit { run } => Self::Commit(Commit { run: *run }),
            RelayMessage::Running => Self::Running(Nothing {}),
            RelayMessage::Fenced(cause) => Self::Fenced(Text { text: cut(cause) }),
            RelayMessage::Abort(cause) => Self::Abort(Text { text: cut(cause) }),
        }
    }
}

impl TryFrom<Body> for RelayMessage {
    type Error = DecodeError;

    fn try_from(body: Body) -> Result<Self, DecodeError> {
        Ok(match body {
            Body::Offer(offer) => Self::Offer(checked_offer(offer)?),
            Body::Answer(answer) => Self::Answer(checked_answer(answer)?),
            Body::Bytes(StreamBytes { stream, bytes }) => {
                at_most("a piece of a stream", bytes.len() as u64, MAX_STREAM_BYTES as u64)?;
                Self::Bytes { stream: checked_stream(stream)?, bytes }
            }
            Body::End(End { stream }) => Self::End { stream: checked_stream(stream)? },
            Body::Packet(Packet { stream, header, page, bytes }) => {
                at_most("a packet's header", header.len() as u64, MAX_PACKET_HEADER as u64)?;
                at_most("a packet", u64::from(bytes), u64::from(MAX_PACKET_BYTES))?;
                Self::Packet { stream: checked_stream(stream)?, header, page, bytes }
            }
            Body::Passed(Passed { stream, bytes }) => {
                at_most("what was passed on", bytes, super::STREAM_WINDOW)?;
                Self::Passed { stream: checked_stream(stream)?, bytes }
            }
            Body::Free(Free { page }) => Self::Free { page },
            Body::Loaded(Nothing {}) => Self::Loaded,
            Body::Commit(Commit { run }) => Self::Commit { run },
            Body::Running(Nothing {}) => Self::Running,
            Body::Fenced(Text { text }) => Self::Fenced(checked_text("a cause", &text)?),
            Body::Abort(Text { text }) => Self::Abort(checked_text("a cause", &text)?),
        })
    }
}
