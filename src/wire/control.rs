//! Control messages: protobuf, so that versions can differ, checked and bounded before anything acts on them.
//!
//! [`Message`] is what the rest of the crate sees; the protobuf structures behind it are in `control/proto.rs`. Fields that a
//! newer peer adds are skipped, a body that this version does not know is an error.

mod proto;

use prost::Message as _;

use crate::layout::{LayoutError, MAX_REGIONS, RamLayout, RamRegion};
use crate::units::{GuestAddress, RoundId};

/// The largest encoded message, in bytes: the largest guest configuration (1 MiB) and room for the rest of a `Setup`.
pub const MAX_MESSAGE_BYTES: usize = (1 << 20) + (64 << 10);
/// The largest guest configuration in a [`Setup`], in bytes.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// How much CPU and device state travels in one message, in bytes.
pub const STATE_CHUNK_BYTES: usize = 256 << 10;
/// The most CPU and device state in all, in bytes.
pub const MAX_STATE_BYTES: u64 = 64 << 20;
/// The longest name or explanation, in bytes; longer ones of our own are cut.
pub const MAX_TEXT_BYTES: usize = 1024;

/// The one-time value that stands for the right to run a guest after one migration. The destination draws it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub [u8; 16]);

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({self})")
    }
}

impl std::str::FromStr for Token {
    type Err = DecodeError;

    fn from_str(text: &str) -> Result<Self, DecodeError> {
        let wrong = DecodeError::Length { what: "a token in hexadecimal", got: text.len() as u64, limit: 32 };
        if text.len() != 32 || !text.is_ascii() {
            return Err(wrong);
        }
        let mut token = [0; 16];
        for (index, byte) in token.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[index * 2..index * 2 + 2], 16).map_err(|_| wrong.clone())?;
        }
        Ok(Self(token))
    }
}

/// The source describes the guest; first message of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// What people call the guest.
    pub name: String,
    /// Which adapter made it (`kvm`, `process`, ...): the destination must have the same.
    pub guest: String,
    /// What the adapter needs to make a skeleton of it; opaque here, at most [`MAX_CONFIG_BYTES`].
    pub config: Vec<u8>,
    /// The guest's RAM.
    pub layout: RamLayout,
    /// How many pages may hold something other than zero: what the destination must have memory for at least.
    pub touched_pages: u64,
    /// The transfer mode that the source's host asks for, in the host file's words.
    pub mode: String,
    /// Names of optional abilities that the source has; unknown ones are ignored.
    pub capabilities: Vec<String>,
}

/// The destination has made the skeleton and waits for channels.
#[derive(Clone, PartialEq, Eq)]
pub struct Accept {
    /// What every further connection of this migration has to show.
    pub secret: [u8; 32],
    /// Names of optional abilities that the destination has.
    pub capabilities: Vec<String>,
}

impl std::fmt::Debug for Accept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accept").field("capabilities", &self.capabilities).finish_non_exhaustive()
    }
}

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: here is what is coming.
    Setup(Setup),
    /// Destination: ready for channels.
    Accept(Accept),
    /// Source: a round has been placed, and this is how it stands. For the destination's log; it acts on nothing here.
    RoundDone {
        /// Which round.
        round: RoundId,
        /// Pages that the guest dirtied meanwhile.
        dirtied: u64,
    },
    /// Source: the next piece of CPU and device state, in order.
    State(Vec<u8>),
    /// Source: every page is placed and all state sent.
    Finish {
        /// How many bytes of state there were.
        state_bytes: u64,
        /// The source's wall clock at the guest's last instruction, in nanoseconds since 1970.
        stopped_at: u64,
    },
    /// Destination: has everything, and can run the guest when told so.
    Ready(Token),
    /// Source: gives the guest up. It has written down that it may no longer resume it.
    Commit(Token),
    /// Destination: the guest runs here, for good.
    Running(Token),
    /// Source, after it lost touch: did you run it?
    Query(Token),
    /// Destination: did not run it, never will; the source may resume.
    Fenced(Token),
    /// Either: the migration is over because of this. Not sent once `Commit` may have been.
    Abort(String),
}

/// Why bytes are not a control message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// No protobuf, or fields of the wrong type.
    #[error("the control message is not well-formed: {0}")]
    Malformed(prost::DecodeError),
    /// A body that this version does not know.
    #[error("the control message has no body that this version knows; the peer may be newer")]
    UnknownBody,
    /// Something longer or shorter than it may be.
    #[error("{what} has a length of {got}; {limit} is the limit")]
    Length {
        /// Which part.
        what: &'static str,
        /// Its length.
        got: u64,
        /// The longest, or the only, length it may have.
        limit: u64,
    },
    /// A RAM layout that cannot be.
    #[error("the peer's RAM layout is wrong")]
    Layout(#[from] LayoutError),
    /// More pages touched than there are.
    #[error("the peer says that {touched} of {total} pages are touched")]
    Touched {
        /// Pages said to be touched.
        touched: u64,
        /// Pages in the layout.
        total: u64,
    },
}

impl Message {
    /// The message as it travels. At most [`MAX_MESSAGE_BYTES`] when its parts keep their own limits.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        proto::Control { body: Some(proto::Body::from(self)) }.encode_to_vec()
    }

    /// Reads a message and checks every bound.
    ///
    /// # Errors
    /// [`DecodeError`]: what was wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        at_most("a control message", bytes.len() as u64, MAX_MESSAGE_BYTES as u64)?;
        let control = proto::Control::decode(bytes).map_err(DecodeError::Malformed)?;
        Self::try_from(control.body.ok_or(DecodeError::UnknownBody)?)
    }

    /// The message's name, for logs and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Setup(_) => "Setup",
            Self::Accept(_) => "Accept",
            Self::RoundDone { .. } => "RoundDone",
            Self::State(_) => "State",
            Self::Finish { .. } => "Finish",
            Self::Ready(_) => "Ready",
            Self::Commit(_) => "Commit",
            Self::Running(_) => "Running",
            Self::Query(_) => "Query",
            Self::Fenced(_) => "Fenced",
            Self::Abort(_) => "Abort",
        }
    }
}

