//! How memory is transferred: what a host asks for, and what two hosts can do.

use std::fmt;
use std::str::FromStr;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// It takes compressed batches (apart).
    pub compression: bool,
}

impl Capabilities {
    /// Those of this program.
    pub const OURS: Self = Self { compression: true };

    const COMPRESSION: &str = "zstd";

    /// The names that travel in control messages.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        self.compression.then(|| Self::COMPRESSION.to_owned()).into_iter().collect()
    }

    /// From the names that came; unknown ones are a newer peer's and ignored.
    #[must_use]
    pub fn from_names(names: &[String]) -> Self {
        Self { compression: names.iter().any(|name| name == Self::COMPRESSION) }
    }
}

/// The mode that a migration uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// [`TransferMode::Tcp`] or [`TransferMode::Compression`].
    pub used: TransferMode,
    /// Why, as a sentence.
    pub reason: String,
}

/// Which mode two hosts use when the source's asks for one.
#[must_use]
pub fn resolve(requested: TransferMode, ours: Capabilities, theirs: Capabilities) -> Resolved {
    let resolved = |used, reason: &str| Resolved { used, reason: reason.to_owned() };
    match requested {
        TransferMode::Tcp => resolved(TransferMode::Tcp, "tcp was asked for"),
        TransferMode::Compression if !ours.compression => {
            resolved(TransferMode::Tcp, "this host cannot compress, so tcp is used")
        }
        TransferMode::Compression if !theirs.compression => {
            resolved(TransferMode::Tcp, "the destination takes no compressed pages, so tcp is used")
        }
        TransferMode::Compression => resolved(TransferMode::Compression, "compression was asked for"),
        TransferMode::Rdma => {
            resolved(TransferMode::Tcp, "this version of pageferry has no RDMA channel, so tcp is used")
        }
        TransferMode::Auto => resolved(
            TransferMode::Tcp,
            "this version of pageferry has no RDMA channel, and compresses only when asked to",
        ),
    }
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
    }

    #[test]
    fn what_is_asked_for_is_used_where_both_can() {
        let all = Capabilities::OURS;
        let none = Capabilities::from_names(&["something newer".to_owned()]);
        assert_eq!(Capabilities::from_names(&all.names()), all);
        for (requested, theirs, used, word) in [
            (TransferMode::Tcp, all, TransferMode::Tcp, "asked"),
            (TransferMode::Compression, all, TransferMode::Compression, "asked"),
            (TransferMode::Compression, none, TransferMode::Tcp, "destination"),
            (TransferMode::Rdma, all, TransferMode::Tcp, "RDMA"),
            (TransferMode::Auto, all, TransferMode::Tcp, "RDMA"),
        ] {
            let resolved = resolve(requested, all, theirs);
            assert_eq!(resolved.used, used);
            assert!(resolved.reason.contains(word), "{}", resolved.reason);
        }
        assert_eq!(resolve(TransferMode::Compression, none, all).used, TransferMode::Tcp);
    }
}
