//! The virtual machine itself: memory, vCPUs and their threads, as one thing that runs or stands still.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::Kvm;

use super::config::MachineConfig;
use super::devices::Devices;
use super::vcpu::VcpuThread;
use super::{boot, cpuid, state};
use crate::dirty::{DirtyTracker, TrackerKind};
use crate::guest::GuestError;
use crate::memory::GuestMemory;
use crate::sys::kvm::{DirtyMode, VirtualMachine};
use crate::units::GuestAddress;

/// Three pages that Intel processors need for real mode, in the hole below 4 GiB where PCs have their firmware.
const TSS: GuestAddress = GuestAddress(0xfffb_d000);
/// Entries of a vCPU's dirty ring: 64 KiB of them; a vCPU that fills it in one go has it emptied by its own thread.
const RING_ENTRIES: u32 = 4096;
/// A counter that is off by less is taken for the same (what NTP corrects; QEMU's limit too): 250 parts per million.
const TSC_TOLERANCE: u64 = 4000;

/// Opens `/dev/kvm`.
pub(super) fn open_kvm() -> Result<Kvm, GuestError> {
    Kvm::new().map_err(|error| {
        GuestError::caused("opening /dev/kvm; load the kvm module and see that this user may use it", error)
    })
}

pub(super) struct Machine {
    // Before the machine, so that the threads end first.
    vcpus: Vec<VcpuThread>,
    vm: Arc<VirtualMachine>,
    tracker: TrackerKind,
    /// The MSRs that the kernel lists.
    msrs: Vec<u32>,
    tsc_khz: u32,
}

impl Machine {
    pub(super) fn make(
        kvm: &Kvm,
        config: &MachineConfig,
        memory: &GuestMemory,
        devices: Arc<Mutex<Devices>>,
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
        let mut vcpus = Vec::new();
        let mut tsc_khz = 0;
        for number in 0..config.vcpus {
            let vcpu = vm.create_vcpu(number.into()).map_err(failed("making a vCPU"))?;
            // Before the system registers, which are checked against it.
            vcpu.state()
                .set_cpuid2(&cpuid::of_vcpu(&config.cpuid, number)?)
                .map_err(|error| GuestError::caused("giving a vCPU its CPUID", error))?;
            tsc_khz = vcpu.state().get_tsc_khz().unwrap_or(0);
            let thread = VcpuThread::spawn(number as usize, vcpu, Arc::clone(&devices), None);
            vcpus.push(thread.map_err(failed("starting a vCPU's thread"))?);
        }
        Ok(Self { vcpus, vm, tracker, msrs: msrs.as_slice().to_vec(), tsc_khz })
    }

    /// The frequency of the guest's time stamp counter; 0 where the host does not know.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Gives the time stamp counters the frequency that the guest knows.
    pub(super) fn set_tsc_khz(&self, wanted: u32) -> Result<(), GuestError> {
        if u64::from(wanted.abs_diff(self.tsc_khz)) * TSC_TOLERANCE <= u64::from(self.tsc_khz) {
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
        let _ = memory;
        Err(GuestError::new(format!(
            "dirty pages of a KVM guest cannot be tracked by {}",
            self.tracker.name()
        )))
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
        stopped_for: Duration,
    ) -> Result<(), GuestError> {
        let state = state::decode(bytes, self.vcpus.len())?;
        let vcpus: Vec<_> = self.vcpus.iter().map(VcpuThread::vcpu).collect();
        let tsc_khz = self.tsc_khz;
        state::load(&state, &self.vm, vcpus.iter().map(|vcpu| &**vcpu), devices, tsc_khz, stopped_for)
    }
}
