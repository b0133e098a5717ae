//! What a written page looks like, and what is wrong with one that does not look so.
//!
//! A page begins with the number of the write that made it (its sequence, from 1 on) and a checksum over that number and
//! the page's own; the rest follows from the two. So from the page number and the sequence alone it is known what each
//! byte has to be: a page that got lost, an old copy, another page's bytes and a flipped bit are all told apart from it.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::units::{PAGE_SIZE, PageIndex};

/// A private copy of a page.
pub(super) type PageBytes = [u8; PAGE_SIZE as usize];

/// Sequence and checksum.
const STAMP_BYTES: usize = 16;
/// The body changes its kind every 256 bytes: 32 words of 8. Short enough that every batch holds both kinds, and several
/// times longer than the shortest match that zstd looks for.
const STRETCH_WORDS: usize = 32;

/// What the pages are filled with behind their stamp: how well they compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fill {
    /// Nothing: the least work for a write, and a page of mostly zero bytes.
    Stamp,
    /// Random bytes and text by turns: shrinks to about half.
    #[default]
    Half,
    /// Random bytes: does not shrink.
    Random,
    /// Text: shrinks to a tenth or so.
    Text,
}

/// Sixteen words that text is made of.
const WORDS: [&[u8; 8]; 16] = [
    b"the page",
    b" of the ",
    b"machine ",
    b"host and",
    b" ferries",
    b" a guest",
    b" memory ",
    b"arrives.",
    b"\n  Then ",
    b"written ",
    b"between ",
    b" source ",
    b"channel ",
    b" rounds ",
    b"another ",
    b", where ",
];

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    /// Nothing is in it, as if it had never been written.
    Lost { expected: u64 },
    /// It is whole, but as another write left it.
    Stale { found: u64, expected: u64 },
    /// Its stamp is none.
    Stamp { expected: u64 },
    /// Its stamp is right, but not the eight bytes at this offset.
    Body { offset: usize, expected: u64 },
    /// The table names a last write of it that cannot be.
    Table { named: u64, writes: u64 },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { expected } => write!(f, "lost: it is empty, write {expected} was its last"),
            Self::Stale { found, expected } => {
                write!(f, "stale: it is as write {found} left it, write {expected} was its last")
            }
            Self::Stamp { expected } => write!(f, "corrupt: no stamp of it, write {expected} was its last"),
            Self::Body { offset, expected } => {
                write!(f, "corrupt: wrong at byte {offset}, write {expected} was its last")
            }
            Self::Table { named, writes } => {
                write!(f, "unknown: the table names write {named} of {writes} as its last")
            }
        }
    }
}

/// Makes pages and checks them. Guests with other seeds have other pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamper {
    seed: u64,
    fill: Fill,
}

impl Stamper {
    pub(super) fn new(seed: u64, fill: Fill) -> Self {
        Self { seed, fill }
    }

    /// The page as write number `sequence` leaves it.
    pub(super) fn make(&self, page: PageIndex, sequence: u64, into: &mut PageBytes) {
        let checksum = self.checksum(page, sequence);
        into[..8].copy_from_slice(&sequence.to_le_bytes());
        into[8..STAMP_BYTES].copy_from_slice(&checksum.to_le_bytes());
        for (index, word) in into[STAMP_BYTES..].chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.word(checksum, index));
        }
    }

    /// Whether the page is what write number `expected` (not 0) made of it.
    pub(super) fn check(&self, page: PageIndex, expected: u64, found: &PageBytes) -> Result<(), Damage> {
        let sequence = u64::from_le_bytes(found[..8].try_into().expect("8 bytes"));
        let stamp = u64::from_le_bytes(found[8..STAMP_BYTES].try_into().expect("8 bytes"));
        if sequence == 0 && stamp == 0 {
            return Err(Damage::Lost { expected });
        }
        if stamp != self.checksum(page, sequence) {
            return Err(Damage::Stamp { expected });
        }
        let body = found[STAMP_BYTES..].chunks_exact(8).enumerate();
        for (index, word) in body {
            if word != self.word(stamp, index) {
                return Err(Damage::Body { offset: STAMP_BYTES + index * 8, expected });
            }
        }
        if sequence != expected {
            return Err(Damage::Stale { found: sequence, expected });
        }
        Ok(())
    }

    fn checksum(&self, page: PageIndex, sequence: u64) -> u64 {
        let mut of = [0; 16];
        of[..8].copy_from_slice(&sequence.to_le_bytes());
        of[8..].copy_from_slice(&page.0.to_le_bytes());
        xxh3_64_with_seed(&of, self.seed)
    }

    fn word(&self, key: u64, index: usize) -> [u8; 8] {
        let drawn = mix(key, index as u64);
        let text = || *WORDS[(drawn >> 60) as usize];
        match self.fill {
            Fill::Stamp => [0; 8],
            Fill::Half if index / STRETCH_WORDS % 2 == 1 => text(),
            Fill::Half | Fill::Random => drawn.to_le_bytes(),
            Fill::Text => text(),
        }
    }
}

