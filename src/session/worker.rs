//! The thread that pushes on one channel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::mode::TransferMode;
use super::source::SourceShared;
use super::source::timing::TimeSplit;
use super::striping::Work;
use crate::channel::{ChannelError, ChannelLink, ChannelSource, Pushed};
use crate::codec::Compressor;
use crate::codec::level::{
    Choice, Findings, LevelController, PROBE_LEVEL, Queued, SAMPLE_PAGES, Sample, Sent, Taken,
};
use crate::codec::repeated::{self, Repeated};
use crate::memory::GuestMemory;
use crate::units::{PageIndex, RoundId, Run};
use crate::wire::data::ChannelId;

/// How many pages' first lines are fetched at once before they are looked at: a processor keeps 10 to 16 misses in flight.
const PREFETCH_PAGES: u64 = 16;
/// How long before a cap on the rate lets it go a batch is begun at most, so that it is compressed meanwhile.
const MAX_LEAD: Duration = Duration::from_millis(50);

/// What a batch came to; nothing for a barrier.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Batched {
    /// The number of its last frame.
    pub(super) sequence: u64,
    /// Pages in it.
    pub(super) pages: u64,
    /// Pages that went as zero.
    pub(super) zero_pages: u64,
    /// Bytes that went out.
    pub(super) wire_bytes: u64,
    /// What the time went into.
    pub(super) split: TimeSplit,
}

impl Batched {
    fn add(&mut self, pushed: Pushed) {
        self.sequence = pushed.sequence;
        self.wire_bytes += pushed.wire_bytes;
    }
}

pub(super) struct Worker {
    shared: Arc<SourceShared>,
    id: ChannelId,
    source: Box<dyn ChannelSource>,
    link: Arc<dyn ChannelLink>,
    memory: GuestMemory,
    packer: Option<Packer>,
    /// Failure injection: cut the channel after so many bytes.
    cut_after: Option<u64>,
    sorted: Sorted,
}

/// The pages of a batch, by how they go.
#[derive(Default)]
struct Sorted {
    zeros: Vec<Run>,
    /// Those that repeat another byte, where they go compressed, and what they repeat.
    repeated: Vec<Run>,
    bytes: Vec<Repeated>,
    others: Vec<Run>,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<SourceShared>,
        id: ChannelId,
        source: Box<dyn ChannelSource>,
        link: Arc<dyn ChannelLink>,
        findings: Findings,
    ) -> Self {
        let options = &shared.options;
        let packer = (options.mode == TransferMode::Compression)
            .then(|| Packer::new(findings, shared.begin))
            .and_then(|made| {
                made.inspect_err(
                    |error| tracing::warn!(%error, "no compression on a channel; it sends pages raw"),
                )
                .ok()
            });
        let cut_after = options.cut.filter(|(channel, _)| *channel == id.0 as usize).map(|(_, bytes)| bytes);
        let memory = options.memory.clone();
        Self { shared, id, source, link, memory, packer, cut_after, sorted: Sorted::default() }
    }

    pub(super) fn run(mut self) {
        let lead = |packer: &Option<Packer>| packer.as_ref().map_or(Duration::ZERO, |packer| packer.lead);
        while let Some(next) = self.shared.next_work(self.id, lead(&self.packer)) {
            if let Some(packer) = &mut self.packer {
                packer.held = next.held;
                packer.sharing = next.sharing;
                if next.idle {
                    packer.mark = None;
                }
            }
            let pushed = match next.work {
                Work::Batch { round, runs } => self.push_batch(round, &runs),
                // Its bytes are counted already.
                Work::Barrier { round, barrier, fenced } => {
                    self.source.push_barrier(barrier, round, &fenced).map(|_| Batched::default())
                }
                Work::Wait => continue,
            };
            match pushed {
                Ok(batch) => {
                    let bytes = self.shared.sent(self.id, &batch);
                    if self.cut_after.is_some_and(|limit| bytes >= limit) {
                        self.link.shut();
                    }
                }
                Err(cause) => return self.shared.push_failed(self.id, cause),
            }
        }
    }

    fn push_batch(&mut self, round: RoundId, runs: &[Run]) -> Result<Batched, ChannelError> {
        let began = Instant::now();
        self.sorted.sort(&self.memory, runs, self.packer.is_some());
        let separated = Instant::now();
        let mut compress = Duration::ZERO;
        let count = |runs: &[Run]| runs.iter().map(|run| run.pages).sum::<u64>();
        let mut batch =
            Batched { pages: count(runs), zero_pages: count(&self.sorted.zeros), ..Batched::default() };
        let Sorted { zeros, repeated, bytes, others } = &self.sorted;
        if !zeros.is_empty() {
            batch.add(self.source.push_zeros(round, zeros)?);
        }
        if !repeated.is_empty() {
            let mut packed = Vec::new();
            repeated::encode(bytes, &mut packed);
            batch.add(self.source.push_packed(round, repeated, &packed)?);
        }
        if !others.is_empty() {
            batch.add(match &mut self.packer {
                Some(packer) => {
                    let pushed = packer.push(&mut *self.source, &self.memory, round, others)?;
                    compress = packer.took;
                    pushed
                }
                None => self.source.push_pages(round, others)?,
            });
        }
        let send = separated.elapsed().saturating_sub(compress);
        batch.split = TimeSplit { scan: separated - began, compress, send, wait: Duration::ZERO };
        Ok(batch)
    }
}

