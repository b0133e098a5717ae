//! The destination's end of a relay: what comes over the sessions goes on to the QEMU that waits for the guest.

mod engine;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};

use super::streams::{Event, Streams};
use super::{RelayError, RelayOutcome, RelayReport, SocketFile, layout, map, meeting_place, memory, spawn};
use crate::engine::cancel::CancelSignal;
use crate::engine::cpu::CpuMeter;
use crate::engine::endpoint::Place;
use crate::engine::fault::FaultPlan;
use crate::engine::{chain, draw};
use crate::guest::qemu::multifd::MAGIC;
use crate::guest::qemu::qmp::Qmp;
use crate::guest::qemu::ram::{self, RamBlock};
use crate::guest::qemu::settings::{self, Facts, Settings};
use crate::layout::MAX_REGIONS;
use crate::memory::GuestMemory;
use crate::pageset::PageSet;
use crate::session::{
    Capabilities, ControlLink, DestinationEvent, DestinationSession, Encryption, LinkEvent, Listener,
    PendingLink, RdmaSupport, TransferMode,
};
use crate::units::PAGE_SIZE;
use crate::wire::preamble::{MigrationId, Secret};
use crate::wire::relay::{Answer, MAX_STREAMS, Offer, RelayMessage};
use engine::Engine;

/// How long a source may take from its connection to its offer.
const OFFER: Duration = Duration::from_secs(30);
/// How often threads look whether all is over.
const LOOK: Duration = Duration::from_millis(100);
/// How long the last words may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// The most memory for packets that a source may ask for.
const MOST_STAGING: u64 = 256 << 20;
/// QEMU has no downtime limit at the destination; this is only what is written there.
const DOWNTIME: Duration = Duration::from_millis(300);

/// How one guest is taken into a waiting QEMU.
#[derive(Clone, Debug)]
pub struct DestinationRelayOptions {
    /// The QMP socket of the QEMU that waits (`-incoming defer`).
    pub qmp: PathBuf,
    /// Where QEMU is to listen; beside the QMP socket otherwise.
    pub socket: Option<PathBuf>,
    /// Whether pages are placed where that is possible.
    pub placement: bool,
    /// After which time a silent channel counts as lost.
    pub link_timeout: Duration,
    /// What this host has for RDMA; `None` looks at its devices.
    pub rdma: Option<RdmaSupport>,
    /// What this host demands of the payload.
    pub encryption: Encryption,
    /// Whether data channels may come under TLS: the host has certificates.
    pub takes_tls: bool,
    /// Stops it.
    pub cancel: CancelSignal,
    /// What is to go wrong, in tests: at `ready` (it is loaded), `journaled` (the source has given it up), `committed`, `finished`.
    pub faults: FaultPlan,
}

/// A QEMU that waits for a guest, looked at and found fit.
#[derive(Debug)]
pub struct Waiting {
    qmp: Qmp,
    facts: Facts,
}

impl Waiting {
    /// Connects to it, before anybody is told that it waits.
    ///
    /// # Errors
    /// Why it cannot take a guest.
    pub fn connect(options: &DestinationRelayOptions) -> Result<Self, RelayError> {
        let mut qmp = Qmp::connect(&options.qmp)?;
        let facts = settings::facts(&mut qmp)?;
        if facts.status != "inmigrate" {
            return Err(settings::SettingsError::NotDeferred.into());
        }
        Ok(Self { qmp, facts })
    }
}

/// Waits in a place of an endpoint for the one migration that it was made for, and takes its guest in; `None` when it was cancelled
/// before a source came. `begun` is called when one has.
pub fn take_in_place(
    waiting: Waiting,
    options: &DestinationRelayOptions,
    place: Place<'_>,
    begun: impl FnOnce(),
) -> Option<RelayReport> {
    let endpoint = place.endpoint();
    let (migration, link) = place.wait(&options.cancel)?;
    begun();
    Some(take(waiting, options, endpoint.listener(), migration, link))
}

