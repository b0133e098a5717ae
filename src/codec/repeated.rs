//! Pages that repeat one byte, as a zstd frame that no compressor has to make.
//!
//! Linux leaves such pages behind: what it frees of its image and initial RAM disk after booting is filled with 0xcc
//! (`POISON_FREE_INITMEM`). A block of kind RLE says them in 4 bytes, so the destination needs nothing new. The format is that of RFC
//! 8878, section 3.1.1.

use crate::units::PAGE_SIZE;

const MAGIC: u32 = 0xfd2f_b528;
/// A frame header of: a single segment, no dictionary, no checksum, and the size of its content in 4 bytes.
const DESCRIPTOR: u8 = 0b1010_0000;
/// The most that a block may come to, in pages: 128 KiB.
const BLOCK_PAGES: u64 = (128 << 10) / PAGE_SIZE;
const RLE: u32 = 1;

/// Pages in a row that repeat one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeated {
    /// The byte.
    pub byte: u8,
    /// How many pages.
    pub pages: u64,
}

/// Appends the zstd frame of these pages to `into`: 9 bytes, and 4 for each block.
///
/// # Panics
/// If there are none, or more than a `u32` counts the bytes of: batches are cut before.
pub fn encode(pages: &[Repeated], into: &mut Vec<u8>) {
    let bytes = pages.iter().map(|row| row.pages).sum::<u64>() * PAGE_SIZE;
    let bytes = u32::try_from(bytes).expect("a batch is a few MiB");
    assert!(bytes > 0, "a frame without pages");
    into.extend(MAGIC.to_le_bytes());
    into.push(DESCRIPTOR);
    into.extend(bytes.to_le_bytes());
    let mut last = 0;
    for row in pages {
        for first in (0..row.pages).step_by(BLOCK_PAGES as usize) {
            last = into.len();
            let size = ((row.pages - first).min(BLOCK_PAGES) * PAGE_SIZE) as u32;
            into.extend_from_slice(&(size << 3 | RLE << 1).to_le_bytes()[..3]);
            into.push(row.byte);
        }
    }
    into[last] |= 1;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::Decompressor;

    proptest! {
        #[test]
        fn what_repeats_comes_back(rows in prop::collection::vec((any::<u8>(), 1..70u64), 1..20)) {
            let rows: Vec<_> = rows.into_iter().map(|(byte, pages)| Repeated { byte, pages }).collect();
            let pages = rows.iter().map(|row| row.pages).sum();
            let bytes: Vec<u8> =
                rows.iter().flat_map(|row| vec![row.byte; (row.pages * PAGE_SIZE) as usize]).collect();
            let mut packed = Vec::new();
            encode(&rows, &mut packed);
            prop_assert!(packed.len() <= 9 + 4 * pages as usize);
            prop_assert!(Decompressor::new().unwrap().decompress(&packed, pages).unwrap() == bytes);
            prop_assert!(Decompressor::new().unwrap().decompress(&packed, pages + 1).is_err());
        }
    }
}
