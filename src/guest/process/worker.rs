//! The threads that stand for vCPUs: each runs the program over its own share of the pages, in turns of at most
//! [`BATCH_PAGES`], and does nothing to guest RAM between two turns while it is parked.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guest::process::config::{ProcessConfig, ThreadState};
use crate::guest::process::pace::{Pace, TICK, Turn};
use crate::guest::process::pattern::Pattern;
use crate::guest::process::plan::Plan;
use crate::guest::process::shared::Shared;
use crate::guest::process::stamp::{Damage, PageBytes, Stamper, mix};
use crate::guest::program::{Program, SelfReport};
use crate::memory::{GuestMemory, Mapping};
use crate::units::PAGE_SIZE;

/// What a thread writes or verifies before it looks at the clock and at its orders again: about 0.1 ms.
const BATCH_PAGES: u64 = 64;
/// A thread whose memory is lost would fill the console with nothing else.
const NOTICES: u32 = 16;

/// A walk over every page that the thread ever wrote.
#[derive(Debug)]
struct Walk {
    request: u64,
    /// The next page to look at, as a number among the written pages.
    next: u64,
    /// The sum of the sequences of all pages before `next`.
    sum: u64,
}

/// One thread.
pub(super) struct Worker {
    thread: usize,
    memory: GuestMemory,
    shared: Arc<Shared>,
    plan: Plan,
    share: Range<u64>,
    program: Program,
    stamper: Stamper,
    pattern: Pattern,
    pace: Pace,
    state: ThreadState,
    gap_reset: u64,
    walk: Option<Walk>,
    fulfilled: u64,
    notices: u32,
    next_tick: Duration,
    next_line: Duration,
    page: Box<PageBytes>,
}

impl Worker {
    pub(super) fn new(
        thread: u32,
        config: &ProcessConfig,
        plan: Plan,
        memory: GuestMemory,
        shared: Arc<Shared>,
    ) -> Self {
        let share = plan.share(u64::from(thread));
        let program = config.program;
        let pattern =
            Pattern::new(program.program, share.end - share.start, mix(program.seed, u64::from(thread)));
        Self {
            thread: thread as usize,
            memory,
            shared,
            plan,
            share,
            program: program.program,
            stamper: Stamper::new(program.seed, config.fill),
            pattern,
            pace: Pace::new(program.bytes_per_second, thread, config.threads),
            state: ThreadState::default(),
            gap_reset: 0,
            walk: None,
            fulfilled: 0,
            notices: NOTICES,
            next_tick: Duration::ZERO,
            next_line: Duration::ZERO,
            page: Box::new([0; PAGE_SIZE as usize]),
        }
    }

    /// Follows orders until the last.
    pub(super) fn run(mut self) {
        while self.shared.park() {
            self.wake();
            while !self.shared.is_to_leave() {
                if let Some(until) = self.turn() {
                    self.shared.rest(until);
                }
            }
        }
    }

    fn ram(&self) -> &Mapping {
        &self.memory.mappings()[0]
    }

    /// Takes up the state that was loaded, if one was, and looks whether it and the memory are of the same moment.
    fn wake(&mut self) {
        let published = self.shared.published(self.thread).clone();
        (self.state, self.gap_reset) = (published.state, published.gap_reset);
        // A walk that was begun over other memory says nothing of this one.
        self.walk = None;
        let now = self.shared.now();
        self.pace.restart(now);
        self.next_tick = now;
        let status = Plan::status(self.thread as u64);
        let mine = [self.state.writes, self.state.heartbeats, self.state.sum];
        let ram = [0, 8, 16].map(|at| self.ram().load(status + at));
        if mine != ram {
            self.state.corrupt += 1;
            self.notice(&format!(
                "its state is of write {} and heartbeat {}, its memory of write {} and heartbeat {}",
                mine[0], mine[1], ram[0], ram[1]
            ));
        }
    }

    /// One turn: the clock, the heartbeat, some pages. Answers until when nothing is to be done.
    fn turn(&mut self) -> Option<Duration> {
        let now = self.shared.now();
        self.look_at_clock();
        let turn = self.pace.turn(now, self.shared.throttle.load(SeqCst));
        let rest = match turn {
            Turn::Throttled { until } => Some(until),
            Turn::Run { pages } => {
                self.tick(now);
                let verifying = self.verify();
                let writing = self.write_some(pages);
                (!verifying && !writing).then_some(self.next_tick)
            }
        };
        self.publish();
        rest
    }

    fn look_at_clock(&mut self) {
        // CLOCK_REALTIME, so that looks on both hosts compare.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        let resets = self.shared.gap_resets.load(SeqCst);
        if resets != self.gap_reset {
            self.gap_reset = resets;
            self.state.longest_gap = 0;
        }
        if self.state.last_look != 0 {
            let gap = now.saturating_sub(self.state.last_look);
            self.state.longest_gap = self.state.longest_gap.max(gap);
        }
        self.state.last_look = now;
    }

