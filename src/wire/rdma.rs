//! What both ends of an RDMA channel tell each other over its TCP connection: who they are at first, then keys.
//!
//! The source sends an [`Offer`], the destination answers with an [`Answer`]. Then pages are written by RDMA and frame
//! headers are sent over the queue pair; over the connection the destination sends [`FromDestination`], the source [`Want`]s.
//! Guest RAM is registered in pieces, numbered as both ends number them ([`MAX_PIECES`]).
//!
//! | offset | offer | answer |
//! |---|---|---|
//! | 0 | magic `PGRO` | magic `PGRA` |
//! | 4 | frames under way at most (u32) | code (u8; 0 is taken), a zero byte, length of the text (u16) |
//! | 8 | queue pair, first packet, MTU (u32 each) | the same |
//! | 20 | bytes of the map (u32) | frames under way at most (u32) |
//! | 24 | GID (16 bytes) | GID (16 bytes) |
//! | 40 | bytes of a piece (u64) | text: why it is refused |
//! | 48 | map of the pieces that the source is going to write, bit by bit | |

use super::data::{FrameError, MAX_ERROR_BYTES, RECEIPT_BYTES, Receipt, ReceiptHeader};
use super::{Fields, cut_text, shown_text};

/// Length of an encoded [`Offer`] without its map.
pub const OFFER_BYTES: usize = 48;
/// Length of an encoded [`Answer`] without its text.
pub const ANSWER_BYTES: usize = 40;
/// Length of the longest fixed part of a [`FromDestination`].
pub const KEY_BYTES: usize = 24;
/// Length of an encoded [`Want`].
pub const WANT_BYTES: usize = 8;
/// The most pieces that guest RAM is registered in: a map of 2 KiB, and 400 KiB of keys.
pub const MAX_PIECES: u32 = 16 << 10;
/// The most frames under way that an end may name.
pub const MAX_FRAMES: u32 = 4096;

const OFFER_MAGIC: [u8; 4] = *b"PGRO";
const ANSWER_MAGIC: [u8; 4] = *b"PGRA";
const KEY_MAGIC: [u8; 4] = *b"PGRK";
const NO_KEY_MAGIC: [u8; 4] = *b"PGRN";
const WANT_MAGIC: [u8; 4] = *b"PGRW";

/// Why bytes are not what an end of an RDMA channel says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RdmaFrameError {
    /// Not the magic.
    #[error("a message about RDMA begins with {} instead of its magic", .0.escape_ascii())]
    Magic([u8; 4]),
    /// A bit set that this version keeps 0.
    #[error("a reserved field of a message about RDMA is not zero")]
    Reserved,
    /// A number that cannot be.
    #[error("{what} is {got}, which cannot be")]
    Number {
        /// Which.
        what: &'static str,
        /// Its value.
        got: u64,
    },
    /// A piece that there is not.
    #[error("piece {got} of the guest's memory is spoken of, and there are {pieces}")]
    Piece {
        /// Which.
        got: u32,
        /// How many there are.
        pieces: u32,
    },
    /// A receipt that is none.
    #[error(transparent)]
    Receipt(#[from] FrameError),
}

/// An end of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Its number; 24 bits.
    pub queue_pair: u32,
    /// The number of the first packet that it sends; 24 bits.
    pub packet: u32,
    /// Payload bytes of a packet that its port carries: a power of two from 256 to 4096.
    pub mtu: u32,
    /// Its address.
    pub gid: [u8; 16],
}

impl End {
    fn decode(fields: &mut Fields<'_>) -> Result<(Self, u32), RdmaFrameError> {
        let (queue_pair, packet, mtu, between) = (fields.u32(), fields.u32(), fields.u32(), fields.u32());
        let wrong = |what, got: u32| Err(RdmaFrameError::Number { what, got: u64::from(got) });
        if queue_pair >> 24 != 0 {
            return wrong("the number of a queue pair", queue_pair);
        }
        if packet >> 24 != 0 {
            return wrong("the number of a packet", packet);
        }
        if !matches!(mtu, 256 | 512 | 1024 | 2048 | 4096) {
            return wrong("the MTU of an RDMA path", mtu);
        }
        Ok((Self { queue_pair, packet, mtu, gid: fields.take() }, between))
    }

    fn encode(&self, between: u32, into: &mut Vec<u8>) {
        for number in [self.queue_pair, self.packet, self.mtu, between] {
            into.extend(number.to_le_bytes());
        }
        into.extend(self.gid);
    }
}

fn frames(got: u32) -> Result<u32, RdmaFrameError> {
    if (1..=MAX_FRAMES).contains(&got) {
        return Ok(got);
    }
    Err(RdmaFrameError::Number { what: "the number of frames under way", got: u64::from(got) })
}

