//! CPU and device state: what is read from the paused machine, and put into the skeleton.
//!
//! Each part is the kernel's own structure, byte for byte (x86-64 has one layout of them), inside a message that names it.

use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_irqchip,
    kvm_msr_entry,
};
use prost::Message;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::devices::{DeviceState, Devices};
use crate::guest::GuestError;
use crate::sys::kvm::{Vcpu, VirtualMachine};

/// The only version so far.
const VERSION: u32 = crate::guest::STATE_VERSION;
/// A vCPU's parts are below 32 KiB together, the machine's below 4 KiB; twice that is refused before it is decoded.
const MOST_BYTES_PER_VCPU: usize = 64 << 10;
/// More than the kernel has in its list (some 200).
const MOST_MSRS: usize = 1024;
/// `IA32_TIME_STAMP_COUNTER` (Intel SDM volume 4).
pub(super) const MSR_TSC: u32 = 0x10;

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct MachineState {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(message, repeated, tag = "2")]
    pub vcpus: Vec<VcpuState>,
    #[prost(bytes = "vec", tag = "3")]
    pub pic_master: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub pic_slave: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    pub ioapic: Vec<u8>,
    #[prost(bytes = "vec", tag = "6")]
    pub pit: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    pub clock: Vec<u8>,
    #[prost(message, optional, tag = "8")]
    pub devices: Option<DeviceState>,
    /// How long the guest had been paused when its counters were read: they count on while it is.
    #[prost(uint64, tag = "9")]
    pub paused_nanoseconds: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct VcpuState {
    #[prost(bytes = "vec", tag = "1")]
    pub mp_state: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub regs: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub sregs: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub xsave: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    pub xcrs: Vec<u8>,
    #[prost(bytes = "vec", tag = "6")]
    pub debug_regs: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    pub lapic: Vec<u8>,
    #[prost(message, repeated, tag = "8")]
    pub msrs: Vec<Msr>,
    #[prost(bytes = "vec", tag = "9")]
    pub events: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Msr {
    #[prost(uint32, tag = "1")]
    pub index: u32,
    #[prost(uint64, tag = "2")]
    pub value: u64,
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

fn reading(part: &'static str) -> impl Fn(Cause) -> GuestError {
    move |cause| GuestError::caused(format!("reading the KVM guest's {part}"), cause)
}

fn writing(part: &'static str) -> impl Fn(Cause) -> GuestError {
    move |cause| GuestError::caused(format!("putting the KVM guest's {part} in place"), cause)
}

/// The structure that a part is, or an error that names the part.
fn part<T: FromBytes>(name: &'static str, bytes: &[u8]) -> Result<T, GuestError> {
    T::read_from_bytes(bytes).map_err(|_| {
        GuestError::new(format!(
            "the KVM guest's state is damaged: its {name} has {} bytes, not {}",
            bytes.len(),
            size_of::<T>()
        ))
    })
}

fn bytes_of<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// Reads all state of a machine whose vCPUs are parked.
pub(super) fn save<'a>(
    machine: &VirtualMachine,
    vcpus: impl Iterator<Item = &'a Vcpu>,
    devices: &Devices,
    msrs: &[u32],
    paused_for: Duration,
) -> Result<Vec<u8>, GuestError> {
    let chip = |id, name| {
        let chip = machine.irqchip(id).map_err(|error| reading(name)(error.into()))?;
        Ok::<_, GuestError>(bytes_of(&chip))
    };
    let state = MachineState {
        version: VERSION,
        vcpus: vcpus.map(|vcpu| save_vcpu(vcpu, msrs)).collect::<Result<_, _>>()?,
        pic_master: chip(KVM_IRQCHIP_PIC_MASTER, "first PIC")?,
        pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE, "second PIC")?,
        ioapic: chip(KVM_IRQCHIP_IOAPIC, "IOAPIC")?,
        pit: bytes_of(&machine.pit2().map_err(|error| reading("timer")(error.into()))?),
        clock: bytes_of(&machine.clock().map_err(|error| reading("clock")(error.into()))?),
        devices: Some(devices.save()),
        paused_nanoseconds: u64::try_from(paused_for.as_nanos()).unwrap_or(u64::MAX),
    };
    Ok(state.encode_to_vec())
}

