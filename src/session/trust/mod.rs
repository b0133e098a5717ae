//! How hosts prove to each other which host they are: certificates of one authority, shown by both sides (mutual TLS).

#[cfg(feature = "tls")]
mod identity;

use std::path::PathBuf;
#[cfg(feature = "tls")]
use std::sync::Arc;

#[cfg(feature = "tls")]
pub use identity::{TlsError, TlsIdentity, explain, peer_host_name};

/// Where a host's certificates are, in PEM files.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(schemars::JsonSchema))]
pub struct TlsFiles {
    /// The certificates of the authorities that are trusted.
    pub ca: PathBuf,
    /// This host's certificate, and what it was issued by if that is not an authority itself.
    pub certificate: PathBuf,
    /// The key of this host's certificate.
    pub key: PathBuf,
}

/// Whether hosts prove who they are.
#[derive(Clone, Debug, Default)]
pub enum Trust {
    /// They do not: whoever reaches a host may say that it is another.
    #[default]
    Insecure,
    /// They do.
    #[cfg(feature = "tls")]
    Tls(Arc<TlsIdentity>),
}

impl Trust {
    /// Whether hosts do not prove who they are.
    #[must_use]
    pub fn is_insecure(&self) -> bool {
        matches!(self, Self::Insecure)
    }
}

/// How this host trusts one other host.
#[derive(Clone, Debug, Default)]
pub struct PeerTrust {
    /// What both prove themselves with.
    pub trust: Trust,
    /// The name that the other host's certificate must hold: a DNS name or an IP address. Needed with certificates.
    pub name: Option<String>,
}
