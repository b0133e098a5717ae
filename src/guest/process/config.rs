//! What a process guest is, and how that and its state travel. Everything decoded here came from a peer and is checked
//! before anything is allocated by it.

use prost::Message;

use crate::dirty::TrackerKind;
use crate::guest::GuestError;
use crate::guest::process::plan::Plan;
use crate::guest::process::stamp::Fill;
use crate::guest::program::{Program, ProgramConfig};
use crate::layout::RamLayout;
use crate::memory::{Backing, HugePages};

/// As many threads as the KVM guest has vCPUs at most.
pub const MAX_THREADS: u32 = 4;

/// Of both messages: a guest of another version is refused.
const VERSION: u32 = crate::guest::STATE_VERSION;
/// Both messages are a few numbers, four times at most: below 100 bytes each. Longer ones are none of ours.
const MAX_MESSAGE_BYTES: usize = 4096;
/// No counter of a real guest comes near it (2,000 years of a write every 15 ns), so that none wraps after it was loaded.
const MAX_COUNT: u64 = 1 << 62;

/// What a process guest is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessConfig {
    /// RAM in bytes, whole pages.
    pub bytes: u64,
    /// What the RAM is.
    pub backing: Backing,
    /// What pages it is mapped with. Each host's own choice: it does not travel.
    pub huge: HugePages,
    /// How many threads write, 1 to [`MAX_THREADS`].
    pub threads: u32,
    /// What they do.
    pub program: ProgramConfig,
    /// What the written pages hold.
    pub fill: Fill,
    /// Where dirty pages come from: for memory without a VM, [`TrackerKind::Pagemap`].
    pub tracker: TrackerKind,
}

impl ProcessConfig {
    /// The layout and the areas of such a guest, if there can be one.
    pub(super) fn check(&self) -> Result<(RamLayout, Plan), GuestError> {
        if self.tracker != TrackerKind::Pagemap {
            return Err(GuestError::new(format!(
                "dirty pages of a process guest cannot come from '{}', which needs a KVM guest; use '{}'",
                self.tracker.name(),
                TrackerKind::Pagemap.name()
            )));
        }
        if !(1..=MAX_THREADS).contains(&self.threads) {
            return Err(GuestError::new(format!(
                "a process guest has 1 to {MAX_THREADS} threads, not {}",
                self.threads
            )));
        }
        let layout = RamLayout::flat(self.bytes).map_err(|cause| {
            GuestError::caused(format!("{} bytes cannot be a guest's RAM", self.bytes), cause)
        })?;
        let plan = Plan::new(self.bytes, self.program.touch_bytes, self.threads)?;
        Ok((layout, plan))
    }

    /// For the destination.
    pub(super) fn encode(&self) -> Vec<u8> {
        ConfigMessage {
            version: VERSION,
            bytes: self.bytes,
            backing: number_of(&BACKINGS, &self.backing),
            threads: self.threads,
            fill: number_of(&FILLS, &self.fill),
            program: number_of(&Program::ALL, &self.program.program),
            bytes_per_second: self.program.bytes_per_second,
            touch_bytes: self.program.touch_bytes,
            seed: self.program.seed,
        }
        .encode_to_vec()
    }

    /// What a peer says of its guest, if it can be.
    pub(super) fn decode(bytes: &[u8], huge: HugePages) -> Result<Self, GuestError> {
        const WHAT: &str = "the configuration of a process guest";
        let message: ConfigMessage = decoded(bytes, WHAT)?;
        check_version(message.version, WHAT)?;
        let config = Self {
            bytes: message.bytes,
            backing: named(&BACKINGS, message.backing, "backing")?,
            huge,
            threads: message.threads,
            program: ProgramConfig {
                program: named(&Program::ALL, message.program, "program")?,
                bytes_per_second: message.bytes_per_second,
                touch_bytes: message.touch_bytes,
                seed: message.seed,
            },
            fill: named(&FILLS, message.fill, "fill")?,
            tracker: TrackerKind::Pagemap,
        };
        config.check()?;
        Ok(config)
    }
}

