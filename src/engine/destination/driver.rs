//! The destination's loop: takes an event, tells the machine, performs what the machine says.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, unbounded};

use super::{ReceiveOptions, Received};
use crate::engine::endpoint::{Endpoint, answer_from_journal};
use crate::engine::fault::{FaultPlan, FaultPoint};
use crate::engine::observe::{DestinationReport, RamDigest};
use crate::engine::stall::Stall;
use crate::engine::{chain, draw, wall_clock};
use crate::guest::{Guest, GuestError};
use crate::memory::snapshot::{MemoryDigest, Snapshot};
use crate::migration::destination::{Destination, DestinationAction, DestinationConfig, DestinationInput};
use crate::migration::handover::Arrival;
use crate::migration::source::PhaseName;
use crate::session::control::{ControlLink, LinkEvent};
use crate::session::destination::{DestinationEvent, DestinationSession};
use crate::session::listener::{PendingLink, QueryConnection};
use crate::session::mode::Capabilities;
use crate::session::rdma::RdmaSupport;
use crate::units::{Bytes, PAGE_SIZE};
use crate::wire::control::{Message, Setup, Token};
use crate::wire::preamble::{MigrationId, Secret};

/// How long to wait for an event when the machine has no deadline.
const IDLE: Duration = Duration::from_secs(1);
/// How long the last message may take to be confirmed.
const LAST_WORD: Duration = Duration::from_millis(500);

pub(super) fn report(migration: MigrationId, arrival: Arrival, cpu: Duration) -> DestinationReport {
    DestinationReport {
        migration,
        name: String::new(),
        arrival,
        downtime: Duration::ZERO,
        cpu,
        ram: None,
        warnings: Vec::new(),
    }
}

/// Why a migration that came in could not even begin.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("no random numbers for a new migration")]
    Draw(#[from] std::io::Error),
    #[error("the source's connection could not be taken up")]
    Link(#[from] crate::session::SessionError),
}

/// RAM at the pause: being digested while the guest runs, or digested already.
enum RamCheck {
    Running(Snapshot),
    Done(RamDigest),
}

type MakeGuest<'a, G> = &'a mut dyn FnMut(&Setup) -> Result<G, GuestError>;

pub(super) struct Driver<'a, G: Guest> {
    endpoint: &'a Endpoint,
    options: &'a ReceiveOptions,
    make: MakeGuest<'a, G>,
    id: MigrationId,
    name: String,
    secret: Secret,
    machine: Destination,
    /// `None` once it has been closed.
    link: Option<ControlLink>,
    link_events: Receiver<LinkEvent>,
    rdma: RdmaSupport,
    session: Option<DestinationSession>,
    session_events: Receiver<DestinationEvent>,
    questions: Receiver<QueryConnection>,
    /// Questions that the machine has been asked and has not answered.
    open_questions: Vec<QueryConnection>,
    guest: Option<G>,
    ram: Option<RamCheck>,
    faults: FaultPlan,
    began: Instant,
    /// Of bytes of pages, and of messages.
    idle: Stall<(u64, u64)>,
    heard: u64,
    stopped_at: u64,
    downtime: Duration,
    warnings: Vec<String>,
}

impl<'a, G: Guest> Driver<'a, G> {
    pub(super) fn new(
        endpoint: &'a Endpoint,
        options: &'a ReceiveOptions,
        id: MigrationId,
        link: PendingLink,
        make: MakeGuest<'a, G>,
    ) -> Result<Self, StartError> {
        let secret: [u8; 32] = draw()?;
        let rdma = options.rdma.clone().unwrap_or_else(RdmaSupport::of_this_host);
        let config = DestinationConfig {
            token: Token(draw()?),
            secret,
            capabilities: Capabilities::with_rdma(rdma.absent())
                .encrypting(endpoint.takes_tls(), &options.encryption)
                .names(),
            setup_within: options.setup_within,
            fence_after: options.fence_after,
        };
        let (sender, link_events) = unbounded();
        // Before the source is told that it may begin: from then on it may ask.
        let questions = endpoint.answer_for(id);
        let link = link.accept(sender).inspect_err(|_| endpoint.journal_answers(id, &questions))?;
        Ok(Self {
            endpoint,
            options,
            make,
            id,
            name: String::new(),
            secret: Secret(secret),
            machine: Destination::new(config),
            link: Some(link),
            link_events,
            rdma,
            session: None,
            session_events: never(),
            questions,
            open_questions: Vec::new(),
            guest: None,
            ram: None,
            faults: options.faults.clone(),
            began: Instant::now(),
            idle: Stall::new(Instant::now()),
            heard: 0,
            stopped_at: 0,
            downtime: Duration::ZERO,
            warnings: Vec::new(),
        })
    }

    fn tell(&mut self, input: DestinationInput) {
        self.machine.handle(self.began.elapsed(), input);
    }

    pub(super) fn run(&mut self) -> Arrival {
        loop {
            while let Some(action) = self.machine.poll_action() {
                if let DestinationAction::Finished(arrival) = action {
                    self.reached(FaultPoint::Finished);
                    return arrival;
                }
                self.perform(action);
            }
            self.wait();
        }
    }

