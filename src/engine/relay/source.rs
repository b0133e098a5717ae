//! The source's end of a relay: the QEMU that has the guest sends to this process, which sends on.

mod engine;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::packets::{Carrier, PlacedBlock};
use super::streams::{Event, Streams};
use super::{
    RelayError, RelayOutcome, RelayProgress, RelayReport, STAGING_BYTES, SocketFile, layout, map,
    meeting_place, memory, spawn,
};
use crate::engine::cancel::{CancelSignal, PeerGoneSignal};
use crate::engine::cpu::CpuMeter;
use crate::engine::fault::FaultPlan;
use crate::engine::source::links::bits_per_second;
use crate::engine::{chain, draw};
use crate::guest::qemu::qmp::Qmp;
use crate::guest::qemu::ram::{self, RamBlock};
use crate::guest::qemu::settings::{self, Facts, Settings};
use crate::memory::GuestMemory;
use crate::session::caps::RateCaps;
use crate::session::trust::PeerTrust;
use crate::session::{
    Capabilities, ControlLink, ControlOptions, Encryption, EncryptionPolicy, LinkEvent, Opening, Path,
    RdmaSupport, SessionEvent, SourceOptions, SourceSession, TransferMode, mode,
};
use crate::wire::preamble::{MigrationId, Secret};
use crate::wire::relay::{Answer, Block, Offer, RelayMessage};
use engine::Engine;

/// How long the destination may take to prepare its QEMU.
const ANSWER: Duration = Duration::from_secs(90);
/// How often the thread that accepts looks whether all is over.
const LOOK: Duration = Duration::from_millis(100);
/// How long the last words may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// How one guest of a QEMU is to move.
#[derive(Clone, Debug)]
pub struct SourceRelayOptions {
    /// The QMP socket of the QEMU that has the guest.
    pub qmp: PathBuf,
    /// Where to make the socket that QEMU sends to; beside the QMP socket otherwise.
    pub socket: Option<PathBuf>,
    /// How QEMU is set.
    pub settings: Settings,
    /// Whether pages are placed where that is possible.
    pub placement: bool,
    /// The migration's name; drawn where nobody else has to know it before.
    pub migration: Option<MigrationId>,
    /// The one-time secret that the destination waits for.
    pub admission: Secret,
    /// How both hosts prove which host they are.
    pub trust: PeerTrust,
    /// Ways to the destination, the preferred first. Not empty.
    pub paths: Vec<Path>,
    /// How many data channels, over all paths together.
    pub channels: usize,
    /// How memory travels.
    pub mode: TransferMode,
    /// What this host has for RDMA; `None` looks at its devices, when the mode asks for it.
    pub rdma: Option<RdmaSupport>,
    /// What this host demands of the payload.
    pub encryption: Encryption,
    /// The most bytes per second on the wire.
    pub rate_caps: RateCaps,
    /// When a connection counts as dead.
    pub control: ControlOptions,
    /// How long to go on without any data channel.
    pub reopen_within: Duration,
    /// Stops it.
    pub cancel: CancelSignal,
    /// Says that the destination's process has ended, for who can know.
    pub peer_gone: PeerGoneSignal,
    /// What is to go wrong, in tests: at `pre-copy`, `ready`, `committed`, `finished`.
    pub faults: FaultPlan,
}

/// Moves the guest of a running QEMU to the destination that waits in [`super::destination::take`].
///
/// It always answers with a report that says where the guest is. `observer` is called about ten times a second from this thread.
pub fn send(options: &SourceRelayOptions, observer: &mut dyn FnMut(&RelayProgress)) -> RelayReport {
    let (began, cpu) = (Instant::now(), CpuMeter::start());
    let mut report = RelayReport::new(options.mode);
    report.outcome = match Qmp::connect(&options.qmp) {
        Ok(mut qmp) => run(&mut qmp, options, observer, &mut report, began),
        Err(error) => RelayOutcome::RolledBack { cause: chain(&error) },
    };
    if report.total.is_zero() {
        report.total = began.elapsed();
    }
    report.cpu = cpu.elapsed();
    report
}

