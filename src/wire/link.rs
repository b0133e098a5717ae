//! Frames of a control link: what carries messages, and the receipts and heartbeats that keep it alive.
//!
//! 20 bytes, little-endian: magic `PGFC`, kind (u8): 1 message, 2 receipt, 3 goodbye; 3 zero bytes; length of the message
//! that follows (u32); number (u64).

use super::Fields;
use super::control::MAX_MESSAGE_BYTES;

/// Length of an encoded [`LinkHeader`].
pub const LINK_HEADER_BYTES: usize = 20;

const MAGIC: [u8; 4] = *b"PGFC";

/// What a frame of a control link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A message of [`LinkHeader::bytes`] follows; the number is its own, from 0 on.
    Message,
    /// The number says how many messages the sender has received. Sent each second, so it is the heartbeat too.
    Receipt,
    /// As [`LinkKind::Receipt`], and the sender has nothing more to say and closes the link for good.
    Goodbye,
}

/// The fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkHeader {
    /// What it is.
    pub kind: LinkKind,
    /// Bytes that follow; at most [`MAX_MESSAGE_BYTES`], and 0 unless it is a message.
    pub bytes: u32,
    /// See [`LinkKind`].
    pub number: u64,
}

/// Why bytes are not a frame of a control link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkFrameError {
    /// Not the magic: the stream is out of step, or another protocol.
    #[error("a control frame begins with {} instead of its magic", .0.escape_ascii())]
    Magic([u8; 4]),
    /// A kind that this version does not know.
    #[error("a control frame of kind {0} is unknown to this version")]
    Kind(u8),
    /// A bit set that this version keeps 0.
    #[error("a reserved field of a control frame is not zero")]
    Reserved,
    /// Longer than a message may be.
    #[error("a control message of {0} bytes is announced; {MAX_MESSAGE_BYTES} is the limit")]
    Length(u32),
}

impl LinkHeader {
    /// The bytes that travel.
    #[must_use]
    pub fn encode(&self) -> [u8; LINK_HEADER_BYTES] {
        let mut bytes = [0; LINK_HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = match self.kind {
            LinkKind::Message => 1,
            LinkKind::Receipt => 2,
            LinkKind::Goodbye => 3,
        };
        bytes[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[12..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// Reads what the peer sent.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; LINK_HEADER_BYTES]) -> Result<Self, LinkFrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != MAGIC {
            return Err(LinkFrameError::Magic(magic));
        }
        let kind = match fields.u8() {
            1 => LinkKind::Message,
            2 => LinkKind::Receipt,
            3 => LinkKind::Goodbye,
            other => return Err(LinkFrameError::Kind(other)),
        };
        let (reserved, length, number) = (fields.take::<3>(), fields.u32(), fields.u64());
        if reserved != [0; 3] || (kind != LinkKind::Message && length != 0) {
            return Err(LinkFrameError::Reserved);
        }
        if length as usize > MAX_MESSAGE_BYTES {
            return Err(LinkFrameError::Length(length));
        }
        Ok(Self { kind, bytes: length, number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_and_a_flipped_bit_is_an_error_or_another_header(
            kind in prop::sample::select(vec![LinkKind::Message, LinkKind::Receipt, LinkKind::Goodbye]),
            length in 0..=MAX_MESSAGE_BYTES as u32, number in any::<u64>(), bit in 0..LINK_HEADER_BYTES * 8,
        ) {
            let sent = LinkHeader { kind, bytes: if kind == LinkKind::Message { length } else { 0 }, number };
            let mut bytes = sent.encode();
            prop_assert_eq!(LinkHeader::decode(&bytes), Ok(sent));
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(other) = LinkHeader::decode(&bytes) {
                prop_assert_eq!(other.encode(), bytes);
            }
        }
    }

    #[test]
    fn lengths_are_bounded() {
        let header = |bytes| LinkHeader { kind: LinkKind::Message, bytes, number: 0 }.encode();
        let limit = MAX_MESSAGE_BYTES as u32;
        assert!(LinkHeader::decode(&header(limit)).is_ok());
        assert_eq!(LinkHeader::decode(&header(limit + 1)), Err(LinkFrameError::Length(limit + 1)));
    }
}
