//! Whether a host can prove what its host file says, and what it lets others do.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{HostFileError, Loaded, Problem};
use crate::session::trust::{TlsError, TlsIdentity};

/// How long before its end a certificate is worth a warning.
const SOON: Duration = Duration::from_secs(30 * 24 * 60 * 60);

impl Loaded {
    /// The certificate and the key that the host file names, read and checked now; nothing where it names none.
    ///
    /// # Errors
    /// [`HostFileError::Bad`] at the line that names what cannot be used, and at the certificate's if it is of another host.
    pub fn identity(&self) -> Result<Option<TlsIdentity>, HostFileError> {
        let Some(files) = &self.config.tls else { return Ok(None) };
        let bad = |key: &str, what: String| HostFileError::Bad {
            path: self.path.clone().unwrap_or_default(),
            problems: vec![Problem { line: self.line_of(key), what: format!("{key}: {what}") }],
        };
        let identity = TlsIdentity::load(files).map_err(|error| {
            let key = match &error {
                TlsError::File { what: "key", .. } | TlsError::Pair { .. } => "tls.key",
                TlsError::File { what: "CA certificate", .. } => "tls.ca",
                TlsError::File { .. } | TlsError::Time { .. } | TlsError::Foreign { .. } => "tls.certificate",
            };
            bad(key, error.to_string())
        })?;
        if !identity.host_name().eq_ignore_ascii_case(&self.config.name) {
            let what = format!(
                "{} is the certificate of {}, and this host is {}; issue one for it (`pageferry pki issue {}`), or set name",
                files.certificate.display(),
                identity.host_name(),
                self.config.name,
                self.config.name,
            );
            return Err(bad("tls.certificate", what));
        }
        Ok(Some(identity))
    }

    /// What will be wrong soon, or is unwise, about the host's certificate and key.
    pub(super) fn doubts(&self, identity: &TlsIdentity) -> Vec<Problem> {
        let Some(files) = &self.config.tls else { return Vec::new() };
        let left = identity.expires().duration_since(SystemTime::now()).unwrap_or_default();
        let soon = (left < SOON).then(|| Problem {
            line: self.line_of("tls.certificate"),
            what: format!(
                "tls.certificate: {} ends in {} days; issue another one (`pageferry pki issue {}`)",
                files.certificate.display(),
                left.as_secs() / (24 * 60 * 60),
                self.config.name
            ),
        });
        let open = others_may_read(&files.key).then(|| Problem {
            line: self.line_of("tls.key"),
            what: format!(
                "tls.key: other users may read {}, and be this host with it; chmod 600 it",
                files.key.display()
            ),
        });
        soon.into_iter().chain(open).collect()
    }

    /// What the daemon will, or will not, let others do.
    pub(super) fn exposure(&self) -> Option<Problem> {
        let what = match (&self.config.tls, self.config.allow_insecure) {
            (Some(_), _) => return None,
            (None, false) => {
                "there is no [tls], so the daemon listens on loopback only; `pageferry pki` makes certificates".to_owned()
            }
            (None, true) => format!(
                "allow_insecure: whoever reaches port {} or {}-{} can read and change guests on their way; \
                 `pageferry pki` makes certificates",
                self.config.port, self.config.migration_ports.0, self.config.migration_ports.1
            ),
        };
        Some(Problem { line: self.line_of("allow_insecure"), what })
    }
}

fn others_may_read(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}
