//! The thread that decides at the destination: follows QEMU while it loads, and lets the guest run when it was given.
//!
//! QEMU is not asked while it loads, but listened to: it answers nobody while it waits for pages.

use std::time::Duration;

use crossbeam_channel::select;
use serde_json::json;

use super::{DestinationRelayOptions, Opened};
use crate::engine::chain;
use crate::engine::fault::{FaultPlan, FaultPoint};
use crate::engine::relay::streams::Event;
use crate::engine::relay::{RelayError, RelayOutcome};
use crate::guest::qemu::qmp::{Qmp, QmpError, QmpEvent};
use crate::guest::qemu::settings;
use crate::session::DestinationEvent;
use crate::wire::relay::RelayMessage;

/// How long a QEMU may take to end.
const ENDS: Duration = Duration::from_secs(3);

/// How long a message may take to be sent, in tests.
const MESSAGE: Duration = Duration::from_millis(100);

pub(super) struct Engine<'a> {
    qmp: &'a mut Qmp,
    opened: &'a Opened,
    options: &'a DestinationRelayOptions,
    /// QEMU has everything.
    loaded: bool,
    faults: FaultPlan,
}

/// Why it ends.
enum End {
    /// The source has given the guest up.
    Commit { run: bool },
    /// It does not come about.
    Failed(RelayError),
    /// The source is out of reach, and the guest is complete here.
    OutOfReach(RelayError),
}

impl<'a> Engine<'a> {
    pub(super) fn new(qmp: &'a mut Qmp, opened: &'a Opened, options: &'a DestinationRelayOptions) -> Self {
        Self { qmp, opened, options, loaded: false, faults: options.faults.clone() }
    }

    pub(super) fn run(&mut self, warnings: &mut Vec<String>) -> RelayOutcome {
        let streams = self.opened.streams.clone();
        let say = |message: &RelayMessage| streams.say(message);
        match self.follow(warnings) {
            End::Commit { run } => match self.resume(run) {
                Ok(()) => {
                    let _ = self.faults.reached(FaultPoint::Committed);
                    say(&RelayMessage::Running);
                    self.sent(FaultPoint::Finished);
                    RelayOutcome::Completed
                }
                Err(error) => {
                    let cause = chain(&error);
                    self.end_qemu();
                    say(&RelayMessage::Fenced(cause.clone()));
                    RelayOutcome::RolledBack { cause }
                }
            },
            End::Failed(error) => {
                let cause = chain(&error);
                say(&RelayMessage::Abort(cause.clone()));
                // A QEMU that still loads fails by that, and ends.
                self.opened.streams.finish();
                if self.loaded || !self.qmp.ends_within(ENDS) {
                    self.opened.streams.shut();
                    self.end_qemu();
                }
                RelayOutcome::RolledBack { cause }
            }
            End::OutOfReach(error) => RelayOutcome::InDoubt {
                cause: format!(
                    "{}; the guest is complete here and stopped: ask the source QEMU (query-status); if the guest does not \
                     run there and is not to, continue it here (cont), otherwise end this QEMU",
                    chain(&error)
                ),
            },
        }
    }

    fn follow(&mut self, warnings: &mut Vec<String>) -> End {
        let qmp_events = self.qmp.events();
        let events = self.opened.events.clone();
        loop {
            let asked = select! {
                recv(events) -> event => match event {
                    Ok(event) => match self.event(event, warnings) {
                        Some(end) => return end,
                        None => continue,
                    },
                    Err(_) => continue,
                },
                recv(self.opened.session_events) -> event => match event {
                    Ok(event) => self.session(event, warnings),
                    Err(_) => continue,
                },
                recv(qmp_events) -> event => match event {
                    Ok(event) => self.qemu_says(&event),
                    Err(_) => Err(self.qmp.closed().into()),
                },
                recv(self.options.cancel.0) -> _ => Err(RelayError::Cancelled),
            };
            if let Err(error) = asked {
                return End::Failed(error);
            }
        }
    }

    fn event(&mut self, event: Event, warnings: &mut Vec<String>) -> Option<End> {
        match event {
            Event::Message(RelayMessage::Commit { run }) if self.loaded => Some(End::Commit { run }),
            Event::Message(RelayMessage::Abort(cause)) => Some(End::Failed(RelayError::Peer(cause))),
            Event::Message(other) => Some(End::Failed(RelayError::OutOfTurn(other.name()))),
            // A commit may be under way.
            Event::Failed(error @ RelayError::Session(_)) if self.loaded => Some(End::OutOfReach(error)),
            Event::Failed(error) => Some(End::Failed(error)),
            // QEMU closes its connections when it is done, and when it has failed, and says which.
            Event::Broken(error) => {
                tracing::debug!("{}", chain(&error));
                None
            }
            Event::Warning(text) => {
                tracing::warn!("{text}");
                warnings.push(text);
                None
            }
        }
    }

    fn session(&self, event: DestinationEvent, warnings: &mut Vec<String>) -> Result<(), RelayError> {
        match event {
            DestinationEvent::Violation { cause, .. } => return Err(cause.into()),
            DestinationEvent::ChannelLost { channel, cause } if !self.loaded => {
                warnings.push(format!("data channel {channel} was lost: {}", chain(&cause)));
            }
            DestinationEvent::ChannelLost { .. } | DestinationEvent::ChannelAttached { .. } => {}
        }
        Ok(())
    }

    fn qemu_says(&mut self, event: &QmpEvent) -> Result<(), RelayError> {
        match event.data["status"].as_str() {
            Some("completed") if event.name == "MIGRATION" => {
                self.loaded = true;
                self.opened.streams.say(&RelayMessage::Loaded);
                self.sent(FaultPoint::Ready);
                Ok(())
            }
            Some(status @ ("failed" | "cancelled")) if event.name == "MIGRATION" => {
                Err(RelayError::Qemu { status: status.into(), error: None })
            }
            _ => Ok(()),
        }
    }

    /// A message is on its way: a fault is to come after it.
    fn sent(&mut self, point: FaultPoint) {
        if self.faults.at.is_some_and(|(at, _)| at == point) {
            std::thread::sleep(MESSAGE);
            let _ = self.faults.reached(point);
        }
    }

    fn resume(&mut self, run: bool) -> Result<(), RelayError> {
        let _ = self.faults.reached(FaultPoint::Journaled);
        if !run {
            return Ok(());
        }
        settings::resume(self.qmp)?;
        match settings::status(self.qmp)? {
            (true, _) => Ok(()),
            (false, status) => Err(RelayError::Qemu { status, error: None }),
        }
    }

    /// A copy that must never run is ended, so that nobody lets it.
    fn end_qemu(&mut self) {
        match self.qmp.execute_within("quit", &json!({}), ENDS) {
            // It closes its socket before or after the answer.
            Ok(_) | Err(QmpError::Closed { .. }) => {}
            Err(error) => tracing::warn!("the destination QEMU is to be ended: {}", chain(&error)),
        }
    }
}