    fn wait(&mut self) {
        let deadline = self.machine.poll_timeout().map(|deadline| self.began + deadline);
        let patience = deadline.map_or(IDLE, |deadline| deadline.saturating_duration_since(Instant::now()));
        let cancelled = self.options.cancel.0.clone();
        if cancelled.try_recv().is_ok() {
            // Whoever cancels in time is obeyed, whatever else has come by now.
            return self.tell(DestinationInput::Cancel);
        }
        select! {
            recv(self.session_events) -> event => match event {
                Ok(event) => self.session_event(event),
                Err(_) => self.session_events = never(),
            },
            recv(self.link_events) -> event => match event {
                Ok(event) => self.link_event(event),
                Err(_) => self.link_events = never(),
            },
            recv(self.questions) -> question => match question {
                Ok(question) => self.question(question),
                Err(_) => self.questions = never(),
            },
            recv(cancelled) -> asked => if asked.is_ok() { self.tell(DestinationInput::Cancel) },
            default(patience) => {}
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.machine.handle_timeout(self.began.elapsed());
        }
        self.look_for_idling();
    }

    /// A source that lives and sends nothing would keep the memory of a guest that never comes.
    fn look_for_idling(&mut self) {
        let Some(session) = self.session.as_ref().filter(|_| self.machine.phase() == PhaseName::PreCopy)
        else {
            return;
        };
        let lasts = self.idle.lasts(Instant::now(), (session.stats().wire_bytes, self.heard));
        if lasts > self.options.idle_after {
            let what = "the source lives and has sent neither pages nor messages";
            self.tell(DestinationInput::Failed(format!("{what} for {} s", lasts.as_secs())));
        }
    }

    fn session_event(&mut self, event: DestinationEvent) {
        match event {
            DestinationEvent::ChannelAttached { .. } => self.reached(FaultPoint::PreCopy),
            // Closed here, before the state is loaded.
            DestinationEvent::ChannelLost { .. } if self.session.is_none() => {}
            DestinationEvent::ChannelLost { channel, cause } => {
                self.warn(format!("channel {channel} was lost: {}", chain(&cause)));
            }
            DestinationEvent::Violation { channel, cause } => {
                self.tell(DestinationInput::Violation(format!("channel {channel}: {}", chain(&cause))));
            }
        }
    }

    fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Message(bytes) => {
                self.heard += 1;
                self.tell(match Message::decode(&bytes) {
                    Ok(message) => DestinationInput::Message(message),
                    Err(error) => {
                        DestinationInput::Violation(format!("it sent what is no message: {}", chain(&error)))
                    }
                });
            }
            LinkEvent::Interrupted { cause } => {
                self.warn(format!(
                    "the control connection was interrupted; the source may come back: {}",
                    chain(&cause)
                ));
            }
            LinkEvent::Resumed { path } => self.warn(format!("the control connection goes on over {path}")),
            LinkEvent::Lost { cause } => self.tell(DestinationInput::LinkLost(chain(&cause))),
        }
    }

    fn question(&mut self, question: QueryConnection) {
        match Message::decode(question.request()) {
            Ok(asked) => {
                self.open_questions.push(question);
                self.tell(DestinationInput::Asked(asked));
            }
            Err(_) => answer_from_journal(self.endpoint.journal(), question),
        }
    }

    fn warn(&mut self, warning: String) {
        tracing::warn!(migration = %self.id, "{warning}");
        self.warnings.push(warning);
    }

    fn reached(&mut self, point: FaultPoint) {
        if self.faults.reached(point) {
            self.tell(DestinationInput::Cancel);
        }
    }

    fn perform(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::MakeGuest(setup) => {
                let input = self.make_guest(&setup).map(|()| DestinationInput::GuestMade);
                self.answer("make the guest", input);
                self.reached(FaultPoint::SetUp);
            }
            DestinationAction::Send(message) => {
                if let Some(link) = &self.link {
                    link.send(message.encode());
                }
                if matches!(message, Message::Ready(_)) {
                    self.reached(FaultPoint::Ready);
                }
            }
            DestinationAction::LoadState { state, stopped_at } => {
                self.reached(FaultPoint::StopAndCopy);
                let input = self.load_state(&state, stopped_at).map(|()| DestinationInput::StateLoaded);
                self.answer("load the guest's state", input);
            }
            DestinationAction::Decide(token, decision) => {
                let input = self.endpoint.journal().decide(token, decision).map(DestinationInput::Decided);
                self.answer("decide about the guest", input);
                self.reached(FaultPoint::Journaled);
            }
            DestinationAction::Revoke(token) => {
                let input = self.endpoint.journal().revoke(token).map(|()| DestinationInput::Revoked);
                self.answer("give the guest back", input);
            }
            DestinationAction::Resume(_right) => {
                let input = self.resume().map(|()| DestinationInput::Resumed);
                self.answer("start the guest", input);
                self.reached(FaultPoint::Committed);
            }
            DestinationAction::Answer(message) => {
                for question in self.open_questions.drain(..) {
                    // Whoever has gone asks again.
                    let _ = question.answer(&message.encode());
                }
            }
            DestinationAction::DropGuest => self.drop_guest(),
            DestinationAction::Finished(_) => {}
        }
    }

    fn answer<E: std::error::Error>(&mut self, what: &str, input: Result<DestinationInput, E>) {
        self.tell(input.unwrap_or_else(|error| {
            DestinationInput::Failed(format!("could not {what}: {}", chain(&error)))
        }));
    }

    fn make_guest(&mut self, setup: &Setup) -> Result<(), GuestError> {
        self.name.clone_from(&setup.name);
        let available = if self.faults.no_memory { 0 } else { available_memory() };
        enough_memory(setup.touched_pages * PAGE_SIZE, available)?;
        let guest = (self.make)(setup)?;
        let memory = guest.memory();
        if *memory.layout() != setup.layout {
            return Err(GuestError::new(
                "the guest made from the source's configuration has other RAM regions than the source says",
            ));
        }
        let (sender, events) = unbounded();
        let (timeout, encryption) = (self.endpoint.link_timeout(), self.options.encryption.clone());
        let session = DestinationSession::with(memory, self.id, timeout, &self.rdma, encryption, sender);
        if let Some(link) = &self.link {
            link.set_secret(self.secret);
            self.endpoint.listener().register(self.id, self.secret, &session, link);
        }
        self.session = Some(session);
        self.session_events = events;
        self.guest = Some(guest);
        Ok(())
    }

    /// No thread writes the guest's memory any more when this is done, and its state is in place.
    fn load_state(&mut self, state: &[u8], stopped_at: u64) -> Result<(), GuestError> {
        self.close_session();
        self.stopped_at = stopped_at;
        let stopped_for = Duration::from_nanos(wall_clock().saturating_sub(stopped_at));
        let guest = self.guest.as_mut().ok_or_else(|| GuestError::new("there is no guest"))?;
        guest.load_state(state, stopped_for)?;
        if self.options.digest_ram {
            self.begin_digest();
        }
        Ok(())
    }

    fn begin_digest(&mut self) {
        let Some(guest) = &self.guest else { return };
        let memory = guest.memory();
        let begun = Snapshot::begin(&memory).map(RamCheck::Running).or_else(|cause| {
            tracing::info!("RAM is digested in the pause, not behind the running guest: {cause}");
            MemoryDigest::of_paused(&memory)
                .map(|digest| RamCheck::Done(RamDigest { digest, in_the_pause: true }))
        });
        match begun {
            Ok(check) => self.ram = Some(check),
            Err(cause) => self.warn(format!("RAM could not be digested at the destination: {cause}")),
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let guest = self.guest.as_mut().ok_or_else(|| GuestError::new("there is no guest"))?;
        guest.resume()?;
        self.downtime = Duration::from_nanos(wall_clock().saturating_sub(self.stopped_at));
        Ok(())
    }

    fn close_session(&mut self) {
        if let Some(session) = self.session.take() {
            session.close();
        }
    }

    fn drop_guest(&mut self) {
        self.close_session();
        self.ram = None;
        self.guest = None;
    }

    /// Ends every thread, and hands the guest and the report over.
    pub(super) fn close(mut self, arrival: Arrival, cpu: Duration) -> Received<G> {
        // The last word is to arrive; a source that is gone is not waited for long, it can ask the journal.
        if let Some(link) = self.link.take() {
            link.flush_and_close(LAST_WORD);
        }
        self.endpoint.listener().unregister(self.id);
        self.close_session();
        for question in self.open_questions.drain(..) {
            answer_from_journal(self.endpoint.journal(), question);
        }
        self.endpoint.journal_answers(self.id, &self.questions);
        let mut report = report(self.id, arrival, cpu);
        report.name = self.name;
        report.downtime = self.downtime;
        report.warnings = self.warnings;
        match self.ram {
            Some(RamCheck::Done(digest)) => report.ram = Some(digest),
            Some(RamCheck::Running(snapshot)) => match snapshot.finish() {
                Ok(digest) => report.ram = Some(RamDigest { digest, in_the_pause: false }),
                Err(cause) => report.warnings.push(format!("RAM could not be digested: {cause}")),
            },
            None => {}
        }
        Received { guest: self.guest, report }
    }
}

/// Refuses a guest whose touched memory this host does not have now.
fn enough_memory(needed: u64, available: u64) -> Result<(), GuestError> {
    if needed <= available {
        return Ok(());
    }
    Err(GuestError::new(format!(
        "the guest uses {} of memory and this host has {} available; free some, or choose another host",
        Bytes(needed),
        Bytes(available),
    )))
}

/// `MemAvailable` of `/proc/meminfo` (proc_meminfo(5)) in bytes; no limit where it cannot be read.
fn available_memory() -> u64 {
    let Ok(meminfo) = std::fs::read_to_string("/proc/meminfo") else { return u64::MAX };
    meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}
