//! Authorities and certificates, made for one test.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use time::OffsetDateTime;

use crate::session::trust::{PeerTrust, TlsError, TlsFiles, TlsIdentity, Trust};

/// An authority that issues certificates to hosts.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    directory: TempDir,
}

impl Authority {
    pub(super) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem, directory: tempfile::tempdir().unwrap() }
    }

    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// A host's files: a certificate that ends after this time, or has ended so long ago.
    pub(super) fn issue(&self, host: &str, ends_in: i64) -> TlsFiles {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(3600);
        params.not_after = OffsetDateTime::now_utc() + time::Duration::seconds(ends_in);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        TlsFiles {
            ca: self.file("ca.pem", &self.pem),
            certificate: self.file(&format!("{host}.pem"), &certificate.pem()),
            key: self.file(&format!("{host}-key.pem"), &key.serialize_pem()),
        }
    }

    pub(super) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// What a host proves itself with, for a day.
    pub(super) fn host(&self, host: &str) -> Trust {
        trust(&self.issue(host, 86_400)).unwrap()
    }
}

pub(super) fn trust(files: &TlsFiles) -> Result<Trust, TlsError> {
    TlsIdentity::load(files).map(|identity| Trust::Tls(Arc::new(identity)))
}

/// Trust in the host of this name.
pub(super) fn in_host(trust: &Trust, name: &str) -> PeerTrust {
    PeerTrust { trust: trust.clone(), name: Some(name.to_owned()) }
}
