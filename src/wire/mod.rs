//! Every byte that crosses the network: bounded decoding, versions. No I/O.
//!
//! A connection starts with a [`preamble`], which says what it is for. Then it carries either [`link`] frames with
//! [`control`] messages in them, or [`data`] frames. [`rdma`] is what comes before and beside those of an RDMA channel.

pub mod control;
pub mod data;
pub mod link;
pub mod preamble;
pub mod rdma;
pub mod relay;

/// The version that this program speaks at best.
pub const PROTOCOL_VERSION: u16 = 1;
/// The oldest version that it still speaks.
pub const OLDEST_PROTOCOL_VERSION: u16 = 1;

/// Takes fixed-size little-endian fields off the front of a buffer whose length was checked by its type.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    /// The next `N` bytes.
    ///
    /// # Panics
    /// If there are fewer: the buffer's own type says how many there are.
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk().expect("the buffer is as long as its fields");
        self.0 = rest;
        *head
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// Cuts a text of our own to at most `limit` bytes, between two characters.
pub(crate) fn cut_text(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}

/// What may be shown of a peer's text: no control characters, which could rewrite a terminal.
pub(crate) fn shown_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
