//! How a VMM gets live migration: its RAM is rust-vmm's `vm-memory`, it implements [`Guest`], and calls one function at
//! each end. The "vCPU" is a thread that counts in guest RAM, so that the example runs anywhere.
#![allow(unsafe_code)]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::dirty::{DirtyTracker, pagemap::PagemapTracker};
use pageferry::engine::destination::{ReceiveOptions, receive};
use pageferry::engine::source::{MigrateOptions, migrate};
use pageferry::engine::{endpoint::Endpoint, journal::Journal};
use pageferry::guest::{Guest, GuestError};
use pageferry::layout::{RamLayout, RamRegion};
use pageferry::memory::{GuestMemory, Mapping};
use pageferry::pageset::PageSet;
use pageferry::session::Path;
use pageferry::units::GuestAddress;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// Two regions with a hole between them, as a PC has.
const RAM: [(vm_memory::GuestAddress, usize); 2] =
    [(vm_memory::GuestAddress(0), 16 << 20), (vm_memory::GuestAddress(1 << 32), 8 << 20)];

struct Vmm {
    ram: Arc<GuestMemoryMmap>,
    memory: GuestMemory,
    /// The "register" of the vCPU: how far it has counted.
    counted: u64,
    vcpu: Option<JoinHandle<u64>>,
    stop: Arc<AtomicBool>,
    throttled: Arc<AtomicU8>,
}

impl Vmm {
    fn new() -> Result<Self, Box<dyn Error>> {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&RAM)?);
        let (mut regions, mut mappings) = (Vec::new(), Vec::new());
        for region in ram.iter() {
            regions.push(RamRegion { start: GuestAddress(region.start_addr().0), bytes: region.len() });
            let start = region.get_host_address(MemoryRegionAddress(0))?;
            let owner = Arc::clone(&ram);
            // SAFETY: `owner` keeps the region mapped, readable and writable; vm-memory makes no references to it.
            mappings.push(unsafe { Mapping::from_raw(start, region.len(), owner) }?);
        }
        let memory = GuestMemory::new(RamLayout::new(regions)?, mappings)?;
        Ok(Self { ram, memory, counted: 0, vcpu: None, stop: Arc::default(), throttled: Arc::default() })
    }
}

impl Guest for Vmm {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    // A VMM on KVM returns a `KvmLogTracker` or `KvmRingTracker` here; this one works for any memory.
    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Ok(Box::new(PagemapTracker::new(&self.memory)?))
    }

    fn config(&self) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }

    fn touched(&self) -> Result<PageSet, GuestError> {
        Ok(self.memory.touched()?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.stop.store(true, Relaxed);
        if let Some(vcpu) = self.vcpu.take() {
            self.counted = vcpu.join().map_err(|_| GuestError::new("the vCPU thread panicked"))?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.vcpu.is_some() {
            return Ok(());
        }
        self.stop.store(false, Relaxed);
        let (ram, stop) = (Arc::clone(&self.ram), Arc::clone(&self.stop));
        let (throttled, mut counted) = (Arc::clone(&self.throttled), self.counted);
        let run = move || {
            while !stop.load(Relaxed) {
                counted += 1;
                let page = vm_memory::GuestAddress(counted % 1000 * 4096);
                ram.write_obj(counted, page).expect("the first 1000 pages exist");
                std::thread::sleep(Duration::from_millis(100) / u32::from(100 - throttled.load(Relaxed)));
            }
            counted
        };
        self.vcpu = Some(std::thread::Builder::new().name("guest-vcpu0".into()).spawn(run)?);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(self.counted.to_le_bytes().to_vec())
    }

    fn load_state(&mut self, state: &[u8], _stopped_for: Duration) -> Result<(), GuestError> {
        let state =
            state.try_into().map_err(|cause| GuestError::caused("the state is not 8 bytes", cause))?;
        self.counted = u64::from_le_bytes(state);
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.throttled.store(percent.min(99), Relaxed);
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let state = tempfile::tempdir()?;
    // The destination: here a thread, in life another host.
    let journal = Journal::open(state.path().join("destination"))?;
    let endpoint = Endpoint::bind(&["127.0.0.1:0".parse()?], journal)?;
    let path = Path::to(endpoint.local_addresses()[0]);
    let (place, arrival) = (endpoint.expect(), ReceiveOptions::default());
    let mut skeleton = |_: &_| Vmm::new().map_err(|cause| GuestError::new(cause.to_string()));
    // The source, whose guest runs.
    let mut guest = Vmm::new()?;
    guest.resume()?;
    let journal = Journal::open(state.path().join("source"))?;
    let options = MigrateOptions::new("embedded", "example", vec![path]);
    let (received, report) = std::thread::scope(|threads| {
        let destination = threads.spawn(|| receive(place, &arrival, &mut skeleton));
        let report = migrate(&mut guest, &options, &journal, &mut |progress| println!("{progress:?}"));
        (destination.join(), report)
    });
    println!("{:?} after {} rounds, paused for {:?}", report.outcome, report.rounds.len(), report.paused);
    let received = received.map_err(|_| "the destination panicked")?;
    let mut moved = received.and_then(|received| received.guest).ok_or("the guest did not arrive")?;
    moved.pause()?;
    println!("it had counted to {} when it left, and to {} now", guest.counted, moved.counted);
    let page = vm_memory::GuestAddress(guest.counted % 1000 * 4096);
    assert!(moved.ram.read_obj::<u64>(page)? >= guest.counted, "what it wrote last came with it");
    Ok(())
}

#[test]
fn it_moves() {
    use pageferry::testing::{Need, require};
    assert!(!require(&[Need::Uffd]) || main().is_ok());
}
