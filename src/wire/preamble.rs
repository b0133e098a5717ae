//! The first bytes of every connection: what it is for, and proof that it belongs to a migration.
//!
//! The dialling side sends a [`Preamble`] of [`PREAMBLE_BYTES`], little-endian, and the listening side answers with a
//! [`Reply`]. Their lengths and the place of magic and versions are the same in every version of the protocol, so that any
//! two versions can at least refuse each other in words.
//!
//! | offset | preamble | reply |
//! |---|---|---|
//! | 0 | magic `PGFERRY\n` | magic `PGFREPLY` |
//! | 8 | oldest version, newest version (u16 each) | the same of the listening side |
//! | 12 | purpose (u8), 3 zero bytes | code (u8; 0 is accepted), 1 zero byte, length of the text (u16) |
//! | 16 | argument of the purpose (u64) | control messages received (u64) |
//! | 24 | migration (16 bytes) | text |
//! | 40 | proof (32 bytes), see [`Secret::prove`] | |

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::{Fields, OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, cut_text, shown_text};

/// Length of an encoded [`Preamble`].
pub const PREAMBLE_BYTES: usize = 72;
/// Length of an encoded [`Reply`] without its text.
pub const REPLY_BYTES: usize = 24;
/// The longest text of a refusal, in bytes. Longer ones of our own are cut.
pub const MAX_REFUSAL_BYTES: usize = 512;

const PREAMBLE_MAGIC: [u8; 8] = *b"PGFERRY\n";
const REPLY_MAGIC: [u8; 8] = *b"PGFREPLY";

/// The name of a migration, drawn at random by its source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

/// What lets a connection into a migration; the destination draws it and sends it over the control link. It never travels on the
/// connections that it opens: they show a proof of it ([`Secret::prove`]).
///
/// It is never printed, and comparing takes the same time wherever the values differ.
#[derive(Clone, Copy, Eq)]
pub struct Secret(pub [u8; 32]);

impl Secret {
    /// What is sent while there is no secret yet. It opens nothing.
    pub const NONE: Self = Self([0; 32]);

    /// Whether this is [`Secret::NONE`].
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// Proof that whoever opens a connection for this purpose knows the secret: HMAC-SHA256 (RFC 2104) with the secret as its key
    /// over `pageferry` and a zero byte, the migration, the purpose's code and its argument (little-endian). Overheard, it opens
    /// only the very same connection once more, which is refused: channel numbers and attempts are used once. The proof of no
    /// secret is [`Secret::NONE`].
    #[must_use]
    pub fn prove(&self, purpose: Purpose, migration: MigrationId) -> Proof {
        if self.is_none() {
            return Proof(Self::NONE);
        }
        let (code, argument) = purpose.code_and_argument();
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return Proof(Self::NONE) };
        mac.update(b"pageferry\0");
        mac.update(&migration.0);
        mac.update(&[code]);
        mac.update(&argument.to_le_bytes());
        Proof(Self(mac.finalize().into_bytes().into()))
    }
}

/// What a preamble shows in place of a secret. Compared like one, and as little printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof(Secret);

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        let differing = self.0.iter().zip(&other.0).fold(0, |seen, (a, b)| seen | (a ^ b));
        // Without the barrier the compiler may stop at the first difference.
        std::hint::black_box(differing) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The versions that a program speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

impl Versions {
    /// Those of this program.
    pub const OURS: Self = Self { oldest: OLDEST_PROTOCOL_VERSION, newest: PROTOCOL_VERSION };

    /// The newest version that both speak.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.oldest == self.newest {
            return write!(f, "{}", self.newest);
        }
        write!(f, "{} to {}", self.oldest, self.newest)
    }
}

/// More control messages than one migration has.
pub const RECEIVED_LIMIT: u64 = 1 << 48;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The control link of a migration that begins.
    NewMigration,
    /// The control link of a running migration, after its connection was lost.
    ResumeControl {
        /// Which attempt it is, from 1 on; none is taken twice. Travels in the argument's upper 16 bits.
        attempt: u16,
        /// How many control messages the dialling side has received: the other side sends the rest again. Below
        /// [`RECEIVED_LIMIT`].
        received: u64,
    },
    /// A data channel.
    Data {
        /// Its number, drawn by the source; never used twice in a migration.
        channel: u32,
    },
    /// One question about a migration and one answer.
    Query,
    /// A data channel whose pages are written by RDMA.
    RdmaData {
        /// As for [`Purpose::Data`], and out of the same numbers.
        channel: u32,
    },
}

