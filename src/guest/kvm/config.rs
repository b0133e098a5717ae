//! What the destination has to know to make the same machine, and what it believes of it.

use kvm_bindings::kvm_cpuid_entry2;
use prost::Message;

use super::{KvmConfig, MAX_VCPUS, boot, cpuid};
use crate::guest::GuestError;
use crate::guest::program::{Program, ProgramConfig};
use crate::layout::{MAX_REGIONS, RamLayout, RamRegion};
use crate::units::{Bytes, GuestAddress};

/// The only version so far. One that differs is refused, since a field unknown here would be a device left out.
const VERSION: u32 = crate::guest::STATE_VERSION;
/// Every field at its largest (80 CPUID leaves of 40 bytes, 64 regions of 24) and as much again.
const MOST_BYTES: usize = 16 << 10;
/// What a PC's first region has at least: descriptor tables, page tables and something to work with.
const LEAST_LOW_MEMORY: u64 = 16 << 20;
/// Where a PC has its interrupt controllers and KVM its own pages; RAM goes around.
const DEVICES: std::ops::Range<u64> = 0xfec0_0000..1 << 32;

/// A machine as it is described to the other host.
#[derive(Clone, Debug)]
pub(super) struct MachineConfig {
    pub layout: RamLayout,
    pub vcpus: u32,
    pub program: ProgramConfig,
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// 0 where the host does not know (its counter is not stable).
    pub tsc_khz: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Wire {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(message, repeated, tag = "2")]
    regions: Vec<WireRegion>,
    #[prost(uint32, tag = "3")]
    vcpus: u32,
    #[prost(bytes = "vec", tag = "4")]
    cpuid: Vec<u8>,
    #[prost(uint32, tag = "5")]
    tsc_khz: u32,
    #[prost(string, tag = "6")]
    program: String,
    #[prost(uint64, tag = "7")]
    bytes_per_second: u64,
    #[prost(uint64, optional, tag = "8")]
    touch_bytes: Option<u64>,
    #[prost(uint64, tag = "9")]
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct WireRegion {
    #[prost(uint64, tag = "1")]
    start: u64,
    #[prost(uint64, tag = "2")]
    bytes: u64,
}

impl MachineConfig {
    /// The machine that somebody asked for on this host.
    pub(super) fn of(config: &KvmConfig, cpuid: Vec<kvm_cpuid_entry2>) -> Result<Self, GuestError> {
        let this = Self {
            layout: config.layout.clone(),
            vcpus: config.vcpus,
            program: config.program,
            cpuid,
            tsc_khz: 0,
        };
        this.check()?;
        Ok(this)
    }

