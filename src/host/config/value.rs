//! The values of the host file, one function for each kind: what is written there, or why it cannot be.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use rustls::pki_types::ServerName;
use serde::de::{Deserializer, Error, Unexpected, Visitor};

use crate::host::quantity;
use crate::memory::HugePages;
use crate::migration::convergence::OnNoConvergence;
use crate::session::mode::TransferMode;

/// The most connections on one path.
const MAX_CHANNELS_PER_PATH: i64 = 64;
/// A unix socket's address has 108 bytes, the zero byte at the end included (unix(7)).
const MAX_SOCKET_BYTES: usize = 107;
/// Leaves 47 of those 107 for the names of the guests' sockets below the state directory.
const MAX_STATE_DIR_BYTES: usize = 60;

/// What a text means, or why it cannot be there.
type ReadText<T> = fn(&str) -> Result<T, String>;

/// What a value may be written as: each form that it can have, and how that is read.
pub(super) struct Reader<T> {
    wanted: &'static str,
    text: Option<ReadText<T>>,
    number: Option<fn(i64) -> Option<T>>,
    flag: Option<fn(bool) -> T>,
}

impl<T> Reader<T> {
    /// Of a value that is described so, after "write".
    pub(super) fn of(wanted: &'static str) -> Self {
        Self { wanted, text: None, number: None, flag: None }
    }

    pub(super) fn text(self, read: ReadText<T>) -> Self {
        Self { text: Some(read), ..self }
    }

    fn number(self, read: fn(i64) -> Option<T>) -> Self {
        Self { number: Some(read), ..self }
    }

    fn flag(self, read: fn(bool) -> T) -> Self {
        Self { flag: Some(read), ..self }
    }

    pub(super) fn read<'de, D: Deserializer<'de>>(self, from: D) -> Result<T, D::Error> {
        from.deserialize_any(self)
    }
}

impl<T> Visitor<'_> for Reader<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.wanted)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        let read = self.text.ok_or_else(|| E::invalid_type(Unexpected::Str(text), &self))?;
        read(text).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        let read = self.number.ok_or_else(|| E::invalid_type(Unexpected::Signed(number), &self))?;
        read(number).ok_or_else(|| E::custom(format!("{number} cannot be; write {}", self.wanted)))
    }

    fn visit_bool<E: Error>(self, flag: bool) -> Result<T, E> {
        let read = self.flag.ok_or_else(|| E::invalid_type(Unexpected::Bool(flag), &self))?;
        Ok(read(flag))
    }
}

/// A name that a certificate can hold as a DNS name, so that hosts can prove it to each other.
///
/// # Errors
/// What is wrong with it, as a sentence that names it.
pub(crate) fn check_host_name(name: &str) -> Result<(), String> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > 253 {
        "it has more than 253 bytes"
    } else if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte)) {
        "it may have only letters, digits, hyphens and dots"
    } else if name.split('.').any(str::is_empty) {
        "there is nothing before, between or after its dots"
    } else if name.split('.').any(|label| label.len() > 63) {
        "a part between dots has more than 63 bytes"
    } else if name.split('.').any(|label| label.starts_with('-') || label.ends_with('-')) {
        "a part begins or ends with a hyphen"
    } else if matches!(ServerName::try_from(name), Ok(ServerName::DnsName(_))) {
        return Ok(());
    } else {
        "its last part is a number, as in an address"
    };
    Err(format!("{name:?} cannot be a host's name in a certificate: {why}; write a name like \"host-a\""))
}

pub(super) fn name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let read = |text: &str| check_host_name(text).map(|()| text.to_owned());
    Reader::of("a name in quotes, like \"host-a\"").text(read).read(from)
}

pub(super) fn own_name<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    name(from).map(Some)
}

pub(super) fn mode<'de, D: Deserializer<'de>>(from: D) -> Result<Option<TransferMode>, D::Error> {
    Reader::of("\"tcp\", \"compression\", \"rdma\" or \"auto\"").text(mode_named).read(from).map(Some)
}

