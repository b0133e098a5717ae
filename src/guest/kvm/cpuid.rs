//! What the guest's processor can do, and whether another host's can do it too.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use zerocopy::{FromBytes, IntoBytes};

use crate::guest::GuestError;

const ENTRY_BYTES: usize = size_of::<kvm_cpuid_entry2>();

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

/// A register of feature bits: what one host has and the other lacks would break the guest. The names are those of
/// `/proc/cpuinfo`, from bit 0 on; `-` is a bit without one.
struct FeatureWord {
    leaf: u32,
    index: u32,
    register: Register,
    names: &'static str,
}

/// Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; `Documentation/virt/kvm/x86/cpuid.rst`.
const FEATURE_WORDS: &[FeatureWord] = &[
    word(
        1,
        0,
        Register::Ecx,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave - avx f16c rdrand hypervisor",
    ),
    word(
        1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse \
         sse2 ss ht tm ia64 pbe",
    ),
    word(
        7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed adx \
         smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    word(
        7,
        0,
        Register::Ecx,
        "prefetchwt1 avx512vbmi umip pku - waitpkg avx512_vbmi2 cet_ss gfni vaes vpclmulqdq avx512_vnni avx512_bitalg \
         tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd - pks",
    ),
    word(
        7,
        0,
        Register::Edx,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear - - - serialize \
         hybrid tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 ibrs stibp flush_l1d \
         arch_capabilities core_capabilities ssbd",
    ),
    word(
        7,
        1,
        Register::Eax,
        "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs",
    ),
    word(0xd, 0, Register::Eax, "x87_state sse_state avx_state - - opmask zmm_hi256 hi16_zmm - pkru_state"),
    word(0xd, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core",
    ),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(0x8000_0008, 0, Register::Ebx, "clzero irperf xsaveerptr - rdpru - - - mcommit wbnoinvd - - ibpb"),
    word(
        0x4000_0001,
        0,
        Register::Eax,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield \
         kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control",
    ),
];

const fn word(leaf: u32, index: u32, register: Register, names: &'static str) -> FeatureWord {
    FeatureWord { leaf, index, register, names }
}

/// What this host can give a guest. Nested virtualisation is left out: its state is not moved.
pub(super) fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, GuestError> {
    let table = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|error| {
        GuestError::caused("reading what this host's processor offers (KVM_GET_SUPPORTED_CPUID)", error)
    })?;
    let mut entries = table.as_slice().to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => entry.ecx &= !(1 << 5),
            0x8000_0001 => entry.ecx &= !(1 << 2),
            _ => {}
        }
    }
    Ok(entries)
}

/// The table as vCPU `number` sees it: its own APIC number in the leaves that tell it.
pub(super) fn of_vcpu(entries: &[kvm_cpuid_entry2], number: u32) -> Result<CpuId, GuestError> {
    let mut entries = entries.to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | number << 24,
            0xb | 0x1f => entry.edx = number,
            _ => {}
        }
    }
    CpuId::from_entries(&entries)
        .map_err(|error| GuestError::new(format!("a CPUID table of {} leaves: {error:?}", entries.len())))
}

pub(super) fn encode(entries: &[kvm_cpuid_entry2]) -> Vec<u8> {
    entries.as_bytes().to_vec()
}

/// A table as a peer sent it: bounded, nothing more is known of it.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<kvm_cpuid_entry2>, GuestError> {
    if !bytes.len().is_multiple_of(ENTRY_BYTES) || bytes.len() / ENTRY_BYTES > KVM_MAX_CPUID_ENTRIES {
        return Err(GuestError::new(format!(
            "the guest's CPUID table has {} bytes, which is not a whole number of leaves up to {KVM_MAX_CPUID_ENTRIES}",
            bytes.len()
        )));
    }
    let leaves = bytes.chunks_exact(ENTRY_BYTES).map(kvm_cpuid_entry2::read_from_bytes);
    leaves.collect::<Result<_, _>>().map_err(|_| GuestError::new("the guest's CPUID table cannot be read"))
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|entry| {
        let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        entry.function == leaf && (!indexed && index == 0 || indexed && entry.index == index)
    })
}

