//! Guests that a QEMU has. The daemon knows such a guest only while it moves: it is called `qemu:` and the path of the QMP socket at
//! this host, and its process holds nothing but carries it ([`crate::engine::relay`]).
//!
//! There is no journal for it. Where it is when a process or a daemon has ended, both QEMUs say ([`settle`]).

mod settle;

use std::sync::Arc;

use super::check::failed;
use super::outgoing::MigrateFailure;
use super::store::{GuestRecord, QemuRecord};
use super::tables::{Guest, Tables};
use super::{ANSWER, Daemon, now, watch};
use crate::engine::chain;
use crate::engine::relay::RelayError;
use crate::host::api::check::Check;
use crate::host::api::guest::{GuestInfo, GuestState};
use crate::host::api::migration::{MigrateRequest, MigrationState};
use crate::host::guest_process::GuestProcessError;
use crate::host::holder::protocol::{Command, QemuEnd};
use crate::host::preflight::{GuestFacts, HostFacts, checks};
use crate::host::qemu::{self, QemuFacts, is_qemu};
use crate::session::mode::TransferMode;

/// What its kind is called.
pub(super) const KIND: &str = "qemu";

/// Whether what is said of the QEMU at the destination fits the guest.
///
/// # Errors
/// What is missing or too much.
pub(super) fn check_incoming(name: &str, incoming: Option<&str>) -> Result<(), MigrateFailure> {
    let refused = |why: String| Err(MigrateFailure::Refused(why));
    match (is_qemu(name), incoming) {
        (false, None) => Ok(()),
        (false, Some(_)) => refused(format!(
            "--incoming is for guests of QEMU, and {name:?} is a guest of this daemon; write qemu: and a QMP socket to mean one"
        )),
        (true, None) => refused(format!(
            "which QEMU takes {name} in is not said; add --incoming qemu:PATH with the QMP socket of the one that waits at the \
             destination, started with -incoming defer"
        )),
        (true, Some(incoming)) => {
            qemu::socket(name).and(qemu::socket(incoming)).map(drop).map_err(MigrateFailure::Refused)
        }
    }
}

/// Whether a migration can be asked for so.
///
/// # Errors
/// What does not fit.
pub(super) fn check_request(name: &str, request: &MigrateRequest) -> Result<(), MigrateFailure> {
    check_incoming(name, request.incoming.as_deref())?;
    if !is_qemu(name) {
        return Ok(());
    }
    let unfit = [
        (request.verify, "--verify: pageferry does not stop a QEMU's guest and cannot digest its memory"),
        (
            request.max_rounds.is_some(),
            "--max-rounds: QEMU decides when it switches over, by --downtime-limit",
        ),
        (
            request.on_no_convergence.is_some(),
            "--on-no-convergence: QEMU decides; raise --downtime-limit or set auto-converge in QEMU",
        ),
    ];
    match unfit.into_iter().find(|(asked, _)| *asked) {
        Some((_, what)) => {
            Err(MigrateFailure::Refused(format!("a guest of QEMU cannot be moved with {what}")))
        }
        None => Ok(()),
    }
}

/// What is kept of the QEMU that a guest is to come to.
pub(super) fn record_of(guest: &GuestFacts) -> Option<QemuRecord> {
    let facts = guest.qemu.as_ref()?;
    Some(QemuRecord { qmp: qemu::socket(&guest.name).ok()?, runs: facts.runs })
}

/// The destination is of a release without all this.
pub(super) fn too_old(theirs: &HostFacts) -> Check {
    failed(
        "qemu",
        format!("{} (pageferry {}) takes no guests of QEMU in", theirs.name, theirs.versions.program),
        &format!("update pageferry at {}, or move the guest with `pageferry relay`", theirs.name),
    )
}

/// Asks a QEMU something, which blocks.
async fn ask<T: Send + 'static>(question: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(question).await.map_err(|error| error.to_string())
}

async fn look(
    question: impl FnOnce() -> Result<QemuFacts, RelayError> + Send + 'static,
) -> Result<QemuFacts, String> {
    ask(question).await?.map_err(|error| chain(&error))
}

impl Daemon {
    /// Has the tables know the guest of a QEMU from now on. One that they know already is left as it is.
    pub(super) fn attach_qemu(&self, tables: &mut Tables, name: &str) -> Result<(), MigrateFailure> {
        if !is_qemu(name) || tables.guests.contains_key(name) {
            return Ok(());
        }
        let qmp = qemu::socket(name).map_err(MigrateFailure::Refused)?;
        let info = GuestInfo::new(name, KIND, GuestState::Running, now());
        let qemu = Some(QemuRecord { qmp, runs: true });
        let record = GuestRecord { instance: self.new_instance(), info, promised_bytes: 0, qemu };
        tables.guests.insert(name.to_owned(), Guest { record, process: None, stopping: false });
        Ok(())
    }