impl Sorted {
    /// Sorts the pages of a batch. With `compressing`, those that repeat a byte go by themselves.
    fn sort(&mut self, memory: &GuestMemory, runs: &[Run], compressing: bool) {
        self.zeros.clear();
        self.repeated.clear();
        self.bytes.clear();
        self.others.clear();
        for run in runs {
            for page in run.start.0..run.end() {
                if (page - run.start.0).is_multiple_of(PREFETCH_PAGES) {
                    memory.prefetch(Run::new(page, PREFETCH_PAGES.min(run.end() - page)));
                }
                let list = match repeated_byte(memory, PageIndex(page), compressing) {
                    Some(0) => &mut self.zeros,
                    Some(byte) => {
                        match self.bytes.last_mut().filter(|last| last.byte == byte) {
                            Some(last) => last.pages += 1,
                            None => self.bytes.push(Repeated { byte, pages: 1 }),
                        }
                        &mut self.repeated
                    }
                    None => &mut self.others,
                };
                // Joined within a run only: the runs of a batch do not cross borders between regions.
                match list.last_mut().filter(|last| last.end() == page && page != run.start.0) {
                    Some(last) => last.pages += 1,
                    None => list.push(Run::new(page, 1)),
                }
            }
        }
    }
}

/// What a page repeats; only whether that is zero unless it is to be `any` byte.
fn repeated_byte(memory: &GuestMemory, page: PageIndex, any: bool) -> Option<u8> {
    if any { memory.repeated_byte(page) } else { memory.is_zero_page(page).then_some(0) }
}

/// Compresses batches where that is faster, and tells its controller what everything cost.
struct Packer {
    compressor: Compressor,
    controller: LevelController,
    /// When the session began.
    epoch: Instant,
    /// A private copy of pages: the guest goes on writing the originals.
    copy: Vec<u8>,
    /// When the last batch was handed over, and how much was in the socket's buffer then. `None` after the channel had
    /// nothing to do.
    mark: Option<(Instant, Option<u64>)>,
    /// How long a cap on the rate held the channel back since.
    held: Duration,
    /// How many channels use its interface.
    sharing: usize,
    /// How long the last batch kept the compressor, samples included.
    took: Duration,
    /// How long before a cap lets it go the next batch can be begun.
    lead: Duration,
    /// The levels that were used before.
    used: Vec<i32>,
}

impl Packer {
    fn new(findings: Findings, epoch: Instant) -> Result<Self, crate::codec::CodecError> {
        Ok(Self {
            compressor: Compressor::new()?,
            controller: LevelController::new(findings),
            epoch,
            copy: Vec::new(),
            mark: None,
            held: Duration::ZERO,
            sharing: 1,
            took: Duration::ZERO,
            lead: Duration::ZERO,
            used: Vec::new(),
        })
    }

    fn push(
        &mut self,
        source: &mut dyn ChannelSource,
        memory: &GuestMemory,
        round: RoundId,
        runs: &[Run],
    ) -> Result<Pushed, ChannelError> {
        let page_bytes: u64 = runs.iter().map(|run| run.bytes()).sum();
        let (now, bytes) = (Instant::now(), source.backlog());
        let (begin, before) = self.mark.unwrap_or((now, bytes));
        let queued = Queued { bytes, held_seconds: self.held.as_secs_f64(), sharing: self.sharing };
        let plan = self.controller.plan(page_bytes, queued);
        let sampling = self.try_levels(memory, runs, plan.sample);
        let started = thread_time();
        let (compress_seconds, packed) = match plan.choice {
            Choice::Raw => (0.0, None),
            Choice::Level(level) => self.compress(memory, runs, level, plan.probe),
        };
        let compress_cpu_seconds = thread_time().saturating_sub(started).as_secs_f64();
        let (handed, waiting) = (Instant::now(), source.backlog());
        let pushed = match packed {
            Some(packed) => source.push_packed(round, runs, packed)?,
            None => source.push_pages(round, runs)?,
        };
        let (end, after) = (Instant::now(), source.backlog());
        self.mark = Some((end, after));
        self.took = Duration::from_secs_f64(sampling + compress_seconds);
        if plan.choice != Choice::Raw {
            self.lead = Duration::from_secs_f64(compress_seconds).min(MAX_LEAD);
        }
        let left = |before: Option<u64>| {
            before.zip(after).map(|(before, after)| (before + pushed.wire_bytes).saturating_sub(after))
        };
        // A wire that ran dry waited for this batch.
        let ran_dry = waiting.is_none_or(|waiting| waiting == 0) && self.held.is_zero();
        let since = if ran_dry { handed } else { begin };
        let taken = left(if ran_dry { waiting } else { before }).unwrap_or(pushed.wire_bytes);
        tracing::trace!(
            choice = ?plan.choice, sample = ?plan.sample, page_bytes, wire_bytes = pushed.wire_bytes, waited = bytes,
            compress_us = compress_seconds * 1e6, us = (end - begin).as_micros(), taken,
            taken_us = (end - since).as_micros(), "a batch"
        );
        self.controller.sent(Sent {
            choice: plan.choice,
            page_bytes,
            wire_bytes: pushed.wire_bytes,
            compress_seconds,
            compress_cpu_seconds,
            seconds: (end - begin).as_secs_f64() - sampling,
            drained_bytes: left(before),
            taken: Taken { bytes: taken, from: self.at(since), until: self.at(end) },
        });
        Ok(pushed)
    }

