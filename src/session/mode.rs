//! How memory is transferred: what a host asks for, and what two hosts can do.

use std::fmt;
use std::str::FromStr;

use super::encryption::Encryption;
use crate::wire::control::MAX_TEXT_BYTES;
use crate::wire::{cut_text, shown_text};

/// The transfer modes, as a host's configuration names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransferMode {
    /// Pages as they are, over TCP.
    Tcp,
    /// Pages compressed where that is faster, over TCP.
    Compression,
    /// Pages written by the network card; TCP where that is not possible.
    Rdma,
    /// The best that both hosts can do.
    Auto,
}

impl TransferMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Compression, Self::Rdma, Self::Auto];

    /// The word for it on the command line, in JSON and in the host file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Compression => "compression",
            Self::Rdma => "rdma",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for TransferMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a transfer mode; there are tcp, compression, rdma and auto")]
pub struct UnknownMode(pub String);

impl FromStr for TransferMode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

/// What a host can do beyond plain TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// It takes compressed batches (apart).
    pub compression: bool,
    /// Why it has no RDMA; `None` when it has. Empty when it does not say.
    pub no_rdma: Option<String>,
    /// It takes data channels under TLS.
    pub takes_tls: bool,
    /// What it demands of the payload.
    pub encryption: Encryption,
}

impl Capabilities {
    const COMPRESSION: &str = "zstd";
    const RDMA: &str = "rdma";
    const NO_RDMA: &str = "no rdma: ";
    const TLS: &str = "tls";
    const ENCRYPTED: &str = "encrypted";
    const ISOLATED: &str = "isolated: ";
    /// Of 64 names, the others leave room for so many; where a host has more, the others count as not isolated.
    const MAX_ISOLATED: usize = 32;

    /// Those of this program on a host that has RDMA, or has not for this reason.
    #[must_use]
    pub fn with_rdma(no_rdma: Option<&str>) -> Self {
        Self { compression: true, no_rdma: no_rdma.map(str::to_owned), ..Self::none() }
    }

    /// The same with data channels under TLS, if it takes them, and what it demands.
    #[must_use]
    pub fn encrypting(self, takes_tls: bool, encryption: &Encryption) -> Self {
        Self { takes_tls, encryption: encryption.clone(), ..self }
    }

    /// Nothing but plain TCP.
    #[must_use]
    pub fn none() -> Self {
        let encryption = Encryption::default();
        Self { compression: false, no_rdma: Some(String::new()), takes_tls: false, encryption }
    }

    /// The names that travel in control messages. Why there is no RDMA is the end of one, for people.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let rdma = match &self.no_rdma {
            None => Self::RDMA.to_owned(),
            Some(why) => cut_text(&format!("{}{why}", Self::NO_RDMA), MAX_TEXT_BYTES).to_owned(),
        };
        let said = [
            (self.compression, Self::COMPRESSION),
            (self.takes_tls, Self::TLS),
            (self.encryption.required, Self::ENCRYPTED),
        ];
        let said = said.into_iter().filter(|(so, _)| *so).map(|(_, name)| name.to_owned());
        let isolated = self.encryption.isolated.iter().filter(|_| self.encryption.required);
        let isolated = isolated.take(Self::MAX_ISOLATED).map(|at| format!("{}{at}", Self::ISOLATED));
        said.chain(isolated).chain([rdma]).collect()
    }

    /// From the names that came; unknown ones are a newer peer's and ignored.
    #[must_use]
    pub fn from_names(names: &[String]) -> Self {
        let has = |wanted: &str| names.iter().any(|name| name == wanted);
        let why = names.iter().find_map(|name| name.strip_prefix(Self::NO_RDMA));
        let isolated = names.iter().filter_map(|name| name.strip_prefix(Self::ISOLATED)?.parse().ok());
        Self {
            takes_tls: has(Self::TLS),
            encryption: Encryption { required: has(Self::ENCRYPTED), isolated: isolated.collect() },
            compression: has(Self::COMPRESSION),
            no_rdma: (!has(Self::RDMA))
                .then(|| why.map(|why| shown_text(why.as_bytes())).unwrap_or_default()),
        }
    }
}

/// The mode that a migration uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Never [`TransferMode::Auto`].
    pub used: TransferMode,
    /// Why, as a sentence.
    pub reason: String,
}

/// From so many bits a second on, plain TCP is chosen by itself: one core compresses 2 to 5 Gbit/s, and a guest's vCPUs want the
/// others.
pub const FAST_ENOUGH: u64 = 25_000_000_000;

/// Which mode two hosts use when the source's asks for one. `bits_per_second` is what the paths carry together, where their
/// interfaces say; `forbidden` is why RDMA may be used on none of them, where both hosts have it.
#[must_use]
pub fn resolve(
    requested: TransferMode,
    ours: &Capabilities,
    theirs: &Capabilities,
    bits_per_second: Option<u64>,
    forbidden: Option<&str>,
) -> Resolved {
    let resolved = |used, reason: String| Resolved { used, reason };
    let not_allowed = || forbidden.map(|why| format!("RDMA is not allowed ({why})"));
    match (requested, without_rdma(ours, theirs).or_else(not_allowed)) {
        (TransferMode::Tcp, _) => resolved(TransferMode::Tcp, "tcp was asked for".into()),
        (TransferMode::Compression, _) => compression(ours, theirs, "compression was asked for"),
        (TransferMode::Rdma, None) => resolved(TransferMode::Rdma, "rdma was asked for".into()),
        (TransferMode::Rdma, Some(why)) => resolved(TransferMode::Tcp, format!("{why}, so tcp is used")),
        (TransferMode::Auto, None) => resolved(TransferMode::Rdma, "both hosts have RDMA".into()),
        (TransferMode::Auto, Some(why)) => match bits_per_second.filter(|bits| *bits >= FAST_ENOUGH) {
            Some(bits) => {
                let gigabits = bits / 1_000_000_000;
                resolved(
                    TransferMode::Tcp,
                    format!("{why}, and the paths carry {gigabits} Gbit/s without compression"),
                )
            }
            None => compression(ours, theirs, &format!("{why}, and compression is never slower than tcp")),
        },
    }
}