fn save_vcpu(vcpu: &Vcpu, msrs: &[u32]) -> Result<VcpuState, GuestError> {
    let kvm = vcpu.state();
    // First, because reading it delivers what other vCPUs have sent (INIT, SIPI) and so changes the rest.
    let mp_state = kvm.get_mp_state().map_err(|error| reading("mp_state")(error.into()))?;
    Ok(VcpuState {
        mp_state: bytes_of(&mp_state),
        regs: bytes_of(&kvm.get_regs().map_err(|error| reading("regs")(error.into()))?),
        sregs: bytes_of(&kvm.get_sregs().map_err(|error| reading("sregs")(error.into()))?),
        xsave: vcpu.xsave().map_err(|error| reading("xsave area")(error.into()))?,
        xcrs: bytes_of(&kvm.get_xcrs().map_err(|error| reading("xcrs")(error.into()))?),
        debug_regs: bytes_of(
            &kvm.get_debug_regs().map_err(|error| reading("debug registers")(error.into()))?,
        ),
        lapic: bytes_of(&kvm.get_lapic().map_err(|error| reading("LAPIC")(error.into()))?),
        msrs: read_msrs(vcpu, msrs)?,
        events: bytes_of(&kvm.get_vcpu_events().map_err(|error| reading("events")(error.into()))?),
    })
}

/// Reads the MSRs of a list; those that this vCPU does not have are left out.
pub(super) fn read_msrs(vcpu: &Vcpu, indices: &[u32]) -> Result<Vec<Msr>, GuestError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut request = msr_list(&entries)?;
        let count = vcpu.state().get_msrs(&mut request).map_err(|error| reading("MSRs")(error.into()))?;
        let read = request.as_slice().iter().take(count);
        found.extend(read.map(|entry| Msr { index: entry.index, value: entry.data }));
        // KVM stops at the first that cannot be read.
        rest = &rest[(count + usize::from(count < batch.len())).min(rest.len())..];
    }
    Ok(found)
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, GuestError> {
    Msrs::from_entries(entries).map_err(|error| GuestError::new(format!("a list of MSRs: {error:?}")))
}

/// Checks a state and everything in it that can be checked without a machine.
pub(super) fn decode(bytes: &[u8], vcpus: usize) -> Result<MachineState, GuestError> {
    let most = MOST_BYTES_PER_VCPU * (vcpus + 1);
    if bytes.len() > most {
        return Err(GuestError::new(format!(
            "the KVM guest's state has {} bytes, more than the {most} that {vcpus} vCPUs can have",
            bytes.len()
        )));
    }
    let state = MachineState::decode(bytes)
        .map_err(|error| GuestError::caused("the KVM guest's state cannot be decoded", error))?;
    if state.version != VERSION {
        return Err(GuestError::new(format!(
            "the KVM guest's state is of version {}, and this host knows {VERSION}; run the same release on both hosts",
            state.version
        )));
    }
    if state.vcpus.len() != vcpus {
        return Err(GuestError::new(format!(
            "the KVM guest's state is of {} vCPUs, and its configuration of {vcpus}",
            state.vcpus.len()
        )));
    }
    if let Some(vcpu) = state.vcpus.iter().find(|vcpu| vcpu.msrs.len() > MOST_MSRS) {
        return Err(GuestError::new(format!("the KVM guest's state has {} MSRs in a vCPU", vcpu.msrs.len())));
    }
    Ok(state)
}

/// Puts a state in place. `stopped_for` is how long the guest has not run: time stamp counters and clock go on by as much
/// of it as they have not counted themselves.
pub(super) fn load<'a>(
    state: &MachineState,
    machine: &VirtualMachine,
    vcpus: impl Iterator<Item = &'a Vcpu>,
    devices: &mut Devices,
    tsc_khz: u32,
    stopped_for: Duration,
) -> Result<(), GuestError> {
    let uncounted = stopped_for.saturating_sub(Duration::from_nanos(state.paused_nanoseconds));
    let uncounted = u64::try_from(uncounted.as_nanos()).unwrap_or(u64::MAX);
    let ticks = u64::try_from(u128::from(uncounted) * u128::from(tsc_khz) / 1_000_000).unwrap_or(u64::MAX);
    for (vcpu, saved) in vcpus.zip(&state.vcpus) {
        load_vcpu(vcpu, saved, ticks)?;
    }
    for (name, bytes, id) in [
        ("first PIC", &state.pic_master, KVM_IRQCHIP_PIC_MASTER),
        ("second PIC", &state.pic_slave, KVM_IRQCHIP_PIC_SLAVE),
        ("IOAPIC", &state.ioapic, KVM_IRQCHIP_IOAPIC),
    ] {
        let mut chip: kvm_irqchip = part(name, bytes)?;
        chip.chip_id = id;
        machine.set_irqchip(&chip).map_err(|error| writing(name)(error.into()))?;
    }
    let saved: kvm_clock_data = part("clock", &state.clock)?;
    // Without flags: the kernel would otherwise move it on by the difference of the two hosts' clocks a second time.
    let clock = kvm_clock_data { clock: saved.clock.saturating_add(uncounted), ..Default::default() };
    machine.set_clock(&clock).map_err(|error| writing("clock")(error.into()))?;
    let state_of_devices = state.devices.as_ref();
    let state_of_devices = state_of_devices
        .ok_or_else(|| GuestError::new("the KVM guest's state is damaged: its devices are missing"))?;
    devices.load(state_of_devices).map_err(|what| {
        GuestError::new(format!("the KVM guest's state is damaged: its devices have {what}"))
    })?;
    // Last, because the timer ticks from then on.
    machine.set_pit2(&part("timer", &state.pit)?).map_err(|error| writing("timer")(error.into()))
}

