//! What a QEMU is told before, while and after its guest moves.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};

/// No limit of QEMU's own, in bytes a second: what pageferry sends is limited by pageferry. 0 would mean the same to some versions
/// and "nothing at all" to others.
const NO_LIMIT: u64 = 1 << 40;

/// Why a QEMU cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It does not do what it is told.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// It waits already.
    #[error(
        "this QEMU is no destination that waits to be told where to listen; start it with -incoming defer"
    )]
    NotDeferred,
    /// It is already a destination.
    #[error("this QEMU waits for a guest itself (-incoming) and has none to give")]
    NoGuest,
    /// Something that it was set to, which cannot be carried.
    #[error("QEMU has the migration capability {0} on, with which its memory cannot be carried; set it off")]
    Capability(String),
    /// A migration of somebody else's.
    #[error("QEMU has a migration under way already ({0})")]
    Busy(String),
}

/// How both ends are set; the same at both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How many multifd channels.
    pub channels: u8,
    /// Whether the destination QEMU answers on the main channel, so that the source QEMU is done only when it says so.
    pub return_path: bool,
    /// The downtime that QEMU aims at.
    pub downtime_limit: Duration,
}

/// What a QEMU says of itself before anything is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Whether the guest runs.
    pub running: bool,
    /// Its state, in QEMU's word.
    pub status: String,
    /// Whether QEMU encrypts its channels itself: then nobody can look into them.
    pub tls: bool,
    /// Whether post-copy may follow, in which QEMU has to know of each page that came.
    pub postcopy: bool,
}

/// Looks at a QEMU.
///
/// # Errors
/// [`SettingsError::Qmp`], or [`SettingsError::Capability`] for what cannot be carried.
pub fn facts(qmp: &mut Qmp) -> Result<Facts, SettingsError> {
    let capabilities = capabilities(qmp)?;
    let on = |name: &str| capabilities.get(name).copied().unwrap_or(false);
    // Shared RAM is not sent at all; the stream is a file; the guest's state is taken while it runs; two copies are compared.
    for name in ["x-ignore-shared", "mapped-ram", "background-snapshot", "x-colo"] {
        if on(name) {
            return Err(SettingsError::Capability(name.into()));
        }
    }
    let parameters = qmp.execute("query-migrate-parameters", &json!({}))?;
    let status = qmp.execute("query-status", &json!({}))?;
    Ok(Facts {
        running: status["running"].as_bool().unwrap_or(false),
        status: status["status"].as_str().unwrap_or_default().to_owned(),
        tls: parameters["tls-creds"].as_str().is_some_and(|name| !name.is_empty()),
        postcopy: on("postcopy-ram"),
    })
}

fn capabilities(qmp: &mut Qmp) -> Result<BTreeMap<String, bool>, QmpError> {
    let list = qmp.execute("query-migrate-capabilities", &json!({}))?;
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let entry = |entry: &Value| Some((entry["capability"].as_str()?.to_owned(), entry["state"].as_bool()?));
    Ok(list.iter().filter_map(entry).collect())
}

fn set(qmp: &mut Qmp, settings: Settings, more: &[(&str, bool)]) -> Result<(), QmpError> {
    let states = [
        ("multifd", true),
        ("return-path", settings.return_path),
        ("zero-copy-send", false),
        ("events", true),
    ];
    let states: Vec<Value> = (states.iter().chain(more))
        .map(|(name, state)| json!({ "capability": name, "state": state }))
        .collect();
    qmp.execute("migrate-set-capabilities", &json!({ "capabilities": states }))?;
    qmp.execute(
        "migrate-set-parameters",
        &json!({
            "multifd-channels": settings.channels,
            "multifd-compression": "none",
            "zero-page-detection": "multifd",
            "max-bandwidth": NO_LIMIT,
            "downtime-limit": u64::try_from(settings.downtime_limit.as_millis()).unwrap_or(u64::MAX),
        }),
    )?;
    Ok(())
}

/// Sets the end that has the guest.
///
/// # Errors
/// [`SettingsError`].
pub fn prepare_source(qmp: &mut Qmp, facts: &Facts, settings: Settings) -> Result<(), SettingsError> {
    if facts.status == "inmigrate" {
        return Err(SettingsError::NoGuest);
    }
    let state = migration(qmp)?;
    if state.is_under_way() {
        return Err(SettingsError::Busy(state.status));
    }
    Ok(set(qmp, settings, &[])?)
}

