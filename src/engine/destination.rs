//! The destination's end of a migration: one loop that owns the machine, and one function around it.

mod driver;

use std::time::Duration;

use super::cancel::CancelSignal;
use super::cpu::CpuMeter;
use super::endpoint::Place;
use super::fault::FaultPlan;
use super::observe::DestinationReport;
use crate::guest::{Guest, GuestError};
use crate::migration::handover::Arrival;
use crate::session::encryption::Encryption;
use crate::session::rdma::RdmaSupport;
pub use crate::wire::control::Setup;
use driver::Driver;

/// How migrations are received.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// How long a source may take from its connection to saying what it wants to send.
    pub setup_within: Duration,
    /// How long a source that gives signs of life may send neither pages nor messages.
    pub idle_after: Duration,
    /// How long to hold a complete guest that the source does not commit, before giving it up.
    pub fence_after: Duration,
    /// What this host has for RDMA; `None` looks at its devices.
    pub rdma: Option<RdmaSupport>,
    /// What this host demands of the payload.
    pub encryption: Encryption,
    /// Whether RAM at the pause is digested, to be compared with the source's.
    pub digest_ram: bool,
    /// Stops it, also while it waits.
    pub cancel: CancelSignal,
    /// What is to go wrong, in tests.
    pub faults: FaultPlan,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            setup_within: Duration::from_secs(30),
            // A source that saves its guest's state on a slow disk, or sends under a low cap, is not idle.
            idle_after: Duration::from_secs(300),
            fence_after: Duration::from_secs(60),
            rdma: None,
            encryption: Encryption::default(),
            digest_ram: false,
            cancel: CancelSignal::default(),
            faults: FaultPlan::default(),
        }
    }
}

/// A migration that has ended at the destination.
#[derive(Debug)]
pub struct Received<G> {
    /// The guest, running, when it arrived.
    pub guest: Option<G>,
    /// How it went.
    pub report: DestinationReport,
}

/// Waits for a migration in its place ([`super::endpoint::Endpoint::expect`]) and takes the guest in. `make` builds the skeleton: the guest with all its memory mapped and
/// empty, not running. It is called after the source's description has been checked and before anything is sent.
///
/// `None` when it was cancelled before a migration came. When the guest did not arrive, everything of it has been dropped.
pub fn receive<G: Guest>(
    place: Place<'_>,
    options: &ReceiveOptions,
    make: &mut dyn FnMut(&Setup) -> Result<G, GuestError>,
) -> Option<Received<G>> {
    let endpoint = place.endpoint();
    let (migration, link) = place.wait(&options.cancel)?;
    let cpu = CpuMeter::start();
    tracing::info!(%migration, "a migration arrives");
    let mut driver = match Driver::new(endpoint, options, migration, link, make) {
        Ok(driver) => driver,
        Err(cause) => {
            let arrival = Arrival::Discarded { cause: super::chain(&cause) };
            return Some(Received { guest: None, report: driver::report(migration, arrival, cpu.elapsed()) });
        }
    };
    let arrival = driver.run();
    // Before the digest, which is no part of the migration.
    let cpu = cpu.elapsed();
    tracing::info!(%migration, ?arrival, "migration ends");
    Some(driver.close(arrival, cpu))
}