/// What the source begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its end.
    pub end: End,
    /// How many frames it would have under way; 1 to [`MAX_FRAMES`].
    pub frames: u32,
    /// Bytes of a piece of guest RAM.
    pub piece_bytes: u64,
    /// The pieces that it is going to write, one bit each; at most [`MAX_PIECES`] bits.
    pub map: Vec<u8>,
}

/// The fixed part of an [`Offer`], which tells how long the map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferHeader {
    offer: Offer,
    map_bytes: usize,
}

impl Offer {
    /// The bytes that travel.
    ///
    /// # Panics
    /// If the map is longer than [`MAX_PIECES`] bits.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.map.len() <= MAX_PIECES as usize / 8, "a map of at most {MAX_PIECES} pieces");
        let mut bytes = OFFER_MAGIC.to_vec();
        bytes.extend(self.frames.to_le_bytes());
        self.end.encode(self.map.len() as u32, &mut bytes);
        bytes.extend(self.piece_bytes.to_le_bytes());
        bytes.extend(&self.map);
        bytes
    }
}

impl OfferHeader {
    /// Reads the fixed part of an offer.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; OFFER_BYTES]) -> Result<Self, RdmaFrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != OFFER_MAGIC {
            return Err(RdmaFrameError::Magic(magic));
        }
        let frames = frames(fields.u32())?;
        let (end, map_bytes) = End::decode(&mut fields)?;
        if map_bytes > MAX_PIECES / 8 {
            let got = u64::from(map_bytes);
            return Err(RdmaFrameError::Number { what: "the length of the map of pieces", got });
        }
        let piece_bytes = fields.u64();
        let offer = Offer { end, frames, piece_bytes, map: Vec::new() };
        Ok(Self { offer, map_bytes: map_bytes as usize })
    }

    /// How many bytes of map follow; at most [`MAX_PIECES`] bits.
    #[must_use]
    pub fn map_bytes(&self) -> usize {
        self.map_bytes
    }

    /// The whole offer.
    #[must_use]
    pub fn with_map(self, map: Vec<u8>) -> Offer {
        Offer { map, ..self.offer }
    }
}

/// What the destination answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The channel is taken.
    Taken {
        /// Its end.
        end: End,
        /// How many frames may be under way; 1 to [`MAX_FRAMES`].
        frames: u32,
    },
    /// It is not; the text says why.
    Refused(String),
}

/// The fixed part of an [`Answer`], which tells how much text follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerHeader {
    taken: Option<(End, u32)>,
    text_bytes: u16,
}

impl Answer {
    /// The bytes that travel. The text is cut to [`MAX_ERROR_BYTES`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = ANSWER_MAGIC.to_vec();
        match self {
            Self::Taken { end, frames } => {
                bytes.extend([0; 4]);
                end.encode(*frames, &mut bytes);
            }
            Self::Refused(text) => {
                let text = cut_text(text, MAX_ERROR_BYTES);
                bytes.extend([1, 0]);
                bytes.extend((text.len() as u16).to_le_bytes());
                bytes.resize(ANSWER_BYTES, 0);
                bytes.extend(text.as_bytes());
            }
        }
        bytes
    }
}

impl AnswerHeader {
    /// Reads the fixed part of an answer.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, RdmaFrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != ANSWER_MAGIC {
            return Err(RdmaFrameError::Magic(magic));
        }
        let (code, reserved, text_bytes) = (fields.u8(), fields.u8(), fields.u16());
        if reserved != 0 || (code == 0 && text_bytes != 0) {
            return Err(RdmaFrameError::Reserved);
        }
        if usize::from(text_bytes) > MAX_ERROR_BYTES {
            let got = u64::from(text_bytes);
            return Err(RdmaFrameError::Number { what: "the length of a refusal's text", got });
        }
        if code != 0 {
            return Ok(Self { taken: None, text_bytes });
        }
        let (end, between) = End::decode(&mut fields)?;
        Ok(Self { taken: Some((end, frames(between)?)), text_bytes })
    }

    /// How many bytes of text follow; at most [`MAX_ERROR_BYTES`].
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        usize::from(self.text_bytes)
    }

    /// The whole answer.
    #[must_use]
    pub fn with_text(self, text: &[u8]) -> Answer {
        match self.taken {
            Some((end, frames)) => Answer::Taken { end, frames },
            None => Answer::Refused(shown_text(text)),
        }
    }
}

/// What the destination says on a channel that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromDestination {
    /// As on every channel.
    Receipt(Receipt),
    /// A piece can be written.
    Key {
        /// Which; below the number of pieces.
        piece: u32,
        /// The key.
        key: u32,
        /// Where the piece begins, as the destination addresses it.
        address: u64,
    },
    /// A piece cannot be registered.
    NoKey {
        /// Which; below the number of pieces.
        piece: u32,
        /// Why.
        text: String,
    },
}

