//! Who may run the guest: never two, never none.
//!
//! `Ready{token}` (the destination has everything) -> `Commit{token}` (the source, which first wrote to its journal that it
//! may no longer resume) -> `Running{token}`. Between Commit and Running the source does not know. It asks (`Query`), over
//! any path and after any restart; the destination answers Running, or burns the token in its journal and answers Fenced.
//! The journal's word on a token is written once and stands: see [`Decision`].

use crate::wire::control::{Message, Token};

/// Why a source whose destination answered `Fenced` has its guest again: the word comes without a reason.
pub const NEVER_STARTED: &str = "the destination has not started the guest and never will";

/// The right to let the guest run. There is one per host and migration; it can be moved, not copied.
#[derive(Debug, PartialEq, Eq)]
pub struct ResumeRight(());

impl ResumeRight {
    /// The right of the source, which runs the guest when a migration begins.
    pub(super) fn of_the_source() -> Self {
        Self(())
    }

    /// The right of a destination whose journal says `Running`.
    pub(super) fn decided() -> Self {
        Self(())
    }

    /// Gives the right away. From here on only [`GivenUp::fenced`] brings it back.
    pub(super) fn commit(self, token: Token) -> GivenUp {
        GivenUp { token }
    }
}

/// What the source holds once it may no longer resume.
#[derive(Debug, PartialEq, Eq)]
pub struct GivenUp {
    token: Token,
}

impl GivenUp {
    /// The token that was committed.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// The destination has burnt this token: the right is back. Any other token changes nothing.
    pub(super) fn fenced(self, token: Token) -> Result<ResumeRight, Self> {
        if token == self.token { Ok(ResumeRight(())) } else { Err(self) }
    }
}

/// What a destination's journal says of a token. The first decision that is written stands for good, whoever asks for
/// another later and from whichever process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The guest runs at the destination.
    Running,
    /// It never will.
    Fenced,
}

/// What the source's journal says of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceRecord {
    /// `Commit` may have been sent: this host may not resume the guest.
    Committing(Token),
    /// The destination runs it.
    Completed(Token),
    /// The destination never will; this host has it.
    RolledBack(Token),
}

/// How a migration ended, as the source sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the destination. What went wrong after that is a warning.
    Completed {
        /// Things that an operator should know of.
        warnings: Vec<String>,
    },
    /// The guest goes on at the source.
    RolledBack {
        /// Why.
        cause: String,
    },
    /// The destination was told to run the guest and has not answered; the guest stays paused here until it does.
    InDoubt {
        /// What to ask the destination for.
        token: Token,
    },
}

/// How a migration ended, as the destination sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The guest runs here.
    Running {
        /// The token that stands for it.
        token: Token,
    },
    /// Everything received was dropped.
    Discarded {
        /// Why.
        cause: String,
    },
}

/// The answer to a `Query` or `Commit` for a token whose guest is not held here any more (or never was): the decision that
/// is to be recorded first, if any, and the message. A caller that finds another decision recorded meanwhile asks again.
///
/// What nobody holds cannot run: a token without a decision is burnt.
#[must_use]
pub fn answer_without_guest(asked: &Message, recorded: Option<Decision>) -> (Option<Decision>, Message) {
    match asked {
        Message::Query(token) | Message::Commit(token) => match recorded {
            Some(Decision::Running) => (None, Message::Running(*token)),
            Some(Decision::Fenced) => (None, Message::Fenced(*token)),
            None => (Some(Decision::Fenced), Message::Fenced(*token)),
        },
        _ => (None, Message::Abort("only Query and Commit may be asked".into())),
    }
}