fn run(
    qmp: &mut Qmp,
    options: &SourceRelayOptions,
    observer: &mut dyn FnMut(&RelayProgress),
    report: &mut RelayReport,
    began: Instant,
) -> RelayOutcome {
    let outcome = match open(qmp, options, report) {
        Ok(opened) => {
            report.began = true;
            tracing::debug!(took = ?began.elapsed(), "everything is ready; QEMU is told to send");
            let mut engine = Engine::new(qmp, &opened, options, report, began);
            let outcome = engine.run(observer);
            // Without what is put away then.
            report.total = began.elapsed();
            opened.close(report);
            outcome
        }
        Err(error) => RelayOutcome::RolledBack { cause: chain(&error) },
    };
    report.guest_here = settings::status(qmp).ok();
    outcome
}

/// Everything that carries, before QEMU is told to send.
struct Opened {
    facts: Facts,
    carrier: Arc<Carrier>,
    link: Arc<ControlLink>,
    events: Receiver<Event>,
    /// Where QEMU is to send.
    socket: SocketFile,
    threads: Vec<JoinHandle<()>>,
}

impl Opened {
    /// Ends everything, in an order in which nobody waits for somebody who has gone.
    fn close(self, report: &mut RelayReport) {
        let stats = self.carrier.session().stats();
        report.wire_bytes = stats.wire_bytes;
        report.placed_pages = stats.placed_pages;
        report.channels = stats.channels;
        self.carrier.session().rest();
        self.carrier.shut();
        self.carrier.session().abort();
        self.carrier.streams.join();
        for thread in self.threads {
            // One that panicked has ended as well.
            let _ = thread.join();
        }
        drop(self.carrier);
        // Nobody else has it now.
        if let Some(link) = Arc::into_inner(self.link) {
            link.flush_and_close(GOODBYE);
        }
    }
}

/// Agrees with the destination and makes everything ready.
fn open(qmp: &mut Qmp, options: &SourceRelayOptions, report: &mut RelayReport) -> Result<Opened, RelayError> {
    let facts = settings::facts(qmp)?;
    let blocks = ram::blocks(qmp)?;
    let place = meeting_place(&options.qmp, options.socket.as_ref(), ".pageferry-out")?;
    // Before the other host is bothered.
    settings::prepare_source(qmp, &facts, options.settings)?;
    let migration = match options.migration {
        Some(migration) => migration,
        None => MigrationId(draw().map_err(RelayError::Random)?),
    };
    let (link_sender, link_events) = unbounded();
    let opening = Opening { admission: options.admission, trust: options.trust.clone() };
    let link = ControlLink::dial(&options.paths, migration, &opening, options.control, link_sender)?;
    let placement = options.placement && !facts.tls && !facts.postcopy;
    let offered: Vec<&RamBlock> = blocks.iter().collect();
    let rdma = RdmaSupport::for_mode(options.mode, options.rdma.as_ref());
    let offer = Offer {
        hypervisor: format!("QEMU {}", qmp.version()),
        blocks: (offered.iter())
            .map(|block| {
                let bytes = block.bytes;
                Block {
                    name: block.name.clone(),
                    bytes,
                    backend: block.backend,
                    shared: block.private_because().is_none(),
                }
            })
            .collect(),
        channels: u32::from(options.settings.channels),
        return_path: options.settings.return_path,
        tls: facts.tls,
        placement,
        staging_bytes: STAGING_BYTES,
        mode: options.mode.name().into(),
        capabilities: Capabilities::with_rdma(rdma.absent()).encrypting(false, &options.encryption).names(),
    };
    link.send(RelayMessage::Offer(offer).encode());
    let answer = answer(&link_events)?;
    link.set_secret(Secret(answer.secret));
    let theirs = Capabilities::from_names(&answer.capabilities);
    let encryption = EncryptionPolicy {
        trust: options.trust.clone(),
        ours: options.encryption.clone(),
        theirs: theirs.encryption.clone(),
        theirs_can: theirs.takes_tls,
    };
    let resolved = mode::resolve(
        options.mode,
        &Capabilities::with_rdma(rdma.absent()),
        &theirs,
        bits_per_second(&options.paths),
        encryption.forbids_all_rdma(&options.paths).as_deref(),
    );
    (report.mode_used, report.mode_reason) = (resolved.used, resolved.reason.to_string());
    let (memory, placed) = session_memory(&blocks, &answer)?;
    report.placed_blocks = placed.iter().map(|block| block.name.clone()).collect();
    report.relay_because = because(&blocks, &answer, &facts, options);
    let (sender, events) = unbounded();
    let (session_sender, session_events) = unbounded();
    let session = SourceSession::open(
        SourceOptions {
            migration,
            secret: Secret(answer.secret),
            paths: options.paths.clone(),
            channels: options.channels,
            memory: memory.clone(),
            mode: resolved.used,
            encryption,
            rdma,
            rate_caps: options.rate_caps.clone(),
            link_timeout: options.control.link_timeout,
            reopen: Some(options.reopen_within),
            cut: None,
        },
        session_sender,
    )?;
    let link = Arc::new(link);
    let streams = Arc::new(Streams::new(link.clone(), memory.clone(), sender, true));
    let pages = memory.layout().total_pages();
    let carrier = Arc::new(Carrier::new(streams, session, placed, pages, facts.tls));
    let socket = SocketFile(place);
    let mut opened = Opened { facts, carrier, link, events, socket, threads: Vec::new() };
    if let Err(error) = opened.start(qmp, session_events, link_events) {
        opened.close(report);
        return Err(error);
    }
    Ok(opened)
}

