//! Which settings are best, and how a host file says so.

use serde::{Deserialize, Serialize};

use super::case::Case;
use super::verdict::channels;
use crate::host::view::table::per_second;
use crate::session::TransferMode;
use crate::session::striping::BATCH_PAGES;
use crate::units::{Bytes, PAGE_SIZE};

/// The batches that are tried, in pages: 64 KiB to the largest that the protocol has.
pub(super) const BATCHES: [u64; 4] = [16, 64, BATCH_PAGES, 1024];
/// The numbers of channels that are tried unless they are given.
pub const CHANNELS: [usize; 4] = [1, 2, 4, 8];
/// What is slower by less than this is as fast: it is less than two runs differ by.
const AS_FAST: f64 = 0.97;

/// What a sweep found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The best mode.
    pub mode: TransferMode,
    /// The best number of channels.
    pub channels: usize,
    /// The best batch, in bytes. A migration's is 1 MiB.
    pub message_bytes: u64,
    /// How fast that was.
    pub bytes_per_second: f64,
    /// The best that a host file can choose, as a part of one.
    pub host_file: String,
}

/// The best of what was measured; none of nothing.
pub(super) fn best(cases: &[Case], paths: usize) -> Option<Best> {
    let best = best_of(cases.iter())?;
    let usual =
        best_of(cases.iter().filter(|case| case.message_bytes == BATCH_PAGES * PAGE_SIZE)).unwrap_or(best);
    let host_file = format!(
        "# pageferry bench --sweep: {} with {} for {} of memory ({}), {:.3} CPU s/GiB at the source, {:.3} at the destination\n\
         performance_option = \"{}\"\nchannels_per_path = {}\n",
        per_second(usual.bytes, usual.seconds),
        channels(usual),
        Bytes(usual.memory_bytes),
        usual.fill.escape_debug(),
        usual.source_cpu_seconds_per_gib,
        usual.destination_cpu_seconds_per_gib,
        usual.mode,
        usual.channels.div_ceil(paths.max(1)),
    );
    Some(Best {
        mode: best.mode,
        channels: best.channels,
        message_bytes: best.message_bytes,
        bytes_per_second: best.bytes_per_second,
        host_file,
    })
}

/// The fastest; of those that are as fast, the one that costs least.
fn best_of<'a>(cases: impl Iterator<Item = &'a Case> + Clone) -> Option<&'a Case> {
    let fastest = cases.clone().map(|case| case.bytes_per_second).fold(0.0, f64::max);
    let cost = |case: &Case| case.source_cpu_seconds_per_gib + case.destination_cpu_seconds_per_gib;
    cases
        .filter(|case| case.bytes_per_second >= fastest * AS_FAST)
        .min_by(|one, other| cost(one).total_cmp(&cost(other)).then(one.channels.cmp(&other.channels)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::bench::verdict::tests::case;

    #[test]
    fn the_fastest_wins_and_of_equals_the_cheapest() {
        let slow = Case { bytes_per_second: 1e9, ..case() };
        let fast = Case { bytes_per_second: 2e9, channels: 4, source_cpu_seconds_per_gib: 0.3, ..case() };
        let cheap = Case { bytes_per_second: 1.98e9, channels: 3, ..case() };
        let large = Case { bytes_per_second: 2.5e9, message_bytes: 4 << 20, ..case() };
        let found = best(&[slow.clone(), fast.clone(), cheap.clone()], 2).unwrap();
        assert_eq!((found.channels, found.message_bytes), (3, 1 << 20));
        assert!(
            found.host_file.ends_with("performance_option = \"tcp\"\nchannels_per_path = 2\n"),
            "{found:?}"
        );
        let found = best(&[slow, fast, cheap, large], 1).unwrap();
        assert_eq!(found.message_bytes, 4 << 20);
        // A host file cannot choose the batch, so what it says is the best with the usual one.
        assert!(found.host_file.contains("channels_per_path = 3\n"), "{found:?}");
        assert_eq!(best(&[], 1), None);
    }

    #[test]
    fn a_host_file_takes_what_is_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.toml");
        let strange = Case { fill: "file:/a\nb".to_owned(), ..case() };
        std::fs::write(&path, best(&[strange], 1).unwrap().host_file).unwrap();
        assert_eq!(crate::host::config::check(Some(&path), true), crate::host::exit::Exit::Completed);
    }
}
