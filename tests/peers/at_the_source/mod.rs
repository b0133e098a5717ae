//! The real source against scripted destinations.

mod doubt;
mod receipts;
mod silence;
mod strangers;
mod words;

use std::net::SocketAddr;
use std::time::Duration;

use pageferry::engine::journal::Journal;
use pageferry::engine::observe::SourceReport;
use pageferry::engine::source::{MigrateOptions, migrate};
use pageferry::migration::convergence::Limits;
use pageferry::migration::handover::Outcome;
use pageferry::migration::source::Patience;
use pageferry::session::TransferMode;
use pageferry::session::control::ControlOptions;
use pageferry::session::path::Path;

use crate::guest::{KIND, StampingGuest};
use crate::within;

/// Options of a source that waits for longer than a test may take: whatever ends, ends because of what was said.
pub(crate) fn patient(address: SocketAddr) -> MigrateOptions {
    let long = Duration::from_secs(30);
    MigrateOptions {
        mode: TransferMode::Tcp,
        // One round, then the switchover, however slow the machine.
        limits: Limits { downtime: long, ..Limits::default() },
        patience: Patience {
            setup: long,
            placing: long,
            ready: long,
            running: long,
            query: Duration::from_millis(50),
            doubt: long,
        },
        control: ControlOptions { link_timeout: long, give_up_after: long },
        ..MigrateOptions::new("peers", KIND, vec![Path::to(address)])
    }
}

/// Options of a source that waits for seconds: for peers that say nothing.
fn hasty(address: SocketAddr) -> MigrateOptions {
    let patient = patient(address);
    MigrateOptions {
        patience: Patience {
            setup: Duration::from_secs(2),
            placing: Duration::from_secs(2),
            ready: Duration::from_secs(2),
            running: Duration::from_secs(1),
            query: Duration::from_millis(100),
            doubt: Duration::from_secs(1),
        },
        control: ControlOptions {
            link_timeout: Duration::from_secs(2),
            give_up_after: Duration::from_secs(1),
        },
        ..patient
    }
}

/// How a migration ended at the source.
struct Ended {
    name: String,
    report: SourceReport,
    guest: StampingGuest,
    journal: Journal,
    _state: tempfile::TempDir,
}

/// Far below what a [`patient`] source waits for, far above what a [`hasty`] one may take.
const SOON: Duration = Duration::from_secs(20);

fn attempt(name: &str, options: MigrateOptions) -> Ended {
    let whose = name.to_owned();
    within(SOON, name, move || {
        let state = tempfile::tempdir().unwrap();
        let journal = Journal::open(state.path()).unwrap();
        let mut guest = StampingGuest::running();
        let report = migrate(&mut guest, &options, &journal, &mut |_| {});
        Ended { name: whose, report, guest, journal, _state: state }
    })
}

impl Ended {
    /// The migration was rolled back for a cause with these words, and the guest goes on here.
    fn rolled_back(&self, words: &[&str]) {
        let Outcome::RolledBack { cause } = &self.report.outcome else {
            panic!("{}: {:?}", self.name, self.report.outcome)
        };
        println!("{}: {cause}", self.name);
        for word in words {
            assert!(cause.contains(word), "{}: {word:?} is not in {cause:?}", self.name);
        }
        self.guest.assert_runs(&self.name);
        let (pauses, resumes) = self.guest.pauses_and_resumes();
        assert!(pauses <= 1 && resumes == pauses, "{}: {pauses} pauses, {resumes} resumes", self.name);
        assert_eq!(self.journal.unfinished().unwrap(), [], "{}", self.name);
    }

    /// The destination says that it runs the guest, so it must not run here.
    fn completed(&self) {
        let outcome = &self.report.outcome;
        assert!(matches!(outcome, Outcome::Completed { .. }), "{}: {outcome:?}", self.name);
        self.stays_stopped();
        assert_eq!(self.journal.unfinished().unwrap(), [], "{}", self.name);
    }

    /// Nobody says what became of it: it is kept, stopped, and the next start asks again.
    fn in_doubt(&self) {
        let outcome = &self.report.outcome;
        assert_eq!(*outcome, Outcome::InDoubt { token: crate::TOKEN }, "{}", self.name);
        self.stays_stopped();
        let unfinished = self.journal.unfinished().unwrap();
        assert_eq!(unfinished.len(), 1, "{}", self.name);
        assert_eq!(unfinished[0].token, crate::TOKEN, "{}", self.name);
    }

    fn stays_stopped(&self) {
        self.guest.assert_stopped(&self.name);
        assert_eq!(self.guest.pauses_and_resumes(), (1, 0), "{}", self.name);
    }

    /// Something that the operator is told besides the outcome.
    fn warned(&self, words: &str) {
        let warned = self.report.warnings.iter().any(|warning| warning.contains(words));
        assert!(warned, "{}: {words:?} is not in {:#?}", self.name, self.report.warnings);
    }
}
