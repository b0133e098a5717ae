use super::*;
use crate::layout::RamRegion;
use crate::units::GuestAddress;
use proptest::prelude::*;

const REGION: u64 = 700;

fn layout() -> RamLayout {
    let region = |start| RamRegion { start: GuestAddress(start), bytes: REGION * PAGE_SIZE };
    RamLayout::new(vec![region(0), region(1 << 32)]).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    /// A channel takes work and sends it.
    Take(usize),
    /// The next frame of a channel, live or lost, reaches the destination.
    Deliver(usize),
    /// The destination confirms what it has of a channel.
    Receipt(usize),
    Lose(usize),
    Add,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..8usize).prop_map(Step::Take),
        6 => (0..8usize).prop_map(Step::Deliver),
        3 => (0..8usize).prop_map(Step::Receipt),
        1 => (0..8usize).prop_map(Step::Lose),
        1 => Just(Step::Add),
    ]
}

#[derive(Debug)]
enum Frame {
    Pages(u64, Arc<[Run]>),
    Barrier(u64, BarrierId, Vec<ChannelId>),
}

/// A connection: what is under way on it, and what the destination has of it.
#[derive(Debug, Default)]
struct Wire {
    under_way: VecDeque<Frame>,
    sequence: u64,
    delivered: u64,
    reached: Vec<BarrierId>,
    unconfirmed: Vec<(u64, Arc<[Run]>)>,
    lost: bool,
    closed: bool,
}

/// A source, wires and a destination, with sets of page numbers as the oracle.
struct World {
    striping: Striping,
    wires: Vec<Wire>,
    round: BTreeSet<u64>,
    placed: BTreeSet<u64>,
    confirmed: BTreeSet<u64>,
    done: bool,
}

fn numbers(runs: &[Run]) -> impl Iterator<Item = u64> + '_ {
    runs.iter().flat_map(|run| run.start.0..run.end())
}

impl World {
    fn new(pages: &PageSet, channels: usize) -> Self {
        let mut world = Self {
            striping: Striping::new(layout()),
            wires: Vec::new(),
            round: pages.runs().flat_map(|run| run.start.0..run.end()).collect(),
            placed: BTreeSet::new(),
            confirmed: BTreeSet::new(),
            done: false,
        };
        for _ in 0..channels {
            world.add();
        }
        world.striping.begin(RoundId(0), pages.clone());
        world
    }

    fn add(&mut self) {
        self.striping.add_channel(ChannelId(self.wires.len() as u32));
        self.wires.push(Wire::default());
    }

    fn take(&mut self, index: usize) -> bool {
        let wire = &mut self.wires[index];
        let channel = ChannelId(index as u32);
        match self.striping.take(channel) {
            Work::Batch { runs, .. } => {
                assert!(!wire.lost && runs.iter().all(|run| (run.start.0 < REGION) == (run.end() <= REGION)));
                assert!(runs.iter().map(|run| run.pages).sum::<u64>() <= BATCH_PAGES);
                wire.sequence += 1;
                wire.under_way.push_back(Frame::Pages(wire.sequence, runs.clone()));
                wire.unconfirmed.push((wire.sequence, runs));
                self.striping.posted(channel, wire.sequence);
            }
            Work::Barrier { barrier, fenced, .. } => {
                wire.sequence += 1;
                wire.under_way.push_back(Frame::Barrier(wire.sequence, barrier, fenced));
            }
            Work::Wait => return false,
        }
        true
    }

    fn deliver(&mut self, index: usize) -> bool {
        let wire = &mut self.wires[index];
        let Some(frame) = wire.under_way.pop_front().filter(|_| !wire.closed) else { return false };
        match frame {
            Frame::Pages(sequence, runs) => {
                assert!(!self.done, "pages of channel {index} arrive after the round is over");
                wire.delivered = sequence;
                self.placed.extend(numbers(&runs));
            }
            Frame::Barrier(sequence, barrier, fenced) => {
                wire.delivered = sequence;
                wire.reached.push(barrier);
                for channel in fenced {
                    self.wires[channel.0 as usize].closed = true;
                }
            }
        }
        true
    }

    fn receipt(&mut self, index: usize) -> bool {
        let wire = &mut self.wires[index];
        if wire.lost {
            return false;
        }
        let (channel, delivered) = (ChannelId(index as u32), wire.delivered);
        let (now, later) = wire.unconfirmed.drain(..).partition(|(sequence, _)| *sequence <= delivered);
        wire.unconfirmed = later;
        let now: Vec<(u64, Arc<[Run]>)> = now;
        let progress = !now.is_empty() || !wire.reached.is_empty();
        self.confirmed.extend(now.iter().flat_map(|(_, runs)| numbers(runs)));
        self.striping.confirm(channel, delivered);
        for barrier in std::mem::take(&mut wire.reached) {
            if self.striping.barrier_reached(channel, barrier).is_some() {
                self.done = true;
            }
        }
        progress
    }

    fn lose(&mut self, index: usize) -> Option<PageSet> {
        self.wires[index].lost = true;
        (self.striping.channel_lost(ChannelId(index as u32)) == 0).then(|| self.striping.abort())
    }

    fn owed(&self) -> BTreeSet<u64> {
        self.round.difference(&self.confirmed).copied().collect()
    }

