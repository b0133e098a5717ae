//! Sizes, rates and durations as people write them.

use std::time::Duration;

use bytesize::ByteSize;

use crate::layout::MAX_BYTES;
use crate::units::{Bytes, PAGE_SIZE};

/// Why a text is not the quantity that was asked for. Each message names the text and shows a right one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number with a unit of bytes.
    #[error("{0:?} is no size; write it like 1GiB, 256MiB or 65536")]
    Size(String),
    /// A size past 64 bits.
    #[error("{0:?} is larger than any memory; write it like 1GiB")]
    SizeTooLarge(String),
    /// Guest memory of size 0.
    #[error("a guest needs some memory, not {0:?}; write it like 1GiB")]
    NoMemory(String),
    /// Guest memory that ends inside a page.
    #[error("{0:?} is {1} bytes, which is not a whole number of 4 KiB pages; write it like 1GiB or 256MiB")]
    Unaligned(String, u64),
    /// More guest memory than a layout holds.
    #[error("{0:?} is more than the {max} that a guest can have", max = Bytes(MAX_BYTES))]
    TooMuchMemory(String),
    /// Not a number with a unit of bytes or bits per second.
    #[error("{0:?} is no rate; write it like 100MiB/s (bytes) or 10Gbit/s (bits)")]
    Rate(String),
    /// A unit that some read as bytes and some as bits.
    #[error("{0:?} could mean bits or bytes; write {1}bit/s or {1}B/s")]
    AmbiguousRate(String, String),
    /// Not a duration.
    #[error("{0:?} is no duration ({1}); write it like 300ms or 2s")]
    Duration(String, humantime::DurationError),
    /// A duration of 0 where nothing can be done in no time.
    #[error("{0:?} is no time at all; write it like 300ms")]
    NoTime(String),
    /// Not two addresses with a hyphen between them.
    #[error(
        "{0:?} is no path; write it as the source's and the destination's address, like 192.0.2.1-192.0.2.2"
    )]
    Path(String),
}

/// Bytes: a number with B, KiB, MiB, GiB, TiB (or KB, MB, GB, TB for powers of ten); without a unit it counts bytes.
///
/// # Errors
/// [`QuantityError`] naming the text.
pub fn size(text: &str) -> Result<u64, QuantityError> {
    let bytes: ByteSize = text.trim().parse().map_err(|_| QuantityError::Size(text.to_owned()))?;
    // The parser saturates.
    if bytes.0 == u64::MAX { Err(QuantityError::SizeTooLarge(text.to_owned())) } else { Ok(bytes.0) }
}

/// The size of a guest's memory: some whole pages, at most [`MAX_BYTES`].
///
/// # Errors
/// [`QuantityError`] naming the text.
pub fn memory(text: &str) -> Result<u64, QuantityError> {
    let bytes = size(text)?;
    if bytes == 0 {
        return Err(QuantityError::NoMemory(text.to_owned()));
    }
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(QuantityError::Unaligned(text.to_owned(), bytes));
    }
    if bytes > MAX_BYTES {
        return Err(QuantityError::TooMuchMemory(text.to_owned()));
    }
    Ok(bytes)
}

/// Bytes per second, out of bytes (`100MiB`, `100MiB/s`) or bits (`1Gbit`, `1Gbit/s`); 0 is a rate.
///
/// # Errors
/// [`QuantityError`] naming the text.
pub fn rate(text: &str) -> Result<u64, QuantityError> {
    let bad = |_| QuantityError::Rate(text.to_owned());
    let trimmed = text.trim();
    let amount = trimmed.strip_suffix("/s").unwrap_or(trimmed);
    if let Some(bits) = amount.strip_suffix("bit") {
        return Ok(size(&format!("{bits}B")).map_err(bad)? / 8);
    }
    if let Some(number) = amount.strip_suffix('b') {
        return Err(QuantityError::AmbiguousRate(text.to_owned(), number.to_owned()));
    }
    size(amount).map_err(bad)
}