/// The `index`th number that is drawn from a seed: splitmix64 (Steele, Lea, Flood 2014), whose numbers can be drawn in
/// any order, so that nothing but an index has to be kept.
pub(super) fn mix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILLS: [Fill; 4] = [Fill::Stamp, Fill::Half, Fill::Random, Fill::Text];

    fn made(stamper: Stamper, page: u64, sequence: u64) -> PageBytes {
        let mut bytes = [0xee; PAGE_SIZE as usize];
        stamper.make(PageIndex(page), sequence, &mut bytes);
        bytes
    }

    #[test]
    fn each_kind_of_damage_is_told() {
        for fill in FILLS {
            let stamper = Stamper::new(3, fill);
            let page = made(stamper, 7, 40);
            let check = |found: &PageBytes| stamper.check(PageIndex(7), 40, found);
            assert_eq!(check(&page), Ok(()));
            assert_eq!(check(&[0; 4096]), Err(Damage::Lost { expected: 40 }));
            let stale = Damage::Stale { found: 39, expected: 40 };
            assert_eq!(check(&made(stamper, 7, 39)), Err(stale));
            let ahead = Damage::Stale { found: 41, expected: 40 };
            assert_eq!(check(&made(stamper, 7, 41)), Err(ahead));
            let corrupt = Err(Damage::Stamp { expected: 40 });
            assert_eq!(check(&made(stamper, 8, 40)), corrupt, "another page's bytes");
            assert_eq!(check(&made(Stamper::new(4, fill), 7, 40)), corrupt, "another guest's page");
            let mut torn = page;
            torn[2048..].copy_from_slice(&made(stamper, 7, 39)[2048..]);
            if fill != Fill::Stamp {
                // A word or two of the text may be the same in both.
                let found = check(&torn).unwrap_err();
                assert!(matches!(found, Damage::Body { offset: 2048..2200, expected: 40 }), "{found}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_flipped_bit_anywhere_is_found(
            page in 0..1u64 << 34, sequence in 1..u64::MAX, byte in 0..4096usize, bit in 0..8, fill in 0..4usize,
        ) {
            let stamper = Stamper::new(9, FILLS[fill]);
            let mut bytes = made(stamper, page, sequence);
            prop_assert_eq!(stamper.check(PageIndex(page), sequence, &bytes), Ok(()));
            bytes[byte] ^= 1u8 << bit;
            prop_assert!(stamper.check(PageIndex(page), sequence, &bytes).is_err());
        }
    }

    #[test]
    fn pages_shrink_as_their_fill_says() {
        for (fill, least, most) in [
            (Fill::Stamp, 0.0, 0.02),
            (Fill::Half, 0.45, 0.65),
            (Fill::Random, 0.99, 1.1),
            (Fill::Text, 0.0, 0.2),
        ] {
            let batch: Vec<u8> = (0..64).flat_map(|page| made(Stamper::new(1, fill), page, 5)).collect();
            for level in [-5, 1, 3] {
                let shrunk = zstd::bulk::compress(&batch, level).unwrap().len() as f64 / batch.len() as f64;
                assert!((least..most).contains(&shrunk), "{fill:?} at level {level}: {shrunk}");
            }
        }
    }
}