    fn check_done(&mut self) {
        assert!(self.placed.is_superset(&self.round), "every page of the round was placed");
        for index in 0..self.wires.len() {
            assert!(self.wires[index].lost || self.wires[index].under_way.is_empty());
            while self.deliver(index) {}
        }
    }

    /// Lets everything that can happen happen, until the round is over.
    fn run_out(&mut self) {
        for _ in 0..10_000 {
            let mut progress = false;
            for index in 0..self.wires.len() {
                progress |= self.take(index);
                progress |= !self.done && self.deliver(index);
                progress |= self.receipt(index);
                if self.done {
                    return;
                }
            }
            assert!(progress, "stuck: {:?}", self.striping);
        }
        panic!("the round does not end");
    }
}

fn page_set() -> impl Strategy<Value = PageSet> {
    prop::collection::vec((0..2 * REGION, 1..300u64), 0..8).prop_map(|runs| {
        let mut set = PageSet::empty(2 * REGION);
        set.extend(runs.into_iter().map(|(start, pages)| Run::new(start, pages)));
        set
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn every_page_is_placed_and_nothing_is_under_way_when_a_round_ends(
        pages in page_set(), channels in 1..4usize, steps in prop::collection::vec(step(), 0..120),
    ) {
        let mut world = World::new(&pages, channels);
        for step in steps {
            if world.done {
                break;
            }
            let count = world.wires.len();
            match step {
                Step::Take(index) => { world.take(index % count); }
                Step::Deliver(index) => { world.deliver(index % count); }
                Step::Receipt(index) => { world.receipt(index % count); }
                Step::Add => if count < 8 { world.add() },
                Step::Lose(index) => {
                    let expected = world.owed();
                    if let Some(owed) = world.lose(index % count) {
                        let owed: BTreeSet<u64> = owed.runs().flat_map(|run| run.start.0..run.end()).collect();
                        prop_assert_eq!(owed, expected);
                        return Ok(());
                    }
                }
            }
            if !world.done {
                prop_assert_eq!(world.striping.remaining_pages(), world.owed().len() as u64);
            }
        }
        if !world.done {
            world.run_out();
        }
        world.check_done();
    }

    #[test]
    fn what_is_aborted_is_owed(pages in page_set(), steps in prop::collection::vec(step(), 0..60)) {
        let mut world = World::new(&pages, 2);
        for step in steps {
            match step {
                Step::Take(index) => { world.take(index % 2); }
                Step::Deliver(index) => { world.deliver(index % 2); }
                Step::Receipt(index) => { world.receipt(index % 2); }
                Step::Lose(_) | Step::Add => {}
            }
            if world.done {
                return Ok(());
            }
        }
        let owed: BTreeSet<u64> = world.striping.abort().runs().flat_map(|run| run.start.0..run.end()).collect();
        prop_assert_eq!(owed, world.owed());
        prop_assert_eq!(world.striping.take(ChannelId(0)), Work::Wait);
    }
}

#[test]
fn batches_shrink_at_the_end_and_stay_within_the_window() {
    let layout = RamLayout::flat(1 << 30).unwrap();
    let total = layout.total_pages();
    let mut striping = Striping::new(layout);
    for channel in 0..2 {
        striping.add_channel(ChannelId(channel));
    }
    striping.begin(RoundId(0), PageSet::full(total));
    let (mut sequence, mut sizes) = (0, Vec::new());
    while let Work::Batch { runs, .. } = striping.take(ChannelId(0)) {
        sizes.push(runs.iter().map(|run| run.pages).sum::<u64>());
        sequence += 1;
        striping.posted(ChannelId(0), sequence);
        if sizes.iter().sum::<u64>() >= WINDOW_PAGES {
            striping.confirm(ChannelId(0), sequence);
        }
    }
    assert_eq!((sizes[0], *sizes.last().unwrap()), (BATCH_PAGES, LAST_BATCH_PAGES));
    assert_eq!(sizes.iter().sum::<u64>(), total);

    let mut blocked = Striping::new(RamLayout::flat(1 << 30).unwrap());
    blocked.add_channel(ChannelId(0));
    blocked.begin(RoundId(0), PageSet::full(total));
    let taken =
        std::iter::from_fn(|| (blocked.take(ChannelId(0)) != Work::Wait).then_some(())).count() as u64;
    assert_eq!(taken, WINDOW_PAGES / BATCH_PAGES);
}

#[test]
fn a_channel_lost_between_two_rounds_is_fenced_by_the_next() {
    let mut striping = Striping::new(RamLayout::flat(1 << 20).unwrap());
    striping.add_channel(ChannelId(0));
    striping.add_channel(ChannelId(1));
    assert_eq!(striping.channel_lost(ChannelId(1)), 1);
    striping.begin(RoundId(4), PageSet::empty(256));
    let Work::Barrier { barrier, fenced, .. } = striping.take(ChannelId(0)) else { panic!("a barrier") };
    assert_eq!(fenced, [ChannelId(1)]);
    assert_eq!(striping.barrier_reached(ChannelId(0), BarrierId(barrier.0 + 1)), None);
    assert_eq!(striping.barrier_reached(ChannelId(0), barrier), Some(RoundId(4)));
    striping.begin(RoundId(5), PageSet::empty(256));
    assert!(matches!(striping.take(ChannelId(0)), Work::Barrier { fenced, .. } if fenced.is_empty()));
}
