//! How pages travel: as zero runs, raw, or compressed; which of the two last, and how hard, is decided per batch.

pub mod level;
pub mod repeated;

use crate::units::PAGE_SIZE;

/// How a page travels. A page that is in no frame was never touched, or has not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Only its number: it holds zero bytes.
    Zero,
    /// As it is, without a copy at the source.
    Raw,
    /// Compressed by zstd together with the other pages of its batch.
    Zstd,
}

/// A batch has to shrink by a tenth, or it travels raw: what is saved would not pay for taking it apart.
const WORTH_IT: (usize, usize) = (9, 10);

/// What the fast levels remember: 4096 places in 16 KiB, which stays in the first cache. Pages are alike in what is near.
const SMALL_HASH_LOG: u32 = 12;

/// Why pages could not be compressed or taken apart.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// No context: zstd could not allocate.
    #[error("zstd has no memory for a context")]
    Context(#[source] std::io::Error),
    /// What arrived is no zstd frame, is damaged, or holds more than the announced pages.
    #[error("a compressed batch of {expected} bytes cannot be taken apart")]
    Decompress {
        /// The size of the pages that it should hold.
        expected: usize,
        /// What zstd says.
        #[source]
        cause: std::io::Error,
    },
    /// It holds less than the announced pages.
    #[error("a compressed batch holds {got} bytes where {expected} are announced")]
    Short {
        /// Bytes in it.
        got: usize,
        /// Bytes of its pages.
        expected: usize,
    },
}

/// Compresses batches on one thread; context and buffer are kept from one to the next.
pub struct Compressor {
    context: zstd::bulk::Compressor<'static>,
    level: Option<i32>,
    packed: Vec<u8>,
}

impl Compressor {
    /// A compressor without content.
    ///
    /// # Errors
    /// [`CodecError::Context`].
    pub fn new() -> Result<Self, CodecError> {
        let context = zstd::bulk::Compressor::new(0).map_err(CodecError::Context)?;
        Ok(Self { context, level: None, packed: Vec::new() })
    }

    /// Compresses a private copy of pages. `None` when they do not shrink by a tenth: they travel raw then.
    ///
    /// The pages must not be guest RAM itself: a compressor that reads a byte twice while the guest writes it makes a
    /// stream that cannot be taken apart.
    pub fn compress(&mut self, pages: &[u8], level: i32) -> Option<&[u8]> {
        if self.level != Some(level) {
            self.context.set_compression_level(level).ok()?;
            // 0 is what zstd takes by itself.
            let hash_log = if level < 0 { SMALL_HASH_LOG } else { 0 };
            self.context.set_parameter(zstd::zstd_safe::CParameter::HashLog(hash_log)).ok()?;
            self.level = Some(level);
        }
        // zstd gives up by itself when the result outgrows this, so what does not shrink costs less than what does.
        let room = pages.len() / WORTH_IT.1 * WORTH_IT.0;
        if self.packed.len() < room {
            self.packed.resize(room, 0);
        }
        match self.context.compress_to_buffer(pages, &mut self.packed[..room]) {
            Ok(bytes) => Some(&self.packed[..bytes]),
            Err(_) => {
                // A frame that was given up is still open, and while it is, the context refuses another level.
                let reset = self.context.context_mut().reset(zstd::zstd_safe::ResetDirective::SessionOnly);
                debug_assert!(reset.is_ok(), "a session can be reset at any time");
                None
            }
        }
    }
}

/// Takes batches apart on one thread; context and buffer are kept from one to the next.
pub struct Decompressor {
    context: zstd::bulk::Decompressor<'static>,
    pages: Vec<u8>,
}

impl Decompressor {
    /// A decompressor without content.
    ///
    /// # Errors
    /// [`CodecError::Context`].
    pub fn new() -> Result<Self, CodecError> {
        let context = zstd::bulk::Decompressor::new().map_err(CodecError::Context)?;
        Ok(Self { context, pages: Vec::new() })
    }

    /// The bytes of exactly `pages` pages. Never writes more, whatever the compressed bytes claim.
    ///
    /// # Errors
    /// [`CodecError::Decompress`] or [`CodecError::Short`].
    pub fn decompress(&mut self, packed: &[u8], pages: u64) -> Result<&[u8], CodecError> {
        let expected = (pages * PAGE_SIZE) as usize;
        if self.pages.len() < expected {
            self.pages.resize(expected, 0);
        }
        let got = self
            .context
            .decompress_to_buffer(packed, &mut self.pages[..expected])
            .map_err(|cause| CodecError::Decompress { expected, cause })?;
        if got != expected {
            return Err(CodecError::Short { got, expected });
        }
        Ok(&self.pages[..expected])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pages of which every `step`-th byte is random: shrink well for a large step, not at all for 1.
    fn pages(count: u64, step: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; (count * PAGE_SIZE) as usize];
        let mut state = seed | 1;
        for byte in bytes.iter_mut().step_by(step) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = (state >> 56) as u8;
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_shrinks_comes_back(count in 1..64u64, step in 4..64usize, seed: u64, level in prop::sample::select(&level::LEVELS[..])) {
            let (mut compressor, mut decompressor) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
            let bytes = pages(count, step, seed);
            if let Some(packed) = compressor.compress(&bytes, level) {
                prop_assert!(packed.len() * 10 <= bytes.len() * 9);
                prop_assert_eq!(decompressor.decompress(packed, count).unwrap(), &bytes[..]);
            } else {
                prop_assert!(step < 8, "zeros for {} bytes of 8 shrink", step);
            }
        }

        #[test]
        fn damage_is_an_error_and_never_more_than_the_pages(seed: u64, at in any::<prop::sample::Index>(), to: u8) {
            let (mut compressor, mut decompressor) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
            let mut packed = compressor.compress(&pages(8, 16, seed), 1).unwrap().to_vec();
            let at = at.index(packed.len());
            packed[at] = to;
            if let Ok(bytes) = decompressor.decompress(&packed, 8) {
                prop_assert_eq!(bytes.len(), 8 * 4096);
            }
        }
    }

    #[test]
    fn random_pages_travel_raw() {
        let mut compressor = Compressor::new().unwrap();
        for level in level::LEVELS {
            assert!(compressor.compress(&pages(16, 1, 7), level).is_none(), "level {level}");
        }
    }

    #[test]
    fn what_did_not_shrink_leaves_every_level_as_it_was() {
        let mut compressor = Compressor::new().unwrap();
        for level in level::LEVELS {
            for next in level::LEVELS {
                assert!(compressor.compress(&pages(16, 1, 7), level).is_none());
                assert!(compressor.compress(&pages(16, 16, 7), next).is_some(), "{next} after {level}");
            }
        }
    }

    #[test]
    fn a_batch_of_another_size_is_refused() {
        let (mut compressor, mut decompressor) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
        let packed = compressor.compress(&pages(8, 16, 3), 1).unwrap();
        assert!(matches!(decompressor.decompress(packed, 9), Err(CodecError::Short { got: 32768, .. })));
        assert!(matches!(decompressor.decompress(packed, 7), Err(CodecError::Decompress { .. })));
        assert!(matches!(decompressor.decompress(b"no zstd", 7), Err(CodecError::Decompress { .. })));
    }
}
