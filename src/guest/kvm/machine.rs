//! The virtual machine itself: memory, vCPUs and their threads, as one thing that runs or stands still.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::Kvm;

use super::config::MachineConfig;
use super::devices::Devices;
use super::vcpu::VcpuThread;
use super::{boot, cpuid, state};
use crate::dirty::kvm_log::KvmLogTracker;
use crate::dirty::kvm_ring::{KvmRingTracker, RingHarvester};
use crate::dirty::pagemap::PagemapTracker;
use crate::dirty::{DirtyTracker, TrackerKind};
use crate::guest::GuestError;
use crate::memory::GuestMemory;
use crate::sys::kvm::{DirtyMode, Vcpu, VirtualMachine};
use crate::units::GuestAddress;

/// Three pages that Intel processors need for real mode, in the hole below 4 GiB where PCs have their firmware.
const TSS: GuestAddress = GuestAddress(0xfffb_d000);
/// Entries of a vCPU's dirty ring, the most that KVM makes: 1 MiB of them.
const RING_ENTRIES: u32 = 65536;
/// A counter that is off by less is taken for the same (what NTP corrects; QEMU's limit too): 250 parts per million.
const TSC_TOLERANCE: u64 = 4000;

/// Opens `/dev/kvm`.
pub(super) fn open_kvm() -> Result<Kvm, GuestError> {
    Kvm::new().map_err(|error| {
        GuestError::caused("opening /dev/kvm; load the kvm module and see that this user may use it", error)
    })
}

fn make_vcpu(vm: &Arc<VirtualMachine>, config: &MachineConfig, number: u32) -> Result<Vcpu, GuestError> {
    let vcpu = vm
        .create_vcpu(number.into())
        .map_err(|error| GuestError::caused(format!("making vCPU {number} of the KVM guest"), error))?;
    // Before the system registers, which are checked against it.
    vcpu.state()
        .set_cpuid2(&cpuid::of_vcpu(&config.cpuid, number)?)
        .map_err(|error| GuestError::caused("giving a vCPU its CPUID", error))?;
    Ok(vcpu)
}

fn make_rings(
    vm: &Arc<VirtualMachine>,
    config: &MachineConfig,
    vcpus: &[Vcpu],
) -> Result<RingHarvester, GuestError> {
    let rings = vcpus.iter().map(Vcpu::dirty_ring).collect::<Result<_, _>>();
    rings
        .and_then(|rings| RingHarvester::new(vm, &config.layout, rings))
        .map_err(|error| GuestError::caused("making the dirty rings of the vCPUs", error))
}

pub(super) struct Machine {
    // Before the machine, so that the threads end first.
    vcpus: Vec<VcpuThread>,
    vm: Arc<VirtualMachine>,
    tracker: TrackerKind,
    /// With [`TrackerKind::Ring`].
    rings: Option<RingHarvester>,
    /// The MSRs that the kernel lists.
    msrs: Vec<u32>,
    tsc_khz: u32,
}

