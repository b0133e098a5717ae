//! Whole sessions over real sockets on the loopback.

#[cfg(feature = "cli")]
mod certificates;
#[cfg(feature = "cli")]
mod encryption;
mod gate;
mod hostile;
mod link;
mod namespaces;
mod proofs;
#[cfg(feature = "rdma")]
mod rdma;
mod reopening;
mod transfer;
#[cfg(feature = "cli")]
mod trust;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};

use super::*;
use crate::layout::{RamLayout, RamRegion};
use crate::memory::{Backing, GuestMemory, HugePages};
use crate::pageset::PageSet;
use crate::session::caps::RateCaps;
use crate::session::trust::PeerTrust;
use crate::units::{GuestAddress, PAGE_SIZE, PageIndex, RoundId, Run};
use crate::wire::preamble::{MigrationId, Secret};

/// Longer than anything here takes; what waits so long fails.
const PATIENCE: Duration = Duration::from_secs(20);
const MIGRATION: MigrationId = MigrationId([7; 16]);
const SECRET: Secret = Secret([42; 32]);

/// Two regions of 8 MiB and 24 MiB.
fn memory(backing: Backing) -> GuestMemory {
    let region = |start, mebibytes: u64| RamRegion { start: GuestAddress(start), bytes: mebibytes << 20 };
    let layout = RamLayout::new(vec![region(0, 8), region(1 << 32, 24)]).unwrap();
    GuestMemory::allocate(layout, backing, HugePages::No).unwrap()
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *state ^ (*state >> 29)
}

/// A page that shrinks to an eighth when `compressible`, and not at all otherwise.
fn write_page(memory: &GuestMemory, page: u64, seed: &mut u64, compressible: bool) {
    let repeats = if compressible { 8 } else { 1 };
    let words = 512 / repeats as u64;
    let bytes: Vec<u8> = (0..words).flat_map(|_| random(seed).to_le_bytes()).collect();
    memory.write_run(Run::new(page, 1), &bytes.repeat(repeats));
}

fn assert_equal(one: &GuestMemory, other: &GuestMemory) {
    let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
    for page in 0..one.layout().total_pages() {
        one.read_page(PageIndex(page), &mut a);
        other.read_page(PageIndex(page), &mut b);
        assert!(a == b, "page {page} differs");
    }
}

fn next<T>(events: &Receiver<T>) -> T {
    events.recv_timeout(PATIENCE).expect("an event in time")
}

fn listener() -> (Listener, Receiver<ListenerEvent>) {
    listener_with(ListenerOptions::default())
}

fn listener_with(options: ListenerOptions) -> (Listener, Receiver<ListenerEvent>) {
    let (sender, events) = unbounded();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    (Listener::bind(&[address], options, sender).unwrap(), events)
}

fn path_to(listener: &Listener) -> Path {
    Path {
        source: Some(Ipv4Addr::LOCALHOST.into()),
        destination: listener.local_addresses()[0],
        interface: None,
    }
}

/// A control link and both of its ends, without the secret.
struct Links {
    source: ControlLink,
    source_events: Receiver<LinkEvent>,
    destination: ControlLink,
    destination_events: Receiver<LinkEvent>,
}

fn links(listener: &Listener, incoming: &Receiver<ListenerEvent>, options: ControlOptions) -> Links {
    links_over(path_to(listener), incoming, Opening::default(), options)
}

fn links_over(
    path: Path,
    incoming: &Receiver<ListenerEvent>,
    opening: Opening,
    options: ControlOptions,
) -> Links {
    let (sender, source_events) = unbounded();
    let dialler =
        std::thread::spawn(move || ControlLink::dial(&[path], MIGRATION, &opening, options, sender));
    let ListenerEvent::NewMigration { migration, link, .. } = next(incoming) else { panic!("a migration") };
    assert_eq!(migration, MIGRATION);
    let (sender, destination_events) = unbounded();
    let destination = link.accept(sender).unwrap();
    let source = dialler.join().unwrap().unwrap();
    Links { source, source_events, destination, destination_events }
}

/// A destination that waits for channels.
struct Host {
    listener: Listener,
    memory: GuestMemory,
    session: DestinationSession,
    events: Receiver<DestinationEvent>,
    links: Links,
}

fn host(memory: GuestMemory) -> Host {
    host_with(memory, ListenerOptions::default(), Opening::default())
}

fn host_with(memory: GuestMemory, options: ListenerOptions, opening: Opening) -> Host {
    demanding_host(memory, options, opening, Encryption::default())
}

/// A destination that demands this of the payload.
fn demanding_host(
    memory: GuestMemory,
    options: ListenerOptions,
    opening: Opening,
    encryption: Encryption,
) -> Host {
    let (listener, incoming) = listener_with(options);
    let links = links_over(path_to(&listener), &incoming, opening, ControlOptions::default());
    let (sender, events) = unbounded();
    let (timeout, rdma) = (Duration::from_secs(2), RdmaSupport::off("not in this test"));
    let session = DestinationSession::with(memory.clone(), MIGRATION, timeout, &rdma, encryption, sender);
    links.source.set_secret(SECRET);
    links.destination.set_secret(SECRET);
    listener.register(MIGRATION, SECRET, &session, &links.destination);
    Host { listener, memory, session, events, links }
}

fn options(memory: &GuestMemory, host: &Host, channels: usize, mode: TransferMode) -> SourceOptions {
    SourceOptions {
        migration: MIGRATION,
        secret: SECRET,
        paths: vec![path_to(&host.listener)],
        channels,
        memory: memory.clone(),
        mode,
        rdma: RdmaSupport::off("not in this test"),
        encryption: EncryptionPolicy::default(),
        reopen: None,
        rate_caps: RateCaps::default(),
        link_timeout: Duration::from_secs(5),
        cut: None,
    }
}

/// Waits until something is so that another thread brings about.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} does not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn placed(events: &Receiver<SessionEvent>) -> (RoundId, RoundStats) {
    loop {
        match next(events) {
            SessionEvent::Placed { round, stats } => return (round, stats),
            SessionEvent::ChannelLost { .. }
            | SessionEvent::ChannelReturned { .. }
            | SessionEvent::CarrierChanged { .. }
            | SessionEvent::PathLeftOut { .. } => {}
            SessionEvent::Failed { cause, .. } => panic!("the round failed: {cause}"),
        }
    }
}

fn set(memory: &GuestMemory, runs: &[Run]) -> PageSet {
    let mut set = PageSet::empty(memory.layout().total_pages());
    set.extend(runs.iter().copied());
    set
}