/// In the order of their numbers on the wire, from 1 on; new ones are added at the end.
const BACKINGS: [Backing; 2] = [Backing::Memfd, Backing::Anonymous];
/// As above.
const FILLS: [Fill; 4] = [Fill::Stamp, Fill::Half, Fill::Random, Fill::Text];

fn number_of<T: PartialEq>(all: &[T], one: &T) -> u32 {
    all.iter().position(|other| other == one).map_or(0, |index| index as u32 + 1)
}

fn named<T: Copy>(all: &[T], number: u32, what: &str) -> Result<T, GuestError> {
    let index = (number as usize).checked_sub(1);
    index.and_then(|index| all.get(index)).copied().ok_or_else(|| {
        GuestError::new(format!(
            "the peer's process guest has {what} {number}, which this version does not know (1 to {}); use the same \
             pageferry on both hosts",
            all.len()
        ))
    })
}

fn decoded<M: Message + Default>(bytes: &[u8], what: &str) -> Result<M, GuestError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(GuestError::new(format!(
            "{what} has {} bytes, more than the {MAX_MESSAGE_BYTES} that one can have",
            bytes.len()
        )));
    }
    M::decode(bytes).map_err(|cause| GuestError::caused(format!("{what} cannot be read"), cause))
}

fn check_version(version: u32, what: &str) -> Result<(), GuestError> {
    if version == VERSION {
        return Ok(());
    }
    Err(GuestError::new(format!("{what} has version {version}, and only {VERSION} is known here")))
}

#[derive(Clone, PartialEq, Message)]
struct ConfigMessage {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(uint64, tag = "2")]
    bytes: u64,
    #[prost(uint32, tag = "3")]
    backing: u32,
    #[prost(uint32, tag = "4")]
    threads: u32,
    #[prost(uint32, tag = "5")]
    fill: u32,
    #[prost(uint32, tag = "6")]
    program: u32,
    #[prost(uint64, tag = "7")]
    bytes_per_second: u64,
    #[prost(uint64, optional, tag = "8")]
    touch_bytes: Option<u64>,
    #[prost(fixed64, tag = "9")]
    seed: u64,
}

/// Where one thread's program is. Which page comes next follows from `writes`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ThreadState {
    /// Pages written; the sequence of the last write.
    #[prost(uint64, tag = "1")]
    pub(super) writes: u64,
    #[prost(uint64, tag = "2")]
    pub(super) heartbeats: u64,
    #[prost(uint64, tag = "3")]
    pub(super) verified: u64,
    #[prost(uint64, tag = "4")]
    pub(super) corrupt: u64,
    /// The sum of the thread's part of the table, modulo 2^64: a table page that was lost with all pages that it speaks
    /// of would not be noticed otherwise.
    #[prost(fixed64, tag = "5")]
    pub(super) sum: u64,
    /// CLOCK_REALTIME when the thread last looked, in nanoseconds; 0 for never.
    #[prost(fixed64, tag = "6")]
    pub(super) last_look: u64,
    /// In nanoseconds.
    #[prost(uint64, tag = "7")]
    pub(super) longest_gap: u64,
}

#[derive(Clone, PartialEq, Message)]
struct StateMessage {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(message, repeated, tag = "2")]
    threads: Vec<ThreadState>,
}

/// The state of all threads, for the destination.
pub(super) fn encode_state(threads: Vec<ThreadState>) -> Vec<u8> {
    StateMessage { version: VERSION, threads }.encode_to_vec()
}

