//! What a process does with its guest: makes it, asks it, takes it in, moves it away.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::convert::{arrived, move_progress, moved};
use super::protocol::{
    Agreed, Caps, Doing, Event, GuestNeeds, GuestSeen, GuestSpec, ListenAt, MoveSpec, ReceiveSpec,
};
use super::{Busy, Handles, Holder, lock};
use crate::engine::cancel::{cancel_pair, peer_gone_pair};
use crate::engine::destination::{ReceiveOptions, Setup, receive};
use crate::engine::endpoint::{Admission, Endpoint, ListenOn, ListenerOptions};
use crate::engine::fault::FaultPlan;
use crate::engine::journal::Unfinished;
use crate::engine::recovery::resolve;
use crate::engine::source::{MigrateOptions, MigrationId, Secret, migrate};
use crate::engine::{chain, observe};
use crate::host::guests::{self, AnyGuest};
use crate::host::hex;
use crate::migration::convergence::Limits;
use crate::migration::handover::{Arrival, Outcome};
use crate::migration::source::Patience;
use crate::session::caps::RateCaps;
use crate::session::control::ControlOptions;
use crate::session::mode::TransferMode;
use crate::session::path::{InterfaceName, Path};
use crate::session::trust::{PeerTrust, TlsFiles, TlsIdentity, Trust};
use crate::session::{Encryption, RdmaSupport};
use crate::units::PAGE_SIZE;

/// A guest that has not written all its pages by then never will.
const WARM_UP_LIMIT: Duration = Duration::from_secs(600);
/// How long between two questions about a guest whose migration ended in doubt.
const SETTLE_PAUSE: Duration = Duration::from_secs(2);
/// How long one such question may take.
const QUESTION: Duration = Duration::from_secs(5);
/// How long the ports of an arrival stay taken after its end: the source may not have read the last word yet.
const AFTERWARDS: Duration = Duration::from_secs(5);

/// Sets what a migration may send from now on.
pub(super) fn set_caps(caps: &RateCaps, to: &Caps) {
    caps.set_total(to.total);
    caps.set_interfaces(to.interfaces.iter().map(|(name, cap)| (name.clone(), *cap)).collect());
}

impl Holder {
    pub(super) fn start(&self, spec: &GuestSpec) -> Result<Event, String> {
        {
            let mut state = self.state();
            if state.doing != Doing::Nothing {
                return Err("there is a guest here already".into());
            }
            state.doing = Doing::Starting;
        }
        let started = self.start_guest(spec);
        self.state().doing = if started.is_ok() { Doing::Running } else { Doing::Nothing };
        started
    }

