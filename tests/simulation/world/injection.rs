//! What goes wrong, done to the world.

use pageferry::migration::destination::DestinationInput;
use pageferry::migration::handover::{Decision, SourceRecord};
use pageferry::migration::source::SourceInput;

use super::World;
use crate::faults::Fault;

impl World {
    pub(super) fn inject(&mut self, fault: Fault) {
        self.trace.push(format!("{} FAULT {fault:?}", self.step));
        match fault {
            Fault::KillSource => {
                if let Some(host) = self.source.take() {
                    let given_up = matches!(self.journals.source, Some(SourceRecord::Committing(_)));
                    let moved = self.destination.as_ref().and_then(|host| host.guest.as_ref());
                    self.lost |=
                        host.guest.running || (!given_up && !moved.is_some_and(|guest| guest.running));
                }
                self.question = None;
                self.network.cut_all();
                self.drop_link();
            }
            Fault::KillDestination => {
                if self.destination.take().is_some() {
                    // Once the journal says Running the guest was here, and only here.
                    self.lost |= self.journals.destination == Some(Decision::Running);
                }
                if let Some(question) = &mut self.question {
                    question.answer = Some(None);
                }
                self.network.cut_all();
                self.drop_link();
            }
            Fault::CutLink => self.link.cut(),
            Fault::LoseLink => self.drop_link(),
            Fault::LoseLinkSilently => {
                if self.link.lose() {
                    self.unnoticed = (true, true);
                }
            }
            Fault::CutChannel => self.network.cut_one(&mut self.random),
            Fault::CutAllChannels => self.network.cut_all(),
            Fault::CancelAtSource => {
                if let Some(host) = &mut self.source {
                    host.machine.handle(self.now, SourceInput::Cancel);
                }
            }
            Fault::CancelAtDestination => {
                if let Some(host) = &mut self.destination {
                    host.machine.handle(self.now, DestinationInput::Cancel);
                }
            }
            Fault::FailSource => self.fail_source = true,
            Fault::FailDestination => self.fail_destination = true,
            Fault::Stall => {
                self.pass_time();
            }
            Fault::LoseQuestions => self.lose_questions = 2,
        }
    }

    /// Both ends notice that the link is gone.
    pub(super) fn drop_link(&mut self) {
        if self.link.lose() {
            self.unnoticed = (true, true);
            while self.notice_lost_link() {}
        }
    }

    pub(super) fn notice_lost_link(&mut self) -> bool {
        let cause = || "injected".to_owned();
        if std::mem::take(&mut self.unnoticed.0) {
            if let Some(host) = &mut self.source {
                host.machine.handle(self.now, SourceInput::LinkLost(cause()));
            }
            return true;
        }
        if std::mem::take(&mut self.unnoticed.1) {
            if let Some(host) = &mut self.destination {
                host.machine.handle(self.now, DestinationInput::LinkLost(cause()));
            }
            return true;
        }
        false
    }
}
