//! A host's certificate and key, and the authorities that it trusts, ready for TLS.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use super::TlsFiles;

/// Why a host cannot prove who it is.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds something else.
    #[error("the {what} {path} cannot be used: {why}")]
    File {
        /// `certificate`, `key` or `CA certificate`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// In words.
        why: String,
    },
    /// The certificate's time is over or has not come.
    #[error(
        "the certificate {path} {why}; issue another one (`pageferry pki issue`), or set this host's clock"
    )]
    Time {
        /// Which file.
        path: PathBuf,
        /// In words.
        why: String,
    },
    /// The parts do not fit.
    #[error("the certificate {certificate} and the key {key} do not fit each other: {why}")]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// In words.
        why: String,
    },
    /// No other host would believe it.
    #[error("the certificate {certificate} was not issued by the authority in {ca}: {why}")]
    Foreign {
        /// The certificate's file.
        certificate: PathBuf,
        /// The authority's file.
        ca: PathBuf,
        /// In words.
        why: String,
    },
}

/// What a host proves with that it is that host, and what it checks others with.
pub struct TlsIdentity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: String,
    expires: SystemTime,
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity").field("name", &self.name).finish_non_exhaustive()
    }
}

impl TlsIdentity {
    /// Reads the files and checks that they fit each other, now.
    ///
    /// # Errors
    /// [`TlsError`] naming the file.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let roots = roots(&files.ca)?;
        let chain = certificates("certificate", &files.certificate)?;
        let key = key(&files.key)?;
        let (name, expires) = described(&files.certificate, &chain[0])?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let pair = |error: rustls::Error| TlsError::Pair {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
            why: explain(&error),
        };
        let foreign = |why: String| TlsError::Foreign {
            certificate: files.certificate.clone(),
            ca: files.ca.clone(),
            why,
        };
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| foreign(error.to_string()))?;
        let now = rustls::pki_types::UnixTime::now();
        verifier.verify_client_cert(&chain[0], &chain[1..], now).map_err(|error| foreign(explain(&error)))?;
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pair)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(pair)?;
        Ok(Self { client: Arc::new(client), server: Arc::new(server), name, expires })
    }

    /// For connections that this host makes.
    #[must_use]
    pub fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// For connections that this host takes: whoever makes one has to show a certificate.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// The name in this host's certificate.
    #[must_use]
    pub fn host_name(&self) -> &str {
        &self.name
    }

    /// When this host's certificate ends.
    #[must_use]
    pub fn expires(&self) -> SystemTime {
        self.expires
    }
}

/// The name in the certificate that the other side showed, its own first in the list.
#[must_use]
pub fn peer_host_name(certificates: &[CertificateDer<'_>]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificates.first()?).ok()?;
    host_name(&certificate)
}

/// What TLS says, in plain words, with what to do.
#[must_use]
pub fn explain(error: &rustls::Error) -> String {
    use rustls::AlertDescription as Alert;
    match error {
        rustls::Error::InvalidCertificate(certificate) => explain_certificate(certificate),
        rustls::Error::NoCertificatesPresented => {
            "it shows no certificate; give that host one of the same CA".into()
        }
        rustls::Error::InconsistentKeys(_) => "the key belongs to another certificate".into(),
        rustls::Error::AlertReceived(Alert::CertificateRequired) => {
            "it wants this host to show a certificate; give this host one ([tls] in the host file)".into()
        }
        rustls::Error::AlertReceived(Alert::UnknownCA) => {
            "it does not trust the CA of this host's certificate; both hosts need certificates of one CA"
                .into()
        }
        rustls::Error::AlertReceived(Alert::CertificateExpired) => {
            "it finds this host's certificate expired; issue another one, or set the clocks".into()
        }
        rustls::Error::AlertReceived(
            Alert::BadCertificate | Alert::CertificateUnknown | Alert::AccessDenied,
        ) => "it does not accept this host's certificate; look into its log for the reason".into(),
        rustls::Error::AlertReceived(Alert::DecryptError) => {
            "it finds that this host's certificate was not signed by the CA that it trusts".into()
        }
        rustls::Error::InvalidMessage(_) => "it does not speak TLS; does that host have certificates?".into(),
        other => other.to_string(),
    }
}

fn explain_certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired; issue another one, or set the clocks".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet; set the clocks".into()
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is of a CA that this host does not trust; both hosts need certificates of one CA"
                .into()
        }
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "its certificate is for {}, not for {}; another host answers there, or it needs a certificate with that name",
            presented.join(", "),
            expected.to_str()
        ),
        CertificateError::NotValidForName => "its certificate is for another host".into(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its certificate is not made for this use; issue one with `pageferry pki issue`".into()
        }
        other => format!("its certificate is not valid: {other}"),
    }
}

fn file_error(what: &'static str, path: &Path) -> impl Fn(String) -> TlsError {
    move |why| TlsError::File { what, path: path.to_owned(), why }
}

fn pem_error(error: rustls::pki_types::pem::Error, wanted: &str) -> String {
    match error {
        rustls::pki_types::pem::Error::Io(error) => error.to_string(),
        rustls::pki_types::pem::Error::NoItemsFound => format!("it holds no {wanted} in PEM form"),
        other => other.to_string(),
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = file_error(what, path);
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = found.map_err(|error| failed(pem_error(error, "certificate")))?;
    if found.is_empty() { Err(failed("it holds no certificate in PEM form".into())) } else { Ok(found) }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path)
        .map_err(|error| file_error("key", path)(pem_error(error, "private key")))
}

fn roots(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("CA certificate", path)? {
        roots.add(certificate).map_err(|error| file_error("CA certificate", path)(error.to_string()))?;
    }
    Ok(Arc::new(roots))
}

/// The certificate's name, and its end. It must be valid now.
fn described(path: &Path, certificate: &CertificateDer<'_>) -> Result<(String, SystemTime), TlsError> {
    let failed = file_error("certificate", path);
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| failed(error.to_string()))?;
    let name = host_name(&parsed).ok_or_else(|| failed("it names no host (it has no DNS name)".into()))?;
    let (begins, ends) = (parsed.validity().not_before, parsed.validity().not_after);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    let wrong_time = |why: String| TlsError::Time { path: path.to_owned(), why };
    if now > ends.timestamp() {
        return Err(wrong_time(format!("expired on {ends}")));
    }
    if now < begins.timestamp() {
        return Err(wrong_time(format!("is valid only from {begins} on")));
    }
    let expires = UNIX_EPOCH + Duration::from_secs(u64::try_from(ends.timestamp()).unwrap_or(0));
    Ok((name, expires))
}

fn host_name(certificate: &X509Certificate<'_>) -> Option<String> {
    let names = certificate.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    })
}