/// Our words and Hyper-V's, in upper or lower case, as its administrators write them.
fn mode_named(text: &str) -> Result<TransferMode, String> {
    match text.to_ascii_lowercase().as_str() {
        "tcpip" => Ok(TransferMode::Tcp),
        "smb" => Ok(TransferMode::Rdma),
        word => word.parse().map_err(|_| {
            format!(
                "{text:?} is no performance option; write \"tcp\", \"compression\", \"rdma\" or \"auto\" \
                 (or, as in Hyper-V, \"TCPIP\", \"Compression\" or \"SMB\")"
            )
        }),
    }
}

pub(super) fn flag<'de, D: Deserializer<'de>>(from: D) -> Result<Option<bool>, D::Error> {
    Reader::of("true or false, without quotes").flag(|flag| flag).read(from).map(Some)
}

/// Whether it is required.
pub(super) fn encryption<'de, D: Deserializer<'de>>(from: D) -> Result<Option<bool>, D::Error> {
    let read = |text: &str| match text {
        "off" => Ok(false),
        "required" => Ok(true),
        other => Err(format!("{other:?} is no choice; write \"off\" or \"required\"")),
    };
    Reader::of("\"off\" or \"required\"").text(read).read(from).map(Some)
}

pub(super) fn rdma_mtu<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let read = |number| u32::try_from(number).ok().filter(|mtu| [256, 512, 1024, 2048, 4096].contains(mtu));
    Reader::of("256, 512, 1024, 2048 or 4096").number(read).read(from).map(Some)
}

pub(super) fn rdma_queue_depth<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let read = |number| u32::try_from(number).ok().filter(|depth| (16..=4096).contains(depth));
    Reader::of("a whole number from 16 to 4096").number(read).read(from).map(Some)
}

pub(super) fn rdma_timeout<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u8>, D::Error> {
    let read = |number| u8::try_from(number).ok().filter(|exponent| (1..=31).contains(exponent));
    Reader::of("a whole number from 1 to 31; 18 is 4.096 us x 2^18, about a second")
        .number(read)
        .read(from)
        .map(Some)
}

pub(super) fn rdma_retries<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u8>, D::Error> {
    let read = |number| u8::try_from(number).ok().filter(|retries| *retries <= 6);
    Reader::of("a whole number from 0 to 6").number(read).read(from).map(Some)
}

/// From 1 on.
pub(super) fn count<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let read = |number| u32::try_from(number).ok().filter(|number| *number > 0);
    Reader::of("a whole number from 1 on, like 2").number(read).read(from).map(Some)
}

pub(super) fn cap<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    Reader::of("a rate in quotes, like \"10Gbit/s\"").text(cap_of).read(from).map(Some)
}

fn cap_of(text: &str) -> Result<u64, String> {
    match quantity::rate(text).map_err(|error| error.to_string())? {
        0 => Err(format!("{text:?} would let nothing through; leave the key out where there is no limit")),
        rate => Ok(rate),
    }
}

/// How many channels; `Some(None)` is "auto".
pub(super) fn channels<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<u16>>, D::Error> {
    let text = |text: &str| match text {
        "auto" => Ok(None),
        other => Err(format!("{other:?} is no number of channels; write \"auto\" or a number from 1 to 64")),
    };
    let number = |number: i64| {
        let known = (1..=MAX_CHANNELS_PER_PATH).contains(&number);
        known.then(|| u16::try_from(number).ok())
    };
    Reader::of("\"auto\" or a number from 1 to 64").text(text).number(number).read(from).map(Some)
}

pub(super) fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let read = |text: &str| quantity::duration(text).map_err(|error| error.to_string());
    Reader::of("a duration in quotes, like \"300ms\"").text(read).read(from).map(Some)
}

pub(super) fn on_no_convergence<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<OnNoConvergence>, D::Error> {
    let read = |text: &str| {
        let named = OnNoConvergence::ALL.into_iter().find(|choice| choice.name() == text);
        named.ok_or_else(|| format!("{text:?} is no choice; write \"cancel\", \"switch\" or \"throttle\""))
    };
    Reader::of("\"cancel\", \"switch\" or \"throttle\"").text(read).read(from).map(Some)
}