/// The memory of the session: QEMU's own where the destination places it, and this process's own for packets.
fn session_memory(
    blocks: &[RamBlock],
    answer: &Answer,
) -> Result<(GuestMemory, Vec<PlacedBlock>), RelayError> {
    let mut mappings = BTreeMap::new();
    for &number in &answer.placed {
        let block = blocks
            .get(number as usize)
            .ok_or(RelayError::Violation("it places a block that there is not"))?;
        let mapping =
            map(block)?.ok_or(RelayError::Violation("it places a block that it was not offered"))?;
        mappings.insert(number, mapping);
    }
    if !mappings.keys().eq(&answer.placed) {
        return Err(RelayError::Violation("it places blocks out of order"));
    }
    let layout = layout(mappings.keys().map(|number| blocks[*number as usize].bytes), STAGING_BYTES)?;
    let placed = (mappings.keys().enumerate())
        .map(|(region, number)| {
            let name = blocks[*number as usize].name.clone();
            PlacedBlock { name, pages: layout.region_run(region) }
        })
        .collect();
    let memory = memory(layout, mappings.into_values().collect(), STAGING_BYTES)?;
    Ok((memory, placed))
}

/// Why the guest's RAM is carried in whole packets, in words; `None` when its pages are placed.
fn because(
    blocks: &[RamBlock],
    answer: &Answer,
    facts: &Facts,
    options: &SourceRelayOptions,
) -> Option<String> {
    if facts.tls {
        return Some("QEMU encrypts its channels itself (tls-creds), so nobody can look into them".into());
    }
    if facts.postcopy {
        return Some("post-copy is on in QEMU, which then has to see every page itself".into());
    }
    if !options.placement {
        return Some("whole packets were asked for".into());
    }
    let here = blocks.iter().filter(|block| block.backend).find_map(|block| {
        block.private_because().map(|why| format!("at the source, RAM block {} {why}", block.name))
    });
    here.or_else(|| (!answer.because.is_empty()).then(|| answer.because.clone()))
}

/// Waits for the destination's answer.
fn answer(events: &Receiver<LinkEvent>) -> Result<Answer, RelayError> {
    let deadline = Instant::now() + ANSWER;
    loop {
        match events.recv_deadline(deadline) {
            Ok(LinkEvent::Message(bytes)) => {
                return match RelayMessage::decode(&bytes)? {
                    RelayMessage::Answer(answer) => Ok(answer),
                    RelayMessage::Abort(cause) => Err(RelayError::Peer(cause)),
                    other => Err(RelayError::OutOfTurn(other.name())),
                };
            }
            Ok(LinkEvent::Lost { cause }) => return Err(cause.into()),
            Ok(LinkEvent::Interrupted { .. } | LinkEvent::Resumed { .. }) => {}
            Err(_) => return Err(RelayError::Silent(ANSWER)),
        }
    }
}

impl Opened {
    fn start(
        &mut self,
        qmp: &mut Qmp,
        session_events: Receiver<SessionEvent>,
        link_events: Receiver<LinkEvent>,
    ) -> Result<(), RelayError> {
        let listener = listen(&self.socket.0, qmp)?;
        let carrier = self.carrier.clone();
        let user = qmp.user();
        self.threads.push(spawn("pf-relay-take", move || accept(&carrier, &listener, user))?);
        let carrier = self.carrier.clone();
        self.threads.push(spawn("pf-relay-pages", move || follow_session(&carrier, &session_events))?);
        let carrier = self.carrier.clone();
        self.threads.push(spawn("pf-relay-link", move || follow_link(&carrier, &link_events))?);
        Ok(())
    }
}

