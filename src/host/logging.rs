//! Logs: to stderr, warnings alone unless more is asked for by `--verbose` or `PAGEFERRY_LOG` (tracing's filter syntax).

use std::io::IsTerminal as _;

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
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

/// Starts logging in a daemon: with times, and as JSON where a program reads it.
pub fn start_daemon(json: bool, default: &str) {
    let filter = EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default));
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // Fails only when logging was started already.
    let _ = if json {
        logs.json().try_init()
    } else {
        logs.with_ansi(std::io::stderr().is_terminal()).try_init()
    };
}
