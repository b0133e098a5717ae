//! The cases. A new one is a file here, a line in [`Case`] and an arm in [`Case::run`].

mod compression;
mod downtime;
mod floor;
mod rdma;
mod scaling;
mod throughput;

use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::measure::{CaseResult, Way};
use crate::memory;
use crate::ours::{Bench, bench};

/// How often in a turn moves of a fraction of a second are measured: one differs from the next by a third.
const PAIRS: usize = 4;

/// The same where what is asked is whether two of them are equal.
const CLOSE_PAIRS: usize = 8;

/// What can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// QEMU's multifd and pageferry's tcp, the same random memory
    Throughput,
    /// pageferry's tcp and the cheapest known way to move bytes, with iperf3 beside them
    Floor,
    /// QEMU's multifd with zstd and pageferry's compression, the RAM of a booted Linux guest
    Compression,
    /// A guest that writes its memory: how long it stands still, and how long all takes
    Downtime,
    /// How cost grows with channels, memory and the part of it that is in use
    Scaling,
    /// RDMA writes and `ib_write_bw`, in a guest with soft-RoCE
    Rdma,
}

impl Case {
    pub(crate) const ALL: [Self; 6] =
        [Self::Throughput, Self::Floor, Self::Compression, Self::Downtime, Self::Scaling, Self::Rdma];

    pub(crate) fn run(self, setup: &Setup) -> anyhow::Result<CaseResult> {
        match self {
            Self::Throughput => throughput::run(setup),
            Self::Floor => floor::run(setup),
            Self::Compression => compression::run(setup),
            Self::Downtime => downtime::run(setup),
            Self::Scaling => scaling::run(setup),
            Self::Rdma => rdma::run(setup),
        }
    }

    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What all cases need to know.
pub(crate) struct Setup {
    /// The repository.
    pub(crate) root: PathBuf,
    /// The pageferry that is measured.
    pub(crate) binary: PathBuf,
    /// A directory for sockets.
    pub(crate) directory: PathBuf,
    /// A file of random bytes in shared memory.
    pub(crate) random: PathBuf,
    /// The size of that file.
    pub(crate) bytes: u64,
    /// The RAM of a booted Linux guest, in shared memory.
    pub(crate) booted: Option<PathBuf>,
    pub(crate) runs: usize,
    pub(crate) quick: bool,
}

impl Setup {
    /// Memory that a move of so much takes: what bench sends is a copy, as much arrives, and there are processes.
    pub(crate) fn takes(bytes: u64) -> u64 {
        2 * bytes + (512 << 20)
    }

    /// What comes before each sample: the images have just been used, and so much memory is at hand, which does not stay so for long.
    pub(crate) fn prepare(&self, takes: u64) -> anyhow::Result<()> {
        std::iter::once(&self.random).chain(&self.booted).try_for_each(|image| memory::look_at(image))?;
        memory::at_hand(takes)
    }

    /// The random bytes over loopback, by mode tcp.
    pub(crate) fn tcp(&self, channels: u32, warm: bool) -> Bench<'_> {
        let fill = Self::fill(&self.random);
        Bench { binary: &self.binary, mode: "tcp", channels, fill, bytes: self.bytes, warm, between: None }
    }

    /// `--fill` for an image.
    pub(crate) fn fill(image: &Path) -> String {
        format!("file:{}", image.display())
    }
}

/// What pageferry does with memory all of which is in use.
fn pageferry(name: String, what: Bench<'_>) -> Way<'_> {
    Way::new(format!("pageferry {name}"), Setup::takes(what.bytes), move || bench(&what))
}
