//! What Prometheus scrapes at `/metrics`: migrations under way and ended, downtimes, bytes by interface, guests.
//!
//! Labels name directions, states, modes and this host's interfaces, never a guest, a peer or a migration: their number stays
//! small however long a host runs. `docs/observability.md` lists every metric.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::host::api::guest::{GuestInfo, GuestState};
use crate::host::api::migration::{Direction, Migration, MigrationState};
use crate::session::mode::TransferMode;

/// The content type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Around the usual limits of 100 ms to 1 s; a downtime past 10 s is a failure of its own kind.
const DOWNTIME_SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0];
/// From a small guest over a fast wire to a terabyte over a slow one.
const TOTAL_SECONDS: [f64; 12] =
    [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0];

const DIRECTIONS: [Direction; 2] = [Direction::Outgoing, Direction::Incoming];
/// The states of a migration that is not over.
const UNDER_WAY: [MigrationState; 4] =
    [MigrationState::Waiting, MigrationState::Checking, MigrationState::Running, MigrationState::InDoubt];
const GUEST_STATES: [GuestState; 6] = [
    GuestState::Starting,
    GuestState::Running,
    GuestState::Moving,
    GuestState::Arriving,
    GuestState::InDoubt,
    GuestState::Lost,
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByDirection {
    direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByMode {
    direction: &'static str,
    mode: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByOutcome {
    direction: &'static str,
    state: &'static str,
    mode: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByState {
    direction: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByGuestState {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByInterface {
    interface: String,
}

/// A host's metrics. The daemon tells what happens; nothing here asks anybody.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    begun: Family<ByMode, Counter>,
    ended: Family<ByOutcome, Counter>,
    under_way: Family<ByState, Gauge>,
    downtime: Family<ByDirection, Histogram>,
    over_limit: Family<ByDirection, Counter>,
    total: Family<ByDirection, Histogram>,
    cpu: Family<ByDirection, Counter<f64, AtomicU64>>,
    sent: Family<ByInterface, Counter>,
    rate: Family<ByInterface, Gauge>,
    guests: Family<ByGuestState, Gauge>,
    under_way_now: Mutex<UnderWay>,
}

/// What the gauges are made of.
#[derive(Debug, Default)]
struct UnderWay {
    migrations: HashMap<(String, Direction), Seen>,
    /// Every interface that was ever used.
    interfaces: BTreeSet<String>,
}

/// What was told of a migration that is not over.
#[derive(Debug)]
struct Seen {
    state: MigrationState,
    /// Bytes by interface that the counters hold already.
    bytes: BTreeMap<String, u64>,
    rates: BTreeMap<String, u64>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics of a host where nothing has happened yet. What can be known beforehand is there from the start, as 0, so that
    /// a rate over a first event is right.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("pageferry");
        registry.register(
            "build",
            "The program that answers",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        let metrics = Self {
            begun: Family::default(),
            ended: Family::default(),
            under_way: Family::default(),
            downtime: Family::new_with_constructor(|| Histogram::new(DOWNTIME_SECONDS)),
            over_limit: Family::default(),
            total: Family::new_with_constructor(|| Histogram::new(TOTAL_SECONDS)),
            cpu: Family::default(),
            sent: Family::default(),
            rate: Family::default(),
            guests: Family::default(),
            under_way_now: Mutex::default(),
            registry,
        };
        metrics.start_at_zero();
        metrics.registered()
    }

    fn start_at_zero(&self) {
        for direction in DIRECTIONS {
            let direction = direction.name();
            for state in UNDER_WAY.map(MigrationState::name) {
                self.under_way.get_or_create(&ByState { direction, state }).set(0);
            }
            let labels = ByDirection { direction };
            drop(self.downtime.get_or_create(&labels));
            drop(self.over_limit.get_or_create(&labels));
            drop(self.total.get_or_create(&labels));
            drop(self.cpu.get_or_create(&labels));
        }
        self.guests(&[]);
    }

    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "migrations",
            "Migrations that are not over, by how far they are",
            self.under_way.clone(),
        );
        registry.register("migrations_begun", "Migrations that were asked for", self.begun.clone());
        registry.register(
            "migrations_ended",
            "Migrations that are over, by how they ended",
            self.ended.clone(),
        );
        registry.register_with_unit(
            "migration_downtime",
            "From the guest's last instruction at the source to its first at the destination",
            Unit::Seconds,
            self.downtime.clone(),
        );
        registry.register(
            "migrations_over_downtime_limit",
            "Migrations that completed with more downtime than was aimed at",
            self.over_limit.clone(),
        );
        registry.register_with_unit(
            "migration_total",
            "From a migration's start to its end, when the guest has moved",
            Unit::Seconds,
            self.total.clone(),
        );
        registry.register_with_unit(
            "migration_cpu",
            "Processor time that migrations took at this host, without the guests'",
            Unit::Seconds,
            self.cpu.clone(),
        );
        registry.register_with_unit(
            "interface_sent",
            "Bytes that outgoing migrations put on the wire",
            Unit::Bytes,
            self.sent.clone(),
        );
        registry.register_with_unit(
            "interface_send_rate",
            "What outgoing migrations put on the wire lately",
            Unit::Other("bytes_per_second".to_owned()),
            self.rate.clone(),
        );
        registry.register("guests", "Guests of this host, by what they are doing", self.guests.clone());
        self
    }

    /// A migration was asked for, here or by the other host.
    pub fn begun(&self, migration: &Migration) {
        let labels = ByMode { direction: migration.direction.name(), mode: migration.mode_requested.name() };
        self.begun.get_or_create(&labels).inc();
        self.progress(migration);
    }

    /// Where a migration stands: at every change of its state, and as often as its progress is told. One that is over is for
    /// [`Metrics::ended`].
    pub fn progress(&self, migration: &Migration) {
        if migration.state.is_over() {
            return;
        }
        let mut now = self.under_way_now();
        let seen = now.migrations.entry(key(migration)).or_insert_with(|| Seen {
            state: migration.state,
            bytes: BTreeMap::new(),
            rates: BTreeMap::new(),
        });
        seen.state = migration.state;
        if let (Direction::Outgoing, Some(progress)) = (migration.direction, &migration.progress) {
            let links = &progress.links;
            seen.rates = by_name(links.iter().map(|link| (link.interface.as_str(), link.bytes_per_second)));
            let bytes = by_name(links.iter().map(|link| (link.interface.as_str(), link.bytes)));
            self.count_sent(&mut seen.bytes, bytes);
        }
        self.show(&mut now);
    }

    /// A migration is over: counts how it ended. To be called once for each; of one that is in doubt it only notes that.
    pub fn ended(&self, migration: &Migration) {
        if !migration.state.is_over() {
            return self.progress(migration);
        }
        let mut now = self.under_way_now();
        let mut counted = now.migrations.remove(&key(migration)).map(|seen| seen.bytes).unwrap_or_default();
        if migration.direction == Direction::Outgoing {
            let channels = migration.channels.iter();
            let bytes = by_name(
                channels.map(|channel| (channel.interface.as_deref().unwrap_or_default(), channel.bytes)),
            );
            self.count_sent(&mut counted, bytes);
        }
        self.show(&mut now);
        drop(now);
        self.count_end(migration);
    }

    fn count_end(&self, migration: &Migration) {
        let direction = migration.direction.name();
        let mode: TransferMode = migration.mode_used.unwrap_or(migration.mode_requested);
        let outcome = ByOutcome { direction, state: migration.state.name(), mode: mode.name() };
        self.ended.get_or_create(&outcome).inc();
        let labels = ByDirection { direction };
        // A clock that was set back makes no negative time here.
        let positive =
            |seconds: Option<f64>| seconds.filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
        if let Some(seconds) = positive(migration.cpu_seconds) {
            self.cpu.get_or_create(&labels).inc_by(seconds);
        }
        if migration.state != MigrationState::Completed {
            return;
        }
        if let Some(seconds) = positive(migration.downtime_seconds) {
            self.downtime.get_or_create(&labels).observe(seconds);
            if seconds > migration.downtime_limit_seconds {
                self.over_limit.get_or_create(&labels).inc();
            }
        }
        if let Some(seconds) = positive(migration.total_seconds) {
            self.total.get_or_create(&labels).observe(seconds);
        }
    }

    /// The guests of this host now.
    pub fn guests(&self, guests: &[GuestInfo]) {
        for state in GUEST_STATES {
            let count = guests.iter().filter(|guest| guest.state == state).count();
            let labels = ByGuestState { state: state.name() };
            self.guests.get_or_create(&labels).set(gauge(count as u64));
        }
    }

    /// Everything, as OpenMetrics text; its content type is [`CONTENT_TYPE`].
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            // Only a label whose own encoding fails can do that, and none does.
            Err(std::fmt::Error) => "# EOF\n".to_owned(),
        }
    }

    /// Adds what is new of `now` to the counters. An interface that lost its count, as in a restarted process, begins anew.
    fn count_sent(&self, counted: &mut BTreeMap<String, u64>, now: BTreeMap<String, u64>) {
        for (interface, bytes) in now {
            let before = counted.get(&interface).copied().unwrap_or(0);
            if bytes > before {
                self.sent.get_or_create(&by_interface(&interface)).inc_by(bytes - before);
                counted.insert(interface, bytes);
            }
        }
    }

    /// Sets the gauges to what is under way.
    fn show(&self, now: &mut UnderWay) {
        for direction in DIRECTIONS {
            for state in UNDER_WAY {
                let migrations = now.migrations.iter();
                let there = migrations.filter(|((_, way), seen)| *way == direction && seen.state == state);
                let labels = ByState { direction: direction.name(), state: state.name() };
                self.under_way.get_or_create(&labels).set(gauge(there.count() as u64));
            }
        }
        let every = now.migrations.values().flat_map(|seen| &seen.rates);
        let rates = by_name(every.map(|(interface, rate)| (interface.as_str(), *rate)));
        now.interfaces.extend(rates.keys().cloned());
        // One that carries nothing any more goes to 0 and stays: a series that vanishes looks like a failed scrape.
        for interface in &now.interfaces {
            let rate = rates.get(interface).copied().unwrap_or(0);
            self.rate.get_or_create(&by_interface(interface)).set(gauge(rate));
        }
    }

    fn under_way_now(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way_now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(migration: &Migration) -> (String, Direction) {
    (migration.id.clone(), migration.direction)
}

/// The sum for each name.
fn by_name<'a>(values: impl Iterator<Item = (&'a str, u64)>) -> BTreeMap<String, u64> {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for (name, value) in values {
        let sum = sums.entry(name.to_owned()).or_default();
        *sum = sum.saturating_add(value);
    }
    sums
}

fn by_interface(interface: &str) -> ByInterface {
    // An address that belongs to no interface here.
    let interface = if interface.is_empty() { "unknown" } else { interface };
    ByInterface { interface: interface.to_owned() }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
