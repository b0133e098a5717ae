//! What is issued is believed by those who trust the authority, and by nobody else.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use time::{Duration, OffsetDateTime};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

use super::*;
use crate::host::config;
use crate::host::exit::Exit;
use crate::session::trust::{TlsError, TlsFiles, TlsIdentity};

fn host(authority: &Authority, directory: &Path, name: &str) -> TlsFiles {
    authority.write_host(directory, name, &["127.0.0.1".parse().unwrap()]).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn two_hosts_of_one_authority_believe_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::create().unwrap();
    let [a, b] = ["host-a", "host-b.example.org"].map(|name| {
        let identity = TlsIdentity::load(&host(&authority, directory.path(), name)).unwrap();
        assert_eq!(identity.host_name(), name);
        identity
    });
    let name = "host-b.example.org".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(a.client_config(), name).unwrap();
    let mut server = rustls::ServerConnection::new(b.server_config()).unwrap();
    handshake(&mut client, &mut server).unwrap();
    let shown = crate::session::trust::peer_host_name(server.peer_certificates().unwrap());
    assert_eq!(shown.as_deref(), Some("host-a"));

    let stranger_directory = tempfile::tempdir().unwrap();
    let stranger = host(&Authority::create().unwrap(), stranger_directory.path(), "host-a");
    let stranger = TlsIdentity::load(&stranger).unwrap();
    let name = "host-b.example.org".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(stranger.client_config(), name).unwrap();
    let mut server = rustls::ServerConnection::new(b.server_config()).unwrap();
    assert!(handshake(&mut client, &mut server).is_err());
}

/// Carries bytes between both until they are done with each other.
fn handshake(
    client: &mut rustls::ClientConnection,
    server: &mut rustls::ServerConnection,
) -> Result<(), rustls::Error> {
    for _ in 0..10 {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut bytes = Vec::new();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(())
}

#[test]
fn a_certificate_of_another_authority_is_foreign() {
    let directory = tempfile::tempdir().unwrap();
    let files = host(&Authority::create().unwrap(), directory.path(), "host-a");
    fs::write(&files.ca, Authority::create().unwrap().certificate()).unwrap();
    let error = TlsIdentity::load(&files).unwrap_err();
    assert!(matches!(error, TlsError::Foreign { .. }), "{error}");
}

#[test]
fn a_certificate_out_of_its_time_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::create().unwrap();
    let files = host(&authority, directory.path(), "host-a");
    let now = OffsetDateTime::now_utc();
    for (begins, ends) in [(-10, -1), (1, 10)] {
        let (begins, ends) = (now + Duration::days(begins), now + Duration::days(ends));
        let issued = authority.issue_between("host-a", &[], begins, ends).unwrap();
        fs::write(&files.certificate, issued.certificate).unwrap();
        fs::write(&files.key, issued.key).unwrap();
        let error = TlsIdentity::load(&files).unwrap_err();
        assert!(matches!(error, TlsError::Time { .. }), "{error}");
    }
}

#[test]
fn the_key_of_another_certificate_does_not_fit() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::create().unwrap();
    let mut files = host(&authority, directory.path(), "host-a");
    files.key = host(&authority, directory.path(), "host-b").key;
    let error = TlsIdentity::load(&files).unwrap_err();
    assert!(matches!(error, TlsError::Pair { .. }), "{error}");
}

#[test]
fn a_certificate_names_the_host_first_and_then_its_addresses() {
    let authority = Authority::create().unwrap();
    let addresses = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    let issued = authority.issue("host-a", &addresses, 10).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(issued.certificate.as_bytes()).unwrap();
    let certificate = Pem::parse_x509(&pem).unwrap();
    let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
    let ipv6 = "fd00::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let expected = [
        GeneralName::DNSName("host-a"),
        GeneralName::IPAddress(&[10, 0, 0, 1]),
        GeneralName::IPAddress(&ipv6),
    ];
    assert_eq!(*names, expected);
    let uses = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(uses.server_auth && uses.client_auth && !uses.any);
    assert!(!certificate.is_ca());
    // So that a long name, which no common name can hold, is not cut in the place that counts.
    let long = ["a".repeat(63), "b".repeat(63), "c".repeat(63)].join(".");
    assert!(authority.issue(&long, &[], 10).is_ok());
}

