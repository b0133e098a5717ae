//! The reference guest: a small microVM on KVM that runs a program which checks its own memory.
//!
//! It has RAM in memfds, 1 to 4 vCPUs, the in-kernel interrupt controllers and timer, and a serial port. The program is
//! described in [`crate::sys::kvm::program`]. The vCPUs' threads are interrupted by the signal `SIGRTMIN`, which gets a
//! handler that does nothing: a process that has a guest of this kind leaves that signal to it.

// `boot` puts the program into memory, `machine` and `vcpu` run it, `config` and `state` are what moves beside the pages.
mod boot;
mod config;
mod cpuid;
mod devices;
mod machine;
mod state;
mod vcpu;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use config::MachineConfig;
use devices::Devices;
use machine::Machine;

use super::program::{ProgramConfig, SelfChecking, SelfReport};
use super::{Guest, GuestError, ProcessorError};
use crate::dirty::{DirtyTracker, TrackerKind};
use crate::layout::{LayoutError, RamLayout, RamRegion};
use crate::memory::{Backing, GuestMemory, HugePages};
use crate::pageset::PageSet;
use crate::sys::kvm::program::{STATUS_BASE, status};
use crate::units::{GuestAddress, PAGE_SIZE};

/// The most vCPUs of a guest: its status pages are reserved for so many.
pub const MAX_VCPUS: u32 = 4;
/// A running guest answers within a tick or two, also when its thread waits for a processor; this long it is dead.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What a guest is to be.
#[derive(Clone, Debug)]
pub struct KvmConfig {
    /// Its RAM. [`pc_layout`] gives what a PC has.
    pub layout: RamLayout,
    /// The pages that the RAM is made of.
    pub huge: HugePages,
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// What it does.
    pub program: ProgramConfig,
    /// How its dirty pages are tracked; the log and the ring are KVM's.
    pub tracker: TrackerKind,
}

/// The RAM of a PC: up to 3 GiB from address 0 on, the rest from 4 GiB on.
///
/// # Errors
/// [`LayoutError`] for a size that is 0, too large or no whole number of pages.
pub fn pc_layout(bytes: u64) -> Result<RamLayout, LayoutError> {
    const LOW: u64 = 3 << 30;
    let mut regions = vec![RamRegion { start: GuestAddress(0), bytes: bytes.min(LOW) }];
    if bytes > LOW {
        regions.push(RamRegion { start: GuestAddress(4 << 30), bytes: bytes - LOW });
    }
    RamLayout::new(regions)
}

/// Whether the guest that [`Guest::config`] of another host describes can run on this host's processor, without making it.
///
/// # Errors
/// [`ProcessorError`] naming the other vendor, or every feature that is missing.
pub fn check_processor(config: &[u8]) -> Result<(), ProcessorError> {
    let config = MachineConfig::decode(config).map_err(ProcessorError::Config)?;
    let here = machine::open_kvm().and_then(|kvm| cpuid::supported(&kvm)).map_err(ProcessorError::Host)?;
    cpuid::compare(&config.cpuid, &here).map_err(ProcessorError::Unfit)
}

/// A virtual machine in this process, and the guest in it. Dropping it ends the guest.
pub struct KvmGuest {
    config: MachineConfig,
    memory: GuestMemory,
    // Fields are dropped in this order: the vCPUs' threads end before anything that they use.
    machine: Machine,
    devices: Arc<Mutex<Devices>>,
    running: bool,
    /// When it was last paused, as long as it is.
    paused_at: Instant,
}

