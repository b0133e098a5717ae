//! The thread that decides at the source: follows QEMU's migration, hands the guest over, or takes it back.

use std::time::{Duration, Instant};

use crossbeam_channel::{select, tick};

use super::{Opened, SourceRelayOptions};
use crate::engine::chain;
use crate::engine::fault::{FaultPlan, FaultPoint};
use crate::engine::relay::streams::Event;
use crate::engine::relay::{RelayError, RelayOutcome, RelayProgress, RelayReport};
use crate::engine::source::links::Links;
use crate::guest::qemu::qmp::{Qmp, QmpEvent};
use crate::guest::qemu::settings::{self, Migration};
use crate::wire::relay::RelayMessage;

/// How often QEMU is asked.
const ASK: Duration = Duration::from_millis(100);
/// How long the destination QEMU may take to load the guest's devices, after the source QEMU has given the guest up.
const LOADED: Duration = Duration::from_secs(300);
/// How long QEMU may take to see that its migration failed before it is told.
const SEES: Duration = Duration::from_secs(2);
/// How long a guest may take to go on here.
const GOES_ON: Duration = Duration::from_secs(30);

/// How long a message may take to be sent, in tests.
const MESSAGE: Duration = Duration::from_millis(100);

pub(super) struct Engine<'a> {
    qmp: &'a mut Qmp,
    opened: &'a Opened,
    options: &'a SourceRelayOptions,
    report: &'a mut RelayReport,
    began: Instant,
    /// Whether the guest ran when it was last looked at, before QEMU stopped it for the switchover.
    ran: bool,
    stopped: Option<Instant>,
    /// QEMU's migration is over at this end, and so is the guest's time here.
    given: Option<Instant>,
    /// The destination QEMU has everything.
    loaded: bool,
    links: Links,
    faults: FaultPlan,
}

impl<'a> Engine<'a> {
    pub(super) fn new(
        qmp: &'a mut Qmp,
        opened: &'a Opened,
        options: &'a SourceRelayOptions,
        report: &'a mut RelayReport,
        began: Instant,
    ) -> Self {
        let ran = opened.facts.running;
        let (links, faults) = (Links::new(&options.paths), options.faults.clone());
        Self {
            qmp,
            opened,
            options,
            report,
            began,
            ran,
            stopped: None,
            given: None,
            loaded: false,
            links,
            faults,
        }
    }

    pub(super) fn run(&mut self, observer: &mut dyn FnMut(&RelayProgress)) -> RelayOutcome {
        match self.follow(observer) {
            Ok(()) => self.commit(),
            Err(error) => self.roll_back(&error),
        }
    }

    /// Until QEMU has given the guest up and the destination QEMU has it.
    fn follow(&mut self, observer: &mut dyn FnMut(&RelayProgress)) -> Result<(), RelayError> {
        let qmp_events = self.qmp.events();
        settings::migrate(self.qmp, &self.opened.socket.0.to_string_lossy())?;
        let (ticks, events) = (tick(ASK), self.opened.events.clone());
        self.reached(FaultPoint::PreCopy)?;
        loop {
            select! {
                recv(events) -> event => if let Ok(event) = event {
                    self.event(event)?;
                },
                recv(qmp_events) -> event => match event {
                    Ok(event) => self.qemu_says(&event)?,
                    // What QEMU is asked next fails, and says that it has gone.
                    Err(_) => self.ask(observer)?,
                },
                recv(ticks) -> _ => self.ask(observer)?,
                recv(self.options.cancel.0) -> _ => return Err(RelayError::Cancelled),
                recv(self.options.peer_gone.0) -> cause => return Err(RelayError::Peer(cause.unwrap_or_default())),
            }
            if self.given.is_some() && self.loaded {
                self.reached(FaultPoint::Ready)?;
                return Ok(());
            }
        }
    }

    fn reached(&mut self, point: FaultPoint) -> Result<(), RelayError> {
        if self.faults.reached(point) { Err(RelayError::Cancelled) } else { Ok(()) }
    }

    fn event(&mut self, event: Event) -> Result<(), RelayError> {
        match event {
            Event::Message(RelayMessage::Loaded) => self.loaded = true,
            Event::Message(RelayMessage::Abort(cause)) => return Err(RelayError::Peer(cause)),
            Event::Message(other) => return Err(RelayError::OutOfTurn(other.name())),
            // QEMU's word for it says more, if it has one: its sockets close when it has failed itself.
            Event::Failed(error @ RelayError::Stream(_)) => {
                std::thread::sleep(ASK);
                self.judge()?;
                return Err(error);
            }
            Event::Failed(error) => return Err(error),
            // What comes back from the destination QEMU; it matters to a source QEMU that is not done, which then says so.
            Event::Broken(error) => tracing::debug!("{}", chain(&error)),
            Event::Warning(text) => {
                tracing::warn!("{text}");
                self.report.warnings.push(text);
            }
        }
        Ok(())
    }

    fn qemu_says(&mut self, event: &QmpEvent) -> Result<(), RelayError> {
        match event.name.as_str() {
            "STOP" => {
                // Of a person, or of the switchover.
                let (_, status) = settings::status(self.qmp)?;
                if matches!(status.as_str(), "finish-migrate" | "postmigrate") {
                    self.stopped = Some(Instant::now());
                } else {
                    self.ran = false;
                }
            }
            "RESUME" => self.ran = true,
            "MIGRATION" => self.judge()?,
            _ => {}
        }
        Ok(())
    }

