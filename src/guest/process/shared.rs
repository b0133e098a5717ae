//! What the guest and its threads say to each other: orders and requests one way, what was followed and found the other.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::guest::process::config::ThreadState;
use crate::guest::program::SelfReport;

/// What the console holds for a reader who does not come: a day of heartbeats is more, and is cut.
const CONSOLE_BYTES: usize = 64 << 10;

/// What a thread was told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Park,
    Run,
    Quit,
}

/// The orders, and what the threads answer. Its mutex is never held over guest RAM.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) order: Order,
    pub(super) parked: usize,
    /// The last request of [`Shared::verify_requested`] that each thread has fulfilled.
    pub(super) verified: Vec<u64>,
}

/// What a thread says of itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Published {
    pub(super) state: ThreadState,
    /// Which reset the longest gap is since; see [`Shared::gap_resets`].
    pub(super) gap_reset: u64,
}

impl Published {
    /// The state, with the longest gap since that reset: the thread may not have seen the reset yet.
    pub(super) fn state_since(&self, reset: u64) -> ThreadState {
        let longest_gap = if self.gap_reset == reset { self.state.longest_gap } else { 0 };
        ThreadState { longest_gap, ..self.state.clone() }
    }
}

/// What the guest and its threads share.
#[derive(Debug)]
pub(super) struct Shared {
    control: Mutex<Control>,
    /// To the threads: there is an order.
    ordered: Condvar,
    /// To the guest: an order was followed.
    followed: Condvar,
    /// Set while the order is not to run, so that a thread need not lock in order to see it.
    leave: AtomicBool,
    pub(super) throttle: AtomicU8,
    pub(super) verify_requested: AtomicU64,
    pub(super) gap_resets: AtomicU64,
    published: Vec<Mutex<Published>>,
    console: Mutex<String>,
    epoch: Instant,
}

/// No code that holds one of our locks panics halfway through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(threads: u32) -> Self {
        let control = Control { order: Order::Park, parked: 0, verified: vec![0; threads as usize] };
        Self {
            control: Mutex::new(control),
            ordered: Condvar::new(),
            followed: Condvar::new(),
            leave: AtomicBool::new(true),
            throttle: AtomicU8::new(0),
            verify_requested: AtomicU64::new(0),
            gap_resets: AtomicU64::new(0),
            published: (0..threads).map(|_| Mutex::default()).collect(),
            console: Mutex::default(),
            epoch: Instant::now(),
        }
    }

    pub(super) fn order(&self, order: Order) {
        let mut control = lock(&self.control);
        control.order = order;
        self.leave.store(order != Order::Run, SeqCst);
        self.ordered.notify_all();
    }

    pub(super) fn current_order(&self) -> Order {
        lock(&self.control).order
    }

    /// Wakes the threads from their rest to look at what is requested.
    pub(super) fn nudge(&self) {
        let _orders = lock(&self.control);
        self.ordered.notify_all();
    }

    /// Waits until `met` holds; answers whether it did in time.
    pub(super) fn wait(&self, within: Duration, met: impl Fn(&Control) -> bool) -> bool {
        let control = lock(&self.control);
        let waited = self.followed.wait_timeout_while(control, within, |control| !met(control));
        let (control, _) = waited.unwrap_or_else(PoisonError::into_inner);
        met(&control)
    }

    pub(super) fn published(&self, thread: usize) -> MutexGuard<'_, Published> {
        lock(&self.published[thread])
    }

    pub(super) fn report(&self) -> SelfReport {
        let resets = self.gap_resets.load(SeqCst);
        let all: Vec<ThreadState> = self.published.iter().map(|one| lock(one).state_since(resets)).collect();
        let sum = |of: fn(&ThreadState) -> u64| all.iter().map(of).sum();
        SelfReport {
            // A guest of which one thread hangs gives no more.
            heartbeats: all.iter().map(|state| state.heartbeats).min().unwrap_or(0),
            writes: sum(|state| state.writes),
            verified: sum(|state| state.verified),
            corrupt: sum(|state| state.corrupt),
            longest_gap: Duration::from_nanos(all.iter().map(|state| state.longest_gap).max().unwrap_or(0)),
        }
    }

    /// Time, on the clock that turns are paced by.
    pub(super) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Whether a running thread has to stop.
    pub(super) fn is_to_leave(&self) -> bool {
        self.leave.load(SeqCst)
    }

    pub(super) fn take_console(&self) -> String {
        std::mem::take(&mut lock(&self.console))
    }

    pub(super) fn print(&self, line: &str) {
        let mut console = lock(&self.console);
        if console.len() + line.len() < CONSOLE_BYTES {
            console.push_str(line);
            console.push('\n');
        }
    }

    /// Rests until `until` or an order.
    pub(super) fn rest(&self, until: Duration) {
        let control = lock(&self.control);
        let left = until.saturating_sub(self.now());
        if control.order == Order::Run && !left.is_zero() {
            drop(self.ordered.wait_timeout(control, left));
        }
    }

    /// Parks until the order is another; answers whether it is to run.
    pub(super) fn park(&self) -> bool {
        let mut control = lock(&self.control);
        control.parked += 1;
        self.followed.notify_all();
        let waited = self.ordered.wait_while(control, |control| control.order == Order::Park);
        control = waited.unwrap_or_else(PoisonError::into_inner);
        control.parked -= 1;
        control.order == Order::Run
    }

    pub(super) fn fulfil(&self, thread: usize, request: u64) {
        lock(&self.control).verified[thread] = request;
        self.followed.notify_all();
    }
}
