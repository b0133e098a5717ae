//! A migration to here: what this host says of itself, whether a guest may come, and the place that is made for it. From there on
//! [`super::watch`] has it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::settings::Settings;
use super::tables::Active;
use super::{ANSWER, Daemon, account, guests, log_line, now, watch};
use crate::engine::chain;
use crate::host::api::check::{Check, CheckStatus};
use crate::host::api::guest::{GuestInfo, GuestState};
use crate::host::api::migration::{Direction, LogLine, Migration, MigrationState};
use crate::host::guest_process::GuestProcess;
use crate::host::hex;
use crate::host::holder::protocol::{Agreed, Command, Event, ListenAt, QemuEnd, ReceiveSpec};
use crate::host::network::probe::EchoService;
use crate::host::peer::client::{Dial, PeerTarget};
use crate::host::peer::messages::{
    AdmitAnswer, AdmitRequest, CheckAnswer, CheckRequest, Gone, MigrationAnswer,
};
use crate::host::peer::reach;
use crate::host::peer::server::Caller;
use crate::host::preflight::facts::{Known, Sources, gather};
use crate::host::preflight::{HostFacts, checks};
use crate::session::mode::TransferMode;

/// How long a host whose end is gone waits for what becomes of the other end.
const GIVEN_UP: Duration = Duration::from_secs(3);
/// How often it is looked whether that is known.
const LOOK: Duration = Duration::from_millis(20);

impl Daemon {
    /// What this host is, now.
    pub(super) async fn facts(&self, settings: &Settings) -> Result<HostFacts, String> {
        let offers = settings.offers().await.map_err(|error| chain(&error))?;
        let config = settings.config();
        let (taken, promised) = {
            let tables = self.tables();
            (tables.taken(Direction::Incoming), tables.promised())
        };
        let known = Known {
            name: config.name.clone(),
            offers,
            promised,
            free_incoming: config.max_migrations.saturating_sub(taken),
            max_incoming: config.max_migrations,
            insecure: settings.trust.is_insecure(),
            requires_encryption: config.requires_encryption,
        };
        let facts = gather(known, &Sources::default()).map_err(|error| chain(&error))?;
        Ok(HostFacts { versions: self.versions.clone(), ..facts })
    }

    /// Whether a guest may come, and where its source can try the paths.
    ///
    /// # Errors
    /// Why the question is not answered, in words.
    pub async fn answer_check(&self, caller: &Caller, asked: &CheckRequest) -> Result<CheckAnswer, String> {
        proved(caller, &asked.source)?;
        let settings = self.settings();
        let facts = self.facts(&settings).await?;
        let checks = self.destination_checks(asked, &facts).await;
        let token = crate::engine::draw::<16>().map_err(|error| error.to_string())?;
        let echo = EchoService::start(&facts.offers, settings.config().migration_ports, token);
        let at = echo.ports().iter().map(|(ip, port)| SocketAddr::new(*ip, *port)).collect();
        tokio::spawn(echo.finished());
        Ok(CheckAnswer { facts, checks, echo: at, echo_token: hex::encode(&token) })
    }

    async fn destination_checks(&self, asked: &CheckRequest, facts: &HostFacts) -> Vec<Check> {
        if let Some(theirs) = &asked.guest.qemu {
            return self.qemu_checks(&asked.guest, theirs, facts, asked.mode).await;
        }
        let name =
            guests::check_name(&asked.guest.name).err().or_else(|| self.name_in_use(&asked.guest.name));
        checks::at_destination(&asked.guest, facts, name.as_deref(), asked.mode == TransferMode::Rdma)
    }