    /// Seconds since the session began.
    fn at(&self, time: Instant) -> f64 {
        (time - self.epoch).as_secs_f64()
    }

    /// Compresses a batch, unless a probe shows first that it does not shrink; answers also how many seconds that took.
    fn compress(
        &mut self,
        memory: &GuestMemory,
        runs: &[Run],
        level: i32,
        probe: bool,
    ) -> (f64, Option<&[u8]>) {
        let began = Instant::now();
        if probe && !self.sample(memory, runs, PROBE_LEVEL).shrank() {
            return (began.elapsed().as_secs_f64(), None);
        }
        self.copy.clear();
        runs.iter().for_each(|run| memory.read_run(*run, &mut self.copy));
        let packed = self.compressor.compress(&self.copy, level);
        (began.elapsed().as_secs_f64(), packed)
    }

    /// Tells the controller what levels make of some pages; answers how many seconds that took. What the first does not shrink no
    /// other does.
    fn try_levels(&mut self, memory: &GuestMemory, runs: &[Run], levels: &[i32]) -> f64 {
        let mut seconds = 0.0;
        for &level in levels {
            let began = Instant::now();
            if !self.used.contains(&level) {
                // The first use of a level makes its tables, in fresh memory: that says nothing of the next.
                self.used.push(level);
                self.sample(memory, runs, level);
            }
            let sample = self.sample(memory, runs, level);
            let spent_seconds = began.elapsed().as_secs_f64();
            self.controller.sampled(Sample { spent_seconds, ..sample });
            seconds += spent_seconds;
            if !sample.shrank() {
                break;
            }
        }
        seconds
    }

    /// Compresses some pages of a batch to see how well that goes.
    fn sample(&mut self, memory: &GuestMemory, runs: &[Run], level: i32) -> Sample {
        // Of this thread alone: while it does not run, that is no matter of the level.
        let started = thread_time();
        self.copy.clear();
        sample_runs(runs).for_each(|run| memory.read_run(run, &mut self.copy));
        let page_bytes = self.copy.len() as u64;
        let packed = self.compressor.compress(&self.copy, level).map(|packed| packed.len() as u64);
        let seconds = thread_time().saturating_sub(started).as_secs_f64();
        let packed_bytes = packed.unwrap_or(page_bytes);
        Sample { level, page_bytes, packed_bytes, seconds, spent_seconds: seconds }
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// [`SAMPLE_PAGES`] pages in some groups from all over a batch; all of a small one.
fn sample_runs(runs: &[Run]) -> impl Iterator<Item = Run> {
    const GROUPS: u64 = 4;
    const GROUP_PAGES: u64 = SAMPLE_PAGES / GROUPS;
    let total: u64 = runs.iter().map(|run| run.pages).sum();
    let every = if total <= SAMPLE_PAGES { GROUP_PAGES } else { total / GROUPS };
    let mut before = 0;
    runs.iter().flat_map(move |run| {
        // The groups that begin in this run. One that it ends in is cut short.
        let (first, end) = (before, before + run.pages);
        before = end;
        let begins =
            (first.div_ceil(every)..).map(move |group| group * every).take_while(move |at| *at < end);
        begins.map(move |at| Run::new(run.start.0 + at - first, GROUP_PAGES.min(end - at)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_from_all_over_a_batch() {
        let of = |runs: &[Run]| sample_runs(runs).collect::<Vec<_>>();
        assert_eq!(of(&[Run::new(100, 3)]), [Run::new(100, 3)]);
        assert_eq!(of(&[Run::new(0, 16)]), [Run::new(0, 4), Run::new(4, 4), Run::new(8, 4), Run::new(12, 4)]);
        let large = [Run::new(0, 256)];
        assert_eq!(of(&large), [Run::new(0, 4), Run::new(64, 4), Run::new(128, 4), Run::new(192, 4)]);
        let apart = [Run::new(10, 2), Run::new(20, 100), Run::new(500, 2)];
        // Groups begin at the pages 0, 26, 52 and 78 of the 104.
        assert_eq!(of(&apart), [Run::new(10, 2), Run::new(44, 4), Run::new(70, 4), Run::new(96, 4)]);
        let single: Vec<Run> = (0..300).map(|page| Run::new(page * 2, 1)).collect();
        let pages: u64 = sample_runs(&single).map(|run| run.pages).sum();
        assert_eq!(pages, 4);
    }
}
