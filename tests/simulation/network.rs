//! The data channels as the session promises them: batches in order within a channel and in any order across them, read when
//! they are delivered (the pages travel by reference), a cut channel's batches still on their way until it is fenced.

use std::collections::VecDeque;

use pageferry::pageset::PageSet;
use pageferry::units::RoundId;

use crate::random::Random;

const CHANNELS: usize = 3;

/// Pages that travel together. With `copied`, as they were when they left; else as they are when they arrive.
struct Batch {
    pages: Vec<u64>,
    copied: Option<Vec<u64>>,
}

struct Channel {
    alive: bool,
    flight: VecDeque<Batch>,
    /// Everything that was put on the channel in this round: it is confirmed only by the barrier.
    unconfirmed: Vec<Vec<u64>>,
}

/// What a delivery put where: page and version.
pub(crate) type Placed = Vec<(u64, u64)>;

pub(crate) enum RoundEnd {
    Placed(RoundId, u64),
    Failed,
}

pub(crate) struct Network {
    channels: Vec<Channel>,
    queue: VecDeque<Vec<u64>>,
    round: Option<(RoundId, u64)>,
}

impl Network {
    pub(crate) fn closed() -> Self {
        Self { channels: Vec::new(), queue: VecDeque::new(), round: None }
    }

    pub(crate) fn open() -> Self {
        let channel = |_| Channel { alive: true, flight: VecDeque::new(), unconfirmed: Vec::new() };
        Self { channels: (0..CHANNELS).map(channel).collect(), ..Self::closed() }
    }

    pub(crate) fn place(&mut self, round: RoundId, pages: &PageSet, random: &mut Random) {
        assert!(self.round.is_none(), "a page is never in flight twice");
        let numbers: Vec<u64> = pages.runs().flat_map(|run| run.start.0..run.end()).collect();
        self.round = Some((round, numbers.len() as u64));
        self.queue = numbers.chunks(1 + random.below(3) as usize).map(<[u64]>::to_vec).collect();
    }

    /// Some channel takes a batch or delivers one; `None` when none can do either.
    pub(crate) fn step(&mut self, source: Option<&[u64]>, random: &mut Random) -> Option<Placed> {
        let (count, first) = (self.channels.len(), random.next() as usize);
        (0..count).find_map(|offset| self.step_channel((first + offset) % count, source, random))
    }

    fn step_channel(&mut self, index: usize, source: Option<&[u64]>, random: &mut Random) -> Option<Placed> {
        let channel = &mut self.channels[index];
        let takes = channel.alive && (channel.flight.is_empty() || random.below(2) == 0);
        if takes && let (Some(source), Some(pages)) = (source, self.queue.pop_front()) {
            let copied = (random.below(2) == 0).then(|| pages.iter().map(|p| source[*p as usize]).collect());
            channel.unconfirmed.push(pages.clone());
            channel.flight.push_back(Batch { pages, copied });
            return Some(Vec::new());
        }
        let batch = channel.flight.pop_front()?;
        let versions = match (batch.copied, source) {
            (Some(copied), _) => copied,
            (None, Some(source)) => batch.pages.iter().map(|p| source[*p as usize]).collect(),
            // What was to be read from a process that is gone never leaves.
            (None, None) => return Some(Vec::new()),
        };
        Some(batch.pages.into_iter().zip(versions).collect())
    }

    /// The barrier of the round, if it can be answered now. It drops what is still on cut channels.
    pub(crate) fn barrier(&mut self) -> Option<RoundEnd> {
        let (round, pages) = self.round?;
        if self.channels.iter().all(|channel| !channel.alive) {
            self.round = None;
            self.queue.clear();
            return Some(RoundEnd::Failed);
        }
        let idle = |channel: &Channel| !channel.alive || channel.flight.is_empty();
        if !self.queue.is_empty() || !self.channels.iter().all(idle) {
            return None;
        }
        for channel in &mut self.channels {
            channel.unconfirmed.clear();
            channel.flight.clear();
        }
        self.round = None;
        Some(RoundEnd::Placed(round, pages))
    }

    /// Cuts a channel: the others send what it has not confirmed.
    pub(crate) fn cut(&mut self, index: usize) {
        let Some(channel) = self.channels.get_mut(index) else { return };
        channel.alive = false;
        if self.round.is_some() {
            self.queue.extend(channel.unconfirmed.drain(..));
        }
    }

    pub(crate) fn cut_all(&mut self) {
        (0..CHANNELS).for_each(|index| self.cut(index));
    }

    pub(crate) fn cut_one(&mut self, random: &mut Random) {
        self.cut(random.below(CHANNELS as u64) as usize);
    }
}