    /// Makes a place for a guest.
    ///
    /// # Errors
    /// Why the request is not obeyed, in words.
    pub async fn admit_guest(
        self: &Arc<Self>,
        caller: &Caller,
        asked: &AdmitRequest,
    ) -> Result<AdmitAnswer, String> {
        proved(caller, &asked.check.source)?;
        watch::parse_id(&asked.migration)?;
        if asked.fault.is_some() && !self.faults_allowed {
            return Err("faults are injected only by a daemon that was started for tests".into());
        }
        let settings = self.settings();
        let facts = self.facts(&settings).await?;
        let mut failed = self.destination_checks(&asked.check, &facts).await;
        failed.retain(|check| check.status == CheckStatus::Failed);
        // A slot that is taken becomes free; whoever waits for one asks again.
        if failed.iter().any(|check| check.name != "slots") {
            return Ok(AdmitAnswer::Refused { checks: failed });
        }
        let listen: Vec<ListenAt> = facts
            .offers
            .iter()
            .filter(|offer| asked.listen.contains(&offer.address))
            .map(|offer| ListenAt {
                address: offer.address,
                interface: Some(offer.interface.clone()),
                isolated: offer.isolated,
            })
            .collect();
        if listen.is_empty() {
            return Err("none of the addresses that the source would connect to is allowed here".into());
        }
        let id = asked.migration.clone();
        if !self.take_incoming_slot(&settings, asked, &caller_target(caller, asked, &facts)) {
            let most = settings.config().max_migrations;
            return Ok(AdmitAnswer::Busy {
                why: format!("{} takes in {most} guests at a time (max_migrations), and does", facts.name),
            });
        }
        self.say(&id, format!("{} wants to send its guest {}", asked.check.source, asked.check.guest.name));
        match self.make_place(&settings, asked, listen).await {
            Ok(answer) => Ok(answer),
            Err(why) => {
                self.finish(&id, MigrationState::RolledBack, Some(why.clone()));
                Err(why)
            }
        }
    }

    /// Takes a slot, in one step with looking whether there is one.
    fn take_incoming_slot(
        &self,
        settings: &Arc<Settings>,
        asked: &AdmitRequest,
        source: &PeerTarget,
    ) -> bool {
        let mut tables = self.tables();
        if tables.taken(Direction::Incoming) >= settings.config().max_migrations
            || tables.migrations.contains_key(&asked.migration)
        {
            return false;
        }
        let migration = Migration {
            id: asked.migration.clone(),
            guest: asked.check.guest.name.clone(),
            guest_kind: asked.check.guest.kind.clone(),
            peer: asked.check.source.clone(),
            peer_address: source.dials.first().map(|dial| dial.address.to_string()),
            state: MigrationState::Checking,
            started_at: Some(now()),
            mode_requested: asked.check.mode,
            mode_origin: "source".into(),
            insecure: settings.trust.is_insecure(),
            downtime_limit_seconds: asked.downtime_limit_ms as f64 / 1e3,
            memory_bytes: asked.check.guest.memory_bytes,
            touched_bytes: Some(asked.check.guest.touched_bytes),
            ..account::blank(Direction::Incoming)
        };
        self.metrics.begun(&migration);
        let mut active = Active::new(migration, Arc::clone(settings), None);
        active.peer = Some(source.clone());
        self.wrote(self.store.put_migration(&active.record()));
        tables.migrations.insert(asked.migration.clone(), active);
        true
    }

    async fn make_place(
        self: &Arc<Self>,
        settings: &Settings,
        asked: &AdmitRequest,
        listen: Vec<ListenAt>,
    ) -> Result<AdmitAnswer, String> {
        let (guest, config) = (&asked.check.guest, settings.config());
        let info = GuestInfo {
            memory_bytes: guest.memory_bytes,
            arrived_from: Some(asked.check.source.clone()),
            migration: Some(asked.migration.clone()),
            ..GuestInfo::new(&guest.name, &guest.kind, GuestState::Arriving, now())
        };
        let qemu = super::qemu::record_of(guest);
        // The memory of a QEMU that waits is its own.
        let promised = if qemu.is_some() { 0 } else { guest.touched_bytes };
        let (process, events) =
            self.new_process(info, promised, qemu.clone()).await.map_err(|error| error.to_string())?;
        let secret = crate::engine::draw::<32>().map_err(|error| error.to_string())?;
        let (first, last) = config.migration_ports;
        let answering = listen.iter().map(|at| SocketAddr::new(at.address, first)).collect();
        let receive = ReceiveSpec {
            tracker: None,
            huge_pages: config.huge_pages,
            listen,
            ports: (first + 1, last),
            agreed: Some(Agreed {
                migration: asked.migration.clone(),
                admission: hex::encode(&secret),
                trust: config.tls.clone(),
                peer_name: None,
            }),
            requires_encryption: config.requires_encryption,
            rdma: config.rdma,
            digest_ram: asked.verify,
            fault: asked.fault.clone(),
            qemu: qemu.map(|qemu| QemuEnd { qmp: qemu.qmp }),
        };
        let received = process.request(Command::Receive(receive), ANSWER).await;
        if received.is_err() {
            self.give_up_place(&process, &guest.name).await;
        }
        let addresses = match received.map_err(|error| error.to_string())? {
            Event::Receiving { addresses } => addresses,
            other => {
                self.give_up_place(&process, &guest.name).await;
                return Err(format!("the process that is to take the guest in answers {other:?}"));
            }
        };
        watch::watch(self, &guest.name, (process, events));
        let at: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        self.say(&asked.migration, format!("a place is made for it at {}", at.join(", ")));
        Ok(AdmitAnswer::Admitted { secret: hex::encode(&secret), addresses, answering })
    }

