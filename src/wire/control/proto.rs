//! The protobuf structures of the control messages, by their field numbers. A number is never used again for something else.

use super::{DecodeError, Token, exactly};

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Control {
    #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
    pub(super) body: Option<Body>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Body {
    #[prost(message, tag = "1")]
    Setup(Setup),
    #[prost(message, tag = "2")]
    Accept(Accept),
    #[prost(message, tag = "3")]
    RoundDone(RoundDone),
    #[prost(message, tag = "4")]
    State(State),
    #[prost(message, tag = "5")]
    Finish(Finish),
    #[prost(message, tag = "6")]
    Ready(WireToken),
    #[prost(message, tag = "7")]
    Commit(WireToken),
    #[prost(message, tag = "8")]
    Running(WireToken),
    #[prost(message, tag = "9")]
    Query(WireToken),
    #[prost(message, tag = "10")]
    Fenced(WireToken),
    #[prost(message, tag = "11")]
    Abort(Abort),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Setup {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) guest: String,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) config: Vec<u8>,
    #[prost(message, repeated, tag = "4")]
    pub(super) regions: Vec<Region>,
    #[prost(uint64, tag = "5")]
    pub(super) touched_pages: u64,
    #[prost(string, tag = "6")]
    pub(super) mode: String,
    #[prost(string, repeated, tag = "7")]
    pub(super) capabilities: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Region {
    #[prost(uint64, tag = "1")]
    pub(super) start: u64,
    #[prost(uint64, tag = "2")]
    pub(super) bytes: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Accept {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) secret: Vec<u8>,
    #[prost(string, repeated, tag = "2")]
    pub(super) capabilities: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct RoundDone {
    #[prost(uint32, tag = "1")]
    pub(super) round: u32,
    #[prost(uint64, tag = "2")]
    pub(super) dirtied: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct State {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) chunk: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Finish {
    #[prost(uint64, tag = "1")]
    pub(super) state_bytes: u64,
    #[prost(uint64, tag = "2")]
    pub(super) stopped_at: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireToken {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Abort {
    #[prost(string, tag = "1")]
    pub(super) cause: String,
}

impl From<&Token> for WireToken {
    fn from(token: &Token) -> Self {
        Self { token: token.0.to_vec() }
    }
}

impl TryFrom<WireToken> for Token {
    type Error = DecodeError;

    fn try_from(wire: WireToken) -> Result<Self, DecodeError> {
        exactly("a token", &wire.token).map(Self)
    }
}