/// Takes a guest in that a source sends ([`super::source::send`]).
///
/// It always answers with a report that says whether the guest is here.
pub fn take(
    mut waiting: Waiting,
    options: &DestinationRelayOptions,
    listener: &Listener,
    migration: MigrationId,
    pending: PendingLink,
) -> RelayReport {
    let (began, cpu) = (Instant::now(), CpuMeter::start());
    let mut report = RelayReport::new(TransferMode::Auto);
    report.outcome = run(&mut waiting, options, listener, migration, pending, &mut report);
    if !matches!(report.outcome, RelayOutcome::RolledBack { .. }) {
        report.guest_here = settings::status(&mut waiting.qmp).ok();
    }
    report.total = began.elapsed();
    report.cpu = cpu.elapsed();
    report
}

fn run(
    waiting: &mut Waiting,
    options: &DestinationRelayOptions,
    listener: &Listener,
    migration: MigrationId,
    pending: PendingLink,
    report: &mut RelayReport,
) -> RelayOutcome {
    let rolled_back = |error: &RelayError| RelayOutcome::RolledBack { cause: chain(error) };
    let (sender, link_events) = unbounded();
    let link = match pending.accept(sender) {
        Ok(link) => link,
        Err(error) => return rolled_back(&error.into()),
    };
    let agreed = offer(&link_events).and_then(|offer| Agreed::make(waiting, offer, options));
    let agreed = match agreed {
        Ok(agreed) => agreed,
        Err(error) => {
            link.send(RelayMessage::Abort(chain(&error)).encode());
            link.flush_and_close(GOODBYE);
            return rolled_back(&error);
        }
    };
    report.placed_blocks.clone_from(&agreed.placed_names);
    report.relay_because = Some(agreed.answer.because.clone()).filter(|because| !because.is_empty());
    if let Ok(mode) = agreed.mode.parse() {
        report.mode_requested = mode;
    }
    let opened = match Opened::open(agreed, (listener, migration), link, link_events, options) {
        Ok(opened) => opened,
        Err(error) => return rolled_back(&error),
    };
    let mut engine = Engine::new(&mut waiting.qmp, &opened, options);
    let outcome = engine.run(&mut report.warnings);
    listener.unregister(migration);
    opened.close(report);
    outcome
}

/// Waits for the source's offer.
fn offer(events: &Receiver<LinkEvent>) -> Result<Offer, RelayError> {
    let deadline = Instant::now() + OFFER;
    loop {
        match events.recv_deadline(deadline) {
            Ok(LinkEvent::Message(bytes)) => {
                return match RelayMessage::decode(&bytes)? {
                    RelayMessage::Offer(offer) => Ok(offer),
                    other => Err(RelayError::OutOfTurn(other.name())),
                };
            }
            Ok(LinkEvent::Lost { cause }) => return Err(cause.into()),
            Ok(LinkEvent::Interrupted { .. } | LinkEvent::Resumed { .. }) => {}
            Err(_) => return Err(RelayError::Silent(OFFER)),
        }
    }
}

/// What both ends have agreed on, with the QEMU here set for it.
struct Agreed {
    answer: Answer,
    placed_names: Vec<String>,
    memory: GuestMemory,
    /// What the memory may hold something other than zero in already.
    used: PageSet,
    channels: u32,
    mode: String,
    rdma: RdmaSupport,
    /// Where QEMU is to listen.
    socket: SocketFile,
}