/// Sets the end that waits. It does not let the guest run when it has come, nor take its disks' locks: that is for
/// [`resume`], when the source has given the guest up.
///
/// # Errors
/// [`SettingsError`]; [`SettingsError::NotDeferred`] for a QEMU that already waits or runs.
pub fn prepare_destination(qmp: &mut Qmp, facts: &Facts, settings: Settings) -> Result<(), SettingsError> {
    if facts.status != "inmigrate" {
        return Err(SettingsError::NotDeferred);
    }
    match set(qmp, settings, &[("late-block-activate", true)]) {
        // "Multifd must be set before incoming starts"
        Err(QmpError::Refused { description, .. }) if description.contains("incoming") => {
            return Err(SettingsError::NotDeferred);
        }
        other => other?,
    }
    // In this state `stop` means: do not start by yourself.
    qmp.execute("stop", &json!({}))?;
    Ok(())
}

/// Has the source QEMU send to a unix socket.
///
/// # Errors
/// [`QmpError`].
pub fn migrate(qmp: &mut Qmp, socket: &str) -> Result<(), QmpError> {
    qmp.execute("migrate", &json!({ "uri": format!("unix:{socket}") })).map(drop)
}

/// Has the destination QEMU listen at a unix socket.
///
/// # Errors
/// [`QmpError`].
pub fn migrate_incoming(qmp: &mut Qmp, socket: &str) -> Result<(), QmpError> {
    qmp.execute("migrate-incoming", &json!({ "uri": format!("unix:{socket}") })).map(drop)
}

/// Ends the migration; the guest goes on at the source.
///
/// # Errors
/// [`QmpError`].
pub fn cancel(qmp: &mut Qmp) -> Result<(), QmpError> {
    qmp.execute("migrate_cancel", &json!({})).map(drop)
}

/// Lets the guest run.
///
/// # Errors
/// [`QmpError`]: disks whose locks somebody else has, for one.
pub fn resume(qmp: &mut Qmp) -> Result<(), QmpError> {
    qmp.execute("cont", &json!({})).map(drop)
}

/// Whether the guest runs, and its state in QEMU's word.
///
/// # Errors
/// [`QmpError`].
pub fn status(qmp: &mut Qmp) -> Result<(bool, String), QmpError> {
    let status = qmp.execute("query-status", &json!({}))?;
    let word = status["status"].as_str().unwrap_or_default().to_owned();
    Ok((status["running"].as_bool().unwrap_or(false), word))
}

/// How QEMU's migration stands, at either end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Migration {
    /// `none` when there was never one, otherwise QEMU's word: `active`, `completed`, `failed` ...
    pub status: String,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes of RAM in all.
    pub total_bytes: u64,
    /// Bytes that are left to send.
    pub remaining_bytes: u64,
    /// Times that QEMU has looked which pages are dirty.
    pub rounds: u64,
    /// Pages that it sent with content.
    pub normal_pages: u64,
    /// Pages that it found to be zero.
    pub zero_pages: u64,
    /// How fast the guest dirties pages, in pages a second.
    pub dirty_pages_rate: u64,
    /// The guest's downtime in milliseconds, as the source QEMU measured it.
    pub downtime_ms: Option<u64>,
    /// How long it has taken, in milliseconds.
    pub total_ms: Option<u64>,
}

impl Migration {
    /// Whether QEMU is at it.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        !matches!(self.status.as_str(), "none" | "completed" | "failed" | "cancelled")
    }

    fn read(answer: &Value) -> Self {
        let ram = &answer["ram"];
        let number = |name: &str| ram[name].as_u64().unwrap_or_default();
        Self {
            status: answer["status"].as_str().unwrap_or("none").to_owned(),
            error: answer["error-desc"].as_str().map(str::to_owned),
            total_bytes: number("total"),
            remaining_bytes: number("remaining"),
            rounds: number("dirty-sync-count"),
            normal_pages: number("normal"),
            zero_pages: number("duplicate"),
            dirty_pages_rate: number("dirty-pages-rate"),
            downtime_ms: answer["downtime"].as_u64(),
            total_ms: answer["total-time"].as_u64(),
        }
    }
}

/// Asks how the migration stands.
///
/// # Errors
/// [`QmpError`].
pub fn migration(qmp: &mut Qmp) -> Result<Migration, QmpError> {
    Ok(Migration::read(&qmp.execute("query-migrate", &json!({}))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_query_migrate_answers_is_read() {
        let none = Migration::read(&json!({}));
        assert_eq!((none.status.as_str(), none.is_under_way()), ("none", false));
        let active = Migration::read(&json!({
            "status": "active", "total-time": 12, "expected-downtime": 300,
            "ram": { "total": 4096, "remaining": 1024, "dirty-sync-count": 2, "normal": 1, "duplicate": 2 },
        }));
        assert!(active.is_under_way());
        assert_eq!((active.total_bytes, active.remaining_bytes, active.rounds), (4096, 1024, 2));
        let failed = Migration::read(&json!({ "status": "failed", "error-desc": "the channel broke" }));
        assert_eq!((failed.is_under_way(), failed.error.as_deref()), (false, Some("the channel broke")));
    }
}
