//! The source's loop: takes an event, tells the machine, performs what the machine says.

mod events;
mod progress;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, unbounded};

use super::MigrateOptions;
use super::links::{Downtime, Links, Rate, bits_per_second};
use crate::dirty::DirtyTracker;
use crate::engine::fault::{FaultPlan, FaultPoint};
use crate::engine::journal::Journal;
use crate::engine::observe::{ChannelRecord, Progress, RamDigest, SourceReport};
use crate::engine::{chain, wall_clock};
use crate::guest::{Guest, GuestError};
use crate::memory::GuestMemory;
use crate::memory::snapshot::MemoryDigest;
use crate::migration::handover::{Outcome, SourceRecord};
use crate::migration::source::{Source, SourceAction, SourceConfig, SourceInput};
use crate::pageset::PageSet;
use crate::session::control::{ControlLink, LinkEvent};
use crate::session::mode::{self, Capabilities, Resolved};
use crate::session::rdma::RdmaSupport;
use crate::session::source::{SourceOptions, SourceSession};
use crate::session::{EncryptionPolicy, SessionEvent};
use crate::session::{SessionError, query};
use crate::wire::control::{Accept, MAX_CONFIG_BYTES, MAX_STATE_BYTES, Message, Setup};
use crate::wire::preamble::{MigrationId, Secret};

/// How often the observer is told.
const TICK: Duration = Duration::from_millis(100);
/// How long one question about a token may take; the next comes soon enough.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);

/// What the destination is told of the guest.
pub(super) fn setup<G: Guest + ?Sized>(
    guest: &G,
    options: &MigrateOptions,
    rdma: &RdmaSupport,
) -> Result<Setup, GuestError> {
    let config = guest.config()?;
    if config.len() > MAX_CONFIG_BYTES {
        return Err(GuestError::new(format!("the guest's configuration has {} bytes", config.len())));
    }
    Ok(Setup {
        name: options.name.clone(),
        guest: options.guest.clone(),
        config,
        layout: guest.memory().layout().clone(),
        touched_pages: guest.touched()?.len(),
        mode: options.mode.name().to_owned(),
        capabilities: Capabilities::with_rdma(rdma.absent()).encrypting(false, &options.encryption).names(),
    })
}

/// Digests the RAM of a guest that has moved: it is stopped here for good.
pub(super) fn digest<G: Guest + ?Sized>(guest: &G, report: &mut SourceReport) {
    match MemoryDigest::of_paused(&guest.memory()) {
        Ok(digest) => report.ram = Some(RamDigest { digest, in_the_pause: false }),
        Err(cause) => report.warnings.push(format!("RAM could not be digested at the source: {cause}")),
    }
}

pub(super) struct Driver<'a, G: Guest + ?Sized> {
    guest: &'a mut G,
    memory: GuestMemory,
    options: &'a MigrateOptions,
    journal: &'a Journal,
    id: MigrationId,
    machine: Source,
    link: ControlLink,
    link_events: Receiver<LinkEvent>,
    session: Option<SourceSession>,
    session_events: Receiver<SessionEvent>,
    tracker: Option<Box<dyn DirtyTracker>>,
    resolved: Option<Resolved>,
    rdma: RdmaSupport,
    faults: FaultPlan,
    began: Instant,
    links: Links,
    downtime: Downtime,
    warnings: Vec<String>,
    /// When progress was last looked for, and the bytes placed and sent by then.
    seen: (Instant, u64),
    seen_sent: u64,
    rate: Rate,
}