/// The first [`RECEIPT_BYTES`] of a [`FromDestination`], which tell how much follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromDestinationHeader {
    /// A receipt; a text may follow.
    Receipt(ReceiptHeader),
    /// A key, of which the address follows.
    Key {
        /// Which piece.
        piece: u32,
        /// Its key.
        key: u32,
    },
    /// No key; a text follows.
    NoKey {
        /// Which piece.
        piece: u32,
        /// Bytes of the text.
        text_bytes: u16,
    },
}

impl FromDestination {
    /// The bytes that travel. A text is cut to [`MAX_ERROR_BYTES`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Receipt(receipt) => receipt.encode(),
            Self::Key { piece, key, address } => {
                let mut bytes = KEY_MAGIC.to_vec();
                bytes.extend(piece.to_le_bytes());
                bytes.extend(key.to_le_bytes());
                bytes.extend([0; 4]);
                bytes.extend(address.to_le_bytes());
                bytes
            }
            Self::NoKey { piece, text } => {
                let text = cut_text(text, MAX_ERROR_BYTES);
                let mut bytes = NO_KEY_MAGIC.to_vec();
                bytes.extend(piece.to_le_bytes());
                bytes.extend((text.len() as u16).to_le_bytes());
                bytes.extend([0; 6]);
                bytes.extend(text.as_bytes());
                bytes
            }
        }
    }
}

impl FromDestinationHeader {
    /// Reads the first part, of a destination that has so many pieces.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; RECEIPT_BYTES], pieces: u32) -> Result<Self, RdmaFrameError> {
        let mut fields = Fields(bytes);
        let magic: [u8; 4] = fields.take();
        if magic != KEY_MAGIC && magic != NO_KEY_MAGIC {
            return Ok(Self::Receipt(ReceiptHeader::decode(bytes)?));
        }
        let piece = known_piece(fields.u32(), pieces)?;
        if magic == KEY_MAGIC {
            let (key, reserved) = (fields.u32(), fields.u32());
            return if reserved == 0 { Ok(Self::Key { piece, key }) } else { Err(RdmaFrameError::Reserved) };
        }
        let (text_bytes, reserved) = (fields.u16(), fields.take::<6>());
        if reserved != [0; 6] {
            return Err(RdmaFrameError::Reserved);
        }
        if usize::from(text_bytes) > MAX_ERROR_BYTES {
            return Err(FrameError::TextLength(text_bytes).into());
        }
        Ok(Self::NoKey { piece, text_bytes })
    }

    /// How many bytes follow; at most [`MAX_ERROR_BYTES`].
    #[must_use]
    pub fn rest_bytes(&self) -> usize {
        match self {
            Self::Receipt(header) => header.text_bytes(),
            Self::Key { .. } => KEY_BYTES - RECEIPT_BYTES,
            Self::NoKey { text_bytes, .. } => usize::from(*text_bytes),
        }
    }

    /// The whole of it.
    ///
    /// # Panics
    /// If `rest` is not [`FromDestinationHeader::rest_bytes`] long.
    #[must_use]
    pub fn with_rest(self, rest: &[u8]) -> FromDestination {
        assert_eq!(rest.len(), self.rest_bytes(), "as long as the first part announces it");
        match self {
            Self::Receipt(header) => FromDestination::Receipt(header.with_text(rest)),
            Self::Key { piece, key } => FromDestination::Key { piece, key, address: Fields(rest).u64() },
            Self::NoKey { piece, .. } => FromDestination::NoKey { piece, text: shown_text(rest) },
        }
    }
}

fn known_piece(got: u32, pieces: u32) -> Result<u32, RdmaFrameError> {
    if got < pieces { Ok(got) } else { Err(RdmaFrameError::Piece { got, pieces }) }
}

/// The source is going to write a piece that its offer did not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want(pub u32);

impl Want {
    /// The bytes that travel.
    #[must_use]
    pub fn encode(self) -> [u8; WANT_BYTES] {
        let mut bytes = [0; WANT_BYTES];
        bytes[..4].copy_from_slice(&WANT_MAGIC);
        bytes[4..].copy_from_slice(&self.0.to_le_bytes());
        bytes
    }

    /// Reads it, at a destination that has so many pieces.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; WANT_BYTES], pieces: u32) -> Result<Self, RdmaFrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != WANT_MAGIC {
            return Err(RdmaFrameError::Magic(magic));
        }
        known_piece(fields.u32(), pieces).map(Self)
    }
}

#[cfg(test)]
mod tests;