    async fn give_up_place(&self, process: &GuestProcess, name: &str) {
        let _ = process.request(Command::Stop, ANSWER).await;
        self.remove_guest(name);
    }

    /// What this host knows of a migration, for the other host that takes part in it.
    ///
    /// # Errors
    /// When it is none of the caller's business.
    pub fn answer_migration(&self, caller: &Caller, id: &str) -> Result<MigrationAnswer, String> {
        let active = self.with_migration(id, false, |active| active.migration.clone());
        let known = active.or_else(|| self.history.find(id).ok());
        if let Some(migration) = &known {
            proved(caller, &migration.peer)?;
        }
        Ok(known.map_or(MigrationAnswer::default(), |migration| MigrationAnswer {
            state: Some(migration.state),
            cause: migration.cause,
            ram_digest: migration.ram_digest,
        }))
    }

    /// The other host says that its end of a migration is not to be waited for any more. Answers what became of it here.
    ///
    /// # Errors
    /// When it is none of the caller's business.
    pub async fn peer_is_gone(
        &self,
        caller: &Caller,
        id: &str,
        gone: Gone,
    ) -> Result<MigrationAnswer, String> {
        self.answer_migration(caller, id)?;
        let ours = self.with_migration(id, true, |active| {
            let news = active.peer_gone.replace(gone.clone()).is_none();
            (news, active.migration.direction, active.migration.guest.clone())
        });
        let Some((news, direction, guest)) = ours else {
            self.amend(id, &gone);
            return self.answer_migration(caller, id);
        };
        if news {
            self.say(id, format!("the other host says: {}", gone.cause));
        }
        let command = match direction {
            Direction::Incoming => Command::Cancel,
            Direction::Outgoing => Command::PeerGone { cause: gone.cause },
        };
        if let Ok(process) = self.process(&guest) {
            let _ = process.request(command, ANSWER).await;
        }
        // Whoever comes again at once is to find the place free, and whoever asks what became of it wants to know.
        let began = Instant::now();
        while self.with_migration(id, false, |_| ()).is_some() && began.elapsed() < GIVEN_UP {
            tokio::time::sleep(LOOK).await;
        }
        self.answer_migration(caller, id)
    }

    /// A migration that is over here was ended by what has happened at the other host: the histories of both are to agree.
    fn amend(&self, id: &str, gone: &Gone) {
        let Ok(mut migration) = self.history.find(id) else { return };
        let lost = match (migration.direction, migration.state) {
            // It had come to its destination, and was gone before that host had noted it.
            (Direction::Outgoing, MigrationState::Completed) => migration.guest_kind != super::qemu::KIND,
            (Direction::Incoming, MigrationState::RolledBack) => gone.lost,
            _ => false,
        };
        if lost {
            migration.state = MigrationState::Lost;
            migration.cause = Some(gone.cause.clone());
            let text = format!("lost after all, as the other host says: {}", gone.cause);
            log_line(id, &migration.guest, migration.insecure, &text);
            migration.log.push(LogLine { at: now(), text });
            self.recorded(&migration);
        }
    }
}

/// A host speaks for itself only.
fn proved(caller: &Caller, name: &str) -> Result<(), String> {
    match &caller.name {
        Some(proved) if proved != name => {
            Err(format!("the caller's certificate is for {proved:?}, and it says that it is {name:?}"))
        }
        _ => Ok(()),
    }
}

/// How the source's daemon is called back.
fn caller_target(caller: &Caller, asked: &AdmitRequest, facts: &HostFacts) -> PeerTarget {
    let address = SocketAddr::new(caller.address.ip(), asked.port);
    let dials = reach::way(address.ip(), &facts.offers).map(|offer| Dial {
        address,
        source: offer.address,
        interface: offer.interface.clone(),
    });
    let name = caller.name.clone().unwrap_or_else(|| asked.check.source.clone());
    PeerTarget { called: asked.check.source.clone(), name, dials: dials.into_iter().collect() }
}