    /// Asks QEMU how far it is.
    fn judge(&mut self) -> Result<(), RelayError> {
        let migration = settings::migration(self.qmp)?;
        self.report.qemu = migration;
        let Migration { status, error, .. } = &self.report.qemu;
        match status.as_str() {
            "completed" => {
                let since = *self.given.get_or_insert_with(Instant::now);
                if since.elapsed() > LOADED {
                    return Err(RelayError::Silent(LOADED));
                }
            }
            "failed" | "cancelled" => {
                // What made its connections end says more.
                for event in self.opened.events.try_iter() {
                    match event {
                        Event::Message(RelayMessage::Abort(cause)) => return Err(RelayError::Peer(cause)),
                        Event::Failed(RelayError::Stream(_)) => {}
                        Event::Failed(error) => return Err(error),
                        _ => {}
                    }
                }
                return Err(RelayError::Qemu { status: status.clone(), error: error.clone() });
            }
            _ => {}
        }
        Ok(())
    }

    fn ask(&mut self, observer: &mut dyn FnMut(&RelayProgress)) -> Result<(), RelayError> {
        self.judge()?;
        let (session, now) = (self.opened.carrier.session(), Instant::now());
        for interface in self.links.look(now) {
            session.interface_is_down(&interface);
        }
        let stats = session.stats();
        self.links.update(&stats, now);
        observer(&RelayProgress {
            qemu: self.report.qemu.clone(),
            mode: stats.mode,
            links: self.links.seen(Some(&stats)),
            wire_bytes: stats.wire_bytes,
            placed_pages: stats.placed_pages,
            elapsed: self.began.elapsed(),
            none_for: stats.none_for,
        });
        Ok(())
    }

    /// The guest is stopped here for good and complete there: from here on this side does not let it run again, unless the other
    /// says that it will not either.
    fn commit(&mut self) -> RelayOutcome {
        let run = self.ran;
        self.opened.carrier.streams.say(&RelayMessage::Commit { run });
        if self.faults.at.is_some_and(|(point, _)| point == FaultPoint::Committed) {
            // The fault is to come when the message is on its way, not before.
            std::thread::sleep(MESSAGE);
            let _ = self.faults.reached(FaultPoint::Committed);
        }
        let events = self.opened.events.clone();
        loop {
            let heard = select! {
                recv(events) -> event => event,
                recv(self.options.peer_gone.0) -> cause => Ok(Event::Failed(RelayError::Peer(cause.unwrap_or_default()))),
            };
            let cause = match heard {
                Ok(Event::Message(RelayMessage::Running)) => {
                    let _ = self.faults.reached(FaultPoint::Finished);
                    self.report.downtime = self.stopped.filter(|_| run).map(|stopped| stopped.elapsed());
                    return RelayOutcome::Completed;
                }
                Ok(Event::Message(RelayMessage::Fenced(cause))) => {
                    return self.take_back(&RelayError::Peer(cause));
                }
                Ok(Event::Warning(text)) => {
                    self.report.warnings.push(text);
                    continue;
                }
                // The streams have nothing more to say.
                Ok(Event::Broken(_) | Event::Failed(RelayError::Stream(_))) => continue,
                Ok(Event::Message(other)) => chain(&RelayError::OutOfTurn(other.name())),
                Ok(Event::Failed(error)) => chain(&error),
                Err(_) => "the link to the destination has ended".into(),
            };
            let cause = format!(
                "{cause}; the guest is complete at both hosts and runs at none unless the destination let it run: ask the \
                 destination QEMU (query-status); if it does not run there, end that QEMU and continue this one (cont)"
            );
            return RelayOutcome::InDoubt { cause };
        }
    }

    /// It did not come about; nothing was committed, so the guest goes on here.
    fn roll_back(&mut self, error: &RelayError) -> RelayOutcome {
        self.opened.carrier.streams.say(&RelayMessage::Abort(chain(error)));
        if matches!(error, RelayError::Cancelled) {
            // Before its sockets close, so that QEMU says cancelled and not failed.
            let _ = settings::cancel(self.qmp);
        }
        self.opened.carrier.shut();
        self.take_back(error)
    }

    /// Sees to it that the guest goes on here.
    fn take_back(&mut self, error: &RelayError) -> RelayOutcome {
        let cause = match self.goes_on() {
            Ok(()) => chain(error),
            Err(other) => format!("{}; and then: {}", chain(error), chain(&other)),
        };
        RelayOutcome::RolledBack { cause }
    }

    fn goes_on(&mut self) -> Result<(), RelayError> {
        let began = Instant::now();
        let mut told = false;
        loop {
            let migration = settings::migration(self.qmp)?;
            let (running, status) = settings::status(self.qmp)?;
            if !migration.is_under_way() && (running || !self.ran) {
                return Ok(());
            }
            if migration.is_under_way() && began.elapsed() > SEES && !told {
                told = true;
                settings::cancel(self.qmp)?;
            }
            // Given up by QEMU, and by nobody else: QEMU takes its disks back and goes on.
            let resumed = match status.as_str() {
                "postmigrate" if !migration.is_under_way() => settings::resume(self.qmp),
                _ => Ok(()),
            };
            if began.elapsed() > GOES_ON {
                resumed?;
                return Err(RelayError::Qemu { status, error: migration.error });
            }
            std::thread::sleep(ASK);
        }
    }
}