impl<'a, G: Guest + ?Sized> Driver<'a, G> {
    pub(super) fn new(
        guest: &'a mut G,
        options: &'a MigrateOptions,
        journal: &'a Journal,
        id: MigrationId,
        (link, link_events): (ControlLink, Receiver<LinkEvent>),
        (setup, rdma): (Setup, RdmaSupport),
        began: Instant,
    ) -> Self {
        let config = SourceConfig { setup, limits: options.limits, patience: options.patience };
        Self {
            memory: guest.memory(),
            guest,
            options,
            journal,
            id,
            machine: Source::new(config),
            link,
            link_events,
            session: None,
            session_events: never(),
            tracker: None,
            resolved: None,
            rdma,
            faults: options.faults.clone(),
            began,
            links: Links::new(&options.paths),
            downtime: Downtime::default(),
            warnings: Vec::new(),
            seen: (began, 0),
            seen_sent: 0,
            rate: Rate::new(began),
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn tell(&mut self, input: SourceInput) {
        self.machine.handle(self.now(), input);
    }

    pub(super) fn run(&mut self, observer: &mut dyn FnMut(&Progress)) -> Outcome {
        self.tell(SourceInput::Begin);
        let mut next_tick = Instant::now();
        loop {
            while let Some(action) = self.machine.poll_action() {
                if let SourceAction::Finished(outcome) = action {
                    self.reached(FaultPoint::Finished);
                    observer(&self.progress());
                    return outcome;
                }
                self.perform(action);
            }
            if Instant::now() >= next_tick {
                observer(&self.progress());
                next_tick = Instant::now() + TICK;
            }
            self.wait(next_tick);
        }
    }

    /// Waits for one event, the machine's deadline or the next tick.
    fn wait(&mut self, next_tick: Instant) {
        let gone = self.options.peer_gone.0.clone();
        let deadline = self.machine.poll_timeout().map(|deadline| self.began + deadline);
        let until = deadline.map_or(next_tick, |deadline| deadline.min(next_tick));
        let cancelled = self.options.cancel.0.clone();
        if cancelled.try_recv().is_ok() {
            // Whoever cancels in time is obeyed, whatever else has come by now.
            return self.tell(SourceInput::Cancel);
        }
        select! {
            recv(self.session_events) -> event => match event {
                Ok(event) => self.session_event(event),
                // The session's threads are gone only when it was closed.
                Err(_) => self.session_events = never(),
            },
            recv(self.link_events) -> event => match event {
                Ok(event) => self.link_event(event),
                Err(_) => self.link_events = never(),
            },
            recv(cancelled) -> asked => if asked.is_ok() { self.tell(SourceInput::Cancel) },
            recv(gone) -> why => if let Ok(why) = why { self.tell(SourceInput::LinkLost(why)) },
            default(until.saturating_duration_since(Instant::now())) => {}
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.machine.handle_timeout(self.now());
        }
    }

    fn warn(&mut self, warning: String) {
        tracing::warn!(migration = %self.id, "{warning}");
        // A question that goes unanswered every half second is one warning.
        if self.warnings.last() != Some(&warning) {
            self.warnings.push(warning);
        }
    }

    fn reached(&mut self, point: FaultPoint) {
        if self.faults.reached(point) {
            self.tell(SourceInput::Cancel);
        }
    }

    fn perform(&mut self, action: SourceAction) {
        tracing::debug!(migration = %self.id, phase = self.machine.phase().name(), action = name_of(&action), "acts");
        match action {
            SourceAction::Send(message) => self.send(&message),
            SourceAction::OpenChannels(accept) => {
                let input = self.open_channels(&accept).map(|()| SourceInput::ChannelsOpen);
                if input.is_err() {
                    self.hear_why();
                }
                self.answer("open the data channels", input);
            }
            SourceAction::StartTracking => {
                let input = self.start_tracking().map(SourceInput::TrackingStarted);
                self.answer("track the guest's dirty pages", input);
            }
            SourceAction::Drain => {
                let input = self.drain();
                self.downtime.mark("the last dirty pages are found");
                self.answer("read the guest's dirty pages", input);
            }
            SourceAction::Place(round, pages) => match &self.session {
                Some(session) => {
                    session.place(round, pages);
                    self.reached(FaultPoint::PreCopy);
                }
                None => self.tell(SourceInput::Failed("there is no session".into())),
            },
            SourceAction::Throttle(percent) => {
                self.warn(format!(
                    "the guest does not converge: {percent} % of its vCPU time are taken from it"
                ));
                if let Err(error) = self.guest.throttle(percent) {
                    self.warn(format!("the guest could not be throttled: {}", chain(&error)));
                }
            }
            SourceAction::Pause => {
                if let Some(session) = &self.session {
                    session.settle();
                }
                self.downtime.begin();
                let input = self.guest.pause().map(|()| SourceInput::Paused(wall_clock()));
                self.downtime.mark("the guest pauses");
                self.answer("pause the guest", input);
                self.reached(FaultPoint::StopAndCopy);
            }
            SourceAction::SaveState => {
                let input = self.save_state().map(SourceInput::StateSaved);
                self.downtime.mark("the guest's state is saved");
                self.answer("save the guest's state", input);
            }
            SourceAction::Journal(record) => self.write_journal(record),
            SourceAction::Resume(_right) => {
                let input = self.guest.resume().map(|()| SourceInput::Resumed);
                self.answer("resume the guest", input);
            }
            SourceAction::Release => self.release(),
            SourceAction::Query(token) => {
                let asked = Message::Query(token).encode();
                let paths = self.options.peers().paths;
                let answer = query(&paths, self.id, &asked, &self.options.trust, QUERY_TIMEOUT)
                    .map_err(|error| self.warn(format!("asked, and got no answer: {}", chain(&error))))
                    .ok()
                    .and_then(|bytes| Message::decode(&bytes).ok());
                self.tell(SourceInput::Answer(answer));
            }
            SourceAction::Finished(_) => {}
        }
    }

    /// Tells the machine what came of an action.
    fn answer<E: std::error::Error>(&mut self, what: &str, input: Result<SourceInput, E>) {
        self.tell(
            input.unwrap_or_else(|error| SourceInput::Failed(format!("could not {what}: {}", chain(&error)))),
        );
    }

    fn send(&mut self, message: &Message) {
        self.link.send(message.encode());
        match message {
            Message::Setup(_) => self.reached(FaultPoint::SetUp),
            Message::Finish { .. } => self.reached(FaultPoint::Ready),
            Message::Commit(_) => {
                // The fault is to come when the message is on its way, not before.
                if self.faults.at.is_some_and(|(point, _)| point == FaultPoint::Committed) {
                    std::thread::sleep(Duration::from_millis(50));
                }
                self.reached(FaultPoint::Committed);
            }
            _ => {}
        }
    }

    fn open_channels(&mut self, accept: &Accept) -> Result<(), SessionError> {
        let theirs = Capabilities::from_names(&accept.capabilities);
        let encryption = EncryptionPolicy {
            trust: self.options.trust.clone(),
            ours: self.options.encryption.clone(),
            theirs: theirs.encryption.clone(),
            theirs_can: theirs.takes_tls,
        };
        let resolved = mode::resolve(
            self.options.mode,
            &Capabilities::with_rdma(self.rdma.absent()),
            &theirs,
            bits_per_second(&self.options.paths),
            encryption.forbids_all_rdma(&self.options.paths).as_deref(),
        );
        let secret = Secret(accept.secret);
        self.link.set_secret(secret);
        let (sender, events) = unbounded();
        let options = SourceOptions {
            migration: self.id,
            secret,
            paths: self.options.paths.clone(),
            channels: self.options.channels,
            memory: self.memory.clone(),
            mode: resolved.used,
            rdma: self.rdma.clone(),
            encryption,
            rate_caps: self.options.rate_caps.clone(),
            link_timeout: self.options.control.link_timeout,
            // A channel that a test cuts stays cut.
            reopen: self.faults.cut.is_none().then_some(self.options.reopen_within),
            cut: self.faults.cut,
        };
        self.session = Some(SourceSession::open(options, sender)?);
        self.session_events = events;
        tracing::info!(migration = %self.id, mode = resolved.used.name(), reason = resolved.reason, "channels are open");
        self.resolved = Some(resolved);
        Ok(())
    }

    fn start_tracking(&mut self) -> Result<PageSet, GuestError> {
        let tracker = self.tracker.insert(self.guest.dirty_tracker()?);
        tracker.start()?;
        // After the start: a page first touched in between is told by the tracker, one touched before is seen here.
        self.guest.touched()
    }

    fn drain(&mut self) -> Result<SourceInput, std::io::Error> {
        let mut dirty = PageSet::empty(self.memory.layout().total_pages());
        match &mut self.tracker {
            Some(tracker) => tracker.drain(&mut dirty).map(|()| SourceInput::Drained(dirty)),
            None => Err(std::io::Error::other("no tracker was started")),
        }
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        let state = self.guest.save_state()?;
        if state.len() as u64 > MAX_STATE_BYTES {
            return Err(GuestError::new(format!(
                "its state has {} bytes, more than can be sent",
                state.len()
            )));
        }
        Ok(state)
    }

    fn write_journal(&mut self, record: SourceRecord) {
        let input = self
            .journal
            .record_source(self.id, &self.options.peers(), record)
            .map(|()| SourceInput::Journaled);
        self.downtime.mark("the journal is written");
        self.answer("write the journal", input);
        if matches!(record, SourceRecord::Committing(_)) {
            self.reached(FaultPoint::Journaled);
        }
    }

    fn release(&mut self) {
        if let Some(mut tracker) = self.tracker.take()
            && let Err(error) = tracker.stop()
        {
            self.warn(format!("the dirty tracker could not be stopped: {error}"));
        }
        if self.machine.throttle() > 0
            && let Err(error) = self.guest.throttle(0)
        {
            self.warn(format!("the guest is still throttled: {}", chain(&error)));
        }
    }

    /// Ends every thread, and puts what is known into the report.
    pub(super) fn close(mut self, report: &mut SourceReport) {
        report.paused = self.downtime.elapsed();
        report.downtime_parts = self.downtime.parts();
        report.throttle = self.machine.throttle();
        report.rounds = self.machine.rounds().to_vec();
        if let Some(session) = self.session.take() {
            let stats = session.stats();
            // What carried the last round; how that came about is among the warnings.
            report.mode_used = stats.mode;
            let resolved = self.resolved.take().map_or_else(String::new, |resolved| resolved.reason);
            report.mode_reason = stats.mode_reason.unwrap_or(resolved);
            report.channels = stats.channels.into_iter().map(ChannelRecord::from).collect();
            session.close();
        }
        // A last word (Abort) is to arrive; a peer that is gone is not waited for long.
        self.link.flush_and_close(Duration::from_millis(500));
        if let Some(mut tracker) = self.tracker.take()
            && let Err(error) = tracker.stop()
        {
            self.warnings.push(format!("the dirty tracker could not be stopped: {error}"));
        }
        report.warnings.append(&mut self.warnings);
        report.warnings.append(&mut self.machine.take_warnings());
    }
}

fn name_of(action: &SourceAction) -> &'static str {
    match action {
        SourceAction::Send(message) => message.name(),
        SourceAction::OpenChannels(_) => "open channels",
        SourceAction::StartTracking => "start tracking",
        SourceAction::Drain => "drain",
        SourceAction::Place(..) => "place",
        SourceAction::Throttle(_) => "throttle",
        SourceAction::Pause => "pause",
        SourceAction::SaveState => "save state",
        SourceAction::Journal(_) => "journal",
        SourceAction::Resume(_) => "resume",
        SourceAction::Release => "release",
        SourceAction::Query(_) => "query",
        SourceAction::Finished(_) => "finished",
    }
}