impl Purpose {
    fn code_and_argument(self) -> (u8, u64) {
        match self {
            Self::NewMigration => (1, 0),
            Self::ResumeControl { attempt, received } => {
                (2, u64::from(attempt) << 48 | received & (RECEIVED_LIMIT - 1))
            }
            Self::Data { channel } => (3, u64::from(channel)),
            Self::Query => (4, 0),
            Self::RdmaData { channel } => (5, u64::from(channel)),
        }
    }

    fn from_code(code: u8, argument: u64) -> Result<Self, PreambleError> {
        match (code, argument) {
            (1, 0) => Ok(Self::NewMigration),
            (2, both) => Ok(Self::ResumeControl {
                attempt: (both >> 48) as u16,
                received: both & (RECEIVED_LIMIT - 1),
            }),
            (3 | 5, channel) => {
                let channel = u32::try_from(channel).map_err(|_| PreambleError::Argument(code, argument))?;
                Ok(if code == 3 { Self::Data { channel } } else { Self::RdmaData { channel } })
            }
            (4, 0) => Ok(Self::Query),
            (1 | 4, _) => Err(PreambleError::Argument(code, argument)),
            _ => Err(PreambleError::Purpose(code)),
        }
    }
}

/// Why the first bytes of a connection are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// Not the magic: something else was connected.
    #[error("the peer does not speak pageferry's protocol; its first bytes are {}", .0.escape_ascii())]
    Magic([u8; 8]),
    /// No version in common.
    #[error(
        "the peer speaks protocol version {theirs}, this side speaks {ours}: upgrade the older of the two"
    )]
    Version {
        /// The peer's.
        theirs: Versions,
        /// This side's.
        ours: Versions,
    },
    /// A range of versions that ends before it begins.
    #[error("the peer's protocol versions {0} to {1} are no range")]
    VersionRange(u16, u16),
    /// A purpose that this version does not know.
    #[error("the peer wants a connection for purpose {0}, which this version does not know")]
    Purpose(u8),
    /// An argument that the purpose does not have.
    #[error("a connection for purpose {0} has no argument {1:#x}")]
    Argument(u8, u64),
    /// A bit set that this version keeps 0.
    #[error("a reserved field of the peer's first bytes is not zero")]
    Reserved,
    /// A text longer than [`MAX_REFUSAL_BYTES`].
    #[error("the peer announces a text of {0} bytes; {MAX_REFUSAL_BYTES} is the limit")]
    TextLength(u16),
    /// A refusal code that this version does not know, with no text that explains it.
    #[error("the peer answers with code {0}, which this version does not know")]
    Code(u8),
}

/// The first message of the dialling side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The versions that it speaks.
    pub versions: Versions,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Which migration it belongs to.
    pub migration: MigrationId,
    /// Proof that the secret is known that the purpose needs.
    pub proof: Proof,
}

impl Preamble {
    /// A preamble with the versions of this program, and proof of the secret ([`Secret::NONE`] where none exists yet).
    #[must_use]
    pub fn new(purpose: Purpose, migration: MigrationId, secret: Secret) -> Self {
        Self { versions: Versions::OURS, purpose, migration, proof: secret.prove(purpose, migration) }
    }

    /// Whether it proves that this secret is known. [`Secret::NONE`] proves nothing.
    #[must_use]
    pub fn proves(&self, secret: &Secret) -> bool {
        !secret.is_none() && secret.prove(self.purpose, self.migration) == self.proof
    }

    /// The bytes that travel.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (purpose, argument) = self.purpose.code_and_argument();
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&PREAMBLE_MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.oldest.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.newest.to_le_bytes());
        bytes[12] = purpose;
        bytes[16..24].copy_from_slice(&argument.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.migration.0);
        bytes[40..].copy_from_slice(&self.proof.0.0);
        bytes
    }

    /// Reads what the peer sent.
    ///
    /// # Errors
    /// The first field that is wrong. The versions come before everything that may differ between versions.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, PreambleError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != PREAMBLE_MAGIC {
            return Err(PreambleError::Magic(magic));
        }
        let versions = versions(&mut fields)?;
        if Versions::OURS.common(versions).is_none() {
            return Err(PreambleError::Version { theirs: versions, ours: Versions::OURS });
        }
        let (purpose, reserved, argument) = (fields.u8(), fields.take::<3>(), fields.u64());
        let purpose = Purpose::from_code(purpose, argument)?;
        if reserved != [0; 3] {
            return Err(PreambleError::Reserved);
        }
        Ok(Self {
            versions,
            purpose,
            migration: MigrationId(fields.take()),
            proof: Proof(Secret(fields.take())),
        })
    }
}

