//! The world: one step at a time, in an order that the seed chooses, with faults where the test wants them.

mod injection;

use std::time::Duration;

use pageferry::migration::destination::{DestinationAction, DestinationInput};
use pageferry::migration::handover::{Decision, Outcome, SourceRecord, answer_without_guest};
use pageferry::migration::source::{PlacedStats, SourceAction, SourceInput};
use pageferry::pageset::PageSet;
use pageferry::wire::control::Message;

use crate::faults::FaultAt;
use crate::guest::{Image, ModelGuest, PAGES};
use crate::hosts::{DestinationHost, Journals, SourceHost, TOKEN};
use crate::link::{Link, Side};
use crate::network::{Network, RoundEnd};
use crate::random::Random;

/// A schedule that has not ended by then hangs.
const MOST_STEPS: u32 = 20_000;

/// Where the guest is when nothing more happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    AtDestination,
    AtSource,
    /// The process that held the only guest was killed, as without any migration.
    LostByCrash,
}

/// A question about the token on a connection of its own.
struct Question {
    message: Message,
    answer: Option<Option<Message>>,
}

pub(crate) struct World {
    random: Random,
    now: Duration,
    step: u32,
    faults: Vec<FaultAt>,
    source: Option<SourceHost>,
    destination: Option<DestinationHost>,
    journals: Journals,
    network: Network,
    link: Link,
    /// Ends of a silently lost link that have not noticed yet.
    unnoticed: (bool, bool),
    question: Option<Question>,
    lose_questions: u32,
    fail_source: bool,
    fail_destination: bool,
    stopped: Option<Image>,
    /// Whether a kill took a guest that nobody else could have: see [`End::LostByCrash`].
    lost: bool,
    late_clear: bool,
    hasty_source: bool,
    handover_began: Option<u32>,
    trace: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64, mut faults: Vec<FaultAt>) -> Self {
        faults.sort_by_key(|fault| std::cmp::Reverse(fault.step));
        Self {
            random: Random::new(seed),
            now: Duration::ZERO,
            step: 0,
            faults,
            source: Some(SourceHost::new()),
            destination: Some(DestinationHost::new()),
            journals: Journals::default(),
            network: Network::closed(),
            link: Link::up(),
            unnoticed: (false, false),
            question: None,
            lose_questions: 0,
            fail_source: false,
            fail_destination: false,
            stopped: None,
            lost: false,
            late_clear: false,
            hasty_source: false,
            handover_began: None,
            trace: vec![format!("seed {seed}")],
        }
    }

    pub(crate) fn with_hasty_source(mut self) -> Self {
        self.hasty_source = true;
        self
    }

    pub(crate) fn with_late_clear(mut self) -> Self {
        self.late_clear = true;
        self
    }

    pub(crate) fn trace(&self) -> &[String] {
        &self.trace
    }

    pub(crate) fn steps(&self) -> u32 {
        self.step
    }

    pub(crate) fn handover_began(&self) -> Option<u32> {
        self.handover_began
    }

    /// Runs until nothing more can happen, and says where the guest is.
    pub(crate) fn run(&mut self) -> End {
        while self.step < MOST_STEPS {
            while self.faults.last().is_some_and(|fault| fault.step <= self.step) {
                if let Some(fault) = self.faults.pop() {
                    self.inject(fault.fault);
                }
            }
            self.step += 1;
            self.now += Duration::from_millis(1);
            if !self.one_step() && self.faults.is_empty() && !self.pass_time() {
                return self.end();
            }
            self.check_running();
        }
        panic!("nothing ends: {:#?}", self.trace);
    }

    /// Tries things in an order that the seed chooses, until one can be done.
    fn one_step(&mut self) -> bool {
        let first = self.random.below(9);
        (0..9).any(|offset| match (first + offset) % 9 {
            0 => self.source_action(),
            1 => self.source_answer(),
            2 => self.destination_action(),
            3 => self.destination_answer(),
            4 => self.deliver_to_destination(),
            5 => self.deliver_to_source(),
            6 => self.deliver_pages(),
            7 => self.finish_round(),
            _ => {
                self.answer_question()
                    || self.recover_source()
                    || self.notice_lost_link()
                    || self.link.reconnect()
            }
        }) | self.guest_writes()
    }

    /// Nothing can be done now: goes on to the next deadline, if there is one.
    fn pass_time(&mut self) -> bool {
        let source = self.source.as_ref().and_then(|host| host.machine.poll_timeout());
        let destination = self.destination.as_ref().and_then(|host| host.machine.poll_timeout());
        let Some(next) = source.into_iter().chain(destination).min() else { return false };
        self.now = self.now.max(next);
        let now = self.now;
        if let Some(host) = &mut self.source {
            host.machine.handle_timeout(now);
        }
        if let Some(host) = &mut self.destination {
            host.machine.handle_timeout(now);
        }
        true
    }

    // The source.

    fn source_action(&mut self) -> bool {
        let Some(host) = &mut self.source else { return false };
        let Some(action) = host.machine.poll_action() else { return false };
        self.trace.push(format!("{} source does {action:?}", self.step));
        let can_fail = matches!(
            action,
            SourceAction::OpenChannels(_)
                | SourceAction::StartTracking
                | SourceAction::Drain
                | SourceAction::Pause
                | SourceAction::SaveState
                | SourceAction::Journal(SourceRecord::Committing(_))
        );
        if can_fail && std::mem::take(&mut self.fail_source) {
            if let SourceAction::Journal(record) = action
                && self.random.below(2) == 0
            {
                // It failed after the entry was durable.
                self.journals.source = Some(record);
            }
            host.answers.push_back(SourceInput::Failed("injected".into()));
            return true;
        }
        let guest = &mut host.guest;
        let answer = match action {
            SourceAction::Send(message) => {
                if matches!(message, Message::Finish { .. }) {
                    self.handover_began.get_or_insert(self.step);
                }
                self.link.send(Side::Source, &message);
                None
            }
            SourceAction::OpenChannels(_) => {
                self.network = Network::open();
                Some(SourceInput::ChannelsOpen)
            }
            SourceAction::StartTracking => {
                guest.dirty = Some(PageSet::empty(PAGES));
                Some(SourceInput::TrackingStarted(guest.touched()))
            }
            SourceAction::Drain => {
                let told = guest.dirty.replace(PageSet::empty(PAGES)).expect("it tracks");
                Some(SourceInput::Drained(told))
            }
            SourceAction::Place(round, pages) => {
                self.network.place(round, pages);
                if self.late_clear
                    && let Some(dirty) = &mut guest.dirty
                {
                    // The mistake: pages written after the drain and before the read are forgotten.
                    dirty.clear();
                }
                None
            }
            SourceAction::Throttle(_) => None,
            SourceAction::Pause => {
                guest.running = false;
                self.stopped = Some(guest.image.clone());
                Some(SourceInput::Paused(1))
            }
            SourceAction::SaveState => Some(SourceInput::StateSaved(guest.state())),
            SourceAction::Journal(record) => {
                self.journals.source = Some(record);
                Some(SourceInput::Journaled)
            }
            SourceAction::Resume(_right) => {
                // A pause that failed, or came after the cancel, left it running.
                if !guest.running {
                    assert_eq!(
                        Some(&guest.image),
                        self.stopped.as_ref(),
                        "the guest differs from what stopped"
                    );
                }
                guest.running = true;
                Some(SourceInput::Resumed)
            }
            SourceAction::Release => {
                guest.dirty = None;
                None
            }
            SourceAction::Query(token) => {
                self.question = Some(Question { message: Message::Query(token), answer: None });
                None
            }
            SourceAction::Finished(outcome) => {
                assert!(!matches!(outcome, Outcome::InDoubt { .. }), "doubt has no end here");
                host.finished = true;
                self.drop_link();
                None
            }
        };
        if let (Some(answer), Some(host)) = (answer, &mut self.source) {
            host.answers.push_back(answer);
        }
        true
    }

    fn source_answer(&mut self) -> bool {
        let Some(host) = &mut self.source else { return false };
        let Some(answer) = host.answers.pop_front() else { return false };
        host.machine.handle(self.now, answer);
        true
    }

    fn deliver_to_source(&mut self) -> bool {
        let Some(host) = &mut self.source else { return false };
        let Some(arrived) = self.link.step(Side::Destination) else { return false };
        let Some(message) = arrived else { return true };
        self.trace.push(format!("{} source hears {message:?}", self.step));
        host.machine.handle(self.now, SourceInput::Message(message));
        true
    }

    fn guest_writes(&mut self) -> bool {
        let page = self.random.below(PAGES);
        if self.random.below(4) != 0 {
            return false;
        }
        for guest in [
            self.source.as_mut().map(|host| &mut host.guest),
            self.destination.as_mut().and_then(|host| host.guest.as_mut()),
        ]
        .into_iter()
        .flatten()
        .filter(|guest| guest.running)
        {
            guest.write(page);
        }
        false
    }

    // The pages.

    fn deliver_pages(&mut self) -> bool {
        let source = self.source.as_ref().map(|host| &host.guest.image.pages[..]);
        let Some(placed) = self.network.step(source, &mut self.random) else { return false };
        if let Some(guest) = self.destination.as_mut().and_then(|host| host.guest.as_mut()) {
            assert!(!guest.running, "nothing is placed into a running guest");
            for (page, version) in placed {
                guest.image.pages[page as usize] = version;
            }
        }
        true
    }

    fn finish_round(&mut self) -> bool {
        let Some(host) = &mut self.source else { return false };
        if self.destination.as_ref().is_none_or(|host| host.guest.is_none()) {
            self.network.cut_all();
        }
        let Some(end) = self.network.ended() else { return false };
        host.answers.push_back(match end {
            RoundEnd::Placed(round, pages) => {
                SourceInput::Placed(round, PlacedStats { pages, ..PlacedStats::default() })
            }
            RoundEnd::Failed(owed) => {
                SourceInput::Failed(format!("the last channel is lost with {} pages", owed.len()))
            }
        });
        true
    }

    // The destination.

    fn destination_action(&mut self) -> bool {
        let Some(host) = &mut self.destination else { return false };
        let Some(action) = host.machine.poll_action() else { return false };
        self.trace.push(format!("{} destination does {action:?}", self.step));
        let can_fail = matches!(
            action,
            DestinationAction::MakeGuest(_)
                | DestinationAction::LoadState { .. }
                | DestinationAction::Resume(_)
        );
        if can_fail && std::mem::take(&mut self.fail_destination) {
            host.answers.push_back(DestinationInput::Failed("injected".into()));
            return true;
        }
        let answer = match action {
            DestinationAction::MakeGuest(_) => {
                host.guest = Some(ModelGuest::skeleton());
                Some(DestinationInput::GuestMade)
            }
            DestinationAction::Send(message) => {
                self.link.send(Side::Destination, &message);
                None
            }
            DestinationAction::LoadState { state, .. } => {
                self.network = Network::closed();
                host.guest.as_mut().expect("a guest").load(&state);
                Some(DestinationInput::StateLoaded)
            }
            DestinationAction::Decide(_, decision) => {
                Some(DestinationInput::Decided(self.journals.decide(decision)))
            }
            DestinationAction::Revoke(_) => {
                self.journals.destination = Some(Decision::Fenced);
                Some(DestinationInput::Revoked)
            }
            DestinationAction::Resume(_right) => {
                let guest = host.guest.as_mut().expect("a guest");
                let stopped = self.stopped.as_ref().expect("the source stopped it");
                assert_eq!(guest.image, *stopped, "the guest differs from what stopped: {:#?}", self.trace);
                guest.running = true;
                Some(DestinationInput::Resumed)
            }
            DestinationAction::Answer(message) => {
                if let Some(question) = &mut self.question {
                    question.answer = Some(Some(message));
                }
                None
            }
            DestinationAction::DropGuest => {
                assert!(
                    !host.guest.take().is_some_and(|guest| guest.running),
                    "a running guest is not dropped"
                );
                None
            }
            DestinationAction::Finished(_) => {
                host.finished = true;
                None
            }
        };
        if let (Some(answer), Some(host)) = (answer, &mut self.destination) {
            host.answers.push_back(answer);
        }
        true
    }

    fn destination_answer(&mut self) -> bool {
        let Some(host) = &mut self.destination else { return false };
        let Some(answer) = host.answers.pop_front() else { return false };
        host.machine.handle(self.now, answer);
        true
    }

    fn deliver_to_destination(&mut self) -> bool {
        let Some(host) = &mut self.destination else { return false };
        let Some(arrived) = self.link.step(Side::Source) else { return false };
        let Some(message) = arrived else { return true };
        self.trace.push(format!("{} destination hears {message:?}", self.step));
        host.machine.handle(self.now, DestinationInput::Message(message));
        true
    }

    // Questions about the token, over connections of their own.

    fn answer_question(&mut self) -> bool {
        let Some(question) = &mut self.question else { return false };
        if self.lose_questions > 0 {
            self.lose_questions -= 1;
            // The mistake that can be switched on: silence is taken for a no.
            question.answer = Some(self.hasty_source.then_some(Message::Fenced(TOKEN)));
        }
        if let Some(answer) = question.answer.take() {
            self.question = None;
            return self.hear_answer(answer);
        }
        match &mut self.destination {
            // The guest's process lives and has the last word; it answers by an action.
            Some(host) if !host.finished => {
                let asked = question.message.clone();
                if host.answers.iter().any(|input| matches!(input, DestinationInput::Asked(_))) {
                    return false;
                }
                host.answers.push_back(DestinationInput::Asked(asked));
                self.lose_questions = 0;
                let delivered = self.destination_answer();
                // An answer that the machine owes until the journal has spoken comes later.
                delivered
            }
            // It has ended, or it was killed and something new has come up in its place: the journal answers.
            _ => {
                let (decision, answer) = answer_without_guest(&question.message, self.journals.destination);
                if let Some(decision) = decision {
                    self.journals.decide(decision);
                }
                question.answer = Some(Some(answer));
                true
            }
        }
    }

    fn hear_answer(&mut self, answer: Option<Message>) -> bool {
        self.trace.push(format!("{} the question is answered: {answer:?}", self.step));
        match &mut self.source {
            Some(host) => host.machine.handle(self.now, SourceInput::Answer(answer)),
            None => match answer {
                Some(Message::Running(token)) => self.journals.source = Some(SourceRecord::Completed(token)),
                Some(Message::Fenced(token)) => {
                    self.journals.source = Some(SourceRecord::RolledBack(token));
                    self.lost = true;
                }
                _ => {}
            },
        }
        true
    }

    /// A source that was killed after `Committing` comes back without its guest, and has the destination run it.
    fn recover_source(&mut self) -> bool {
        let committing = matches!(self.journals.source, Some(SourceRecord::Committing(_)));
        if self.source.is_some() || !committing || self.question.is_some() {
            return false;
        }
        self.question = Some(Question { message: Message::Commit(TOKEN), answer: None });
        true
    }

    // What must hold.

    fn running(&self) -> (bool, bool) {
        let source = self.source.as_ref().is_some_and(|host| host.guest.running);
        let destination =
            self.destination.as_ref().and_then(|host| host.guest.as_ref()).is_some_and(|guest| guest.running);
        (source, destination)
    }

    fn check_running(&self) {
        assert_ne!(self.running(), (true, true), "two guests run: {:#?}", self.trace);
    }

    fn end(&self) -> End {
        match self.running() {
            (true, false) => End::AtSource,
            (false, true) => End::AtDestination,
            (false, false) if self.lost => End::LostByCrash,
            (source, destination) => {
                panic!(
                    "source runs: {source}, destination runs: {destination}, at the end: {:#?}",
                    self.trace
                )
            }
        }
    }
}
