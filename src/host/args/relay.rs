//! The flags of `pageferry relay`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::conflict;
use crate::host::demo_options::MAX_CHANNELS;
use crate::host::quantity;
use crate::host::relay::options::{Common, DestinationOptions, RELAY_PORT, RelayRequest, SourceOptions};
use crate::session::Path;
use crate::session::mode::TransferMode;
use crate::session::path::PathError;
use crate::session::trust::TlsFiles;

#[derive(Debug, Subcommand)]
pub(super) enum Relay {
    /// Move the guest of the QEMU here. It ends when the guest runs at the destination, or goes on here.
    Source(Box<Source>),
    /// Wait for one guest, for the QEMU here that was started with -incoming defer.
    Destination(Box<Destination>),
}

#[derive(Debug, Args)]
struct Shared {
    /// The QMP socket of QEMU (-qmp unix:PATH,server=on,wait=off); it serves one client at a time.
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Where QEMU and pageferry meet. Without it: beside the QMP socket.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Carry QEMU's packets whole, also where pages could be placed in shared memory.
    #[arg(long)]
    whole_packets: bool,
    /// A file with 64 hexadecimal digits that both ends know.
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Certificates that are trusted; with the two below all messages are under TLS.
    #[arg(long, value_name = "FILE", requires = "certificate", requires = "key")]
    ca: Option<PathBuf>,
    /// This host's certificate.
    #[arg(long, value_name = "FILE", requires = "ca")]
    certificate: Option<PathBuf>,
    /// The key of this host's certificate.
    #[arg(long, value_name = "FILE", requires = "ca")]
    key: Option<PathBuf>,
    /// Print the result as one JSON object on stdout, and nothing else there.
    #[arg(long)]
    json: bool,
    /// Log more of what happens, to stderr.
    #[arg(long)]
    verbose: bool,
}

#[derive(Debug, Args)]
pub(super) struct Source {
    #[command(flatten)]
    shared: Shared,
    /// The destination: an address, or a pair of addresses like 192.0.2.1-192.0.2.2 to choose the way; with a port if it is not 7431.
    /// Can be given several times, once for each network.
    #[arg(long, value_name = "[SRC-]DST[:PORT]", required = true, value_parser = path)]
    to: Vec<Path>,
    /// The name in the destination's certificate.
    #[arg(long, value_name = "NAME", requires = "ca")]
    peer_name: Option<String>,
    /// How the memory travels.
    #[arg(long, default_value = "compression")]
    mode: TransferMode,
    /// How many connections carry it, over all networks together. Without it: 2, or as many as networks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_CHANNELS as i64))]
    channels: Option<u16>,
    /// The most that is sent, in bytes (100MiB) or bits (1Gbit) a second.
    #[arg(long, value_name = "RATE", value_parser = quantity::rate)]
    max_bandwidth: Option<u64>,
    /// How long the guest may stand still; QEMU decides by it when to switch over.
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = quantity::duration)]
    downtime_limit: Duration,
    /// How many channels QEMU uses to pageferry.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    multifd_channels: u8,
    /// Do without QEMU's return path, on which the destination QEMU tells the source QEMU that it has everything.
    #[arg(long)]
    no_return_path: bool,
}

#[derive(Debug, Args)]
pub(super) struct Destination {
    #[command(flatten)]
    shared: Shared,
    /// Where to listen: an address, with a port if it is not 7431. Can be given several times. Without it: loopback.
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = listen_address)]
    listen: Vec<SocketAddr>,
}

fn with_port(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, RELAY_PORT)
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let alone = || text.trim_start_matches('[').trim_end_matches(']').parse().map(with_port);
    text.parse().or_else(|_| alone()).map_err(|_| {
        format!("{text:?} is no address to listen at; write it like 192.0.2.1, 0.0.0.0:{RELAY_PORT} or [::]:{RELAY_PORT}")
    })
}

fn path(text: &str) -> Result<Path, PathError> {
    let mut path: Path = text.parse()?;
    let destination = text.split_once('-').map_or(text, |(_, destination)| destination);
    // Where none is written, a path has the daemon's port.
    if let Ok(address) = destination.parse() {
        path.destination = with_port(address);
    }
    Ok(path)
}

impl Shared {
    fn common(self) -> Common {
        let Self { qmp, socket, whole_packets, secret_file, ca, certificate, key, json, verbose } = self;
        let tls = match (ca, certificate, key) {
            (Some(ca), Some(certificate), Some(key)) => Some(TlsFiles { ca, certificate, key }),
            _ => None,
        };
        Common { qmp, socket, whole_packets, secret_file, tls, json, verbose }
    }
}

