//! The checks before a guest moves away: asks the destination, tries the paths, and puts both hosts' findings together.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::outgoing::MigrateFailure;
use super::routes::CheckAsked;
use super::settings::Settings;
use super::tables::Active;
use super::{ANSWER, Daemon, now};
use crate::engine::chain;
use crate::host::api::check::{Check, CheckReport, CheckStatus, PathInfo};
use crate::host::api::migration::Direction;
use crate::host::hex;
use crate::host::holder::protocol::{Command, Event};
use crate::host::network::pairs;
use crate::host::network::probe::{ProbeResult, probe};
use crate::host::peer::client::{PeerError, PeerTarget};
use crate::host::peer::messages::{CheckAnswer, CheckRequest};
use crate::host::peer::reach::reach;
use crate::host::preflight::{GuestFacts, HostFacts, checks};
use crate::session::mode::TransferMode;

/// How long another daemon may take over its checks.
const CALL: Duration = Duration::from_secs(30);

/// What the checks have found out.
pub(super) struct Checked {
    pub(super) target: PeerTarget,
    pub(super) theirs: HostFacts,
    pub(super) guest: GuestFacts,
    pub(super) checks: Vec<Check>,
    pub(super) paths: Vec<PathInfo>,
}

/// Where a guest is to go, and how.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) to: &'a str,
    /// The QEMU that waits there.
    pub(super) incoming: Option<&'a str>,
    pub(super) mode: TransferMode,
}

impl Daemon {
    /// The checks alone, for a person.
    ///
    /// # Errors
    /// [`MigrateFailure::Refused`] when there is no such guest.
    pub async fn check(&self, name: &str, asked: &CheckAsked) -> Result<CheckReport, MigrateFailure> {
        super::qemu::check_incoming(name, asked.incoming.as_deref())?;
        let settings = self.settings();
        let mode = asked.mode.unwrap_or(settings.config().performance_option);
        let way = Way { to: &asked.to, incoming: asked.incoming.as_deref(), mode };
        match self.checked("", name, way, &settings).await {
            Ok(checked) => Ok(CheckReport::new(checked.theirs.name, checked.checks, checked.paths)),
            Err(MigrateFailure::Checks(checks)) => Ok(CheckReport::new(asked.to.clone(), checks, Vec::new())),
            Err(other) => Err(other),
        }
    }

    pub(super) async fn checked(
        &self,
        id: &str,
        name: &str,
        Way { to, incoming, mode }: Way<'_>,
        settings: &Settings,
    ) -> Result<Checked, MigrateFailure> {
        let refused = |why: String| MigrateFailure::Refused(why);
        let guest = match incoming {
            Some(incoming) => self.qemu_facts(id, name, incoming).await?,
            None => self.guest_facts(name).await?,
        };
        let ours = self.facts(settings).await.map_err(refused)?;
        let target = reach(to, settings.config(), &ours.offers).await.map_err(|error| {
            MigrateFailure::Checks(vec![failed("reachable", error.to_string(), error.advice())])
        })?;
        let own = |address: SocketAddr| {
            let here = ours.offers.iter().any(|offer| offer.address == address.ip());
            here && address.port() == settings.config().port
        };
        if target.dials.iter().any(|dial| own(dial.address)) {
            return Err(refused(format!("{to} is this host; --to takes another one")));
        }
        let question = CheckRequest {
            source: settings.config().name.clone(),
            versions: ours.versions.clone(),
            guest: guest.clone(),
            mode,
        };
        let began = Instant::now();
        let asked = target.call::<_, CheckAnswer>(&settings.trust, "/peer/v1/check", &question, CALL).await;
        let answer = asked.map_err(|error| MigrateFailure::Checks(vec![call_failed(&error)]))?;
        let round_trip = began.elapsed();
        // The clocks are compared as of now.
        let ours = HostFacts { clock: now(), ..ours };
        let mut paths =
            pairs::paths(&ours.offers, &answer.facts.offers).await.map_err(|error| refused(chain(&error)))?;
        let echo: Vec<(IpAddr, u16)> = answer.echo.iter().map(|echo| (echo.ip(), echo.port())).collect();
        let token = hex::decode(&answer.echo_token).unwrap_or_default();
        let probes = probe(&paths, &echo, token).await;
        let unmatched = settings.unmatched().await;
        let mut all = checks::at_source(&checks::SourceView {
            ours: &ours,
            theirs: &answer.facts,
            paths: &paths,
            probes: &probes,
            round_trip,
            unmatched: &unmatched,
            free_outgoing: self.free_outgoing(id),
            max_outgoing: settings.config().max_migrations,
            mode,
        });
        match (&guest.qemu, answer.facts.takes_qemu) {
            // What it has against such a guest is that it does not know it.
            (Some(_), false) => all.push(super::qemu::too_old(&answer.facts)),
            _ => all.extend(answer.checks),
        }
        // Ways on which nothing comes through are left out; that one of them does is a check of its own.
        let mut alive = probes.iter().map(|probe| matches!(probe, ProbeResult::Reachable { .. }));
        paths.retain(|_| alive.next().unwrap_or(false));
        let known = PeerTarget { name: target.name.clone(), ..target };
        self.with_migration(id, true, |active| {
            active.peer = Some(known.clone());
            active.migration.peer.clone_from(&answer.facts.name);
            active.migration.peer_address = known.dials.first().map(|dial| dial.address.to_string());
            active.migration.paths.clone_from(&paths);
            active.migration.memory_bytes = guest.memory_bytes;
            active.migration.notes =
                all.iter().filter(|check| check.status == CheckStatus::Note).cloned().collect();
        });
        Ok(Checked { target: known, theirs: answer.facts, guest, checks: all, paths })
    }

    /// What a guest of this host needs, as its process says.
    async fn guest_facts(&self, name: &str) -> Result<GuestFacts, MigrateFailure> {
        let refused = |why: String| MigrateFailure::Refused(why);
        let process = self.process(name).map_err(|error| refused(error.to_string()))?;
        match process.request(Command::Facts, ANSWER).await {
            Ok(Event::Needs(needs)) => Ok(GuestFacts {
                name: name.to_owned(),
                kind: needs.kind,
                memory_bytes: needs.memory_bytes,
                touched_bytes: needs.touched_bytes,
                config: needs.config,
                qemu: None,
            }),
            Ok(other) => Err(refused(format!("the guest's process answers {other:?}"))),
            Err(error) => Err(refused(error.to_string())),
        }
    }

    /// Slots that another migration than this one could have.
    fn free_outgoing(&self, id: &str) -> u32 {
        let tables = self.tables();
        let own = tables.migrations.get(id).is_some_and(Active::takes_slot);
        let taken = tables.taken(Direction::Outgoing) - u32::from(own);
        self.settings().config().max_migrations.saturating_sub(taken)
    }
}

pub(super) fn failed(name: &str, finding: String, advice: &str) -> Check {
    Check { name: name.into(), status: CheckStatus::Failed, finding, advice: Some(advice.into()) }
}

fn call_failed(error: &PeerError) -> Check {
    match error {
        PeerError::Untrusted { .. } => failed(
            "trust",
            error.to_string(),
            "both hosts need certificates of one CA that are valid now (`pageferry pki`)",
        ),
        PeerError::Refused { .. } => {
            failed("admission", error.to_string(), "look into the log of that host's daemon")
        }
        _ => failed(
            "reachable",
            error.to_string(),
            "start the daemon there, allow a network in its host file (networks) that this host may use, too, or mend the \
             network between the hosts",
        ),
    }
}
