//! Sessions between a real source and a destination that lies about its memory, on a real device. They run in one host.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use pageferry::channel::rdma::Reason;
use pageferry::channel::rdma::fabric::{
    Access, Connection, Depths, Domain, Fabric, Port, Region, Segment, VerbsError,
};
use pageferry::layout::RamLayout;
use pageferry::memory::{Backing, GuestMemory, HugePages, Mapping};
use pageferry::pageset::PageSet;
use pageferry::session::caps::RateCaps;
use pageferry::session::encryption::{Encryption, EncryptionPolicy};
use pageferry::session::rdma::{HostDevices, RdmaOptions};
use pageferry::session::{
    ControlLink, ControlOptions, DestinationSession, Listener, ListenerEvent, ListenerOptions, Opening, Path,
    RdmaSupport, SessionEvent, SourceOptions, SourceSession, TransferMode,
};
use pageferry::units::{PAGE_SIZE, PageIndex, RoundId, Run};
use pageferry::wire::preamble::{MigrationId, Secret};

const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 78, 0, 1));
const PAGES: u64 = 2048;
const MIGRATION: MigrationId = MigrationId([7; 16]);
const SECRET: Secret = Secret([42; 32]);
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// It tells a key that the device never gave.
    Key,
    /// It registers half of what it says it has.
    Short,
}

/// This host's devices, of which it tells the wrong thing.
#[derive(Debug)]
struct Liar<T: ?Sized>(Lie, Arc<T>);

impl Fabric for Liar<dyn Fabric> {
    fn reason(&self) -> Option<Reason> {
        self.1.reason()
    }

    fn port_at(&self, address: IpAddr) -> Result<Port, Reason> {
        self.1.port_at(address)
    }

    fn domain(&self, device: &str) -> Result<Arc<dyn Domain>, VerbsError> {
        Ok(Arc::new(Liar(self.0, self.1.domain(device)?)))
    }

    fn reason_against_locking(&self, device: &str, bytes: u64) -> Option<Reason> {
        self.1.reason_against_locking(device, bytes)
    }
}

impl Domain for Liar<dyn Domain> {
    fn register(
        &self,
        mappings: &Arc<[Mapping]>,
        which: usize,
        offset: u64,
        bytes: u64,
        access: Access,
    ) -> Result<Arc<dyn Region>, VerbsError> {
        // Its own buffers are as they should be: only guest memory is open to the other end.
        if access != Access::RemoteWrite {
            return self.1.register(mappings, which, offset, bytes, access);
        }
        let kept = if self.0 == Lie::Short { bytes / 2 } else { bytes };
        Ok(Arc::new(Liar(self.0, self.1.register(mappings, which, offset, kept, access)?)))
    }

    fn queue_pair(&self, depths: Depths) -> Result<Connection, VerbsError> {
        self.1.queue_pair(depths)
    }

    fn watched(&self) -> [BorrowedFd<'_>; 2] {
        self.1.watched()
    }

    fn is_gone(&self) -> bool {
        self.1.is_gone()
    }
}

impl Region for Liar<dyn Region> {
    fn address(&self) -> u64 {
        self.1.address()
    }

    fn remote_key(&self) -> u32 {
        self.1.remote_key() ^ if self.0 == Lie::Key { 0xff00 } else { 0 }
    }

    fn segment(&self, offset: u64, bytes: u32) -> Result<Segment, VerbsError> {
        self.1.segment(offset, bytes)
    }
}

fn memory() -> GuestMemory {
    let layout = RamLayout::flat(PAGES * PAGE_SIZE).expect("whole pages");
    GuestMemory::allocate(layout, Backing::Memfd, HugePages::No).expect("memory")
}

fn scribble(memory: &GuestMemory, seed: u64) {
    for page in 0..PAGES {
        let word = (seed << 32 | page).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        memory.write_run(Run::new(page, 1), &word.repeat(PAGE_SIZE as usize / 8));
    }
}

