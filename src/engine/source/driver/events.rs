//! What the session and the control link tell, and what the machine is told of it.

use std::time::{Duration, Instant};

use super::Driver;
use crate::engine::chain;
use crate::guest::Guest;
use crate::migration::source::{PhaseName, PlacedStats, SourceInput};
use crate::session::control::LinkEvent;
use crate::session::{SessionError, SessionEvent};
use crate::wire::control::Message;

/// How long a destination that takes no channels is listened to: why does it not?
const LAST_WORD: Duration = Duration::from_millis(200);

impl<G: Guest + ?Sized> Driver<'_, G> {
    pub(super) fn session_event(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Placed { round, stats } => {
                if let (PhaseName::StopAndCopy, Some(session)) = (self.machine.phase(), &self.session) {
                    session.rest();
                }
                self.downtime.mark("the last pages are placed");
                self.tell(SourceInput::Placed(
                    round,
                    PlacedStats {
                        pages: stats.pages,
                        zero_pages: stats.zero_pages,
                        bytes: stats.payload_bytes,
                        wire_bytes: stats.wire_bytes,
                    },
                ));
            }
            SessionEvent::ChannelLost { channel, path, cause } => {
                // It was closed from here for that.
                let down = self.links.is_down(&path);
                let why = if down { "the interface is down".to_owned() } else { chain(&cause) };
                self.warn(format!("channel {channel} on {path} was lost, the others carry on: {why}"));
            }
            SessionEvent::ChannelReturned { channel, path, after } => {
                self.warn(format!(
                    "channel {channel} on {path} is open again, after {:.1} s",
                    after.as_secs_f64()
                ));
            }
            SessionEvent::CarrierChanged { to, reason } => {
                tracing::info!(migration = %self.id, mode = to.name(), reason, "another mode carries the pages");
                self.warn(reason);
            }
            SessionEvent::PathLeftOut { path, reason } => {
                self.warn(format!("{path} takes no part while RDMA carries the pages: {reason}"));
            }
            SessionEvent::Failed { cause: cause @ SessionError::AllChannelsLost { .. }, owed } => {
                let down = self.links.down();
                let why = if down.is_empty() { chain(&cause) } else { format!("down: {}", down.join(", ")) };
                self.tell(SourceInput::Failed(format!(
                    "the last channel is lost with {} pages on their way: {why}",
                    owed.len()
                )));
            }
            SessionEvent::Failed { cause, .. } => self.tell(SourceInput::Failed(chain(&cause))),
        }
    }

    pub(super) fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Message(bytes) => match Message::decode(&bytes) {
                Ok(message) => {
                    match message {
                        Message::Ready(_) => self.downtime.mark("the destination loads the state"),
                        Message::Running(_) => self.downtime.mark("the destination starts the guest"),
                        _ => {}
                    }
                    self.tell(SourceInput::Message(message));
                }
                // After Commit this is doubt, before it the end: the machine knows which.
                Err(error) => {
                    let what = format!("it sent what is no message: {}", chain(&error));
                    self.tell(SourceInput::Violation(what));
                }
            },
            LinkEvent::Interrupted { cause } => {
                self.warn(format!(
                    "the control connection was interrupted and is being taken up again: {}",
                    chain(&cause)
                ));
            }
            LinkEvent::Resumed { path } => self.warn(format!("the control connection goes on over {path}")),
            LinkEvent::Lost { cause } => self.tell(SourceInput::LinkLost(chain(&cause))),
        }
    }

    /// A destination that gives up takes no channels, and says why on the link. That the link is lost too says less than that no
    /// channel opens.
    pub(super) fn hear_why(&mut self) {
        let until = Instant::now() + LAST_WORD;
        while self.machine.phase() == PhaseName::SetUp
            && let Ok(event @ LinkEvent::Message(_)) = self.link_events.recv_deadline(until)
        {
            self.link_event(event);
        }
    }
}
