//! The stream of a multifd channel, taken apart: `migration/multifd.h` of QEMU. No I/O; whatever comes is bounded before it is
//! believed.
//!
//! A channel begins with an [`Init`] of [`INIT_BYTES`]. Then packets follow, big-endian, each with a [`Head`] of
//! [`HEAD_BYTES`] that says which kind it is: pages ([`PagesPacket`], [`PACKET_BYTES`] in all, then the pages that are not
//! zero) or a device's state ([`DEVICE_STATE_BYTES`] in all, then the state), which is opaque here.

use crate::units::{PAGE_SIZE, Run};

/// What a multifd channel begins with, big-endian.
pub const MAGIC: u32 = 0x1122_3344;
/// What the main channel begins with: `QEVM`.
pub const MAIN_MAGIC: u32 = 0x5145_564d;
/// The only version of multifd that there is.
pub const VERSION: u32 = 1;
/// Length of what a channel begins with.
pub const INIT_BYTES: usize = 64;
/// What all packets have in common: magic, version and flags.
pub const HEAD_BYTES: usize = 12;
/// The most pages in a packet: 512 KiB of 4 KiB pages.
pub const MAX_PAGES: usize = 128;
/// Length of the header of a packet of pages: 320 bytes and an offset for each page.
pub const PACKET_BYTES: usize = 320 + 8 * MAX_PAGES;
/// Length of the header of a packet with a device's state: the head, a name of 256 bytes, an instance and a length.
pub const DEVICE_STATE_BYTES: usize = HEAD_BYTES + 256 + 8;
/// The most pages' content that a packet carries.
pub const MAX_PAYLOAD_BYTES: usize = MAX_PAGES * PAGE_SIZE as usize;
/// The most of a device's state in one packet. QEMU's own pieces have 1 MiB.
pub const MAX_STATE_BYTES: u32 = 16 << 20;

const FLAG_SYNC: u32 = 1;
/// How the pages are compressed: zlib, zstd, qpl, uadk, qatzip; 0 is not at all.
const FLAG_COMPRESSION: u32 = 0x1f << 1;
const FLAG_DEVICE_STATE: u32 = 32 << 1;

const RAM_BLOCK: std::ops::Range<usize> = 64..320;

/// Why bytes are no multifd stream, or one that cannot be carried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MultifdError {
    /// Not the magic: out of step, or another protocol.
    #[error("a multifd packet begins with {0:#010x} instead of its magic")]
    Magic(u32),
    /// Another version.
    #[error("version {0} of multifd is unknown; this program carries version {VERSION}")]
    Version(u32),
    /// The pages are compressed by QEMU.
    #[error("QEMU compresses the pages itself (flags {0:#x}); set multifd-compression to none on both ends")]
    Compressed(u32),
    /// More pages than a packet has.
    #[error("a multifd packet of {normal} pages and {zero} zero pages; {MAX_PAGES} together are the limit")]
    TooManyPages {
        /// Pages with content.
        normal: u32,
        /// Pages without.
        zero: u32,
    },
    /// The payload has another length than its pages.
    #[error(
        "a multifd packet of {pages} pages announces {bytes} bytes; only guests with pages of 4 KiB are carried"
    )]
    Payload {
        /// Pages with content.
        pages: u32,
        /// What follows, as announced.
        bytes: u32,
    },
    /// A name of a RAM block without an end, or one that is no text.
    #[error("a multifd packet does not name its RAM block")]
    Name,
    /// An offset that is not a page's.
    #[error("a multifd packet has a page at offset {0:#x}, which is no multiple of 4 KiB")]
    Offset(u64),
    /// A device's state that is longer than any.
    #[error("a multifd packet announces {0} bytes of a device's state; {MAX_STATE_BYTES} is the limit")]
    State(u32),
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(number)
}

fn check(bytes: &[u8]) -> Result<(), MultifdError> {
    match (be32(bytes, 0), be32(bytes, 4)) {
        (MAGIC, VERSION) => Ok(()),
        (MAGIC, version) => Err(MultifdError::Version(version)),
        (magic, _) => Err(MultifdError::Magic(magic)),
    }
}

/// What a channel begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    /// The guest's UUID.
    pub uuid: [u8; 16],
    /// Which channel it is.
    pub channel: u8,
}

impl Init {
    /// Reads the first bytes of a channel.
    ///
    /// # Errors
    /// [`MultifdError::Magic`] and [`MultifdError::Version`].
    pub fn decode(bytes: &[u8; INIT_BYTES]) -> Result<Self, MultifdError> {
        check(bytes)?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[8..24]);
        Ok(Self { uuid, channel: bytes[24] })
    }
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A [`PagesPacket`].
    Pages,
    /// A device's state: opaque, but for its length ([`state_bytes`]).
    DeviceState,
}

