//! A way from this host to another: an address pair.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

pub use crate::channel::tcp::{interface_of, keep_packets_small};

/// The port that pageferry listens on, unless told otherwise.
pub const DEFAULT_PORT: u16 = 7433;

/// A way to another host, and the address of this host to take it from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Path {
    /// The address of this host that connections come from, and so its interface; `None` leaves it to the routing table.
    pub source: Option<IpAddr>,
    /// Where the other host listens.
    pub destination: SocketAddr,
    /// The interface that carries it, and no other, whatever the routing table says meanwhile; `None` leaves it to that.
    pub interface: Option<InterfaceName>,
}

impl Path {
    /// A way that the routing table chooses.
    #[must_use]
    pub fn to(destination: SocketAddr) -> Self {
        Self { source: None, destination, interface: None }
    }
}

/// Why a text is no name of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a network interface: it has 1 to 15 bytes, none of them a space or a slash")]
pub struct InterfaceNameError(pub String);

/// The name of a network interface, such as `eth0`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InterfaceName {
    /// `IFNAMSIZ` is 16, the zero byte at the end included (netdevice(7)).
    bytes: [u8; 15],
    length: u8,
}

impl InterfaceName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Made from a text, at one of its borders.
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;

    fn from_str(text: &str) -> Result<Self, InterfaceNameError> {
        let wrong = |byte: u8| byte.is_ascii_whitespace() || byte == b'/' || byte == 0;
        let mut bytes = [0; 15];
        if text.is_empty() || text.len() > bytes.len() || text.bytes().any(wrong) {
            return Err(InterfaceNameError(text.to_owned()));
        }
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, length: text.len() as u8 })
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InterfaceName({self})")
    }
}

/// Why a text is not a path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The part before the dash is no address.
    #[error("{0:?} is not an IP address of this host; a path is SOURCE-DESTINATION, as in 10.0.1.1-10.0.1.2")]
    Source(String),
    /// The part after the dash is no address.
    #[error(
        "{0:?} is not an IP address with or without a port; a path is SOURCE-DESTINATION, as in 10.0.1.1-10.0.1.2:{DEFAULT_PORT}"
    )]
    Destination(String),
    /// One side is IPv4, the other IPv6.
    #[error("the path {0} has IPv4 on one side and IPv6 on the other")]
    Family(Path),
}

impl FromStr for Path {
    type Err = PathError;

    /// `SOURCE-DESTINATION`, or a destination alone. The port may be left out; with one, an IPv6 address is in brackets.
    fn from_str(text: &str) -> Result<Self, PathError> {
        let (source, destination) = match text.split_once('-') {
            Some((source, destination)) => (Some(source), destination),
            None => (None, text),
        };
        let source = source.map(|text| text.parse().map_err(|_| PathError::Source(text.to_owned())));
        let with_port = destination.parse::<SocketAddr>().ok();
        let destination = with_port
            .or_else(|| Some(SocketAddr::new(destination.parse().ok()?, DEFAULT_PORT)))
            .ok_or_else(|| PathError::Destination(destination.to_owned()))?;
        let path = Self { source: source.transpose()?, destination, interface: None };
        if path.source.is_some_and(|source| source.is_ipv4() != destination.is_ipv4()) {
            return Err(PathError::Family(path));
        }
        Ok(path)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = self.source {
            write!(f, "{source}-")?;
        }
        write!(f, "{}", self.destination)?;
        match &self.interface {
            Some(interface) => write!(f, " by {interface}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_and_shown() {
        for (text, shown) in [
            ("10.0.0.1-10.0.0.2:99", "10.0.0.1-10.0.0.2:99"),
            ("10.0.0.1-10.0.0.2", "10.0.0.1-10.0.0.2:7433"),
            ("10.0.0.2", "10.0.0.2:7433"),
            ("fd00::1-fd00::2", "fd00::1-[fd00::2]:7433"),
            ("fd00::1-[fd00::2]:1", "fd00::1-[fd00::2]:1"),
        ] {
            let path: Path = text.parse().unwrap();
            assert_eq!(path.to_string(), shown);
            assert_eq!(shown.parse(), Ok(path));
        }
    }

    #[test]
    fn interfaces_have_names_that_the_kernel_takes() {
        for name in ["lo", "enp0s31f6", "a23456789012345"] {
            assert_eq!(name.parse::<InterfaceName>().unwrap().to_string(), name);
        }
        for name in ["", "a234567890123456", "a b", "a/b", "ä\u{a0}2345678901234"] {
            assert_eq!(name.parse::<InterfaceName>(), Err(InterfaceNameError(name.into())));
        }
    }

    #[test]
    fn what_is_no_path_is_named() {
        let error = |text: &str| text.parse::<Path>().unwrap_err();
        assert_eq!(error("host-10.0.0.2"), PathError::Source("host".into()));
        assert_eq!(error("10.0.0.1-"), PathError::Destination(String::new()));
        assert_eq!(error("10.0.0.1-10.0.0.2:99999"), PathError::Destination("10.0.0.2:99999".into()));
        assert!(matches!(error("10.0.0.1-fd00::2"), PathError::Family(_)));
    }
}
