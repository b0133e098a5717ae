//! An authority: a key, the certificate that others know it by, and what it signs.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use time::{Duration, OffsetDateTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::{AUTHORITY_DAYS, HOST_DAYS};
use crate::host::config::check_host_name;
use crate::host::files;
use crate::session::trust::TlsFiles;

/// How long before now a certificate begins, for hosts whose clocks are behind.
const SKEW: Duration = Duration::days(1);
/// Who may read a certificate: everybody.
const OPEN: u32 = 0o644;
/// Who may read a key: its owner.
const SECRET: u32 = 0o600;

/// Why there is no authority, or no certificate of it.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The host cannot have that name.
    #[error("{0}")]
    Name(String),
    /// A certificate that is never valid.
    #[error("a certificate has to be valid for some days; ask for at least 1, like {HOST_DAYS}")]
    NoDays,
    /// A certificate past its authority's end would be refused from then on.
    #[error(
        "the authority ends in {left} days, so a certificate of it cannot be valid for {asked}; ask for fewer, or make another \
         authority (`pageferry pki init`)"
    )]
    TooLong {
        /// What is left of the authority's time.
        left: i64,
        /// What was asked for.
        asked: u32,
    },
    /// A file of the authority cannot be used.
    #[error("the authority's {what} {path} cannot be used: {why}; `pageferry pki init` makes an authority")]
    Authority {
        /// `certificate` or `key`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// In words.
        why: String,
    },
    /// The key would sign what nobody who knows the certificate believes.
    #[error("the key {key} is not the one of the authority {certificate}; put the right one back")]
    Foreign {
        /// The authority's certificate.
        certificate: PathBuf,
        /// The key beside it.
        key: PathBuf,
    },
    /// Something is there that would be lost.
    #[error("{0} is there already; {1}")]
    Exists(PathBuf, &'static str),
    /// A file cannot be written.
    #[error("{path} cannot be written: {error}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The certificate cannot be made.
    #[error("the certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// Somebody who says which host is which.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// In PEM.
    certificate: String,
    not_after: OffsetDateTime,
}

/// A host's certificate and its key, in PEM.
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// The key.
    pub key: String,
    /// When the certificate ends.
    pub not_after: OffsetDateTime,
}