/// Whether a guest with the processor `wanted` can run on a host that offers `here`.
///
/// # Errors
/// Names the other vendor, or every feature that is missing.
pub(super) fn compare(wanted: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), GuestError> {
    let (theirs, ours) = (vendor(wanted), vendor(here));
    if theirs != ours {
        return Err(GuestError::new(format!(
            "the guest was started on a processor of {theirs:?} and cannot run on one of {ours:?}"
        )));
    }
    let missing: Vec<String> = FEATURE_WORDS.iter().flat_map(|word| missing(word, wanted, here)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(GuestError::new(format!(
        "this host's processor lacks what the guest was started with: {}; move it to a host that has them",
        missing.join(", ")
    )))
}

fn missing(word: &FeatureWord, wanted: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Vec<String> {
    let value = |entries| find(entries, word.leaf, word.index).map_or(0, |entry| word.register.of(entry));
    let lacking = value(wanted) & !value(here);
    let bits = (0..32).filter(|bit| lacking >> bit & 1 == 1);
    bits.map(|bit| match word.names.split_whitespace().nth(bit) {
        Some(name) if name != "-" => name.to_owned(),
        _ => format!("CPUID {:#x}.{} {:?} bit {bit}", word.leaf, word.index, word.register),
    })
    .collect()
}

/// The twelve letters of leaf 0.
fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let Some(leaf) = find(entries, 0, 0) else { return String::new() };
    let letters: Vec<u8> =
        [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&letters).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ..Default::default() }
    }

    #[test]
    fn every_missing_feature_is_named() {
        let wanted = [leaf(1, 1 << 12 | 1 << 25 | 1 << 16), leaf(0x8000_0001, 1)];
        let here = [leaf(1, 1 << 12)];
        let error = compare(&wanted, &here).unwrap_err().to_string();
        assert!(error.contains("CPUID 0x1.0 Ecx bit 16, aes, lahf_lm;"), "{error}");
        compare(&here, &wanted).unwrap();
    }

    #[test]
    fn names_have_their_places() {
        let name = |leaf, register, bit: usize| {
            let word =
                FEATURE_WORDS.iter().find(|word| word.leaf == leaf && word.register == register).unwrap();
            word.names.split_whitespace().nth(bit).unwrap()
        };
        assert_eq!(name(1, Register::Ecx, 31), "hypervisor");
        assert_eq!(name(1, Register::Edx, 31), "pbe");
        assert_eq!(name(7, Register::Ebx, 31), "avx512vl");
        assert_eq!(name(7, Register::Ecx, 31), "pks");
        assert_eq!(name(7, Register::Edx, 31), "ssbd");
        assert_eq!(name(0x8000_0001, Register::Ecx, 23), "perfctr_core");
        assert_eq!(name(0x8000_0001, Register::Edx, 29), "lm");
        assert_eq!(name(0x8000_0008, Register::Ebx, 12), "ibpb");
    }

    #[test]
    fn another_vendor_is_named() {
        let with = |letters: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes(letters[at..at + 4].try_into().unwrap());
            [kvm_cpuid_entry2 { ebx: word(0), edx: word(4), ecx: word(8), ..Default::default() }]
        };
        let error = compare(&with(b"GenuineIntel"), &with(b"AuthenticAMD")).unwrap_err().to_string();
        assert!(error.contains("\"GenuineIntel\"") && error.contains("\"AuthenticAMD\""), "{error}");
    }

    #[test]
    fn a_table_that_is_no_table_is_refused() {
        assert_eq!(decode(&encode(&[leaf(1, 2)])).unwrap(), [leaf(1, 2)]);
        for bytes in [1, ENTRY_BYTES + 1, ENTRY_BYTES * (KVM_MAX_CPUID_ENTRIES + 1)] {
            assert!(decode(&vec![0; bytes]).unwrap_err().to_string().contains("CPUID table"));
        }
    }
}
