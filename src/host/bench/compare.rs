//! A measurement beside an earlier one.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BenchError;
use super::case::{BenchReport, Case};
use crate::session::TransferMode;

/// A baseline is a result of this program: some KiB for each case.
const LARGEST: u64 = 64 << 20;

/// A case beside the same one of a baseline: each figure over the baseline's. Of a figure that was 0 there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Which case.
    pub mode: TransferMode,
    /// Which case.
    pub channels: usize,
    /// Which case.
    pub message_bytes: u64,
    /// More is better.
    pub bytes_per_second: Option<f64>,
    /// Less is better.
    pub source_cpu_seconds_per_gib: Option<f64>,
    /// Less is better.
    pub destination_cpu_seconds_per_gib: Option<f64>,
    /// Less is better.
    pub latency_p99: Option<f64>,
}

/// Reads an earlier result.
///
/// # Errors
/// [`BenchError::Baseline`] naming the file.
pub(super) fn baseline(path: &Path) -> Result<BenchReport, BenchError> {
    let failed = |cause| BenchError::Baseline { path: path.to_owned(), cause };
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(LARGEST).read_to_end(&mut text)).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|error| failed(error.into()))
}

/// Each case that the baseline has too.
pub(super) fn compare(now: &[Case], before: &[Case]) -> Vec<Comparison> {
    let same = |now: &Case, before: &&Case| {
        let key = |case: &Case| {
            (
                case.mode,
                case.channels,
                case.message_bytes,
                case.memory_bytes,
                case.warm,
                case.dirty_bytes_per_second,
            )
        };
        key(now) == key(before) && now.fill == before.fill
    };
    let pairs = now.iter().filter_map(|case| Some((case, before.iter().find(|before| same(case, before))?)));
    pairs.map(|(now, before)| Comparison::of(now, before)).collect()
}

impl Comparison {
    fn of(now: &Case, before: &Case) -> Self {
        let ratio = |of: fn(&Case) -> f64| {
            let ratio = of(now) / of(before);
            ratio.is_finite().then_some(ratio)
        };
        Self {
            mode: now.mode,
            channels: now.channels,
            message_bytes: now.message_bytes,
            bytes_per_second: ratio(|case| case.bytes_per_second),
            source_cpu_seconds_per_gib: ratio(|case| case.source_cpu_seconds_per_gib),
            destination_cpu_seconds_per_gib: ratio(|case| case.destination_cpu_seconds_per_gib),
            latency_p99: ratio(|case| case.latency_us.p99 as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::bench::verdict::tests::case;

    #[test]
    fn like_is_compared_with_like() {
        let before = case();
        let faster = Case { bytes_per_second: before.bytes_per_second * 1.5, ..case() };
        let other = Case { channels: 4, ..case() };
        let found = compare(&[other, faster], &[before]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            (found[0].channels, found[0].bytes_per_second, found[0].latency_p99),
            (2, Some(1.5), Some(1.0))
        );
        let nothing = Case { source_cpu_seconds_per_gib: 0.0, ..case() };
        assert_eq!(compare(&[case()], &[nothing])[0].source_cpu_seconds_per_gib, None);
    }

    #[test]
    fn a_file_that_is_no_result_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{\"cases\": 3}").unwrap();
        let name = file.path().display().to_string();
        assert!(baseline(file.path()).unwrap_err().to_string().contains(&name));
        assert!(baseline(Path::new("/nowhere")).unwrap_err().to_string().contains("/nowhere"));
    }
}
