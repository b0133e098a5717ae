//! The source's end of a migration: one loop that owns the machine, and one function around it.

mod driver;
pub(super) mod links;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;

use super::cancel::{CancelSignal, PeerGoneSignal};
use super::cpu::CpuMeter;
use super::fault::FaultPlan;
use super::journal::{Journal, Peers};
use super::observe::{Progress, SourceReport};
use crate::guest::Guest;
use crate::migration::convergence::Limits;
use crate::migration::handover::Outcome;
use crate::migration::source::Patience;
use crate::session::caps::RateCaps;
use crate::session::control::{ControlLink, ControlOptions, Opening};
use crate::session::encryption::Encryption;
use crate::session::mode::TransferMode;
use crate::session::path::Path;
use crate::session::rdma::RdmaSupport;
use crate::session::trust::PeerTrust;
pub use crate::wire::preamble::{MigrationId, Secret};
use driver::Driver;

/// How one migration is to be done. The defaults are a host's that has said nothing.
#[derive(Clone, Debug)]
pub struct MigrateOptions {
    /// What people call the guest.
    pub name: String,
    /// Which adapter the destination needs to make it (`kvm`, `process`, or the embedder's word).
    pub guest: String,
    /// Its name; drawn where nobody else has to know it before.
    pub migration: Option<MigrationId>,
    /// The one-time secret that the destination waits for ([`super::endpoint::Endpoint::expect_only`]).
    pub admission: Secret,
    /// How both hosts prove which host they are.
    pub trust: PeerTrust,
    /// Ways to the destination, the preferred first. Not empty.
    pub paths: Vec<Path>,
    /// Where else to ask what became of the guest, when the destination's process has gone.
    pub answering: Vec<SocketAddr>,
    /// How many channels, over all paths together.
    pub channels: usize,
    /// How memory travels.
    pub mode: TransferMode,
    /// What this host has for RDMA; `None` looks at its devices, when the mode asks for it.
    pub rdma: Option<RdmaSupport>,
    /// What this host demands of the payload.
    pub encryption: Encryption,
    /// The most bytes per second on the wire.
    pub rate_caps: RateCaps,
    /// When to stop and copy, and what to do when that does not come.
    pub limits: Limits,
    /// How long to wait for the peer's answers.
    pub patience: Patience,
    /// When a connection counts as dead.
    pub control: ControlOptions,
    /// How long to go on without any channel, while lost ones are opened again, before the guest goes back to running here.
    pub reopen_within: Duration,
    /// Whether RAM at the pause is digested, to be compared with the destination's.
    pub digest_ram: bool,
    /// Stops it.
    pub cancel: CancelSignal,
    /// Says that the destination's process has ended, for who can know.
    pub peer_gone: PeerGoneSignal,
    /// What is to go wrong, in tests.
    pub faults: FaultPlan,
}

impl MigrateOptions {
    /// Options for a guest of this name and kind to one address.
    #[must_use]
    pub fn new(name: &str, guest: &str, paths: Vec<Path>) -> Self {
        Self {
            name: name.to_owned(),
            guest: guest.to_owned(),
            migration: None,
            admission: Secret::NONE,
            trust: PeerTrust::default(),
            paths,
            answering: Vec::new(),
            channels: 2,
            mode: TransferMode::Compression,
            rdma: None,
            encryption: Encryption::default(),
            rate_caps: RateCaps::default(),
            limits: Limits::default(),
            patience: Patience::default(),
            control: ControlOptions::default(),
            reopen_within: Duration::from_secs(10),
            digest_ram: false,
            cancel: CancelSignal::default(),
            peer_gone: PeerGoneSignal::default(),
            faults: FaultPlan::default(),
        }
    }

    /// Whom to ask what became of the guest.
    #[must_use]
    pub fn peers(&self) -> Peers {
        let answering = self.answering.iter().map(|address| {
            // By the way that leads to the same address of the destination, where one does.
            let way = self.paths.iter().find(|path| path.destination.ip() == address.ip());
            Path { destination: *address, ..way.copied().unwrap_or(Path::to(*address)) }
        });
        Peers { paths: self.paths.iter().copied().chain(answering).collect(), name: self.trust.name.clone() }
    }
}

/// Moves a running guest to a destination that waits in [`super::destination::receive`].
///
/// It always answers with a report, whose [`Outcome`] says where the guest is: at the destination (this one is stopped and
/// may be dropped), here and running, or in doubt (stopped here; [`super::recovery`] asks on). `observer` is called about ten
/// times a second from this thread.
pub fn migrate<G: Guest + ?Sized>(
    guest: &mut G,
    options: &MigrateOptions,
    journal: &Journal,
    observer: &mut dyn FnMut(&Progress),
) -> SourceReport {
    let began = Instant::now();
    let cpu = CpuMeter::start();
    let mut report = empty_report(guest, options);
    let outcome = run(guest, options, journal, observer, &mut report, began);
    report.outcome = outcome;
    report.total = began.elapsed();
    report.cpu = cpu.elapsed();
    if options.digest_ram && matches!(report.outcome, Outcome::Completed { .. }) {
        driver::digest(guest, &mut report);
    }
    report
}

fn run<G: Guest + ?Sized>(
    guest: &mut G,
    options: &MigrateOptions,
    journal: &Journal,
    observer: &mut dyn FnMut(&Progress),
    report: &mut SourceReport,
    began: Instant,
) -> Outcome {
    let rolled_back = |cause: String| Outcome::RolledBack { cause };
    let id = match options.migration.map_or_else(|| super::draw().map(MigrationId), Ok) {
        Ok(id) => id,
        Err(cause) => return rolled_back(format!("no random numbers for a new migration: {cause}")),
    };
    report.migration = id;
    let rdma = RdmaSupport::for_mode(options.mode, options.rdma.as_ref());
    let setup = match driver::setup(guest, options, &rdma) {
        Ok(setup) => setup,
        Err(cause) => return rolled_back(super::chain(&cause)),
    };
    report.touched_bytes = setup.touched_pages * crate::units::PAGE_SIZE;
    let (link_sender, link_events) = unbounded();
    let opening = Opening { admission: options.admission, trust: options.trust.clone() };
    let link = match ControlLink::dial(&options.paths, id, &opening, options.control, link_sender) {
        Ok(link) => link,
        Err(cause) => return rolled_back(super::chain(&cause)),
    };
    tracing::info!(migration = %id, guest = options.name, mode = options.mode.name(), "migration begins");
    let mut driver = Driver::new(guest, options, journal, id, (link, link_events), (setup, rdma), began);
    let outcome = driver.run(observer);
    driver.close(report);
    tracing::info!(migration = %id, ?outcome, "migration ends");
    outcome
}

fn empty_report<G: Guest + ?Sized>(guest: &G, options: &MigrateOptions) -> SourceReport {
    SourceReport {
        migration: MigrationId([0; 16]),
        outcome: Outcome::RolledBack { cause: String::new() },
        mode_requested: options.mode,
        mode_used: TransferMode::Tcp,
        mode_reason: "no data channel was opened".to_owned(),
        channels: Vec::new(),
        rounds: Vec::new(),
        memory_bytes: guest.memory().layout().total_bytes(),
        touched_bytes: 0,
        total: Duration::ZERO,
        paused: Duration::ZERO,
        downtime_parts: Vec::new(),
        cpu: Duration::ZERO,
        throttle: 0,
        ram: None,
        warnings: Vec::new(),
    }
}
