//! What `pageferry bench` was asked to do, as plain data.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::host::demo_options::AddressPair;
use crate::session::mode::TransferMode;

/// Where `pageferry bench server` listens unless it is told otherwise: beside the daemon's port.
pub const BENCH_PORT: u16 = 7432;

/// What the memory holds that is sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Fill {
    /// Bytes that nothing compresses.
    Random,
    /// Zeros, in pages that were written.
    Zero,
    /// Words of a small vocabulary, which shrink to about a third.
    Text,
    /// Random bytes in this part of the memory, from 0 to 1, in pieces of 64 KiB; the rest was never touched.
    Sparse(f64),
    /// Random bytes in every other page; the rest was never touched.
    Scattered,
    /// Random bytes in this part of the memory, from 0 to 1, from its beginning on; the rest was never touched.
    First(f64),
    /// What a file holds, such as an image of a guest's RAM.
    File(PathBuf),
}

/// A word that names no fill.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no content of memory; there are random, zero, text, sparse:5%, first:5%, scattered and file:PATH"
)]
pub struct UnknownFill(pub String);

impl FromStr for Fill {
    type Err = UnknownFill;

    fn from_str(text: &str) -> Result<Self, UnknownFill> {
        let share = |share: &str| {
            let percent: f64 = share.strip_suffix('%')?.trim().parse().ok()?;
            (percent > 0.0 && percent <= 100.0).then_some(percent / 100.0)
        };
        let fill = match text.split_once(':') {
            None if text == "random" => Some(Self::Random),
            None if text == "zero" => Some(Self::Zero),
            None if text == "text" => Some(Self::Text),
            None if text == "scattered" => Some(Self::Scattered),
            Some(("sparse", percent)) => share(percent).map(Self::Sparse),
            Some(("first", percent)) => share(percent).map(Self::First),
            Some(("file", path)) if !path.is_empty() => Some(Self::File(path.into())),
            _ => None,
        };
        fill.ok_or_else(|| UnknownFill(text.to_owned()))
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => f.write_str("random"),
            Self::Zero => f.write_str("zero"),
            Self::Text => f.write_str("text"),
            Self::Sparse(share) | Self::First(share) => {
                let word = if matches!(self, Self::Sparse(_)) { "sparse" } else { "first" };
                let percent = format!("{:.4}", share * 100.0);
                write!(f, "{word}:{}%", percent.trim_end_matches('0').trim_end_matches('.'))
            }
            Self::Scattered => f.write_str("scattered"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// Where the memory goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A second process of this machine.
    Local,
    /// A `pageferry bench server`: a name or an address, and a port if it is not [`BENCH_PORT`].
    Host(String),
}

/// What is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchOptions {
    /// Where the memory goes to.
    pub target: Target,
    /// In which modes.
    pub modes: Vec<TransferMode>,
    /// How much memory: whole pages. `None` is 1 GiB, or as much as the file has.
    pub memory_bytes: Option<u64>,
    /// What it holds.
    pub fill: Fill,
    /// With how many channels.
    pub channels: Vec<usize>,
    /// Over which address pairs; none leaves it to the routing table.
    pub paths: Vec<AddressPair>,
    /// How much a thread writes of it a second meanwhile, so that rounds follow.
    pub dirty_bytes_per_second: u64,
    /// How long rounds follow the first; `None` is not at all.
    pub duration: Option<Duration>,
    /// Whether the destination's memory is populated before, which that of a guest is not.
    pub warm: bool,
    /// How often everything is measured, in turns.
    pub runs: u32,
    /// In batches of so many pages at most; none leaves it at that of a migration.
    pub batches: Vec<u64>,
    /// Whether batch sizes are tried besides.
    pub sweep: bool,
    /// An earlier result to compare with.
    pub compare: Option<PathBuf>,
    /// Where a page with plots goes.
    pub report: Option<PathBuf>,
    /// Whether the result goes out as JSON.
    pub json: bool,
    /// Whether more of what happens is logged.
    pub verbose: bool,
}

/// How the receiving side runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Where it listens.
    pub listen: Vec<SocketAddr>,
    /// Whether it ends with its first client.
    pub once: bool,
    /// Whether it is a child of `bench local`: says where it listens in JSON, and ends with its stdin.
    pub supervised: bool,
    /// Whether more of what happens is logged.
    pub verbose: bool,
}

/// `pageferry bench`.
#[derive(Clone, Debug, PartialEq)]
pub enum BenchRequest {
    /// Measure.
    Measure(Box<BenchOptions>),
    /// Be measured against.
    Serve(ServerOptions),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_are_read_back() {
        for text in [
            "random",
            "zero",
            "text",
            "sparse:5%",
            "sparse:0.25%",
            "sparse:100%",
            "scattered",
            "first:2%",
            "file:/tmp/a:b",
        ] {
            assert_eq!(text.parse::<Fill>().unwrap().to_string(), text);
        }
        assert_eq!("sparse:5%".parse(), Ok(Fill::Sparse(0.05)));
        let wrong =
            ["", "noise", "zero:1", "sparse", "sparse:5", "sparse:0%", "sparse:101%", "sparse:NaN%", "file:"];
        for text in wrong {
            let message = text.parse::<Fill>().unwrap_err().to_string();
            assert!(message.contains(&format!("{text:?}")) && message.contains("sparse:5%"), "{message}");
        }
    }
}