impl Head {
    /// Reads the beginning of a packet.
    ///
    /// # Errors
    /// [`MultifdError::Magic`], [`MultifdError::Version`] and [`MultifdError::Compressed`].
    pub fn decode(bytes: &[u8; HEAD_BYTES]) -> Result<Self, MultifdError> {
        check(bytes)?;
        match be32(bytes, 8) {
            flags if flags & FLAG_DEVICE_STATE != 0 => Ok(Self::DeviceState),
            flags if flags & FLAG_COMPRESSION != 0 => Err(MultifdError::Compressed(flags)),
            _ => Ok(Self::Pages),
        }
    }

    /// The length of the header that begins so.
    #[must_use]
    pub fn header_bytes(self) -> usize {
        match self {
            Self::Pages => PACKET_BYTES,
            Self::DeviceState => DEVICE_STATE_BYTES,
        }
    }
}

/// How much of a device's state follows its header.
///
/// # Errors
/// [`MultifdError::State`].
pub fn state_bytes(header: &[u8; DEVICE_STATE_BYTES]) -> Result<u32, MultifdError> {
    match be32(header, DEVICE_STATE_BYTES - 4) {
        bytes if bytes > MAX_STATE_BYTES => Err(MultifdError::State(bytes)),
        bytes => Ok(bytes),
    }
}

/// A packet of pages, without them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesPacket {
    /// Whether everything before it on its channel has to be in place before the destination goes on.
    pub sync: bool,
    /// The RAM block; empty without pages.
    pub block: String,
    /// Where in it the pages lie whose content follows, in bytes.
    pub normal: Vec<u64>,
    /// Where the pages lie that hold only zero bytes.
    pub zero: Vec<u64>,
}

impl PagesPacket {
    /// Reads a header.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(header: &[u8; PACKET_BYTES]) -> Result<Self, MultifdError> {
        check(header)?;
        let flags = be32(header, 8);
        if flags & FLAG_COMPRESSION != 0 {
            return Err(MultifdError::Compressed(flags));
        }
        let (normal, bytes, zero) = (be32(header, 16), be32(header, 20), be32(header, 32));
        if u64::from(normal) + u64::from(zero) > MAX_PAGES as u64 {
            return Err(MultifdError::TooManyPages { normal, zero });
        }
        if u64::from(bytes) != u64::from(normal) * PAGE_SIZE {
            return Err(MultifdError::Payload { pages: normal, bytes });
        }
        let name = &header[RAM_BLOCK];
        let end = name.iter().position(|byte| *byte == 0).ok_or(MultifdError::Name)?;
        let block = std::str::from_utf8(&name[..end]).map_err(|_| MultifdError::Name)?;
        if block.is_empty() && normal + zero > 0 {
            return Err(MultifdError::Name);
        }
        let offsets = header[RAM_BLOCK.end..].chunks_exact(8).take((normal + zero) as usize);
        let mut offsets = offsets.map(|bytes| {
            let offset = u64::from(be32(bytes, 0)) << 32 | u64::from(be32(bytes, 4));
            if offset.is_multiple_of(PAGE_SIZE) { Ok(offset) } else { Err(MultifdError::Offset(offset)) }
        });
        let normal = offsets.by_ref().take(normal as usize).collect::<Result<_, _>>()?;
        let zero = offsets.collect::<Result<_, _>>()?;
        Ok(Self { sync: flags & FLAG_SYNC != 0, block: block.to_owned(), normal, zero })
    }

    /// How many bytes of pages follow.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.normal.len() * PAGE_SIZE as usize
    }
}

/// Takes the pages out of a header: what is left asks the destination to do nothing but what its flags say.
pub fn empty(header: &mut [u8; PACKET_BYTES]) {
    header[16..24].fill(0);
    header[32..36].fill(0);
}

/// A packet without pages that asks for everything before it to be in place.
#[must_use]
pub fn sync_packet() -> [u8; PACKET_BYTES] {
    let mut header = [0; PACKET_BYTES];
    header[..4].copy_from_slice(&MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&VERSION.to_be_bytes());
    header[8..12].copy_from_slice(&FLAG_SYNC.to_be_bytes());
    header[12..16].copy_from_slice(&(MAX_PAGES as u32).to_be_bytes());
    header
}

/// The pages at these offsets of a block that begins with page `first`, adjacent ones joined, in the given order. `None` if one
/// lies outside the block's `pages`.
#[must_use]
pub fn runs_at(offsets: &[u64], first: u64, pages: u64) -> Option<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    for offset in offsets {
        let page = offset / PAGE_SIZE;
        if page >= pages {
            return None;
        }
        match runs.last_mut().filter(|run| run.end() == first + page) {
            Some(run) => run.pages += 1,
            None => runs.push(Run::new(first + page, 1)),
        }
    }
    Some(runs)
}

#[cfg(test)]
mod tests;
