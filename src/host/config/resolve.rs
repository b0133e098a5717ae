//! From the keys of a host file to the configuration: defaults, and what keys say together.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::file::{RDMA_KEYS, TABLES, TLS_KEYS, TOP_KEYS};
use super::network::network_text;
use super::problem::{HostFileError, Problem};
use super::read::{self, Read};
use super::{HostConfig, Loaded, Network, Networks, Origin, value};
use crate::session::RdmaTuning;
use crate::session::trust::TlsFiles;

/// The configuration that a text makes, `path` being where it is from.
pub(super) fn resolve(text: &str, path: &Path, kernel_name: &str) -> Result<Loaded, HostFileError> {
    let mut resolving = Resolving { text, read: read::read(text), warnings: Vec::new() };
    let networks = resolving.networks();
    let tls = resolving.tls(path);
    resolving.encryption(tls.is_some());
    resolving.ports();
    let name = resolving.name(kernel_name);
    let Resolving { read, mut warnings, .. } = resolving;
    let Read { file, lines, mut problems, .. } = read;
    if !problems.is_empty() {
        problems.sort();
        return Err(HostFileError::Bad { path: path.to_owned(), problems });
    }
    let peers = file.peers.unwrap_or_default().into_iter();
    let peers: BTreeMap<_, _> = peers.map(|(name, addresses)| (name.0, addresses.0)).collect();
    let defaults = HostConfig::new(name);
    let (rdma, usual) = (file.rdma.unwrap_or_default(), defaults.rdma);
    let config = HostConfig {
        performance_option: file.performance_option.unwrap_or(defaults.performance_option),
        networks,
        max_migrations: file.max_migrations.unwrap_or(defaults.max_migrations),
        max_storage_migrations: file.max_storage_migrations.unwrap_or(defaults.max_storage_migrations),
        bandwidth_cap: file.bandwidth_cap,
        channels_per_path: file.channels_per_path.unwrap_or(defaults.channels_per_path),
        downtime_limit: file.downtime_limit.unwrap_or(defaults.downtime_limit),
        max_rounds: file.max_rounds.unwrap_or(defaults.max_rounds),
        on_no_convergence: file.on_no_convergence.unwrap_or(defaults.on_no_convergence),
        port: file.port.unwrap_or(defaults.port),
        migration_ports: file.migration_ports.unwrap_or(defaults.migration_ports),
        huge_pages: file.huge_pages.unwrap_or(defaults.huge_pages),
        state_dir: file.state_dir.unwrap_or(defaults.state_dir),
        socket: file.socket.unwrap_or(defaults.socket),
        tls,
        allow_insecure: file.allow_insecure.unwrap_or(defaults.allow_insecure),
        requires_encryption: file.encryption.unwrap_or(defaults.requires_encryption),
        rdma: RdmaTuning {
            mtu: rdma.mtu.unwrap_or(usual.mtu),
            queue_depth: rdma.queue_depth.unwrap_or(usual.queue_depth),
            timeout: rdma.timeout.unwrap_or(usual.timeout),
            retries: rdma.retries.unwrap_or(usual.retries),
        },
        peers,
        name: defaults.name,
    };
    warnings.sort();
    let origins = origins(&lines, &config);
    Ok(Loaded { config, path: Some(path.to_owned()), origins, warnings })
}

/// Where each value is from: every key of the top, every table as a whole, and what is in it.
pub(super) fn origins(lines: &BTreeMap<String, usize>, config: &HostConfig) -> BTreeMap<String, Origin> {
    let below_tls = TLS_KEYS.into_iter().map(|key| format!("tls.{key}"));
    let below_rdma = RDMA_KEYS.into_iter().map(|key| format!("rdma.{key}"));
    let below_peers = config.peers.keys().map(|name| format!("peers.{name}"));
    let top = TOP_KEYS.into_iter().chain(TABLES).map(str::to_owned);
    let keys = top.chain(below_tls).chain(below_rdma).chain(below_peers);
    keys.map(|key| {
        let origin = lines.get(&key).map_or(Origin::Default, |line| Origin::File { line: *line });
        (key, origin)
    })
    .collect()
}

struct Resolving<'a> {
    text: &'a str,
    read: Read,
    warnings: Vec<Problem>,
}