impl std::fmt::Debug for KvmGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmGuest")
            .field("config", &self.config)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl KvmGuest {
    /// Makes a guest with its program loaded; it is paused, [`Guest::resume`] starts it.
    ///
    /// # Errors
    /// [`GuestError`] naming what cannot be had: KVM, memory, a tracker, or a configuration that makes no machine.
    pub fn new(config: &KvmConfig) -> Result<Self, GuestError> {
        let kvm = machine::open_kvm()?;
        let machine_config = MachineConfig::of(config, cpuid::supported(&kvm)?)?;
        let mut guest = Self::make(&kvm, machine_config, config.huge, config.tracker)?;
        boot::load(&guest.memory, guest.config.vcpus.into(), &guest.config.program)?;
        guest.machine.boot()?;
        guest.config.tsc_khz = guest.machine.tsc_khz();
        Ok(guest)
    }

    /// Makes the machine that [`Guest::config`] of another host describes: paused, its memory untouched and without a
    /// program, ready for pages and for [`Guest::load_state`].
    ///
    /// # Errors
    /// As [`KvmGuest::new`]; also for a configuration that cannot be believed, and for a processor that lacks what the
    /// guest was started with, each feature named.
    pub fn skeleton(config: &[u8], huge: HugePages, tracker: TrackerKind) -> Result<Self, GuestError> {
        let config = MachineConfig::decode(config)?;
        let kvm = machine::open_kvm()?;
        cpuid::compare(&config.cpuid, &cpuid::supported(&kvm)?)?;
        let tsc_khz = config.tsc_khz;
        let guest = Self::make(&kvm, config, huge, tracker)?;
        guest.machine.set_tsc_khz(tsc_khz)?;
        Ok(guest)
    }

    fn make(
        kvm: &kvm_ioctls::Kvm,
        config: MachineConfig,
        huge: HugePages,
        tracker: TrackerKind,
    ) -> Result<Self, GuestError> {
        let memory = GuestMemory::allocate(config.layout.clone(), Backing::Memfd, huge).map_err(|error| {
            let size = crate::units::Bytes(config.layout.total_bytes());
            let hint = if huge == HugePages::Hugetlb {
                "; vm.nr_hugepages says how many 2 MiB pages there are"
            } else {
                ""
            };
            GuestError::caused(format!("allocating {size} of guest memory{hint}"), error)
        })?;
        let devices = Arc::new(Mutex::new(Devices::default()));
        let machine = Machine::make(kvm, &config, &memory, &devices, tracker)?;
        Ok(Self { config, memory, machine, devices, running: false, paused_at: Instant::now() })
    }

    /// What the guest does.
    #[must_use]
    pub fn program(&self) -> ProgramConfig {
        self.config.program
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A word of a vCPU's status page; the guest may be writing it.
    fn status(&self, vcpu: u32, word: u64) -> u64 {
        self.memory.mappings()[0].load(STATUS_BASE + u64::from(vcpu) * PAGE_SIZE + word)
    }

    fn statuses(&self, word: u64) -> impl Iterator<Item = u64> + '_ {
        (0..self.config.vcpus).map(move |vcpu| self.status(vcpu, word))
    }

    /// Waits until every vCPU has the value in the word. What the guest counts on the way must not stand still.
    fn wait_for_status(&self, word: u64, value: u64, what: &str) -> Result<(), GuestError> {
        let mut last_progress = (Instant::now(), 0);
        while self.statuses(word).any(|found| found != value) {
            self.machine.fault()?;
            let verified = self.statuses(status::VERIFIED).sum();
            if verified != last_progress.1 {
                last_progress = (Instant::now(), verified);
            }
            if last_progress.0.elapsed() > ANSWER_LIMIT {
                return Err(GuestError::new(format!("the KVM guest did not {what} within {ANSWER_LIMIT:?}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn require_paused(&self, what: &str) -> Result<(), GuestError> {
        if self.running {
            return Err(GuestError::new(format!("the KVM guest must be paused to {what}")));
        }
        Ok(())
    }
}

impl Guest for KvmGuest {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.machine.dirty_tracker(&self.memory)
    }

    fn config(&self) -> Result<Vec<u8>, GuestError> {
        Ok(self.config.encode())
    }

    fn touched(&self) -> Result<PageSet, GuestError> {
        self.memory
            .touched()
            .map_err(|error| GuestError::caused("asking which pages of the KVM guest are in use", error))
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        if !self.running {
            return Ok(());
        }
        if let Err(error) = self.machine.pause() {
            // As it was: a guest of which one vCPU stands still is worse than a guest that runs.
            self.machine.run();
            return Err(error);
        }
        self.running = false;
        self.paused_at = Instant::now();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.machine.fault()?;
        self.machine.run();
        self.running = true;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.require_paused("save its state")?;
        self.machine.fault()?;
        self.machine.save(&self.devices(), self.paused_at)
    }

    fn load_state(&mut self, state: &[u8], stopped_for: Duration) -> Result<(), GuestError> {
        self.require_paused("load a state")?;
        self.machine.load(state, &mut self.devices(), self.config.tsc_khz, stopped_for)
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        if percent > 99 {
            return Err(GuestError::new(format!("vCPUs can be throttled by 0 to 99 percent, not {percent}")));
        }
        self.machine.throttle(percent);
        Ok(())
    }
}

impl SelfChecking for KvmGuest {
    fn report(&mut self) -> SelfReport {
        SelfReport {
            // The slowest vCPU's: one that hangs must show.
            heartbeats: self.statuses(status::HEARTBEATS).min().unwrap_or(0),
            writes: self.statuses(status::WRITES).sum(),
            verified: self.statuses(status::VERIFIED).sum(),
            corrupt: self.statuses(status::CORRUPT).sum(),
            longest_gap: Duration::from_micros(self.statuses(status::GAP).max().unwrap_or(0)),
        }
    }

    fn verify_all(&mut self) -> Result<SelfReport, GuestError> {
        if !self.running {
            return Err(GuestError::new("the KVM guest must run to verify its pages"));
        }
        let request = self.devices().request_verify();
        self.wait_for_status(status::VERIFY_DONE, request.into(), "verify its pages")?;
        Ok(self.report())
    }

    fn reset_gap(&mut self) {
        let request = self.devices().request_reset();
        if self.running {
            // A guest that does not answer shows in its heartbeats.
            if let Err(error) =
                self.wait_for_status(status::RESET_SEEN, request.into(), "forget its longest gap")
            {
                tracing::warn!(%error, "the longest gap may be an old one");
            }
        }
    }

    fn warmed_up(&mut self) -> bool {
        self.statuses(status::STARTS).all(|starts| starts > 0)
            && self.statuses(status::WARMING).all(|cycles| cycles == 0)
    }

    fn console(&mut self) -> String {
        self.devices().console()
    }

    fn kind_name(&self) -> &'static str {
        "kvm"
    }
}

#[cfg(test)]
mod tests;
