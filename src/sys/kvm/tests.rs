use super::*;
use crate::sys::mapping::HugePages;
use kvm_ioctls::VcpuExit;

fn kvm() -> Option<Kvm> {
    let kvm = Kvm::new().ok();
    if kvm.is_none() {
        assert!(
            !std::env::var("PAGEFERRY_REQUIRE").unwrap_or_default().contains("kvm"),
            "/dev/kvm is required"
        );
        eprintln!("SKIP: /dev/kvm does not open");
    }
    kvm
}

const PAGES: u64 = 200;

/// A machine of [`PAGES`] pages with one real-mode vCPU that writes the byte 1 at `si`, adds 4096, halts, and so on.
fn machine(kvm: &Kvm, dirty: DirtyMode) -> (Arc<VirtualMachine>, Vcpu) {
    // mov byte [si], 1; add si, 0x1000; hlt; jmp to the start
    const CODE: [u8; 10] = [0xc6, 0x04, 0x01, 0x81, 0xc6, 0x00, 0x10, 0xf4, 0xeb, 0xf6];
    let mapping = Mapping::memfd("test", PAGES * PAGE_SIZE, HugePages::No).unwrap();
    mapping.write(0x1100, &CODE);
    let memory: Arc<[Mapping]> = vec![mapping].into();
    let machine = Arc::new(VirtualMachine::create(kvm, dirty).unwrap());
    assert_eq!(machine.add_memory(GuestAddress(0), &memory, 0).unwrap(), 0);
    let vcpu = machine.create_vcpu(0).unwrap();
    let mut sregs = vcpu.state().get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0x1000, 0x100);
    vcpu.state().set_sregs(&sregs).unwrap();
    let mut regs = vcpu.state().get_regs().unwrap();
    (regs.rip, regs.rsi, regs.rflags) = (0x100, 0x5000, 2);
    vcpu.state().set_regs(&regs).unwrap();
    (machine, vcpu)
}

fn write_pages(vcpu: &mut Vcpu, pages: u64) {
    for _ in 0..pages {
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    }
}

fn dirty(machine: &VirtualMachine) -> Vec<u64> {
    let mut bitmap = Vec::new();
    machine.dirty_log(0, &mut bitmap).unwrap();
    assert_eq!(bitmap.len(), 4);
    (0..256).filter(|page| bitmap[page / 64] >> (page % 64) & 1 == 1).map(|page| page as u64).collect()
}

#[test]
fn the_log_tells_what_was_written_and_clears_what_it_is_told() {
    let Some(kvm) = kvm() else { return };
    for initially_set in [false, true] {
        let (machine, mut vcpu) = machine(&kvm, DirtyMode::Log { initially_set });
        assert_eq!(machine.dirty_log(0, &mut Vec::new()).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        write_pages(&mut vcpu, 1);
        machine.set_dirty_logging(true).unwrap();
        if machine.dirty_log_features().initially_set {
            assert_eq!(dirty(&machine), (0..PAGES).collect::<Vec<_>>());
            machine.clear_dirty_log(0, 0, PAGES as u32, &[u64::MAX; 4]).unwrap();
        }
        assert!(dirty(&machine).is_empty());
        write_pages(&mut vcpu, 2);
        assert_eq!(dirty(&machine), [6, 7]);
        if machine.dirty_log_features().manual_clear {
            machine.clear_dirty_log(0, 0, 64, &[1 << 6]).unwrap();
            assert_eq!(dirty(&machine), [7], "what is not cleared stays");
        }
        machine.set_dirty_logging(false).unwrap();
    }
}

#[test]
fn a_clear_outside_the_slot_is_refused() {
    let Some(kvm) = kvm() else { return };
    let (machine, _vcpu) = machine(&kvm, DirtyMode::Log { initially_set: false });
    machine.set_dirty_logging(true).unwrap();
    let all = [0; 4];
    for (first, pages, bitmap) in [
        (1, 64, &all[..]),
        (0, 63, &all),
        (0, 256, &all),
        (192, 9, &all),
        (0, 200, &all[..3]),
        (u64::MAX - 63, 64, &all),
    ] {
        let error = machine.clear_dirty_log(0, first, pages, bitmap).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{first} {pages}");
    }
    assert!(machine.clear_dirty_log(1, 0, 64, &all).is_err());
    machine.clear_dirty_log(0, 192, 8, &all[..1]).unwrap();
}

#[test]
fn the_ring_tells_what_was_written_once_until_it_is_reset() {
    let Some(kvm) = kvm() else { return };
    let made = VirtualMachine::create(&kvm, DirtyMode::Ring { entries: 256 });
    if made.is_err_and(|error| error.kind() == io::ErrorKind::Unsupported) {
        return eprintln!("SKIP: no dirty ring");
    }
    let (machine, mut vcpu) = machine(&kvm, DirtyMode::Ring { entries: 256 });
    let mut ring = vcpu.dirty_ring().unwrap();
    machine.set_dirty_logging(true).unwrap();
    let mut harvest = || {
        let mut found = Vec::new();
        let count = ring.harvest(|slot, page| found.push((slot, page)));
        assert_eq!(count as usize, found.len());
        found
    };
    write_pages(&mut vcpu, 2);
    assert_eq!(harvest(), [(0, 5), (0, 6)]);
    assert_eq!(harvest(), []);
    assert_eq!(machine.reset_dirty_rings().unwrap(), 2);
    // 16 writes wrap around the 64 KiB that `si` reaches.
    write_pages(&mut vcpu, 16);
    let mut again: Vec<_> = harvest().into_iter().map(|(_, page)| page).collect();
    again.sort_unstable();
    assert_eq!(again, (0..16).collect::<Vec<_>>());
}

#[test]
fn a_ring_of_a_wrong_size_is_named() {
    let Some(kvm) = kvm() else { return };
    for entries in [0, 128, 300, 1 << 30] {
        let error = VirtualMachine::create(&kvm, DirtyMode::Ring { entries }).unwrap_err();
        assert!(
            error.to_string().contains("power of two") || error.kind() == io::ErrorKind::Unsupported,
            "{error}"
        );
    }
}

#[test]
fn a_kicked_vcpu_does_not_run() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = machine(&kvm, DirtyMode::None);
    let kicker = vcpu.kicker().unwrap();
    kicker.set(true);
    assert_eq!(vcpu.run().unwrap_err().raw_os_error(), Some(libc::EINTR));
    kicker.set(false);
    write_pages(&mut vcpu, 1);
}

#[test]
fn the_xsave_area_is_read_and_written_whole() {
    let Some(kvm) = kvm() else { return };
    let (_machine, vcpu) = machine(&kvm, DirtyMode::None);
    let area = vcpu.xsave().unwrap();
    assert!(area.len() >= 4096);
    vcpu.set_xsave(&area).unwrap();
    let error = vcpu.set_xsave(&area[1..]).unwrap_err();
    assert!(error.to_string().contains("4095") || area.len() > 4096, "{error}");
}