#[test]
fn what_cannot_be_issued_is_refused() {
    let authority = Authority::create().unwrap();
    for bad in ["", "a b", "-a", "10.0.0.1", "../a", "a/b", &"a".repeat(64)] {
        assert!(matches!(authority.issue(bad, &[], 1), Err(PkiError::Name(_))), "{bad}");
    }
    assert!(matches!(authority.issue("a", &[], 0), Err(PkiError::NoDays)));
    let error = authority.issue("a", &[], AUTHORITY_DAYS + 1).err().unwrap().to_string();
    assert_eq!(
        error,
        "the authority ends in 3651 days, so a certificate of it cannot be valid for 3653; ask for fewer, or make another authority \
         (`pageferry pki init`)"
    );
}

#[test]
fn the_commands_make_files_that_a_host_file_can_name() {
    let directory = tempfile::tempdir().unwrap();
    let pki = directory.path().join("etc/pki");
    assert_eq!(issue(&pki, "host-a", &[], None, HOST_DAYS, false), Exit::Failed, "there is no authority");
    assert_eq!(init(&pki, false, false), Exit::Completed);
    assert_eq!([mode(&pki), mode(&pki.join("ca.pem")), mode(&pki.join("ca-key.pem"))], [0o700, 0o644, 0o600]);
    assert_eq!(issue(&pki, "host-a", &[], None, HOST_DAYS, false), Exit::Completed);
    let out = directory.path().join("host-b");
    assert_eq!(issue(&pki, "host-b", &[], Some(&out), HOST_DAYS, true), Exit::Completed);
    assert_eq!([mode(&pki.join("host-a.pem")), mode(&pki.join("host-a-key.pem"))], [0o644, 0o600]);

    for (host, at) in [("host-a", &pki), ("host-b", &out)] {
        let path = directory.path().join("host.toml");
        let text = format!(
            "name = {host:?}\n[tls]\nca = \"etc/pki/ca.pem\"\ncertificate = {:?}\nkey = {:?}\n",
            at.join(format!("{host}.pem")),
            at.join(format!("{host}-key.pem"))
        );
        fs::write(&path, text).unwrap();
        let identity = config::load(Some(&path)).unwrap().identity().unwrap().unwrap();
        assert_eq!(identity.host_name(), host);
    }
}

#[test]
fn nothing_is_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let pki = directory.path();
    assert_eq!(init(pki, false, false), Exit::Completed);
    let before = fs::read(pki.join("ca.pem")).unwrap();
    assert_eq!(init(pki, false, false), Exit::Failed);
    assert_eq!(fs::read(pki.join("ca.pem")).unwrap(), before);
    assert_eq!(issue(pki, "host-a", &[], None, 10, false), Exit::Completed);
    let before = fs::read(pki.join("host-a.pem")).unwrap();
    assert_eq!(issue(pki, "host-a", &[], None, 10, false), Exit::Failed);
    assert_eq!(issue(pki, "ca", &[], None, 10, false), Exit::Failed, "it would be the authority's own file");
    assert_eq!(fs::read(pki.join("host-a.pem")).unwrap(), before);
    // Only one of the two is there: neither is written.
    fs::remove_file(pki.join("host-a.pem")).unwrap();
    let error =
        Authority::load(pki).unwrap().issue("host-a", &[], 10).unwrap().write(pki, "host-a").unwrap_err();
    assert!(matches!(error, PkiError::Exists(..)), "{error}");
    assert!(!pki.join("host-a.pem").exists());

    let before = fs::read(pki.join("ca.pem")).unwrap();
    assert_eq!(init(pki, true, false), Exit::Completed);
    assert_ne!(fs::read(pki.join("ca.pem")).unwrap(), before);
    assert_eq!(mode(&pki.join("ca-key.pem")), 0o600);
}

#[test]
fn an_authority_whose_files_do_not_fit_issues_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let pki = directory.path();
    let why = |pki: &Path| Authority::load(pki).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(why(pki).contains("ca.pem cannot be used: No such file"), "{}", why(pki));
    assert_eq!(init(pki, false, false), Exit::Completed);
    assert_eq!(why(pki), "");
    let certificate = fs::read(pki.join("ca.pem")).unwrap();

    fs::write(pki.join("ca.pem"), Authority::create().unwrap().certificate()).unwrap();
    assert!(why(pki).contains("is not the one of the authority"), "{}", why(pki));

    let authority = Authority::create().unwrap();
    let issued = authority.issue("host-a", &[], 1).unwrap();
    fs::write(pki.join("ca.pem"), &issued.certificate).unwrap();
    assert!(why(pki).contains("it is not the certificate of an authority"), "{}", why(pki));

    fs::write(pki.join("ca.pem"), certificate).unwrap();
    fs::write(pki.join("ca-key.pem"), "no key").unwrap();
    assert!(why(pki).contains("authority's key"), "{}", why(pki));
}