impl Agreed {
    fn make(
        waiting: &mut Waiting,
        offer: Offer,
        options: &DestinationRelayOptions,
    ) -> Result<Self, RelayError> {
        let Waiting { qmp, facts } = waiting;
        let place = meeting_place(&options.qmp, options.socket.as_ref(), ".pageferry-in")?;
        if offer.tls != facts.tls {
            return Err(RelayError::TlsOnOneSide(if offer.tls { "source" } else { "destination" }));
        }
        if offer.staging_bytes == 0
            || offer.staging_bytes > MOST_STAGING
            || !offer.staging_bytes.is_multiple_of(PAGE_SIZE)
        {
            return Err(RelayError::Violation("it asks for memory for packets that cannot be"));
        }
        let blocks = ram::blocks(qmp)?;
        same_ram(&offer, &blocks)?;
        let settings = Settings {
            channels: u8::try_from(offer.channels)
                .map_err(|_| RelayError::Violation("it has too many channels"))?,
            return_path: offer.return_path,
            downtime_limit: DOWNTIME,
        };
        settings::prepare_destination(qmp, facts, settings)?;
        let placement = offer.placement && options.placement && !facts.postcopy;
        let (placed, because) = if placement {
            placeable(&offer, &blocks)
        } else {
            (Vec::new(), refused(&offer, facts, options))
        };
        let mut mappings = Vec::new();
        for (_, block) in &placed {
            mappings.push(map(block)?.ok_or(RelayError::Violation("a block that is not shared"))?);
        }
        let layout = layout(placed.iter().map(|(_, block)| block.bytes), offer.staging_bytes)?;
        let memory = memory(layout, mappings, offer.staging_bytes)?;
        let used = memory.touched().map_err(RelayError::Touched)?;
        // Where QEMU listens it may find no file.
        let _ = std::fs::remove_file(&place);
        settings::migrate_incoming(qmp, &place.to_string_lossy())?;
        let rdma = options.rdma.clone().unwrap_or_else(RdmaSupport::of_this_host);
        let answer = Answer {
            secret: draw().map_err(RelayError::Random)?,
            hypervisor: format!("QEMU {}", qmp.version()),
            placed: placed.iter().map(|(number, _)| *number).collect(),
            because,
            capabilities: Capabilities::with_rdma(rdma.absent())
                .encrypting(options.takes_tls, &options.encryption)
                .names(),
        };
        let placed_names = placed.iter().map(|(_, block)| block.name.clone()).collect();
        let socket = SocketFile(place);
        Ok(Self {
            answer,
            placed_names,
            memory,
            used,
            channels: offer.channels,
            mode: offer.mode,
            rdma,
            socket,
        })
    }
}

/// That both QEMUs were given the same RAM. What differs otherwise QEMU says itself.
fn same_ram(offer: &Offer, blocks: &[RamBlock]) -> Result<(), RelayError> {
    for theirs in offer.blocks.iter().filter(|block| block.backend) {
        let Some(ours) = blocks.iter().find(|block| block.name == theirs.name) else {
            return Err(RelayError::Missing(theirs.name.clone()));
        };
        if ours.bytes != theirs.bytes {
            let (source_bytes, destination_bytes) = (theirs.bytes, ours.bytes);
            return Err(RelayError::Size { name: theirs.name.clone(), source_bytes, destination_bytes });
        }
    }
    Ok(())
}