impl Authority {
    /// A new one that is valid for [`AUTHORITY_DAYS`].
    ///
    /// # Errors
    /// [`PkiError::Make`].
    pub fn create() -> Result<Self, PkiError> {
        let now = OffsetDateTime::now_utc();
        let not_after = now + Duration::days(AUTHORITY_DAYS.into());
        let mut params = CertificateParams::default();
        params.not_before = now - SKEW;
        params.not_after = not_after;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // The day tells an authority from the one that replaces it.
        params.distinguished_name = named(&format!("pageferry authority of {}", now.date()));
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate, not_after })
    }

    /// The one whose files are in this directory.
    ///
    /// # Errors
    /// [`PkiError::Authority`] and [`PkiError::Foreign`], naming the file.
    pub fn load(directory: &Path) -> Result<Self, PkiError> {
        let (certificate_path, key_path) = Self::files(directory);
        let wrong = |what, path: &Path| {
            let path = path.to_owned();
            move |why: String| PkiError::Authority { what, path, why }
        };
        let certificate = std::fs::read_to_string(&certificate_path)
            .map_err(|error| wrong("certificate", &certificate_path)(error.to_string()))?;
        let key =
            std::fs::read_to_string(&key_path).map_err(|error| wrong("key", &key_path)(error.to_string()))?;
        let key = KeyPair::from_pem(&key).map_err(|error| wrong("key", &key_path)(error.to_string()))?;

        let unusable = wrong("certificate", &certificate_path);
        let der = match CertificateDer::from_pem_slice(certificate.as_bytes()) {
            Ok(der) => der,
            Err(error) => return Err(unusable(error.to_string())),
        };
        let parsed = match X509Certificate::from_der(&der) {
            Ok((_, parsed)) => parsed,
            Err(error) => return Err(unusable(error.to_string())),
        };
        if !parsed.is_ca() {
            return Err(unusable("it is not the certificate of an authority".to_owned()));
        }
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return Err(PkiError::Foreign { certificate: certificate_path, key: key_path });
        }
        let not_after = parsed.validity().not_after.to_datetime();
        let issuer = match Issuer::from_ca_cert_der(&der, key) {
            Ok(issuer) => issuer,
            Err(error) => return Err(unusable(error.to_string())),
        };
        Ok(Self { issuer, certificate, not_after })
    }

    /// Where an authority's certificate and its key are.
    pub(super) fn files(directory: &Path) -> (PathBuf, PathBuf) {
        (directory.join("ca.pem"), directory.join("ca-key.pem"))
    }

    /// The certificate that hosts know it by, in PEM.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Writes its certificate and its key into a directory.
    ///
    /// # Errors
    /// [`PkiError::Exists`] without `force`, [`PkiError::Write`].
    pub(super) fn write(&self, directory: &Path, force: bool) -> Result<(), PkiError> {
        let (certificate, key) = Self::files(directory);
        let advice =
            "every certificate of that authority would have to be issued again; --force writes over it";
        let texts = [
            (&key, self.issuer.key().serialize_pem(), SECRET),
            (&certificate, self.certificate.clone(), OPEN),
        ];
        if !force {
            refuse(&[&certificate, &key], advice)?;
        }
        for (path, text, mode) in texts {
            files::write(path, text.as_bytes(), mode, force)
                .map_err(|error| PkiError::Write { path: path.clone(), error })?;
        }
        Ok(())
    }

    /// A certificate for a host that is valid for so many days from now. The name is the first in it, the addresses follow.
    ///
    /// # Errors
    /// [`PkiError::Name`], [`PkiError::NoDays`], [`PkiError::TooLong`], [`PkiError::Make`].
    pub fn issue(&self, host: &str, addresses: &[IpAddr], days: u32) -> Result<Issued, PkiError> {
        let now = OffsetDateTime::now_utc();
        let left = (self.not_after - now).whole_days();
        if days == 0 {
            return Err(PkiError::NoDays);
        }
        if i64::from(days) > left {
            return Err(PkiError::TooLong { left, asked: days });
        }
        self.issue_between(host, addresses, now - SKEW, now + Duration::days(days.into()))
    }

    /// As [`Authority::issue`], with a time that may be over or to come, for tests of what is refused.
    ///
    /// # Errors
    /// [`PkiError::Name`], [`PkiError::Make`].
    pub fn issue_between(
        &self,
        host: &str,
        addresses: &[IpAddr],
        not_before: OffsetDateTime,
        not_after: OffsetDateTime,
    ) -> Result<Issued, PkiError> {
        check_host_name(host).map_err(PkiError::Name)?;
        let mut params = CertificateParams::default();
        params.not_before = not_before;
        params.not_after = not_after;
        params.subject_alt_names = vec![SanType::DnsName(Ia5String::try_from(host)?)];
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Each host calls others and is called by them.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.distinguished_name = named(host);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { certificate, key: key.serialize_pem(), not_after })
    }

    /// Writes into a directory what a host needs, its own certificate and key and the authority's certificate, and says where:
    /// for tests and for programs that set up several hosts at once.
    ///
    /// # Errors
    /// As [`Authority::issue`], [`PkiError::Exists`], [`PkiError::Write`].
    pub fn write_host(
        &self,
        directory: &Path,
        host: &str,
        addresses: &[IpAddr],
    ) -> Result<TlsFiles, PkiError> {
        let issued = self.issue(host, addresses, HOST_DAYS)?;
        let (certificate, key) = issued.write(directory, host)?;
        let (ca, _) = Self::files(directory);
        files::write(&ca, self.certificate.as_bytes(), OPEN, true)
            .map_err(|error| PkiError::Write { path: ca.clone(), error })?;
        Ok(TlsFiles { ca, certificate, key })
    }
}

impl Issued {
    /// Writes the certificate and the key into a directory, as `HOST.pem` and `HOST-key.pem`, and says where they are.
    ///
    /// # Errors
    /// [`PkiError::Exists`], [`PkiError::Write`].
    pub fn write(&self, directory: &Path, host: &str) -> Result<(PathBuf, PathBuf), PkiError> {
        let certificate = directory.join(format!("{host}.pem"));
        let key = directory.join(format!("{host}-key.pem"));
        refuse(&[&certificate, &key], "take it away first, or write to another directory")?;
        let written = |path: &Path, text: &str, mode| {
            files::write(path, text.as_bytes(), mode, false)
                .map_err(|error| PkiError::Write { path: path.to_owned(), error })
        };
        written(&key, &self.key, SECRET)?;
        written(&certificate, &self.certificate, OPEN).inspect_err(|_| {
            // A key without its certificate would be in the way of the next attempt.
            let _ = std::fs::remove_file(&key);
        })?;
        Ok((certificate, key))
    }
}

fn refuse(paths: &[&Path], advice: &'static str) -> Result<(), PkiError> {
    match paths.iter().find(|path| path.symlink_metadata().is_ok()) {
        Some(path) => Err(PkiError::Exists((*path).to_owned(), advice)),
        None => Ok(()),
    }
}

fn named(name: &str) -> rcgen::DistinguishedName {
    let mut distinguished = rcgen::DistinguishedName::new();
    // X.509 allows a common name 64 characters; the full name is an alternative name.
    let short: String = name.chars().take(64).collect();
    distinguished.push(DnType::CommonName, short);
    distinguished
}
