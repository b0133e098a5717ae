//! The two hosts: a machine and a guest in a process that can be killed, and a journal that survives it.

use std::collections::VecDeque;
use std::time::Duration;

use pageferry::layout::RamLayout;
use pageferry::migration::convergence::{Limits, OnNoConvergence};
use pageferry::migration::destination::{Destination, DestinationConfig, DestinationInput};
use pageferry::migration::handover::{Decision, SourceRecord};
use pageferry::migration::source::{Patience, Source, SourceConfig, SourceInput};
use pageferry::units::PAGE_SIZE;
use pageferry::wire::control::{Setup, Token};

use crate::guest::{ModelGuest, PAGES};

pub(crate) const TOKEN: Token = Token([9; 16]);

pub(crate) struct SourceHost {
    pub(crate) machine: Source,
    pub(crate) guest: ModelGuest,
    /// Answers to actions that are done but not yet told to the machine.
    pub(crate) answers: VecDeque<SourceInput>,
    /// The link's end, noticed or not.
    pub(crate) finished: bool,
}

impl SourceHost {
    pub(crate) fn new() -> Self {
        let config = SourceConfig {
            setup: Setup {
                name: "model".into(),
                guest: "model".into(),
                config: vec![],
                layout: RamLayout::flat(PAGES * PAGE_SIZE).expect("a small layout"),
                touched_pages: PAGES,
                mode: "tcp".into(),
                capabilities: vec![],
            },
            limits: Limits {
                downtime: Duration::from_millis(30),
                rounds: 6,
                on_no_convergence: OnNoConvergence::Switch,
                handover_allowance: Duration::ZERO,
            },
            // In the simulation doubt has no end: the network always heals.
            patience: Patience { doubt: Duration::MAX, ..Patience::default() },
        };
        let answers = VecDeque::from([SourceInput::Begin]);
        Self { machine: Source::new(config), guest: ModelGuest::running(), answers, finished: false }
    }
}

pub(crate) struct DestinationHost {
    pub(crate) machine: Destination,
    pub(crate) guest: Option<ModelGuest>,
    pub(crate) answers: VecDeque<DestinationInput>,
    pub(crate) finished: bool,
}

impl DestinationHost {
    pub(crate) fn new() -> Self {
        let config = DestinationConfig {
            token: TOKEN,
            secret: [1; 32],
            capabilities: vec![],
            setup_within: Duration::from_secs(30),
            fence_after: Duration::from_secs(60),
        };
        let machine = Destination::new(config);
        Self { machine, guest: None, answers: VecDeque::new(), finished: false }
    }
}

/// What survives a kill.
#[derive(Default)]
pub(crate) struct Journals {
    pub(crate) source: Option<SourceRecord>,
    pub(crate) destination: Option<Decision>,
}

impl Journals {
    /// Writes a decision unless one stands; answers the one that stands.
    pub(crate) fn decide(&mut self, decision: Decision) -> Decision {
        *self.destination.get_or_insert(decision)
    }
}