#[track_caller]
fn assert_equal(one: &GuestMemory, other: &GuestMemory) {
    let (mut a, mut b) = (vec![0; PAGE_SIZE as usize], vec![0; PAGE_SIZE as usize]);
    for page in 0..PAGES {
        one.read_page(PageIndex(page), &mut a);
        other.read_page(PageIndex(page), &mut b);
        assert!(a == b, "page {page} differs");
    }
}

/// Waits for the end of a round, and answers what was told of other carriers meanwhile.
fn placed(events: &Receiver<SessionEvent>) -> Vec<(TransferMode, String)> {
    let mut changes = Vec::new();
    loop {
        match events.recv_timeout(PATIENCE).expect("an event in time") {
            SessionEvent::Placed { .. } => return changes,
            SessionEvent::CarrierChanged { to, reason } => changes.push((to, reason)),
            SessionEvent::Failed { cause, .. } => panic!("{}", pageferry::session::chain(&cause)),
            _ => {}
        }
    }
}

/// Two rounds to a destination, of which `told` is what it has told of its devices; the second with other bytes.
fn move_to(told: Arc<dyn Fabric>) -> (Vec<(TransferMode, String)>, TransferMode) {
    let (sender, incoming) = unbounded();
    let listener = Listener::bind(&[SocketAddr::from((HOST, 0))], ListenerOptions::default(), sender)
        .expect("it listens");
    let path = Path { source: Some(HOST), destination: listener.local_addresses()[0], interface: None };
    let (sender, _link_events) = unbounded();
    let dialler = std::thread::spawn(move || {
        ControlLink::dial(&[path], MIGRATION, &Opening::default(), ControlOptions::default(), sender)
    });
    let Ok(ListenerEvent::NewMigration { link, .. }) = incoming.recv_timeout(PATIENCE) else {
        panic!("a migration")
    };
    let (sender, _more_link_events) = unbounded();
    let control = link.accept(sender).expect("a control link");
    let _dialled = dialler.join().expect("no panic").expect("a control link");

    let (here, there) = (memory(), memory());
    let (sender, _destination_events) = unbounded();
    let rdma = RdmaSupport::with(told, RdmaOptions::default());
    let destination =
        DestinationSession::with(there.clone(), MIGRATION, PATIENCE, &rdma, Encryption::default(), sender);
    listener.register(MIGRATION, SECRET, &destination, &control);
    scribble(&here, 1);
    let (sender, events) = unbounded();
    let options = SourceOptions {
        encryption: EncryptionPolicy::default(),
        migration: MIGRATION,
        secret: SECRET,
        paths: vec![path],
        channels: 2,
        memory: here.clone(),
        mode: TransferMode::Rdma,
        rdma: RdmaSupport::with(Arc::new(HostDevices), RdmaOptions::default()),
        rate_caps: RateCaps::default(),
        link_timeout: PATIENCE,
        reopen: Some(PATIENCE),
        cut: None,
    };
    let session = SourceSession::open(options, sender).expect("channels");
    session.place(RoundId(0), PageSet::full(PAGES));
    let mut changes = placed(&events);
    assert_equal(&here, &there);
    let mode = session.stats().mode;
    scribble(&here, 2);
    session.place(RoundId(1), PageSet::full(PAGES));
    changes.extend(placed(&events));
    assert_equal(&here, &there);
    session.close();
    destination.close();
    (changes, mode)
}

#[test]
#[ignore = "runs in a host of scripts/rxe-testbed"]
fn a_destination_that_lies_about_its_memory_gets_it_by_tcp_and_whole() {
    let (changes, mode) = move_to(Arc::new(HostDevices));
    assert_eq!((changes, mode), (Vec::new(), TransferMode::Rdma), "without a lie");
    for lie in [Lie::Key, Lie::Short] {
        let devices: Arc<dyn Fabric> = Arc::new(HostDevices);
        let (changes, mode) = move_to(Arc::new(Liar(lie, devices)));
        assert_eq!(mode, TransferMode::Tcp, "{lie:?}: {changes:?}");
        let (to, reason) = changes.first().expect("a change of what carries");
        assert_eq!(*to, TransferMode::Tcp, "{lie:?}: {reason}");
        assert!(reason.contains("the peer's memory does not allow it"), "{lie:?}: {reason}");
    }
}
