//! `pageferry pki`: makes an authority, and certificates for hosts.

use std::fs::DirBuilder;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde_json::json;
use time::OffsetDateTime;

use super::authority::{Authority, PkiError};
use crate::host::exit::Exit;

/// Makes an authority in a directory, `ca.pem` and `ca-key.pem`, and says what to do with it. It replaces one only when forced
/// to.
#[must_use]
pub fn init(directory: &Path, force: bool, json: bool) -> Exit {
    finish(create(directory, force), json)
}

/// Issues a certificate for a host by the authority in a directory, writes it there or into another one, and says which lines
/// the host file needs.
#[must_use]
pub fn issue(
    directory: &Path,
    host: &str,
    addresses: &[IpAddr],
    out: Option<&Path>,
    days: u32,
    json: bool,
) -> Exit {
    finish(create_host(directory, host, addresses, out, days), json)
}

/// What was made, for people and for programs.
struct Made {
    text: String,
    json: serde_json::Value,
}

fn create(directory: &Path, force: bool) -> Result<Made, PkiError> {
    let authority = Authority::create()?;
    make_directory(directory)?;
    authority.write(directory, force)?;
    let (certificate, key) = Authority::files(&absolute(directory));
    let text = format!(
        "Made an authority.\n  {}  its certificate: every host needs a copy\n  {}  its key: keep it safe; who has it can be any \
         host\nNext: pageferry pki issue HOST",
        certificate.display(),
        key.display()
    );
    Ok(Made { text, json: json!({ "certificate": certificate, "key": key }) })
}

fn create_host(
    directory: &Path,
    host: &str,
    addresses: &[IpAddr],
    out: Option<&Path>,
    days: u32,
) -> Result<Made, PkiError> {
    let authority = Authority::load(directory)?;
    let issued = authority.issue(host, addresses, days)?;
    let out = out.unwrap_or(directory);
    make_directory(out)?;
    let (certificate, key) = issued.write(&absolute(out), host)?;
    let (ca, _) = Authority::files(&absolute(directory));
    let until = day(issued.not_after);
    let lines =
        format!("name = {host:?}\n\n[tls]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}");
    let text = format!(
        "Issued a certificate for {host}, valid until {until}.\nThe host file of {host} (/etc/pageferry/host.toml) needs:\n\n\
         {lines}\n\nIf {host} is another machine, copy these three files to it, and nothing else from here, and write their paths \
         there."
    );
    let json = json!({
        "host": host,
        "addresses": addresses,
        "ca": ca,
        "certificate": certificate,
        "key": key,
        "valid_until": until,
    });
    Ok(Made { text, json })
}

fn finish(made: Result<Made, PkiError>, json: bool) -> Exit {
    match made {
        Ok(made) => {
            if json {
                println!("{}", made.json);
            } else {
                println!("{}", made.text);
            }
            Exit::Completed
        }
        Err(error) => {
            if json {
                println!("{}", json!({ "error": error.to_string() }));
            } else {
                eprintln!("pageferry: {error}");
            }
            Exit::Failed
        }
    }
}

/// Keys are in it: nobody else needs to look inside.
fn make_directory(directory: &Path) -> Result<(), PkiError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|error| PkiError::Write { path: directory.to_owned(), error })
}

/// What is printed is copied to a host file, which lies elsewhere.
fn absolute(directory: &Path) -> PathBuf {
    std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned())
}

fn day(when: OffsetDateTime) -> String {
    when.date().to_string()
}