    fn start_guest(&self, spec: &GuestSpec) -> Result<Event, String> {
        let mut guest = guests::make(spec).map_err(|error| chain(&error))?;
        guest.resume().map_err(|error| chain(&error))?;
        let began = Instant::now();
        while !guest.warmed_up() {
            if began.elapsed() > WARM_UP_LIMIT {
                return Err(format!("the guest has not written all its pages in {WARM_UP_LIMIT:?}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let touched = guest.touched().map_err(|error| chain(&error))?.len();
        *lock(&self.guest) = Some(guest);
        Ok(Event::Started { touched_bytes: touched * PAGE_SIZE })
    }

    fn with_guest<T>(&self, apply: impl FnOnce(&mut AnyGuest) -> Result<T, String>) -> Result<T, String> {
        let mut slot = lock(&self.guest);
        apply(slot.as_mut().ok_or("there is no guest here, or it is being moved")?)
    }

    pub(super) fn report(&self) -> Result<Event, String> {
        self.with_guest(|guest| Ok(Event::Guest(GuestSeen::now(guest.report()))))
    }

    pub(super) fn console(&self) -> Result<Event, String> {
        self.with_guest(|guest| Ok(Event::Console { text: guest.console() }))
    }

    pub(super) fn verify(&self) -> Result<Event, String> {
        self.with_guest(|guest| {
            let seen = guest.verify_all().map_err(|error| chain(&error))?;
            Ok(Event::Guest(GuestSeen::now(seen)))
        })
    }

    pub(super) fn reset_gap(&self) -> Result<Event, String> {
        self.with_guest(|guest| {
            guest.reset_gap();
            Ok(Event::GapReset)
        })
    }

    pub(super) fn needs(&self) -> Result<Event, String> {
        self.with_guest(|guest| {
            let config = guest.config().map_err(|error| chain(&error))?;
            let touched = guest.touched().map_err(|error| chain(&error))?.len();
            Ok(Event::Needs(GuestNeeds {
                kind: guest.kind_name().to_owned(),
                memory_bytes: guest.memory().layout().total_bytes(),
                touched_bytes: touched * PAGE_SIZE,
                config: hex::encode(&config),
            }))
        })
    }

    pub(super) fn not_busy(&self) -> Result<(), String> {
        let mut busy = lock(&self.busy);
        if let Some(ended) = busy.take_if(|busy| busy.thread.is_finished()) {
            let _ = ended.thread.join();
        }
        if busy.is_some() { Err("a guest is being moved or awaited here".into()) } else { Ok(()) }
    }

    pub(super) fn faults(&self, asked: Option<&String>) -> Result<FaultPlan, String> {
        match asked {
            Some(text) => text.parse().map_err(|error: crate::engine::fault::FaultPlanError| chain(&error)),
            None => Ok(std::mem::take(&mut *lock(&self.faults))),
        }
    }

    pub(super) fn receive(self: &Arc<Self>, spec: &ReceiveSpec) -> Result<Event, String> {
        self.not_busy()?;
        let agreement = Agreement::of(spec.agreed.as_ref())?;
        let endpoint = self.endpoint_for(spec, &agreement, ControlOptions::default())?;
        let addresses = endpoint.local_addresses();
        let (cancel, signal) = cancel_pair();
        let isolated = spec.listen.iter().filter(|at| at.isolated).map(|at| at.address).collect();
        let options = ReceiveOptions {
            rdma: Some(RdmaSupport::of_this_host_with(&spec.rdma)),
            encryption: Encryption { required: spec.requires_encryption, isolated },
            digest_ram: spec.digest_ram,
            cancel: signal,
            faults: self.faults(spec.fault.as_ref())?,
            ..ReceiveOptions::default()
        };
        {
            let mut state = self.state();
            state.doing = Doing::Receiving;
            state.migration = spec.agreed.as_ref().map(|agreed| agreed.migration.clone());
            state.begun = false;
        }
        let (holder, tracker, huge) = (Arc::clone(self), spec.tracker, spec.huge_pages);
        // The place is made before anybody is told: a source that is told of it finds it.
        let (made, place_made) = crossbeam_channel::bounded::<()>(1);
        let handles = Handles { cancel, peer_gone: None, caps: RateCaps::default() };
        self.spawn(handles, move || {
            let place = match agreement.admission {
                Some(admission) => endpoint.expect_only(admission),
                None => endpoint.expect(),
            };
            let _ = made.send(());
            let outlet_holder = Arc::clone(&holder);
            let mut make = |setup: &Setup| {
                outlet_holder.state().begun = true;
                outlet_holder.outlet.emit(Event::Begun);
                guests::skeleton(setup, tracker, huge)
            };
            let received = receive(place, &options, &mut make);
            holder.received(received.map(|received| (received.guest, received.report)));
            if agreement.admission.is_some() {
                linger(&holder, endpoint);
            }
        })?;
        let _ = place_made.recv();
        Ok(Event::Receiving { addresses })
    }

    fn received(&self, received: Option<(Option<AnyGuest>, observe::DestinationReport)>) {
        let Some((guest, report)) = received else {
            self.state().doing = Doing::Nothing;
            let cause = Some("it was told not to wait any longer".into());
            return self.told_arrived(super::protocol::Arrived { cause, ..Default::default() });
        };
        let running = matches!(report.arrival, Arrival::Running { .. });
        *lock(&self.guest) = guest.filter(|_| running);
        self.state().doing = if running { Doing::Running } else { Doing::Nothing };
        self.told_arrived(arrived(report));
    }

    pub(super) fn told_arrived(&self, arrived: super::protocol::Arrived) {
        let arrived = Box::new(arrived);
        self.state().arrived = Some(arrived.clone());
        self.outlet.emit(Event::Arrived(arrived));
    }

    /// The endpoint that listens from the start, or a new one on a free port of the range.
    pub(super) fn endpoint_for(
        &self,
        spec: &ReceiveSpec,
        agreement: &Agreement,
        control: ControlOptions,
    ) -> Result<Arc<Endpoint>, String> {
        let mut standing = lock(&self.endpoint);
        if spec.listen.is_empty() {
            return standing.clone().ok_or_else(|| "it is not said where to listen".into());
        }
        let (first, last) = spec.ports;
        let mut why = None;
        for port in first..=last {
            let on = spec.listen.iter().map(|at| listen_on(at, port)).collect::<Result<Vec<_>, _>>()?;
            let trust = agreement.trust.clone();
            let options = ListenerOptions { trust, control, ..ListenerOptions::default() };
            match Endpoint::bind_on(&on, options, self.journal.clone()) {
                Ok(endpoint) => return Ok(standing.insert(Arc::new(endpoint)).clone()),
                Err(error) => why = Some(chain(&error)),
            }
        }
        let why = why.unwrap_or_else(|| "there is none in it".into());
        Err(format!("no port of {first}-{last} (migration_ports) can be listened at; the last: {why}"))
    }

    pub(super) fn migrate(self: &Arc<Self>, spec: &MoveSpec) -> Result<Event, String> {
        self.not_busy()?;
        let agreement = Agreement::of(spec.agreed.as_ref())?;
        let paths = spec.paths.iter().map(path).collect::<Result<Vec<_>, _>>()?;
        let faults = self.faults(spec.fault.as_ref())?;
        let mut guest = lock(&self.guest).take().ok_or("there is no guest here")?;
        let (cancel, signal) = cancel_pair();
        let (peer_gone, peer_gone_signal) = peer_gone_pair();
        let caps = RateCaps::default();
        set_caps(&caps, &spec.caps);
        let isolated = spec.paths.iter().filter(|path| path.isolated).filter_map(|path| path.source);
        let options = MigrateOptions {
            migration: agreement.admission.map(|admission| admission.migration),
            admission: agreement.admission.map_or(Secret::NONE, |admission| admission.secret),
            trust: PeerTrust {
                trust: agreement.trust,
                name: spec.agreed.as_ref().and_then(|agreed| agreed.peer_name.clone()),
            },
            answering: spec.answering.clone(),
            channels: spec.channels,
            mode: spec.mode,
            rdma: rdma(spec),
            encryption: Encryption { required: spec.requires_encryption, isolated: isolated.collect() },
            rate_caps: caps.clone(),
            limits: Limits {
                downtime: Duration::from_millis(spec.downtime_limit_ms),
                rounds: spec.max_rounds,
                on_no_convergence: spec.on_no_convergence,
                ..Limits::default()
            },
            patience: Patience { doubt: Duration::from_millis(spec.doubt_ms), ..Patience::default() },
            digest_ram: spec.digest_ram,
            cancel: signal,
            peer_gone: peer_gone_signal,
            faults,
            ..MigrateOptions::new(&spec.name, guest.kind_name(), paths)
        };
        {
            let mut state = self.state();
            state.doing = Doing::Moving;
            state.migration = spec.agreed.as_ref().map(|agreed| agreed.migration.clone());
            (state.moved, state.settled, state.progress) = (None, None, None);
        }
        let holder = Arc::clone(self);
        let slot = Arc::clone(&self.guest);
        let handles = Handles { cancel, peer_gone: Some(peer_gone), caps };
        let spawned = self.spawn(handles, move || {
            guest.reset_gap();
            let before = GuestSeen::now(guest.report());
            let mut observer = |progress: &observe::Progress| {
                let progress = move_progress(progress);
                holder.state().progress = Some(progress.clone());
                holder.outlet.emit(Event::Progress(progress));
            };
            let report = migrate(&mut guest, &options, &holder.journal, &mut observer);
            let after = GuestSeen::now(guest.report());
            let (outcome, migration) = (report.outcome.clone(), report.migration);
            let ended = Box::new(moved(report, before, after));
            let doing = match &outcome {
                Outcome::RolledBack { .. } => {
                    *lock(&slot) = Some(guest);
                    Doing::Running
                }
                // A guest that has moved is dropped here.
                Outcome::Completed { .. } => {
                    drop(guest);
                    Doing::Nothing
                }
                Outcome::InDoubt { token } => {
                    {
                        let mut state = holder.state();
                        (state.doing, state.moved) = (Doing::InDoubt, Some(ended.clone()));
                    }
                    holder.outlet.emit(Event::Moved(ended));
                    let unfinished = Unfinished { migration, token: *token, peers: options.peers() };
                    return holder.settle(guest, &unfinished, &options.trust.trust);
                }
            };
            {
                let mut state = holder.state();
                (state.doing, state.moved) = (doing, Some(ended.clone()));
            }
            holder.outlet.emit(Event::Moved(ended));
        });
        spawned.map(|()| Event::Done)
    }

    /// Asks until the destination answers what became of a guest that stands still here.
    fn settle(&self, mut guest: AnyGuest, unfinished: &Unfinished, trust: &Trust) {
        let here = loop {
            match resolve(&mut guest, unfinished, &self.journal, trust, QUESTION) {
                Ok(Outcome::Completed { .. }) => break false,
                Ok(Outcome::RolledBack { .. }) => break true,
                Ok(Outcome::InDoubt { .. }) => {}
                Err(error) => tracing::warn!("the doubt cannot be settled now: {}", chain(&error)),
            }
            std::thread::sleep(SETTLE_PAUSE);
        };
        *lock(&self.guest) = here.then_some(guest);
        {
            let mut state = self.state();
            state.doing = if here { Doing::Running } else { Doing::Nothing };
            state.settled = Some(here);
        }
        self.outlet.emit(Event::Settled { here });
    }

    pub(super) fn spawn(&self, handles: Handles, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
        // Held while it starts, so that its end cannot be looked for before it is there.
        let mut busy = lock(&self.busy);
        let thread = std::thread::Builder::new()
            .name("pf-engine".into())
            .spawn(work)
            .map_err(|error| format!("no thread for the migration: {error}"))?;
        *busy = Some(Busy { handles, thread });
        Ok(())
    }
}

/// Keeps the port of an arrival that is over for a source that asks again. The guest may move on meanwhile.
pub(super) fn linger(holder: &Holder, endpoint: Arc<Endpoint>) {
    lock(&holder.endpoint).take_if(|standing| Arc::ptr_eq(standing, &endpoint));
    let lingering = std::thread::Builder::new().name("pf-afterwards".into()).spawn(move || {
        std::thread::sleep(AFTERWARDS);
        drop(endpoint);
    });
    if let Err(error) = lingering {
        tracing::warn!("the port is given up at once: {error}");
    }
}

/// What two daemons agreed on, in the engine's terms.
pub(super) struct Agreement {
    pub(super) admission: Option<Admission>,
    pub(super) trust: Trust,
}

impl Agreement {
    pub(super) fn of(agreed: Option<&Agreed>) -> Result<Self, String> {
        let Some(agreed) = agreed else { return Ok(Self { admission: None, trust: Trust::Insecure }) };
        let migration = hex::decode(&agreed.migration)
            .map(MigrationId)
            .ok_or("the migration's name is not 32 hexadecimal digits")?;
        let secret =
            hex::decode(&agreed.admission).map(Secret).ok_or("the admission is not 64 hexadecimal digits")?;
        let trust = agreed.trust.as_ref().map_or(Ok(Trust::Insecure), trust)?;
        Ok(Self { admission: Some(Admission { migration, secret }), trust })
    }
}

fn trust(files: &TlsFiles) -> Result<Trust, String> {
    let identity = TlsIdentity::load(files).map_err(|error| chain(&error))?;
    Ok(Trust::Tls(Arc::new(identity)))
}

/// This host's devices, where the mode asks for them.
pub(super) fn rdma(spec: &MoveSpec) -> Option<RdmaSupport> {
    let wanted = matches!(spec.mode, TransferMode::Rdma | TransferMode::Auto);
    wanted.then(|| RdmaSupport::of_this_host_with(&spec.rdma))
}

fn interface(name: Option<&String>) -> Result<Option<InterfaceName>, String> {
    name.map(|name| name.parse().map_err(|error: crate::session::path::InterfaceNameError| chain(&error)))
        .transpose()
}

pub(super) fn path(path: &super::protocol::MovePath) -> Result<Path, String> {
    let interface = interface(path.interface.as_ref())?;
    Ok(Path { source: path.source, destination: path.destination, interface })
}

fn listen_on(at: &ListenAt, port: u16) -> Result<ListenOn, String> {
    let interface = interface(at.interface.as_ref())?;
    Ok(ListenOn { address: SocketAddr::new(at.address, port), interface })
}