    fn tick(&mut self, now: Duration) {
        if now < self.next_tick {
            return;
        }
        // Ticks that the thread was too late for are lost, as a timer's are.
        let due = self.next_tick + TICK;
        self.next_tick = if due > now { due } else { now + TICK };
        self.state.heartbeats += 1;
        if self.thread == 0 && now >= self.next_line {
            self.next_line = now + Duration::from_secs(1);
            let SelfReport { heartbeats, writes, verified, corrupt, .. } = self.shared.report();
            self.shared.print(&format!(
                "heartbeat {heartbeats}: {writes} pages written, {verified} found right, {corrupt} wrong"
            ));
        }
    }

    fn pages(&self) -> u64 {
        self.share.end - self.share.start
    }

    /// Writes up to `pages`, or as many as it can as long as there are pages that it never wrote. Answers whether there
    /// is more to write at once.
    fn write_some(&mut self, pages: u64) -> bool {
        if self.program == Program::Idle {
            return false;
        }
        let fresh = self.pages().saturating_sub(self.state.writes);
        if fresh > 0 {
            for _ in 0..fresh.min(BATCH_PAGES) {
                self.write(self.share.start + self.state.writes);
            }
            self.pace.restart(self.shared.now());
            return true;
        }
        let now = pages.min(BATCH_PAGES);
        for _ in 0..now {
            if let Some(page) = self.pattern.page(self.state.writes - self.pages()) {
                self.write(self.share.start + page);
            }
        }
        self.pace.spend(now);
        pages > now
    }

    /// Looks whether the page is as it was left, and writes it anew.
    fn write(&mut self, data: u64) {
        let last = self.ram().load(Plan::entry(data));
        let warming_up = self.state.writes < self.pages();
        if warming_up {
            if last != 0 {
                self.damaged(data, Damage::Table { named: last, writes: self.state.writes });
            }
        } else {
            self.examine(data, last);
        }
        let sequence = self.state.writes + 1;
        let page = self.plan.page(data);
        self.stamper.make(page, sequence, &mut self.page);
        self.memory.mappings()[0].write(page.0 * PAGE_SIZE, &*self.page);
        self.ram().store(Plan::entry(data), sequence);
        let change = sequence.wrapping_sub(last);
        self.state.sum = self.state.sum.wrapping_add(change);
        if let Some(walk) = self.walk.as_mut().filter(|walk| data < walk.next) {
            walk.sum = walk.sum.wrapping_add(change);
        }
        self.state.writes = sequence;
    }

    fn examine(&mut self, data: u64, last: u64) {
        if last == 0 || last > self.state.writes {
            return self.damaged(data, Damage::Table { named: last, writes: self.state.writes });
        }
        let page = self.plan.page(data);
        self.memory.mappings()[0].read(page.0 * PAGE_SIZE, &mut *self.page);
        match self.stamper.check(page, last, &self.page) {
            Ok(()) => self.state.verified += 1,
            Err(damage) => self.damaged(data, damage),
        }
    }

    /// Goes on with a requested walk over the pages. Answers whether there is more of it at once.
    fn verify(&mut self) -> bool {
        let request = self.shared.verify_requested.load(SeqCst);
        if request == self.fulfilled {
            return false;
        }
        let mut walk = match self.walk.take() {
            Some(walk) if walk.request == request => walk,
            _ => Walk { request, next: self.share.start, sum: 0 },
        };
        // Before the warm-up is over, no page behind its end is touched: reading a hole of a memfd fills it.
        let end = self.share.start + self.state.writes.min(self.pages());
        let stop = end.min(walk.next + BATCH_PAGES);
        for data in walk.next..stop {
            let last = self.ram().load(Plan::entry(data));
            walk.sum = walk.sum.wrapping_add(last);
            self.examine(data, last);
        }
        walk.next = stop;
        if stop < end {
            self.walk = Some(walk);
            return true;
        }
        if walk.sum != self.state.sum {
            self.state.corrupt += 1;
            self.notice("the table of its writes is not as it was left");
        }
        self.fulfilled = request;
        self.publish();
        self.shared.fulfil(self.thread, request);
        false
    }

    fn damaged(&mut self, data: u64, damage: Damage) {
        self.state.corrupt += 1;
        let page = self.plan.page(data).0;
        self.notice(&format!("page {page} is {damage}"));
    }

    fn notice(&mut self, what: &str) {
        if self.notices > 0 {
            self.notices -= 1;
            self.shared.print(&format!("DAMAGE, thread {}: {what}", self.thread));
        }
    }

    /// Ends a turn: what the state is, into guest RAM, and for whoever asks.
    fn publish(&mut self) {
        let status = Plan::status(self.thread as u64);
        for (at, value) in [(0, self.state.writes), (8, self.state.heartbeats), (16, self.state.sum)] {
            // A page that is not written to does not get dirty.
            if self.ram().load(status + at) != value {
                self.ram().store(status + at, value);
            }
        }
        let mut published = self.shared.published(self.thread);
        published.state.clone_from(&self.state);
        published.gap_reset = self.gap_reset;
    }
}