impl Resolving<'_> {
    /// At a key, if it is in the file.
    fn problem(&mut self, key: &str, what: String) {
        self.read.problems.push(Problem { line: self.read.lines.get(key).copied(), what });
    }

    fn spoilt(&self, key: &str) -> bool {
        self.read.spoilt.contains(key)
    }

    fn name(&mut self, kernel_name: &str) -> String {
        if let Some(name) = self.read.file.name.take() {
            return name;
        }
        if !self.spoilt("name") && value::check_host_name(kernel_name).is_err() {
            let what = format!(
                "name: it is not there, and the kernel's, {kernel_name:?}, cannot stand in a certificate; add a line like \
                 name = \"host-a\""
            );
            self.read.problems.push(Problem { line: None, what });
        }
        kernel_name.to_owned()
    }

    fn networks(&mut self) -> Networks {
        let any = self.read.file.use_any_network;
        let Some(entries) = self.read.file.networks.take() else {
            if any == Some(false) && !self.spoilt("networks") {
                let what = "use_any_network: false leaves no network to migrations without a list; add one, like networks = \
                            [\"10.77.1.0/24\"]";
                self.problem("use_any_network", what.to_owned());
            }
            return Networks::Any;
        };
        if entries.is_empty() && !self.spoilt("networks") {
            let what = "networks: the list is empty, so nothing could migrate; add a subnet or an interface, or take the key \
                        out to use any network";
            self.problem("networks", what.to_owned());
        }
        let mut networks: Vec<Network> = Vec::new();
        for entry in entries {
            let (span, network) = (entry.span(), entry.into_inner().0);
            if networks.iter().any(|earlier| earlier.what == network.what) {
                self.twice(&span, &network);
            }
            networks.push(network);
        }
        if any == Some(true) {
            let line = self.read.lines.get("networks").copied();
            let what =
                "networks: the list, its order and its caps are not used, because use_any_network is true";
            self.warnings.push(Problem { line, what: what.to_owned() });
            return Networks::Any;
        }
        Networks::Listed(networks)
    }

    fn twice(&mut self, span: &Range<usize>, network: &Network) {
        let what = format!("networks: {} is there twice; take one out", network_text(&network.what));
        self.read.problems.push(Problem { line: Some(read::line(self.text, span.start)), what });
    }

    fn tls(&mut self, path: &Path) -> Option<TlsFiles> {
        let table = self.read.file.tls.take()?;
        let found = [&table.ca, &table.certificate, &table.key];
        let missing: Vec<&str> = TLS_KEYS
            .into_iter()
            .zip(found)
            .filter(|(_, found)| found.is_none())
            .map(|(key, _)| key)
            .collect();
        // Relative to the file, so that it means the same whoever reads it, from wherever.
        let directory = path.parent().unwrap_or(Path::new(""));
        if let (Some(ca), Some(certificate), Some(key)) = (table.ca, table.certificate, table.key) {
            let [ca, certificate, key] = [ca, certificate, key].map(|file| directory.join(file));
            return Some(TlsFiles { ca, certificate, key });
        }
        if !self.spoilt("tls") {
            let verb = if missing.len() == 1 { "is" } else { "are" };
            let what = format!(
                "tls: {} {verb} missing; give all of ca, certificate and key, or take [tls] out (`pageferry pki issue` prints the \
                 lines)",
                missing.join(", ")
            );
            self.problem("tls", what);
        }
        None
    }

    fn encryption(&mut self, certificates: bool) {
        let said_wrong = self.spoilt("tls") || self.read.lines.contains_key("tls");
        if self.read.file.encryption == Some(true) && !certificates && !said_wrong {
            let what = "encryption: \"required\" takes certificates, and there is no [tls]; add it (`pageferry pki issue` prints the \
                        lines), or write \"off\"";
            self.problem("encryption", what.to_owned());
        }
    }

    fn ports(&mut self) {
        if self.spoilt("port") || self.spoilt("migration_ports") {
            return;
        }
        let defaults = HostConfig::new(String::new());
        let port = self.read.file.port.unwrap_or(defaults.port);
        let (first, last) = self.read.file.migration_ports.unwrap_or(defaults.migration_ports);
        if (first..=last).contains(&port) {
            let key = if self.read.file.migration_ports.is_some() { "migration_ports" } else { "port" };
            let what = format!(
                "{key}: port {port} is among the migration_ports {first}-{last}; choose one outside, or other ports for \
                 migrations"
            );
            self.problem(key, what);
        }
    }
}
