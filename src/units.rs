//! The quantities that the whole crate counts in, as types that cannot be confused.

use std::fmt;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in one page. Dirty pages are tracked and sent in this unit, whatever the host maps them with.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// A physical address as the guest sees it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestAddress(pub u64);

/// The number of a page of guest RAM, counted densely over all RAM regions in the order of the layout.
///
/// It is *not* a guest frame number: holes between regions have no pages. [`crate::layout::RamLayout`] translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageIndex(pub u64);

/// The number of a pre-copy round. Round 0 sends every touched page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RoundId(pub u32);

impl RoundId {
    /// The round after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Adjacent pages: `pages` of them from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// The first page.
    pub start: PageIndex,
    /// How many pages; a run that is handed over is never empty.
    pub pages: u64,
}

impl Run {
    /// A run of `pages` pages from page number `start` on.
    #[must_use]
    pub fn new(start: u64, pages: u64) -> Self {
        Self { start: PageIndex(start), pages }
    }

    /// The number of the first page after the run. Saturates, so that a peer's numbers cannot wrap it.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start.0.saturating_add(self.pages)
    }

    /// Length in bytes. Saturates, for the same reason.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }
}

/// An amount of memory, shown with binary prefixes (`1.5 GiB`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const PREFIXES: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut prefix = 0;
        while value >= 1024.0 && prefix + 1 < PREFIXES.len() {
            value /= 1024.0;
            prefix += 1;
        }
        if value.fract() == 0.0 {
            write!(f, "{value:.0} {}", PREFIXES[prefix])
        } else {
            write!(f, "{value:.2} {}", PREFIXES[prefix])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_with_binary_prefixes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn a_run_at_the_end_of_the_number_space_saturates() {
        assert_eq!(Run::new(u64::MAX, 2).end(), u64::MAX);
        assert_eq!(Run::new(0, u64::MAX).bytes(), u64::MAX);
    }
}