fn compression(ours: &Capabilities, theirs: &Capabilities, reason: &str) -> Resolved {
    let (used, reason) = match (ours.compression, theirs.compression) {
        (true, true) => (TransferMode::Compression, reason),
        (false, _) => (TransferMode::Tcp, "this host cannot compress, so tcp is used"),
        (true, false) => (TransferMode::Tcp, "the destination takes no compressed pages, so tcp is used"),
    };
    Resolved { used, reason: reason.to_owned() }
}

/// Which of both hosts has no RDMA, and why.
fn without_rdma(ours: &Capabilities, theirs: &Capabilities) -> Option<String> {
    let of = |host: &str, why: &String| match why.as_str() {
        "" => format!("{host} has no RDMA"),
        why => format!("{host} has no RDMA ({why})"),
    };
    let here = ours.no_rdma.as_ref().map(|why| of("this host", why));
    here.or_else(|| theirs.no_rdma.as_ref().map(|why| of("the destination", why)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for mode in TransferMode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        let error = "smb".parse::<TransferMode>().unwrap_err().to_string();
        assert_eq!(error, "\"smb\" is not a transfer mode; there are tcp, compression, rdma and auto");
        for can in
            [Capabilities::with_rdma(None), Capabilities::with_rdma(Some("no device")), Capabilities::none()]
        {
            assert_eq!(Capabilities::from_names(&can.names()), can);
        }
        let required = Encryption { required: true, isolated: vec!["10.0.1.2".parse().unwrap(); 99] };
        let told = Capabilities::with_rdma(None).encrypting(true, &required).names();
        assert_eq!(told[..3], ["zstd", "tls", "encrypted"]);
        assert!(told.len() <= 64 && told[3] == "isolated: 10.0.1.2", "{told:?}");
        let heard = Capabilities::from_names(&told);
        assert!(heard.takes_tls && heard.encryption.required && heard.encryption.isolated.len() == 32);
        assert_eq!(Capabilities::from_names(&["something newer".to_owned()]), Capabilities::none());
        let long = Capabilities::with_rdma(Some(&"x".repeat(10_000))).names();
        assert!(long.iter().all(|name| name.len() <= MAX_TEXT_BYTES));
    }

    #[test]
    fn what_is_asked_for_is_used_where_both_can() {
        use TransferMode::{Auto, Compression, Rdma, Tcp};
        let all = Capabilities::with_rdma(None);
        let tcp = Capabilities::none();
        let no_rdma = Capabilities::with_rdma(Some("no device"));
        let slow = Some(1_000_000_000);
        for (requested, ours, theirs, speed, used, reason) in [
            (Tcp, &all, &all, slow, Tcp, "tcp was asked for"),
            (Compression, &all, &all, slow, Compression, "compression was asked for"),
            (Compression, &all, &tcp, slow, Tcp, "the destination takes no compressed pages, so tcp is used"),
            (Compression, &tcp, &all, slow, Tcp, "this host cannot compress, so tcp is used"),
            (Rdma, &all, &all, slow, Rdma, "rdma was asked for"),
            (Rdma, &no_rdma, &all, slow, Tcp, "this host has no RDMA (no device), so tcp is used"),
            (Rdma, &all, &no_rdma, slow, Tcp, "the destination has no RDMA (no device), so tcp is used"),
            (Rdma, &all, &tcp, slow, Tcp, "the destination has no RDMA, so tcp is used"),
            (Auto, &all, &all, slow, Rdma, "both hosts have RDMA"),
            (
                Auto,
                &all,
                &no_rdma,
                None,
                Compression,
                "the destination has no RDMA (no device), and compression is never slower than tcp",
            ),
            (
                Auto,
                &no_rdma,
                &all,
                Some(FAST_ENOUGH),
                Tcp,
                "this host has no RDMA (no device), and the paths carry 25 Gbit/s without compression",
            ),
            (Auto, &all, &tcp, slow, Tcp, "the destination takes no compressed pages, so tcp is used"),
        ] {
            let expected = Resolved { used, reason: reason.to_owned() };
            assert_eq!(resolve(requested, ours, theirs, speed, None), expected, "{requested}");
        }
        for (requested, used) in [(Rdma, Tcp), (Auto, Compression)] {
            let resolved = resolve(requested, &all, &all, slow, Some("encryption is demanded"));
            assert_eq!(resolved.used, used);
            assert!(resolved.reason.starts_with("RDMA is not allowed (encryption is demanded), "));
        }
        assert_eq!(resolve(Tcp, &all, &all, slow, Some("x")).reason, "tcp was asked for");
    }
}