impl From<&Message> for proto::Body {
    fn from(message: &Message) -> Self {
        match message {
            Message::Setup(setup) => Self::Setup(proto::Setup {
                name: cut(&setup.name),
                guest: cut(&setup.guest),
                config: setup.config.clone(),
                regions: (setup.layout.regions().iter())
                    .map(|region| proto::Region { start: region.start.0, bytes: region.bytes })
                    .collect(),
                touched_pages: setup.touched_pages,
                mode: cut(&setup.mode),
                capabilities: setup.capabilities.clone(),
            }),
            Message::Accept(accept) => Self::Accept(proto::Accept {
                secret: accept.secret.to_vec(),
                capabilities: accept.capabilities.clone(),
            }),
            Message::RoundDone { round, dirtied } => {
                Self::RoundDone(proto::RoundDone { round: round.0, dirtied: *dirtied })
            }
            Message::State(chunk) => Self::State(proto::State { chunk: chunk.clone() }),
            Message::Finish { state_bytes, stopped_at } => {
                Self::Finish(proto::Finish { state_bytes: *state_bytes, stopped_at: *stopped_at })
            }
            Message::Ready(token) => Self::Ready(token.into()),
            Message::Commit(token) => Self::Commit(token.into()),
            Message::Running(token) => Self::Running(token.into()),
            Message::Query(token) => Self::Query(token.into()),
            Message::Fenced(token) => Self::Fenced(token.into()),
            Message::Abort(cause) => Self::Abort(proto::Abort { cause: cut(cause) }),
        }
    }
}

impl TryFrom<proto::Body> for Message {
    type Error = DecodeError;

    fn try_from(body: proto::Body) -> Result<Self, DecodeError> {
        Ok(match body {
            proto::Body::Setup(setup) => Self::Setup(checked_setup(setup)?),
            proto::Body::Accept(accept) => Self::Accept(Accept {
                secret: exactly("a secret", &accept.secret)?,
                capabilities: checked_names(accept.capabilities)?,
            }),
            proto::Body::RoundDone(done) => {
                Self::RoundDone { round: RoundId(done.round), dirtied: done.dirtied }
            }
            proto::Body::State(state) => {
                at_most("a piece of guest state", state.chunk.len() as u64, STATE_CHUNK_BYTES as u64)?;
                Self::State(state.chunk)
            }
            proto::Body::Finish(finish) => {
                at_most("the guest's state", finish.state_bytes, MAX_STATE_BYTES)?;
                Self::Finish { state_bytes: finish.state_bytes, stopped_at: finish.stopped_at }
            }
            proto::Body::Ready(token) => Self::Ready(token.try_into()?),
            proto::Body::Commit(token) => Self::Commit(token.try_into()?),
            proto::Body::Running(token) => Self::Running(token.try_into()?),
            proto::Body::Query(token) => Self::Query(token.try_into()?),
            proto::Body::Fenced(token) => Self::Fenced(token.try_into()?),
            proto::Body::Abort(abort) => Self::Abort(checked_text("an abort's cause", abort.cause)?),
        })
    }
}

fn checked_setup(setup: proto::Setup) -> Result<Setup, DecodeError> {
    at_most("the list of RAM regions", setup.regions.len() as u64, MAX_REGIONS as u64)?;
    at_most("the guest's configuration", setup.config.len() as u64, MAX_CONFIG_BYTES as u64)?;
    let regions = (setup.regions.iter())
        .map(|region| RamRegion { start: GuestAddress(region.start), bytes: region.bytes })
        .collect();
    let layout = RamLayout::new(regions)?;
    if setup.touched_pages > layout.total_pages() {
        return Err(DecodeError::Touched { touched: setup.touched_pages, total: layout.total_pages() });
    }
    Ok(Setup {
        name: checked_text("the guest's name", setup.name)?,
        guest: checked_text("the guest's kind", setup.guest)?,
        config: setup.config,
        layout,
        touched_pages: setup.touched_pages,
        mode: checked_text("the mode", setup.mode)?,
        capabilities: checked_names(setup.capabilities)?,
    })
}

fn at_most(what: &'static str, got: u64, limit: u64) -> Result<(), DecodeError> {
    if got > limit { Err(DecodeError::Length { what, got, limit }) } else { Ok(()) }
}

fn exactly<const N: usize>(what: &'static str, bytes: &[u8]) -> Result<[u8; N], DecodeError> {
    bytes.try_into().map_err(|_| DecodeError::Length { what, got: bytes.len() as u64, limit: N as u64 })
}

fn checked_text(what: &'static str, text: String) -> Result<String, DecodeError> {
    at_most(what, text.len() as u64, MAX_TEXT_BYTES as u64).map(|()| text)
}

fn checked_names(names: Vec<String>) -> Result<Vec<String>, DecodeError> {
    at_most("the list of capabilities", names.len() as u64, 64)?;
    names.into_iter().map(|name| checked_text("a capability", name)).collect()
}

/// The longest start of a text that fits into [`MAX_TEXT_BYTES`].
fn cut(text: &str) -> String {
    super::cut_text(text, MAX_TEXT_BYTES).to_owned()
}

#[cfg(test)]
mod tests;