/// What a peer says is the state of a guest that has so many threads.
pub(super) fn decode_state(bytes: &[u8], threads: u32) -> Result<Vec<ThreadState>, GuestError> {
    const WHAT: &str = "the state of a process guest";
    let message: StateMessage = decoded(bytes, WHAT)?;
    check_version(message.version, WHAT)?;
    if message.threads.len() != threads as usize {
        return Err(GuestError::new(format!(
            "{WHAT} speaks of {} threads, and the guest has {threads}",
            message.threads.len()
        )));
    }
    for (index, state) in message.threads.iter().enumerate() {
        let counts = [
            state.writes,
            state.heartbeats,
            state.verified,
            state.corrupt,
            state.last_look,
            state.longest_gap,
        ];
        if let Some(count) = counts.into_iter().find(|&count| count > MAX_COUNT) {
            return Err(GuestError::new(format!(
                "{WHAT} has a count of {count} in thread {index}, which cannot be"
            )));
        }
    }
    Ok(message.threads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> ProcessConfig {
        let program = ProgramConfig {
            program: Program::Uniform,
            bytes_per_second: 1 << 20,
            touch_bytes: None,
            seed: 5,
        };
        ProcessConfig {
            bytes: 16 << 20,
            backing: Backing::Anonymous,
            huge: HugePages::No,
            threads: 2,
            program,
            fill: Fill::Text,
            tracker: TrackerKind::Pagemap,
        }
    }

    fn refused(change: impl Fn(&mut ConfigMessage)) -> String {
        let mut message = ConfigMessage::decode(config().encode().as_slice()).unwrap();
        change(&mut message);
        let error = ProcessConfig::decode(&message.encode_to_vec(), HugePages::No).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {cause}")
    }

    #[test]
    fn what_was_said_is_understood() {
        let said = ProcessConfig { huge: HugePages::Transparent, ..config() };
        assert_eq!(ProcessConfig::decode(&said.encode(), HugePages::Transparent).unwrap(), said);
    }

    #[test]
    fn lies_are_named() {
        for (text, says) in [
            (refused(|m| m.version = 2), "version 2"),
            (refused(|m| m.bytes = 0), "0 bytes cannot be a guest's RAM"),
            (refused(|m| m.bytes = 4097), "whole number of 4 KiB pages"),
            (refused(|m| m.bytes = !4095), "64 TiB"),
            (refused(|m| m.threads = 0), "not 0"),
            (refused(|m| m.threads = u32::MAX), "not 4294967295"),
            (refused(|m| m.backing = 3), "backing 3"),
            (refused(|m| m.fill = 0), "fill 0"),
            (refused(|m| m.program = 77), "program 77"),
            (refused(|m| m.touch_bytes = Some(1 << 40)), "1 TiB of a guest that has 16 MiB"),
            (refused(|m| m.touch_bytes = Some(0)), "too little"),
        ] {
            assert!(text.contains(says), "'{text}' does not say '{says}'");
        }
        let long = ProcessConfig::decode(&vec![0; 1 << 20], HugePages::No).unwrap_err();
        assert!(long.to_string().contains("1048576 bytes"), "{long}");
    }

    #[test]
    fn a_tracker_that_needs_a_vm_is_named() {
        for tracker in [TrackerKind::Log, TrackerKind::Ring, TrackerKind::Synthetic] {
            let error = ProcessConfig { tracker, ..config() }.check().unwrap_err().to_string();
            assert!(error.contains(tracker.name()) && error.contains("'pagemap'"), "{error}");
        }
    }

    #[test]
    fn a_state_that_cannot_be_is_named() {
        let state =
            |threads: Vec<ThreadState>| decode_state(&encode_state(threads), 2).unwrap_err().to_string();
        let good = ThreadState { writes: 3, ..ThreadState::default() };
        assert!(state(vec![good.clone()]).contains("1 threads, and the guest has 2"));
        let wrapping = ThreadState { writes: u64::MAX, ..good.clone() };
        assert!(state(vec![good.clone(), wrapping]).contains("18446744073709551615 in thread 1"));
        let both = vec![good.clone(), good];
        assert_eq!(decode_state(&encode_state(both.clone()), 2).unwrap(), both);
        assert!(decode_state(&vec![0; 5000], 2).unwrap_err().to_string().contains("5000 bytes"));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_means_something(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(config) = ProcessConfig::decode(&bytes, HugePages::No) {
                prop_assert!(config.check().is_ok());
            }
            if let Ok(threads) = decode_state(&bytes, 1) {
                prop_assert_eq!(threads.len(), 1);
            }
        }
    }
}