/// Listens where QEMU is to connect. Only QEMU's user may.
fn listen(path: &FilePath, qmp: &Qmp) -> Result<UnixListener, RelayError> {
    let failed = |cause| RelayError::Socket { path: path.to_owned(), cause };
    // One that a killed process left.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    if let Some(user) = qmp.user().filter(|user| *user != rustix::process::geteuid().as_raw()) {
        std::os::unix::fs::chown(path, Some(user), None).map_err(failed)?;
    }
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// The thread that takes QEMU's connections, and gives each a thread of its own.
fn accept(carrier: &Arc<Carrier>, listener: &UnixListener, user: Option<u32>) {
    let look = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
    let mut readers = Vec::new();
    while !carrier.is_over() {
        if !matches!(poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&look)), Ok(1..)) {
            continue;
        }
        let Ok((socket, _)) = listener.accept() else { continue };
        if !is_of(&socket, user) || socket.set_nonblocking(false).is_err() {
            tracing::warn!("a connection to QEMU's socket is not QEMU's, and is closed");
            continue;
        }
        let reader = carrier.clone();
        match spawn("pf-relay-in", move || reader.read(socket)) {
            Ok(thread) => readers.push(thread),
            Err(error) => carrier.streams.tell(Event::Failed(error)),
        }
    }
    // A connection without a word has no stream yet, and ends when QEMU ends it: nobody waits for its thread.
    readers.retain(std::thread::JoinHandle::is_finished);
    for reader in readers {
        let _ = reader.join();
    }
}

fn is_of(socket: &UnixStream, user: Option<u32>) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(socket).map(|peer| peer.uid.as_raw());
    user.is_none_or(|user| peer.is_ok_and(|peer| peer == user))
}

/// The thread that hears what becomes of the session's rounds.
fn follow_session(carrier: &Carrier, events: &Receiver<SessionEvent>) {
    let tell = |event| carrier.streams.tell(event);
    while !carrier.is_over() {
        match events.recv_timeout(LOOK) {
            Ok(SessionEvent::Placed { round, .. }) => carrier.placed(round),
            Ok(SessionEvent::ChannelLost { path, cause, .. }) => {
                tell(Event::Warning(format!("a data channel over {path} was lost: {}", chain(&cause))));
            }
            Ok(SessionEvent::ChannelReturned { path, after, .. }) => {
                let seconds = after.as_secs_f64();
                tell(Event::Warning(format!("a data channel over {path} came back after {seconds:.1} s")));
            }
            Ok(SessionEvent::CarrierChanged { reason, .. }) => tell(Event::Warning(reason)),
            Ok(SessionEvent::PathLeftOut { path, reason }) => {
                tell(Event::Warning(format!("{path} takes no part while RDMA carries the pages: {reason}")));
            }
            Ok(SessionEvent::Failed { cause, .. }) => tell(Event::Failed(cause.into())),
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {}
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// The thread that hears what the other end says.
fn follow_link(carrier: &Carrier, events: &Receiver<LinkEvent>) {
    while !carrier.is_over() {
        let event = match events.recv_timeout(LOOK) {
            Ok(event) => event,
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => continue,
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => return,
        };
        match event {
            LinkEvent::Message(bytes) => {
                if let Err(error) = hear(carrier, &bytes) {
                    carrier.streams.tell(Event::Failed(error));
                }
            }
            LinkEvent::Interrupted { cause } => {
                let text = format!("the control link broke, and is made again: {}", chain(&cause));
                carrier.streams.tell(Event::Warning(text));
            }
            LinkEvent::Resumed { path } => {
                carrier.streams.tell(Event::Warning(format!("the control link is back, over {path}")));
            }
            LinkEvent::Lost { cause } => return carrier.streams.tell(Event::Failed(cause.into())),
        }
    }
}

fn hear(carrier: &Carrier, bytes: &[u8]) -> Result<(), RelayError> {
    match carrier.streams.deliver(RelayMessage::decode(bytes)?)? {
        None => Ok(()),
        Some(RelayMessage::Free { page }) if carrier.staging.free(page) => Ok(()),
        Some(RelayMessage::Free { .. }) => Err(RelayError::Violation("it frees memory that no packet is in")),
        Some(
            message @ (RelayMessage::Loaded
            | RelayMessage::Running
            | RelayMessage::Fenced(_)
            | RelayMessage::Abort(_)),
        ) => {
            carrier.streams.tell(Event::Message(message));
            Ok(())
        }
        Some(other) => Err(RelayError::OutOfTurn(other.name())),
    }
}