    fn check(&self) -> Result<(), GuestError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(GuestError::new(format!(
                "a KVM guest has 1 to {MAX_VCPUS} vCPUs, not {}",
                self.vcpus
            )));
        }
        let first = self.layout.regions()[0];
        if first.start.0 != 0 || first.bytes < LEAST_LOW_MEMORY {
            return Err(GuestError::new(format!(
                "a KVM guest's first RAM region starts at 0 and has at least {}; this one starts at {:#x} and has {}",
                Bytes(LEAST_LOW_MEMORY),
                first.start.0,
                Bytes(first.bytes)
            )));
        }
        let in_the_way = |region: &&RamRegion| {
            region.start.0 < DEVICES.end && region.start.0 + region.bytes > DEVICES.start
        };
        if let Some(region) = self.layout.regions().iter().find(in_the_way) {
            return Err(GuestError::new(format!(
                "the RAM region at {:#x} overlaps the devices of a PC ({:#x} to {:#x})",
                region.start.0, DEVICES.start, DEVICES.end
            )));
        }
        boot::check(&self.layout, self.vcpus.into(), &self.program)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let region = |region: &RamRegion| WireRegion { start: region.start.0, bytes: region.bytes };
        Wire {
            version: VERSION,
            regions: self.layout.regions().iter().map(region).collect(),
            vcpus: self.vcpus,
            cpuid: cpuid::encode(&self.cpuid),
            tsc_khz: self.tsc_khz,
            program: self.program.program.name().to_owned(),
            bytes_per_second: self.program.bytes_per_second,
            touch_bytes: self.program.touch_bytes,
            seed: self.program.seed,
        }
        .encode_to_vec()
    }

    /// What the peer says, checked as if a user had asked for it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, GuestError> {
        if bytes.len() > MOST_BYTES {
            return Err(GuestError::new(format!(
                "the KVM guest's configuration has {} bytes, more than the {MOST_BYTES} that one can have",
                bytes.len()
            )));
        }
        let wire = Wire::decode(bytes)
            .map_err(|error| GuestError::caused("the KVM guest's configuration cannot be decoded", error))?;
        if wire.version != VERSION {
            return Err(GuestError::new(format!(
                "the KVM guest's configuration is of version {}, and this host knows {VERSION}; run the same release \
                 on both hosts",
                wire.version
            )));
        }
        if wire.regions.len() > MAX_REGIONS {
            return Err(GuestError::new(format!("{} RAM regions are too many", wire.regions.len())));
        }
        let region =
            |region: &WireRegion| RamRegion { start: GuestAddress(region.start), bytes: region.bytes };
        let layout = RamLayout::new(wire.regions.iter().map(region).collect())
            .map_err(|error| GuestError::caused("the KVM guest's RAM regions are not a layout", error))?;
        let program =
            Program::ALL.into_iter().find(|program| program.name() == wire.program).ok_or_else(|| {
                GuestError::new(format!("the KVM guest's program {:?} is not known here", wire.program))
            })?;
        let this = Self {
            layout,
            vcpus: wire.vcpus,
            program: ProgramConfig {
                program,
                bytes_per_second: wire.bytes_per_second,
                touch_bytes: wire.touch_bytes,
                seed: wire.seed,
            },
            cpuid: cpuid::decode(&wire.cpuid)?,
            tsc_khz: wire.tsc_khz,
        };
        this.check()?;
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn honest() -> Wire {
        Wire {
            version: VERSION,
            regions: vec![WireRegion { start: 0, bytes: 16 << 20 }],
            vcpus: 1,
            program: "uniform".into(),
            ..Wire::default()
        }
    }

    #[test]
    fn a_lying_peer_is_refused_by_name() {
        let region = |start, bytes| WireRegion { start, bytes };
        let cases = [
            (Wire { version: 2, ..honest() }, "version 2"),
            (Wire { vcpus: 0, ..honest() }, "1 to 4 vCPUs, not 0"),
            (Wire { vcpus: u32::MAX, ..honest() }, "vCPUs"),
            (Wire { regions: vec![], ..honest() }, "not a layout"),
            (Wire { regions: vec![region(0, 4096); 65], ..honest() }, "65 RAM regions"),
            (Wire { regions: vec![region(0, u64::MAX - 4095)], ..honest() }, "not a layout"),
            (Wire { regions: vec![region(0, 4096)], ..honest() }, "at least 16 MiB"),
            (Wire { regions: vec![region(4096, 16 << 20)], ..honest() }, "starts at 0"),
            (Wire { regions: vec![region(0, 4 << 30)], ..honest() }, "overlaps the devices"),
            (Wire { program: "bitcoin".into(), ..honest() }, "\"bitcoin\" is not known"),
            (Wire { cpuid: vec![0; 41], ..honest() }, "CPUID table"),
            (Wire { touch_bytes: Some(4096), ..honest() }, "needs at least"),
        ];
        MachineConfig::decode(&honest().encode_to_vec()).unwrap();
        for (wire, text) in cases {
            let error = MachineConfig::decode(&wire.encode_to_vec()).unwrap_err().to_string();
            assert!(error.contains(text), "{error:?} does not say {text:?}");
        }
        let long = MachineConfig::decode(&vec![0; MOST_BYTES + 1]).unwrap_err().to_string();
        assert!(long.contains("more than the"), "{long}");
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_understood(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(config) = MachineConfig::decode(&bytes) {
                prop_assert!(config.check().is_ok());
            }
        }

        #[test]
        fn what_is_encoded_is_decoded(gib in 1..64u64, vcpus in 1..=4u32, touch in prop::option::of(1u64 << 28..1 << 32), rate: u64, seed: u64, which in 0..4usize) {
            let program = ProgramConfig { program: Program::ALL[which], bytes_per_second: rate, touch_bytes: touch, seed };
            let cpuid = vec![kvm_cpuid_entry2 { function: 1, eax: 7, ..Default::default() }];
            let config = MachineConfig { layout: super::super::pc_layout(gib << 30).unwrap(), vcpus, program, cpuid, tsc_khz: 3 };
            let back = MachineConfig::decode(&config.encode()).unwrap();
            prop_assert_eq!(back.encode(), config.encode());
            prop_assert_eq!((back.layout, back.program), (config.layout, config.program));
        }
    }
}
