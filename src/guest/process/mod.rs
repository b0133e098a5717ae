//! A guest without a VM: memory of this process that threads write to, tracked with `PAGEMAP_SCAN`.
//!
//! It is what is moved where `/dev/kvm` does not open, and a load whose every number is chosen: how much memory, how fast
//! it is written and in which order, how well it compresses. It checks itself as the KVM guest does: each page that it
//! writes says which write made it (`stamp.rs`), and what it should say is kept in guest RAM too (`plan.rs`).

mod config;
mod pace;
mod pattern;
mod plan;
mod shared;
mod stamp;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;
use std::time::Duration;

pub use config::{MAX_THREADS, ProcessConfig};
pub use stamp::Fill;

use crate::dirty::DirtyTracker;
use crate::dirty::pagemap::PagemapTracker;

use crate::guest::program::{SelfChecking, SelfReport};
use crate::guest::{Guest, GuestError};
use crate::memory::{GuestMemory, HugePages};
use crate::pageset::PageSet;
use config::{decode_state, encode_state};
use plan::Plan;
use shared::{Order, Shared};
use worker::Worker;

/// A thread parks after at most one batch of pages: far below a millisecond, unless the host does not let it run, or a
/// snapshot holds up its page faults.
const PARK_WITHIN: Duration = Duration::from_secs(10);
/// To look at every page takes 30 s at most, plus a second for each 64 MiB: even an unoptimised build does several times that.
const VERIFY_WITHIN: Duration = Duration::from_secs(30);
const VERIFY_BYTES_PER_SECOND: u64 = 64 << 20;

/// Threads of this process as a guest. Made paused; [`Guest::resume`] starts it, and dropping it ends it.
///
/// Its wall clock is the host's, so that there is nothing to move on after a move.
#[derive(Debug)]
pub struct ProcessGuest {
    config: ProcessConfig,
    plan: Plan,
    memory: GuestMemory,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ProcessGuest {
    /// A new guest, paused before its first write.
    ///
    /// # Errors
    /// [`GuestError`] naming the setting that cannot be, or what the kernel refuses.
    pub fn new(config: ProcessConfig) -> Result<Self, GuestError> {
        let (layout, plan) = config.check()?;
        let memory = GuestMemory::allocate(layout, config.backing, config.huge).map_err(|cause| {
            let what = format!(
                "cannot map {} of guest RAM ({:?}, huge pages: {:?})",
                crate::units::Bytes(config.bytes),
                config.backing,
                config.huge
            );
            GuestError::caused(what, cause)
        })?;
        let shared = Arc::new(Shared::new(config.threads));
        let mut guest = Self { config, plan, memory, shared, threads: Vec::new() };
        for thread in 0..config.threads {
            let worker = Worker::new(thread, &config, plan, guest.memory.clone(), Arc::clone(&guest.shared));
            let handle = std::thread::Builder::new()
                .name(format!("guest-{thread}"))
                .spawn(move || worker.run())
                .map_err(|cause| GuestError::caused("cannot start a thread of the guest", cause))?;
            guest.threads.push(handle);
        }
        Ok(guest)
    }

    /// The same guest at the destination, from what [`Guest::config`] said at the source: paused, its memory empty.
    ///
    /// # Errors
    /// [`GuestError`] naming what in the configuration cannot be; nothing is allocated before it is checked.
    pub fn skeleton(config: &[u8], huge: HugePages) -> Result<Self, GuestError> {
        Self::new(ProcessConfig::decode(config, huge)?)
    }

    fn paused(&self, what: &str) -> Result<(), GuestError> {
        match self.shared.current_order() {
            Order::Park => Ok(()),
            _ => Err(GuestError::new(format!("{what} needs a paused guest; pause it first"))),
        }
    }
}

impl Guest for ProcessGuest {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, GuestError> {
        let tracker = PagemapTracker::new(&self.memory)
            .map_err(|cause| GuestError::caused("cannot track the dirty pages of a process guest", cause))?;
        Ok(Box::new(tracker))
    }

    fn config(&self) -> Result<Vec<u8>, GuestError> {
        Ok(self.config.encode())
    }

    fn touched(&self) -> Result<PageSet, GuestError> {
        self.memory.touched().map_err(|cause| {
            GuestError::caused("cannot tell which pages of a process guest are in use", cause)
        })
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.shared.order(Order::Park);
        let threads = self.threads.len();
        if self.shared.wait(PARK_WITHIN, |control| control.parked == threads) {
            return Ok(());
        }
        self.shared.order(Order::Run);
        Err(GuestError::new(format!(
            "the guest's threads did not stop within {} s and go on; is its memory held up by a page fault?",
            PARK_WITHIN.as_secs()
        )))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.shared.order(Order::Run);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.paused("saving the state of a process guest")?;
        let resets = self.shared.gap_resets.load(SeqCst);
        let states = (0..self.threads.len()).map(|thread| self.shared.published(thread).state_since(resets));
        Ok(encode_state(states.collect()))
    }

    fn load_state(&mut self, state: &[u8], _stopped_for: Duration) -> Result<(), GuestError> {
        self.paused("loading the state of a process guest")?;
        for (thread, state) in decode_state(state, self.config.threads)?.into_iter().enumerate() {
            let mut published = self.shared.published(thread);
            published.state = state;
            published.gap_reset = self.shared.gap_resets.load(SeqCst);
        }
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        if percent > 99 {
            return Err(GuestError::new(format!(
                "a guest can be throttled by 0 to 99 %, not by {percent} %"
            )));
        }
        self.shared.throttle.store(percent, SeqCst);
        Ok(())
    }
}

impl SelfChecking for ProcessGuest {
    fn report(&mut self) -> SelfReport {
        self.shared.report()
    }

    fn verify_all(&mut self) -> Result<SelfReport, GuestError> {
        if self.shared.current_order() != Order::Run {
            return Err(GuestError::new("a paused guest cannot look at its pages; resume it first"));
        }
        let request = self.shared.verify_requested.fetch_add(1, SeqCst) + 1;
        self.shared.nudge();
        let within = VERIFY_WITHIN + Duration::from_secs(self.plan.used_bytes() / VERIFY_BYTES_PER_SECOND);
        if self.shared.wait(within, |control| control.verified.iter().all(|&done| done >= request)) {
            return Ok(self.shared.report());
        }
        Err(GuestError::new(format!("the guest did not look at all its pages within {} s", within.as_secs())))
    }

    fn reset_gap(&mut self) {
        self.shared.gap_resets.fetch_add(1, SeqCst);
    }

    fn warmed_up(&mut self) -> bool {
        (0..self.threads.len()).all(|thread| {
            let share = self.plan.share(thread as u64);
            self.shared.published(thread).state.writes >= share.end - share.start
        })
    }

    fn console(&mut self) -> String {
        self.shared.take_console()
    }

    fn kind_name(&self) -> &'static str {
        "process"
    }
}

impl Drop for ProcessGuest {
    fn drop(&mut self) {
        self.shared.order(Order::Quit);
        for thread in self.threads.drain(..) {
            // One that panicked has said so on stderr; there is nobody to tell it to.
            let _ = thread.join();
        }
    }
}
