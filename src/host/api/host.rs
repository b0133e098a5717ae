//! The host itself, and short answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::host::network::Offer;

/// A host, as its daemon sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    /// Its name.
    pub name: String,
    /// The program's version.
    pub version: String,
    /// The daemon's process number.
    pub pid: u32,
    /// When the daemon started.
    pub since: f64,
    /// The host file that is in force; nothing where there is none.
    pub host_file: Option<String>,
    /// The mode that migrations from here use.
    pub performance_option: String,
    /// Whether hosts do not prove who they are.
    pub insecure: bool,
    /// When this host's certificate ends, in seconds since 1970.
    pub certificate_expires: Option<f64>,
    /// The addresses that migrations may use, the preferred first.
    pub offers: Vec<Offer>,
    /// Where other hosts' daemons reach this one.
    pub listening: Vec<String>,
    /// The most migrations at a time, for each direction.
    pub max_migrations: u32,
    /// Migrations from here that are under way.
    pub outgoing: u32,
    /// Migrations to here that are under way.
    pub incoming: u32,
    /// What is not as it should be.
    pub warnings: Vec<String>,
}

/// What came out of a guest's serial port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleText {
    /// Since somebody asked last.
    pub text: String,
}

/// Whether something was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// In words.
    pub what: String,
}