    /// What the guest of a QEMU here needs, as another host is told it: by the name that it is to have there.
    pub(super) async fn qemu_facts(
        &self,
        id: &str,
        name: &str,
        incoming: &str,
    ) -> Result<GuestFacts, MigrateFailure> {
        let moving = self.tables().guests.get(name).and_then(|guest| guest.record.info.migration.clone());
        if let Some(moving) = moving.filter(|moving| moving != id) {
            return Err(MigrateFailure::Refused(format!(
                "{name} is being moved already, by migration {moving}"
            )));
        }
        let qmp = qemu::socket(name).map_err(MigrateFailure::Refused)?;
        let facts = look(move || qemu::look_at_source(&qmp)).await.map_err(|why| {
            let advice =
                "see that this QEMU runs with a QMP socket of its own (-qmp unix:PATH,server=on,wait=off)";
            MigrateFailure::Checks(vec![failed("qemu", why, advice)])
        })?;
        let bytes = facts.memory_bytes();
        self.with_guest(name, |guest| {
            guest.record.info.memory_bytes = bytes;
            if let Some(qemu) = &mut guest.record.qemu {
                qemu.runs = facts.runs;
            }
        });
        Ok(GuestFacts {
            name: incoming.to_owned(),
            kind: KIND.to_owned(),
            memory_bytes: bytes,
            touched_bytes: bytes,
            config: String::new(),
            qemu: Some(facts),
        })
    }

    /// What this host finds out when it is asked whether the guest of a QEMU may come.
    pub(super) async fn qemu_checks(
        &self,
        guest: &GuestFacts,
        theirs: &QemuFacts,
        facts: &HostFacts,
        mode: TransferMode,
    ) -> Vec<Check> {
        let seen = match (qemu::socket(&guest.name), self.name_in_use(&guest.name)) {
            (Err(why), _) | (_, Some(why)) => Err(why),
            (Ok(qmp), None) => look(move || qemu::look_at_destination(&qmp)).await,
        };
        checks::qemu_at_destination(guest, theirs, facts, seen, mode == TransferMode::Rdma)
    }

    /// The QEMU that a guest's process is told of.
    pub(super) fn qemu_end(&self, name: &str) -> Option<QemuEnd> {
        let qemu = self.with_guest(name, |guest| guest.record.qemu.clone()).flatten()?;
        Some(QemuEnd { qmp: qemu.qmp })
    }

    /// Starts the process that carries the guest of a QEMU away.
    pub(super) async fn start_for_qemu(self: &Arc<Self>, name: &str) -> Result<(), GuestProcessError> {
        let instance = self.with_guest(name, |guest| guest.record.instance.clone());
        let instance = instance.ok_or(GuestProcessError::Ended)?;
        watch::watch(self, name, self.spawn_process(&instance).await?);
        Ok(())
    }

    /// The guest of a QEMU did not begin to move: it is that QEMU's alone again.
    pub(super) async fn detach_qemu(&self, name: &str, id: &str, cause: &str) {
        let process = self.with_guest(name, |guest| guest.process.clone()).flatten();
        self.end_with_qemu(
            name,
            |_| true,
            || {
                self.finish(id, MigrationState::RolledBack, Some(cause.to_owned()));
            },
        );
        if let Some(process) = process {
            let _ = process.request(Command::Stop, ANSWER).await;
        }
    }

    /// A migration of a QEMU's guest is over. Its name is free before that is told, and forgotten on disk after it: a daemon that is
    /// killed in between finds a guest whose migration is over, and forgets it.
    fn end_with_qemu(&self, name: &str, condition: impl FnOnce(&Guest) -> bool, finish: impl FnOnce()) {
        let taken = {
            let mut tables = self.tables();
            let fits = tables.guests.get(name).is_some_and(condition);
            if fits { tables.guests.remove(name) } else { None }
        };
        finish();
        if let Some(guest) = taken {
            self.wrote(self.store.remove_guest(&guest.record));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(more: &str) -> MigrateRequest {
        serde_json::from_str(&format!(r#"{{"to":"beta"{more}}}"#)).unwrap()
    }

    #[test]
    fn a_guest_of_qemu_needs_one_that_waits_and_no_other_guest_does() {
        let qemu = r#","incoming":"qemu:/run/in.qmp""#;
        let said =
            |name: &str, more: &str| check_request(name, &request(more)).map_err(|why| why.to_string());
        assert_eq!(said("vm", ""), Ok(()));
        assert_eq!(said("qemu:/run/vm.qmp", qemu), Ok(()));
        for (name, more, words) in [
            ("vm", qemu, "--incoming is for guests of QEMU"),
            ("qemu:/run/vm.qmp", "", "add --incoming qemu:PATH"),
            ("qemu:vm.qmp", qemu, "names no QEMU"),
            ("qemu:/run/vm.qmp", r#","incoming":"/run/in.qmp""#, "names no QEMU"),
        ] {
            let why = said(name, more).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
        for (more, words) in [
            (r#","verify":true"#, "--verify"),
            (r#","max_rounds":3"#, "--max-rounds"),
            (r#","on_no_convergence":"cancel""#, "--on-no-convergence"),
        ] {
            let why = said("qemu:/run/vm.qmp", &format!("{qemu}{more}")).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }
}
