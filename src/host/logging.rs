//! Logs: to stderr, warnings alone unless more is asked for by `--verbose` or `PAGEFERRY_LOG` (tracing's filter syntax).

use tracing_subscriber::EnvFilter;

/// The variable that a filter is read from.
pub const FILTER_VARIABLE: &str = "PAGEFERRY_LOG";

/// Starts logging in this process.
pub fn start(default: &str) {
    let filter = EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default));
    // Fails only when logging was started already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .try_init();
}