impl Machine {
    pub(super) fn make(
        kvm: &Kvm,
        config: &MachineConfig,
        memory: &GuestMemory,
        devices: &Arc<Mutex<Devices>>,
        tracker: TrackerKind,
    ) -> Result<Self, GuestError> {
        let failed = |what: &'static str| move |error: std::io::Error| GuestError::caused(what, error);
        let dirty = match tracker {
            TrackerKind::Log => DirtyMode::Log { initially_set: true },
            TrackerKind::Ring => DirtyMode::Ring { entries: RING_ENTRIES },
            TrackerKind::Pagemap | TrackerKind::Synthetic => DirtyMode::None,
        };
        let vm = VirtualMachine::create(kvm, dirty).map_err(failed("making a virtual machine"))?;
        let vm = Arc::new(vm);
        vm.set_tss_address(TSS).map_err(failed("placing KVM's own pages"))?;
        vm.create_irqchip().map_err(failed("making the interrupt controllers"))?;
        vm.create_pit2().map_err(failed("making the timer"))?;
        for (index, region) in config.layout.regions().iter().enumerate() {
            vm.add_memory(region.start, memory.shared_mappings(), index)
                .map_err(failed("giving the virtual machine its memory"))?;
        }
        let msrs = kvm.get_msr_index_list().map_err(|error| {
            GuestError::caused("reading which MSRs to move (KVM_GET_MSR_INDEX_LIST)", error)
        })?;
        let vcpus = (0..config.vcpus).map(|number| make_vcpu(&vm, config, number));
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        let tsc_khz = vcpus[0].state().get_tsc_khz().unwrap_or(0);
        let rings = match tracker {
            TrackerKind::Ring => Some(make_rings(&vm, config, &vcpus)?),
            TrackerKind::Log | TrackerKind::Pagemap | TrackerKind::Synthetic => None,
        };
        let threads = vcpus.into_iter().enumerate().map(|(number, vcpu)| {
            VcpuThread::spawn(number, vcpu, Arc::clone(devices), rings.clone())
                .map_err(failed("starting a vCPU's thread"))
        });
        let threads = threads.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { vcpus: threads, vm, tracker, rings, msrs: msrs.as_slice().to_vec(), tsc_khz })
    }

    /// The frequency of the guest's time stamp counter; 0 where the host does not know.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Gives the time stamp counters the frequency that the guest knows, or leaves them where the source did not know it.
    pub(super) fn set_tsc_khz(&self, wanted: u32) -> Result<(), GuestError> {
        if wanted == 0 || u64::from(wanted.abs_diff(self.tsc_khz)) * TSC_TOLERANCE <= u64::from(self.tsc_khz)
        {
            return Ok(());
        }
        for thread in &self.vcpus {
            thread.vcpu().state().set_tsc_khz(wanted).map_err(|error| {
                let what = format!(
                    "this host's time stamp counter runs at {} kHz, the guest's at {wanted} kHz, and its KVM cannot scale it",
                    self.tsc_khz
                );
                GuestError::caused(what, error)
            })?;
        }
        Ok(())
    }

    /// Puts every vCPU at the program's entry.
    pub(super) fn boot(&self) -> Result<(), GuestError> {
        for (number, thread) in (0..).zip(&self.vcpus) {
            let vcpu = thread.vcpu();
            let kvm = vcpu.state();
            let booted = kvm
                .get_sregs()
                .and_then(|sregs| kvm.set_sregs(&boot::system_registers(sregs)))
                .and_then(|()| kvm.set_regs(&boot::registers(number)))
                // All but the first wait for another processor to start them, otherwise.
                .and_then(|()| kvm.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }));
            booted.map_err(|error| GuestError::caused("giving a vCPU its first registers", error))?;
        }
        Ok(())
    }

    /// A tracker of the kind that the machine was made for.
    pub(super) fn dirty_tracker(&self, memory: &GuestMemory) -> Result<Box<dyn DirtyTracker>, GuestError> {
        let made: std::io::Result<Box<dyn DirtyTracker>> = match (self.tracker, &self.rings) {
            (TrackerKind::Log, _) => {
                KvmLogTracker::new(&self.vm, memory.layout()).map(|made| Box::new(made) as _)
            }
            (TrackerKind::Ring, Some(rings)) => Ok(Box::new(KvmRingTracker::new(rings.clone()))),
            (TrackerKind::Pagemap, _) => PagemapTracker::new(memory).map(|made| Box::new(made) as _),
            (TrackerKind::Ring | TrackerKind::Synthetic, _) => {
                return Err(GuestError::new(format!(
                    "dirty pages of a KVM guest cannot be tracked by {}; use log, ring or pagemap",
                    self.tracker.name()
                )));
            }
        };
        made.map_err(|error| {
            let what = format!("making the dirty tracker {:?} for a KVM guest", self.tracker.name());
            GuestError::caused(what, error)
        })
    }

    /// Returns when every vCPU is out of the guest.
    pub(super) fn pause(&self) -> Result<(), GuestError> {
        self.vcpus.iter().for_each(VcpuThread::order_pause);
        self.vcpus.iter().try_for_each(VcpuThread::wait_parked)
    }

    pub(super) fn run(&self) {
        self.vcpus.iter().for_each(VcpuThread::order_run);
    }

    pub(super) fn throttle(&self, percent: u8) {
        self.vcpus.iter().for_each(|vcpu| vcpu.throttle(percent));
    }

    /// Fails when a vCPU can never run again.
    pub(super) fn fault(&self) -> Result<(), GuestError> {
        match self.vcpus.iter().find_map(VcpuThread::fault) {
            Some(fault) => Err(GuestError::new(format!("the KVM guest cannot run: {fault}"))),
            None => Ok(()),
        }
    }

    pub(super) fn save(&self, devices: &Devices, paused_at: Instant) -> Result<Vec<u8>, GuestError> {
        let vcpus: Vec<_> = self.vcpus.iter().map(VcpuThread::vcpu).collect();
        state::save(&self.vm, vcpus.iter().map(|vcpu| &**vcpu), devices, &self.msrs, paused_at.elapsed())
    }

    pub(super) fn load(
        &self,
        bytes: &[u8],
        devices: &mut Devices,
        tsc_khz: u32,
        stopped_for: Duration,
    ) -> Result<(), GuestError> {
        let state = state::decode(bytes, self.vcpus.len())?;
        let vcpus: Vec<_> = self.vcpus.iter().map(VcpuThread::vcpu).collect();
        state::load(&state, &self.vm, vcpus.iter().map(|vcpu| &**vcpu), devices, tsc_khz, stopped_for)
    }
}
