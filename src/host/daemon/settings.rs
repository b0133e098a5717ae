//! What is in force: the host file as it was read last, and what follows from it. A migration keeps what it began with.

use std::path::Path;
use std::sync::Arc;

use crate::engine::chain;
use crate::host::config::{self, HostConfig, HostFileError, Loaded, Networks};
use crate::host::network::interfaces::interfaces;
use crate::host::network::{Interface, NetworkError, Offer, allowed};
use crate::session::trust::Trust;

/// What is in force.
#[derive(Debug)]
pub struct Settings {
    /// The host file.
    pub loaded: Loaded,
    /// How this host proves which host it is.
    pub trust: Trust,
}

impl Settings {
    /// Reads the host file and the certificates that it names.
    ///
    /// # Errors
    /// [`HostFileError`].
    pub fn load(path: Option<&Path>) -> Result<Self, HostFileError> {
        let loaded = config::load(path)?;
        let trust = loaded.identity()?.map_or(Trust::Insecure, |identity| Trust::Tls(Arc::new(identity)));
        Ok(Self { loaded, trust })
    }

    /// What the host file says.
    #[must_use]
    pub fn config(&self) -> &HostConfig {
        &self.loaded.config
    }

    /// Whether this host stays on loopback: it cannot prove which host it is, and is not told to do without.
    #[must_use]
    pub fn is_confined(&self) -> bool {
        self.trust.is_insecure() && !self.config().allow_insecure
    }

    /// The addresses that migrations may use now, the preferred first.
    ///
    /// # Errors
    /// [`NetworkError`] when the kernel does not tell.
    pub async fn offers(&self) -> Result<Vec<Offer>, NetworkError> {
        Ok(self.offers_of(&interfaces().await?))
    }

    fn offers_of(&self, interfaces: &[Interface]) -> Vec<Offer> {
        if !self.is_confined() {
            return allowed::offers(interfaces, &self.config().networks);
        }
        let mut offers = allowed::offers(interfaces, &Networks::Any);
        offers.retain(|offer| offer.loopback);
        offers
    }

    /// What the host file names in vain, as sentences.
    pub async fn unmatched(&self) -> Vec<String> {
        match interfaces().await {
            Ok(interfaces) => allowed::unmatched(&interfaces, &self.config().networks),
            Err(error) => vec![chain(&error)],
        }
    }

    /// What is not as an administrator would want it, as sentences.
    pub async fn warnings(&self) -> Vec<String> {
        let file = self.loaded.path.clone().unwrap_or_default();
        let mut warnings: Vec<String> =
            self.loaded.warnings.iter().map(|problem| problem.at(&file)).collect();
        if self.is_confined() {
            warnings.push(
                "no [tls] in the host file: this host listens on loopback only (set allow_insecure = true to do without proof \
                 of who calls)"
                    .into(),
            );
        } else if self.trust.is_insecure() {
            warnings.push("allow_insecure: whoever reaches this host may say that it is another".into());
        }
        warnings.extend(self.unmatched().await);
        warnings
    }
}