/// The order matters: registers before the LAPIC, whose base is one of them; the LAPIC before the MSRs, one of which arms
/// its timer; events last, since writing registers drops them.
fn load_vcpu(vcpu: &Vcpu, saved: &VcpuState, ticks: u64) -> Result<(), GuestError> {
    let kvm = vcpu.state();
    kvm.set_mp_state(part("mp_state", &saved.mp_state)?)
        .map_err(|error| writing("mp_state")(error.into()))?;
    kvm.set_regs(&part("regs", &saved.regs)?).map_err(|error| writing("regs")(error.into()))?;
    kvm.set_sregs(&part("sregs", &saved.sregs)?).map_err(|error| writing("sregs")(error.into()))?;
    vcpu.set_xsave(&fit_xsave(vcpu, &saved.xsave)?).map_err(|error| writing("xsave area")(error.into()))?;
    kvm.set_xcrs(&part("xcrs", &saved.xcrs)?).map_err(|error| writing("xcrs")(error.into()))?;
    kvm.set_debug_regs(&part("debug registers", &saved.debug_regs)?)
        .map_err(|error| writing("debug registers")(error.into()))?;
    kvm.set_lapic(&part("LAPIC", &saved.lapic)?).map_err(|error| writing("LAPIC")(error.into()))?;
    write_msrs(vcpu, &saved.msrs, ticks)?;
    warn_of_foreign_tsc(vcpu, &saved.msrs, ticks)?;
    kvm.set_vcpu_events(&part("events", &saved.events)?).map_err(|error| writing("events")(error.into()))?;
    // So that a watchdog in the guest forgives the time; EINVAL when the guest does not use the clock.
    let _ = kvm.kvmclock_ctrl();
    Ok(())
}

/// KVM without hardware support for an offset gives the guest the host's own counter, whatever is written to it.
fn warn_of_foreign_tsc(vcpu: &Vcpu, saved: &[Msr], ticks: u64) -> Result<(), GuestError> {
    /// More than passes between write and read, less than two hosts' counters usually differ by.
    const JUMP: u64 = 1 << 32;
    let wanted = saved.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.value.wrapping_add(ticks));
    let here = read_msrs(vcpu, &[MSR_TSC])?.first().map(|msr| msr.value);
    if let (Some(wanted), Some(here)) = (wanted, here)
        && here.abs_diff(wanted) > JUMP
    {
        tracing::warn!(
            wanted,
            here,
            "this host's KVM does not keep the guest's time stamp counter; it jumps"
        );
    }
    Ok(())
}

/// The area as long as this host has it. A host with more state components has a longer one; what is cut off must be empty.
fn fit_xsave(vcpu: &Vcpu, saved: &[u8]) -> Result<Vec<u8>, GuestError> {
    let here = vcpu.xsave().map_err(|error| reading("xsave area")(error.into()))?.len();
    let cut = saved.get(here..).unwrap_or_default();
    if saved.len() < 4096 || cut.iter().any(|byte| *byte != 0) {
        return Err(GuestError::new(format!(
            "the KVM guest's xsave area of {} bytes does not fit this host's of {here}",
            saved.len()
        )));
    }
    let mut area = saved.to_vec();
    area.resize(here, 0);
    Ok(area)
}

fn write_msrs(vcpu: &Vcpu, saved: &[Msr], ticks: u64) -> Result<(), GuestError> {
    for batch in saved.chunks(kvm_bindings::KVM_MAX_MSR_ENTRIES) {
        let entry = |msr: &Msr| {
            let data = if msr.index == MSR_TSC { msr.value.wrapping_add(ticks) } else { msr.value };
            kvm_msr_entry { index: msr.index, data, ..Default::default() }
        };
        let entries: Vec<_> = batch.iter().map(entry).collect();
        let mut rest = &entries[..];
        while !rest.is_empty() {
            let count =
                vcpu.state().set_msrs(&msr_list(rest)?).map_err(|error| writing("MSRs")(error.into()))?;
            let Some(refused) = rest.get(count) else { break };
            // KVM stops at the first that it refuses. One that has the value already is as good as written.
            let here = read_msrs(vcpu, &[refused.index])?;
            if here.first().is_none_or(|msr| msr.value != refused.data) {
                return Err(GuestError::new(format!(
                    "this host's KVM refuses the value {:#x} for the guest's MSR {:#x}",
                    refused.data, refused.index
                )));
            }
            rest = &rest[count + 1..];
        }
    }
    Ok(())
}