impl Relay {
    pub(super) fn request(self) -> Result<RelayRequest, clap::Error> {
        match self {
            Self::Source(source) => source.options().map(|options| RelayRequest::Source(Box::new(options))),
            Self::Destination(destination) => {
                let Destination { shared, mut listen } = *destination;
                if listen.is_empty() {
                    listen.push(with_port(IpAddr::V4(Ipv4Addr::LOCALHOST)));
                }
                let options = DestinationOptions { common: shared.common(), listen };
                Ok(RelayRequest::Destination(Box::new(options)))
            }
        }
    }
}

impl Source {
    fn options(self) -> Result<SourceOptions, clap::Error> {
        let common = self.shared.common();
        if common.tls.is_some() && self.peer_name.is_none() {
            return Err(conflict("with certificates it has to be known whose is expected: add --peer-name"));
        }
        let channels = self.channels.map_or(self.to.len().max(2), usize::from);
        if channels < self.to.len() {
            return Err(conflict(&format!(
                "--channels {channels} leaves some of the {} networks without a connection; use {} or more",
                self.to.len(),
                self.to.len()
            )));
        }
        Ok(SourceOptions {
            common,
            paths: self.to,
            peer_name: self.peer_name,
            channels,
            mode: self.mode,
            max_bandwidth: self.max_bandwidth,
            downtime_limit: self.downtime_limit,
            multifd_channels: self.multifd_channels,
            return_path: !self.no_return_path,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::args::{Request, parse_from};

    fn relay(flags: &str) -> Result<RelayRequest, clap::Error> {
        let words = ["pageferry", "relay"].into_iter().chain(flags.split_whitespace());
        parse_from(words).map(|request| match request {
            Request::Relay(request) => request,
            other => panic!("relay was asked for, not {other:?}"),
        })
    }

    fn source(flags: &str) -> SourceOptions {
        match relay(&format!("source --qmp /run/vm1.qmp {flags}")) {
            Ok(RelayRequest::Source(options)) => *options,
            other => panic!("{flags}: {other:?}"),
        }
    }

    #[test]
    fn a_source_needs_a_socket_and_a_destination() {
        let options = source("--to 192.0.2.2");
        assert_eq!(options.paths, ["192.0.2.2:7431".parse().unwrap()]);
        assert_eq!((options.channels, options.multifd_channels, options.return_path), (2, 2, true));
        assert_eq!((options.mode, options.max_bandwidth), (TransferMode::Compression, None));
        let options = source(
            "--to 10.0.0.1-10.0.0.2 --to 10.0.1.1-10.0.1.2:9 --to ::1 --mode tcp --no-return-path --multifd-channels 4 \
             --max-bandwidth 1Gbit --downtime-limit 50ms --whole-packets --secret-file /s --json",
        );
        let ways: Vec<String> = options.paths.iter().map(ToString::to_string).collect();
        assert_eq!(ways, ["10.0.0.1-10.0.0.2:7431", "10.0.1.1-10.0.1.2:9", "[::1]:7431"]);
        assert_eq!((options.channels, options.multifd_channels, options.return_path), (3, 4, false));
        assert!(options.common.whole_packets && options.common.json && options.common.tls.is_none());
        assert_eq!(options.max_bandwidth, Some(125_000_000));
        let options = source("--to ::1 --ca /a --certificate /b --key /c --peer-name beta");
        assert_eq!(options.common.tls.unwrap().key, PathBuf::from("/c"));
    }

    #[test]
    fn a_destination_listens_on_loopback_unless_told_otherwise() {
        let listen = |flags: &str| match relay(&format!("destination --qmp /q {flags}")) {
            Ok(RelayRequest::Destination(options)) => options.listen,
            other => panic!("{flags}: {other:?}"),
        };
        assert_eq!(listen(""), ["127.0.0.1:7431".parse().unwrap()]);
        let two = ["[::]:7431".parse().unwrap(), "0.0.0.0:9".parse().unwrap()];
        assert_eq!(listen("--listen :: --listen 0.0.0.0:9"), two);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (flags, words) in [
            ("source --qmp /q", "--to"),
            ("source --to ::1", "--qmp"),
            ("source --qmp /q --to host", "not an IP address"),
            ("source --qmp /q --to ::1 --to ::1 --channels 1", "use 2 or more"),
            ("source --qmp /q --to ::1 --multifd-channels 0", "1..=64"),
            ("source --qmp /q --to ::1 --ca /a --certificate /b --key /c", "--peer-name"),
            ("source --qmp /q --to ::1 --ca /a", "--certificate"),
            ("destination --qmp /q --listen here", "[::]:7431"),
            ("destination", "--qmp"),
        ] {
            let error = relay(flags).expect_err(flags);
            assert!(error.to_string().contains(words), "{flags}: {error}");
        }
    }
}