/// A duration that is not 0: `300ms`, `2s`, `1m 30s`.
///
/// # Errors
/// [`QuantityError`] naming the text.
pub fn duration(text: &str) -> Result<Duration, QuantityError> {
    let parsed = humantime::parse_duration(text.trim());
    let duration = parsed.map_err(|error| QuantityError::Duration(text.to_owned(), error))?;
    if duration.is_zero() { Err(QuantityError::NoTime(text.to_owned())) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_in_every_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("4KiB", 4096),
            ("256MiB", 256 << 20),
            ("1GiB", 1 << 30),
            ("1 GiB", 1 << 30),
            (" 1gib ", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("64TiB", 64 << 40),
            ("1GB", 1_000_000_000),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn rates_in_bytes_and_in_bits() {
        for (text, bytes) in [
            ("0", 0),
            ("100MiB", 100 << 20),
            ("100MiB/s", 100 << 20),
            ("1Gbit", 125_000_000),
            ("1Gbit/s", 125_000_000),
            ("2.5Gbit/s", 312_500_000),
            ("8Kibit", 1024),
            ("100bit", 12),
        ] {
            assert_eq!(rate(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, milliseconds) in [("300ms", 300), ("2s", 2000), ("1m 30s", 90_000), (" 5ms", 5)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
    }

    /// Every bad input, and the words of its message that a user needs.
    #[test]
    fn bad_inputs_are_named_with_an_example() {
        type Parser = fn(&str) -> Result<u64, QuantityError>;
        let milliseconds: Parser = |text| duration(text).map(|d| d.as_millis() as u64);
        let table: &[(Parser, &str, &str)] = &[
            (size, "", "like 1GiB"),
            (size, "GiB", "like 1GiB"),
            (size, "-1GiB", "like 1GiB"),
            (size, "1GiBs", "like 1GiB"),
            (size, "one", "like 1GiB"),
            (size, "1e3", "like 1GiB"),
            (size, "NaN", "like 1GiB"),
            (size, "inf", "like 1GiB"),
            (size, "0x10", "like 1GiB"),
            (size, "1.2.3MiB", "like 1GiB"),
            (size, "٣GiB", "like 1GiB"),
            (size, "999999999999EiB", "larger than any memory"),
            (memory, "0", "needs some memory"),
            (memory, "0GiB", "needs some memory"),
            (memory, "0.1KiB", "102 bytes, which is not a whole number"),
            (memory, "1GB", "1000000000 bytes, which is not a whole number"),
            (memory, "65TiB", "more than the 64 TiB"),
            (memory, "big", "like 1GiB"),
            (rate, "", "like 100MiB/s"),
            (rate, "/s", "like 100MiB/s"),
            (rate, "fast", "like 100MiB/s"),
            (rate, "1GiB/h", "like 100MiB/s"),
            (rate, "1GiB/s/s", "like 100MiB/s"),
            (rate, "-1Gbit", "like 100MiB/s"),
            (rate, "bit", "like 100MiB/s"),
            (rate, "1Gbitbit", "like 100MiB/s"),
            (rate, "100Mb/s", "write 100Mbit/s or 100MB/s"),
            (rate, "999999999999EiB/s", "like 100MiB/s"),
            (milliseconds, "", "like 300ms"),
            (milliseconds, "300", "like 300ms"),
            (milliseconds, "-1s", "like 300ms"),
            (milliseconds, "1 fortnight", "like 300ms"),
            (milliseconds, "0ms", "no time at all"),
            (milliseconds, "99999999999999999999s", "like 300ms"),
        ];
        for (parse, text, words) in table {
            let message = parse(text).expect_err(text).to_string();
            assert!(message.contains(words), "{text:?} gave {message:?}, without {words:?}");
            assert!(message.contains(&format!("{text:?}")), "{message:?} does not name {text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,24}", number in "[0-9.]{0,30} ?[a-zA-Z/]{0,6}") {
            for text in [&text, &number] {
                let _ = (size(text), memory(text), rate(text), duration(text));
            }
        }

        #[test]
        fn what_is_shown_is_read_back(pages in 1..MAX_BYTES / PAGE_SIZE) {
            let bytes = pages * PAGE_SIZE;
            prop_assert_eq!(memory(&bytes.to_string()), Ok(bytes));
            prop_assert_eq!(memory(&format!("{}KiB", bytes / 1024)), Ok(bytes));
        }
    }
}