/// The offered blocks that can be placed, by their numbers, and why others of the guest's RAM cannot.
fn placeable<'a>(offer: &Offer, blocks: &'a [RamBlock]) -> (Vec<(u32, &'a RamBlock)>, String) {
    let (mut placed, mut because) = (Vec::new(), String::new());
    for (number, theirs) in offer.blocks.iter().enumerate().filter(|(_, block)| block.shared) {
        let Some(ours) = blocks.iter().find(|block| block.name == theirs.name) else { continue };
        match ours.private_because() {
            None if placed.len() < MAX_REGIONS - 1 => placed.push((number as u32, ours)),
            None => because = "there are more RAM blocks than can be placed".into(),
            Some(why) => because = format!("at the destination, RAM block {} {why}", ours.name),
        }
    }
    (placed, because)
}

fn refused(offer: &Offer, facts: &Facts, options: &DestinationRelayOptions) -> String {
    if facts.postcopy {
        "post-copy is on in the destination QEMU, which then has to see every page itself".into()
    } else if offer.tls {
        "QEMU encrypts its channels itself (tls-creds), so nobody can look into them".into()
    } else if !options.placement {
        "whole packets were asked for at the destination".into()
    } else {
        "the source carries whole packets".into()
    }
}

/// Everything that carries.
struct Opened {
    session: DestinationSession,
    session_events: Receiver<DestinationEvent>,
    streams: Arc<Streams>,
    link: Arc<ControlLink>,
    events: Receiver<Event>,
    threads: Vec<JoinHandle<()>>,
    over: Arc<AtomicBool>,
    _socket: SocketFile,
}

impl Opened {
    fn open(
        agreed: Agreed,
        (listener, migration): (&Listener, MigrationId),
        link: ControlLink,
        link_events: Receiver<LinkEvent>,
        options: &DestinationRelayOptions,
    ) -> Result<Self, RelayError> {
        let secret = Secret(agreed.answer.secret);
        let (sender, session_events) = unbounded();
        let memory = agreed.memory.clone();
        let (timeout, encryption) = (options.link_timeout, options.encryption.clone());
        let session = DestinationSession::with(memory, migration, timeout, &agreed.rdma, encryption, sender);
        session.used_before(&agreed.used);
        link.set_secret(secret);
        listener.register(migration, secret, &session, &link);
        let link = Arc::new(link);
        let (sender, events) = unbounded();
        let streams = Arc::new(Streams::new(link.clone(), agreed.memory, sender, false));
        let over = Arc::new(AtomicBool::new(false));
        let follow = LinkFollower {
            streams: streams.clone(),
            socket: agreed.socket.0.clone(),
            most: (agreed.channels + 1).min(MAX_STREAMS),
            over: over.clone(),
            readers: Vec::new(),
        };
        let thread = spawn("pf-relay-link", move || follow.run(&link_events))?;
        streams.say(&RelayMessage::Answer(agreed.answer));
        let (threads, _socket) = (vec![thread], agreed.socket);
        Ok(Self { session, session_events, streams, link, events, threads, over, _socket })
    }

    fn close(self, report: &mut RelayReport) {
        let stats = self.session.stats();
        report.wire_bytes = stats.wire_bytes;
        report.placed_pages = stats.placed_pages;
        report.channels = stats.channels;
        self.over.store(true, Ordering::Relaxed);
        self.streams.shut();
        for thread in self.threads {
            // One that panicked has ended as well.
            let _ = thread.join();
        }
        self.streams.join();
        self.session.close();
        drop(self.streams);
        if let Some(link) = Arc::into_inner(self.link) {
            link.flush_and_close(GOODBYE);
        }
    }
}

/// The thread that hears what the source says, and connects to QEMU for each stream that begins.
struct LinkFollower {
    streams: Arc<Streams>,
    socket: PathBuf,
    /// How many connections QEMU takes.
    most: u32,
    over: Arc<AtomicBool>,
    readers: Vec<JoinHandle<()>>,
}

impl LinkFollower {
    fn run(mut self, events: &Receiver<LinkEvent>) {
        while !self.over.load(Ordering::Relaxed) {
            let event = match events.recv_timeout(LOOK) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            match event {
                LinkEvent::Message(bytes) => {
                    if let Err(error) = self.hear(&bytes) {
                        self.streams.tell(Event::Failed(error));
                    }
                }
                LinkEvent::Interrupted { cause } => {
                    let text = format!("the control link broke, and is waited for: {}", chain(&cause));
                    self.streams.tell(Event::Warning(text));
                }
                LinkEvent::Resumed { path } => {
                    self.streams.tell(Event::Warning(format!("the control link is back, over {path}")));
                }
                LinkEvent::Lost { cause } => {
                    self.streams.tell(Event::Failed(cause.into()));
                    break;
                }
            }
        }
        for reader in self.readers {
            let _ = reader.join();
        }
    }

    fn hear(&mut self, bytes: &[u8]) -> Result<(), RelayError> {
        let message = RelayMessage::decode(bytes)?;
        if let RelayMessage::Bytes { stream, bytes } = &message
            && self.streams.get(*stream).is_none()
        {
            self.connect(*stream, bytes.starts_with(&MAGIC.to_be_bytes()))?;
        }
        match self.streams.deliver(message)? {
            None => Ok(()),
            Some(message @ (RelayMessage::Commit { .. } | RelayMessage::Abort(_))) => {
                self.streams.tell(Event::Message(message));
                Ok(())
            }
            Some(other) => Err(RelayError::OutOfTurn(other.name())),
        }
    }

    /// The first bytes of a stream are in hand, so QEMU, which looks at them, need not wait.
    fn connect(&mut self, id: u32, multifd: bool) -> Result<(), RelayError> {
        if id >= self.most {
            return Err(RelayError::Violation("it has more streams than channels"));
        }
        let failed = |cause| RelayError::Socket { path: self.socket.clone(), cause };
        let stream = self.streams.add(id, multifd, UnixStream::connect(&self.socket).map_err(failed)?)?;
        let streams = self.streams.clone();
        self.readers.push(spawn("pf-relay-in", move || streams.carry(&stream, Vec::new()))?);
        Ok(())
    }
}