pub(super) fn port<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u16>, D::Error> {
    let read = |number| u16::try_from(number).ok().filter(|port| *port > 0);
    Reader::of("a port from 1 to 65535, like 7433").number(read).read(from).map(Some)
}

pub(super) fn ports<'de, D: Deserializer<'de>>(from: D) -> Result<Option<(u16, u16)>, D::Error> {
    Reader::of("a range of ports in quotes, like \"7434-7533\"").text(ports_of).read(from).map(Some)
}

fn ports_of(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| text.trim().parse().ok().filter(|port: &u16| *port > 0);
    let range = text.split_once('-').and_then(|(first, last)| Some((port(first)?, port(last)?)));
    match range {
        None => {
            Err(format!("{text:?} is no range of ports; write the first and the last, like \"7434-7533\""))
        }
        Some((first, last)) if first > last => {
            Err(format!("{text:?} ends before it begins; write \"{last}-{first}\""))
        }
        Some((first, last)) if first == last => Err(format!(
            "{text:?} is one port, and the first is the daemon's own; write at least two, like \"7434-7533\""
        )),
        Some(range) => Ok(range),
    }
}

/// The word for it in the host file.
pub(super) fn huge_pages_name(huge_pages: HugePages) -> &'static str {
    match huge_pages {
        HugePages::No => "no",
        HugePages::Transparent => "transparent",
        HugePages::Hugetlb => "hugetlb",
    }
}

pub(super) fn huge_pages<'de, D: Deserializer<'de>>(from: D) -> Result<Option<HugePages>, D::Error> {
    let read = |text: &str| {
        let all = [HugePages::No, HugePages::Transparent, HugePages::Hugetlb];
        let named = all.into_iter().find(|kind| huge_pages_name(*kind) == text);
        named.ok_or_else(|| {
            format!("{text:?} is no kind of pages; write \"no\", \"transparent\" or \"hugetlb\"")
        })
    };
    Reader::of("\"no\", \"transparent\" or \"hugetlb\"").text(read).read(from).map(Some)
}

pub(super) fn state_dir<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    let read = |text: &str| match absolute(text)? {
        _ if text.len() > MAX_STATE_DIR_BYTES => Err(format!(
            "{text:?} has {} bytes; it may have {MAX_STATE_DIR_BYTES}, because the path of a unix socket below it may have \
             {MAX_SOCKET_BYTES} (unix(7)); choose a shorter directory",
            text.len()
        )),
        path => Ok(path),
    };
    Reader::of("a directory in quotes, like \"/var/lib/pageferry\"").text(read).read(from).map(Some)
}

pub(super) fn socket<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    let read = |text: &str| match absolute(text)? {
        _ if text.len() > MAX_SOCKET_BYTES => Err(format!(
            "{text:?} has {} bytes; the path of a unix socket may have {MAX_SOCKET_BYTES} (unix(7)); choose a shorter one",
            text.len()
        )),
        _ if text.ends_with('/') => Err(format!(
            "{text:?} is a directory; write the socket's own path, like \"/run/pageferry/api.sock\""
        )),
        path => Ok(path),
    };
    Reader::of("a path in quotes, like \"/run/pageferry/api.sock\"").text(read).read(from).map(Some)
}

/// The daemon changes its directory, and the command line has another one: only an absolute path is the same for both.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = file_of(text)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(format!("{text:?} does not begin with a slash; write the whole path, like \"/{text}\""))
    }
}

/// A file, which may be named relative to the host file.
pub(super) fn file<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    Reader::of("a file in quotes, like \"ca.pem\"").text(file_of).read(from).map(Some)
}

fn file_of(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("\"\" names nothing; write a path".to_owned()),
        _ if text.contains('\0') => Err(format!("{text:?} has a zero byte, which no path has; take it out")),
        _ => Ok(PathBuf::from(text)),
    }
}