fn versions(fields: &mut Fields<'_>) -> Result<Versions, PreambleError> {
    let (oldest, newest) = (fields.u16(), fields.u16());
    if oldest > newest {
        return Err(PreambleError::VersionRange(oldest, newest));
    }
    Ok(Versions { oldest, newest })
}

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RefusalCode {
    /// No protocol version in common.
    Version,
    /// The preamble made no sense.
    Malformed,
    /// No such migration here.
    UnknownMigration,
    /// Not the secret of that migration.
    WrongSecret,
    /// The migration does not take such a connection now.
    NotNow,
    /// The host does not want this migration; the text has its reason.
    Declined,
    /// This side has not proved which host it is, or is no host that the other trusts.
    Untrusted,
}

impl RefusalCode {
    const ALL: [Self; 7] = [
        Self::Version,
        Self::Malformed,
        Self::UnknownMigration,
        Self::WrongSecret,
        Self::NotNow,
        Self::Declined,
        Self::Untrusted,
    ];

    fn number(self) -> u8 {
        self as u8 + 1
    }
}

/// The listening side's answer to a preamble.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The versions that it speaks.
    pub versions: Versions,
    /// What it says.
    pub answer: Answer,
}

/// What a [`Reply`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection is taken.
    Accepted {
        /// How many control messages the listening side has received; 0 unless a control link is resumed.
        received: u64,
    },
    /// It is not, and will be closed.
    Refused {
        /// Why, for the program.
        code: RefusalCode,
        /// Why, for people. At most [`MAX_REFUSAL_BYTES`].
        text: String,
    },
}

impl Reply {
    /// An acceptance with the versions of this program.
    #[must_use]
    pub fn accepted(received: u64) -> Self {
        Self { versions: Versions::OURS, answer: Answer::Accepted { received } }
    }

    /// A refusal with the versions of this program. The text is cut to [`MAX_REFUSAL_BYTES`].
    #[must_use]
    pub fn refused(code: RefusalCode, text: &str) -> Self {
        let text = cut_text(text, MAX_REFUSAL_BYTES).to_owned();
        Self { versions: Versions::OURS, answer: Answer::Refused { code, text } }
    }

    /// The bytes that travel: [`REPLY_BYTES`] and the text.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (code, received, text) = match &self.answer {
            Answer::Accepted { received } => (0, *received, ""),
            Answer::Refused { code, text } => (code.number(), 0, cut_text(text, MAX_REFUSAL_BYTES)),
        };
        let mut bytes = Vec::with_capacity(REPLY_BYTES + text.len());
        bytes.extend(REPLY_MAGIC);
        bytes.extend(self.versions.oldest.to_le_bytes());
        bytes.extend(self.versions.newest.to_le_bytes());
        bytes.extend([code, 0]);
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(received.to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }
}

/// The fixed part of a [`Reply`], which tells how much text follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    versions: Versions,
    code: u8,
    text_bytes: u16,
    received: u64,
}

impl ReplyHeader {
    /// Reads the fixed part of what the peer sent.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<Self, PreambleError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != REPLY_MAGIC {
            return Err(PreambleError::Magic(magic));
        }
        let versions = versions(&mut fields)?;
        let (code, reserved, text_bytes, received) = (fields.u8(), fields.u8(), fields.u16(), fields.u64());
        if usize::from(text_bytes) > MAX_REFUSAL_BYTES {
            return Err(PreambleError::TextLength(text_bytes));
        }
        if reserved != 0 || (code == 0 && text_bytes != 0) || (code != 0 && received != 0) {
            return Err(PreambleError::Reserved);
        }
        Ok(Self { versions, code, text_bytes, received })
    }

    /// How many bytes of text follow; at most [`MAX_REFUSAL_BYTES`].
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        usize::from(self.text_bytes)
    }

    /// The whole reply.
    ///
    /// # Errors
    /// No version in common (whatever the code), or a code that this version does not know.
    pub fn with_text(self, text: &[u8]) -> Result<Reply, PreambleError> {
        if Versions::OURS.common(self.versions).is_none() {
            return Err(PreambleError::Version { theirs: self.versions, ours: Versions::OURS });
        }
        let answer = match self.code {
            0 => Answer::Accepted { received: self.received },
            code => {
                let known = RefusalCode::ALL.into_iter().find(|known| known.number() == code);
                let code = known.ok_or(PreambleError::Code(code))?;
                Answer::Refused { code, text: shown_text(text) }
            }
        };
        Ok(Reply { versions: self.versions, answer })
    }
}

#[cfg(test)]
mod tests;
