//! The data channels: the session's own queue decides who sends what, over simulated wires that keep the order within a
//! channel and none across them. Pages travel by reference or by copy. What is on a cut channel's wire may still arrive until
//! a barrier fences it.

use std::collections::VecDeque;

use pageferry::layout::RamLayout;
use pageferry::pageset::PageSet;
use pageferry::session::striping::{Striping, Work};
use pageferry::units::{PAGE_SIZE, RoundId};
use pageferry::wire::data::{BarrierId, ChannelId};

use crate::guest::PAGES;
use crate::random::Random;

const CHANNELS: u32 = 3;

enum Frame {
    /// With `copied`, the pages as they were when they left; else as they are when they arrive.
    Batch {
        number: u64,
        pages: Vec<u64>,
        copied: Option<Vec<u64>>,
    },
    Barrier(BarrierId, Vec<ChannelId>),
}

enum Receipt {
    Placed(u64),
    Barrier(BarrierId),
}

struct Channel {
    id: ChannelId,
    alive: bool,
    frames: u64,
    wire: VecDeque<Frame>,
    back: VecDeque<Receipt>,
}

/// What a delivery put where: page and version.
pub(crate) type Placed = Vec<(u64, u64)>;

pub(crate) enum RoundEnd {
    Placed(RoundId, u64),
    Failed(PageSet),
}

pub(crate) struct Network {
    striping: Striping,
    channels: Vec<Channel>,
    pages_of_round: u64,
    ended: Option<RoundEnd>,
}

impl Network {
    pub(crate) fn closed() -> Self {
        let layout = RamLayout::flat(PAGES * PAGE_SIZE).expect("a small layout");
        Self { striping: Striping::new(layout), channels: Vec::new(), pages_of_round: 0, ended: None }
    }

    pub(crate) fn open() -> Self {
        let mut network = Self::closed();
        for number in 0..CHANNELS {
            let id = ChannelId(number);
            network.striping.add_channel(id);
            let (wire, back) = Default::default();
            network.channels.push(Channel { id, alive: true, frames: 0, wire, back });
        }
        network
    }

    pub(crate) fn place(&mut self, round: RoundId, pages: PageSet) {
        self.pages_of_round = pages.len();
        self.striping.begin(round, pages);
        self.fail_without_channels();
    }

    /// Some channel sends, delivers or hears something; `None` when none can.
    pub(crate) fn step(&mut self, source: Option<&[u64]>, random: &mut Random) -> Option<Placed> {
        let (count, first) = (self.channels.len(), random.next() as usize);
        (0..count).find_map(|offset| {
            let index = (first + offset) % count;
            let order = random.below(3);
            (0..3).find_map(|step| match (order + step) % 3 {
                0 => self.send(index, source?, random),
                1 => self.deliver(index, source),
                _ => self.hear(index),
            })
        })
    }

    fn send(&mut self, index: usize, source: &[u64], random: &mut Random) -> Option<Placed> {
        let channel = &mut self.channels[index];
        if !channel.alive {
            return None;
        }
        match self.striping.take(channel.id) {
            Work::Batch { runs, .. } => {
                let pages: Vec<u64> = runs.iter().flat_map(|run| run.start.0..run.end()).collect();
                let copied =
                    (random.below(2) == 0).then(|| pages.iter().map(|p| source[*p as usize]).collect());
                channel.frames += 1;
                self.striping.posted(channel.id, channel.frames);
                channel.wire.push_back(Frame::Batch { number: channel.frames, pages, copied });
            }
            Work::Barrier { barrier, fenced, .. } => channel.wire.push_back(Frame::Barrier(barrier, fenced)),
            Work::Wait => return None,
        }
        Some(Placed::new())
    }

    fn deliver(&mut self, index: usize, source: Option<&[u64]>) -> Option<Placed> {
        match self.channels[index].wire.pop_front()? {
            Frame::Batch { number, pages, copied } => {
                self.channels[index].back.push_back(Receipt::Placed(number));
                let versions = match (copied, source) {
                    (Some(copied), _) => copied,
                    (None, Some(source)) => pages.iter().map(|p| source[*p as usize]).collect(),
                    // What was to be read from a process that is gone never leaves.
                    (None, None) => return Some(Placed::new()),
                };
                Some(pages.into_iter().zip(versions).collect())
            }
            Frame::Barrier(barrier, fenced) => {
                for channel in self.channels.iter_mut().filter(|channel| fenced.contains(&channel.id)) {
                    channel.wire.clear();
                }
                self.channels[index].back.push_back(Receipt::Barrier(barrier));
                Some(Placed::new())
            }
        }
    }

    fn hear(&mut self, index: usize) -> Option<Placed> {
        let channel = &mut self.channels[index];
        match channel.back.pop_front()? {
            Receipt::Placed(number) => self.striping.confirm(channel.id, number),
            Receipt::Barrier(barrier) => {
                if let Some(round) = self.striping.barrier_reached(channel.id, barrier) {
                    let under_way = self.channels.iter().flat_map(|channel| &channel.wire);
                    let pages = under_way.filter(|frame| matches!(frame, Frame::Batch { .. })).count();
                    assert_eq!(pages, 0, "a page is under way after its round");
                    self.ended = Some(RoundEnd::Placed(round, self.pages_of_round));
                }
            }
        }
        Some(Placed::new())
    }

    /// How the round ended, once.
    pub(crate) fn ended(&mut self) -> Option<RoundEnd> {
        self.ended.take()
    }

    fn fail_without_channels(&mut self) {
        if self.striping.live_channels() == 0 && self.striping.round().is_some() {
            self.ended = Some(RoundEnd::Failed(self.striping.abort()));
        }
    }

    fn cut(&mut self, index: usize) {
        let Some(channel) = self.channels.get_mut(index).filter(|channel| channel.alive) else { return };
        channel.alive = false;
        channel.back.clear();
        self.striping.channel_lost(channel.id);
        self.fail_without_channels();
    }

    pub(crate) fn cut_all(&mut self) {
        (0..self.channels.len()).for_each(|index| self.cut(index));
    }

    pub(crate) fn cut_one(&mut self, random: &mut Random) {
        self.cut(random.below(u64::from(CHANNELS)) as usize);
    }
}
