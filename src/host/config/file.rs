//! The host file as it is written: its keys, each of which may be left out. The JSON schema is made from the same structure.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform as _};
use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use toml::Spanned;

use super::network::{NetworkEntry, PeerAddresses, Peers};
use super::value;
use crate::memory::HugePages;
use crate::migration::convergence::OnNoConvergence;
use crate::session::mode::TransferMode;

/// The keys above the tables, in the order in which people read them.
pub(super) const TOP_KEYS: [&str; 18] = [
    "name",
    "performance_option",
    "networks",
    "use_any_network",
    "bandwidth_cap",
    "channels_per_path",
    "max_migrations",
    "max_storage_migrations",
    "downtime_limit",
    "max_rounds",
    "on_no_convergence",
    "port",
    "migration_ports",
    "huge_pages",
    "state_dir",
    "socket",
    "allow_insecure",
    "encryption",
];
/// The tables.
pub(super) const TABLES: [&str; 3] = ["tls", "rdma", "peers"];
/// The keys below `[tls]`.
pub(super) const TLS_KEYS: [&str; 3] = ["ca", "certificate", "key"];
/// The keys below `[rdma]`.
pub(super) const RDMA_KEYS: [&str; 4] = ["mtu", "queue_depth", "timeout", "retries"];

/// What an administrator chooses once for a host, and every migration from it follows.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "The host file of pageferry")]
pub(super) struct HostFile {
    /// The host's name: what other hosts call it, and the name in its certificate. Without it, the kernel's (`hostname`).
    #[serde(default, deserialize_with = "value::own_name")]
    #[schemars(with = "String", length(min = 1, max = 253), regex(pattern = r"^[A-Za-z0-9.-]+$"))]
    pub(super) name: Option<String>,
    /// How memory travels from this host. The words of Hyper-V are TCPIP, Compression and SMB.
    #[serde(default, deserialize_with = "value::mode")]
    #[schemars(
        with = "String",
        extend(
            "default" = "compression",
            "enum" = ["tcp", "compression", "rdma", "auto", "TCPIP", "Compression", "SMB"]
        )
    )]
    pub(super) performance_option: Option<TransferMode>,
    /// What migrations may use, in both directions, the preferred first: subnets of this host's addresses, or interfaces.
    #[serde(default)]
    #[schemars(with = "Vec<NetworkEntry>", length(min = 1))]
    pub(super) networks: Option<Vec<Spanned<NetworkEntry>>>,
    /// Whether migrations may use every network, whatever `networks` lists. Default: true without `networks`, false with it.
    #[serde(default, deserialize_with = "value::flag")]
    #[schemars(with = "bool")]
    pub(super) use_any_network: Option<bool>,
    /// The most that all migrations from this host send together, in bits or bytes a second.
    #[serde(default, deserialize_with = "value::cap")]
    #[schemars(with = "String", extend("examples" = ["10Gbit/s", "500MiB/s"]))]
    pub(super) bandwidth_cap: Option<u64>,
    /// Connections per path.
    #[serde(default, deserialize_with = "value::channels")]
    #[schemars(with = "Channels", extend("default" = "auto"))]
    pub(super) channels_per_path: Option<Option<u16>>,
    /// The most migrations at a time, for each direction.
    #[serde(default, deserialize_with = "value::count")]
    #[schemars(with = "u32", range(min = 1), extend("default" = 2))]
    pub(super) max_migrations: Option<u32>,
    /// The most storage migrations at a time, for each direction.
    #[serde(default, deserialize_with = "value::count")]
    #[schemars(with = "u32", range(min = 1), extend("default" = 2))]
    pub(super) max_storage_migrations: Option<u32>,
    /// The longest downtime that is aimed at.
    #[serde(default, deserialize_with = "value::duration")]
    #[schemars(with = "String", extend("default" = "300ms", "examples" = ["300ms", "2s"]))]
    pub(super) downtime_limit: Option<Duration>,
    /// After how many rounds a guest counts as not converging.
    #[serde(default, deserialize_with = "value::count")]
    #[schemars(with = "u32", range(min = 1), extend("default" = 30))]
    pub(super) max_rounds: Option<u32>,
    /// What happens to a guest that dirties its memory faster than it can be sent.
    #[serde(default, deserialize_with = "value::on_no_convergence")]
    #[schemars(with = "String", extend("default" = "cancel", "enum" = ["cancel", "switch", "throttle"]))]
    pub(super) on_no_convergence: Option<OnNoConvergence>,
    /// The TCP port where the daemons of other hosts reach this one's.
    #[serde(default, deserialize_with = "value::port")]
    #[schemars(with = "u16", range(min = 1), extend("default" = 7433))]
    pub(super) port: Option<u16>,
    /// The TCP ports at which guests come in, at least two; the first is the daemon's own.
    #[serde(default, deserialize_with = "value::ports")]
    #[schemars(
        with = "String",
        regex(pattern = "^ *[0-9]{1,5} *- *[0-9]{1,5} *$"),
        extend("default" = "7434-7533")
    )]
    pub(super) migration_ports: Option<(u16, u16)>,
    /// The pages that the RAM of guests is made of.
    #[serde(default, deserialize_with = "value::huge_pages")]
    #[schemars(with = "String", extend("default" = "transparent", "enum" = ["no", "transparent", "hugetlb"]))]
    pub(super) huge_pages: Option<HugePages>,
    /// Where the daemon keeps its journal, its records and its guests' sockets.
    #[serde(default, deserialize_with = "value::state_dir")]
    #[schemars(
        with = "String",
        length(max = 60),
        regex(pattern = "^/"),
        extend("default" = "/var/lib/pageferry")
    )]
    pub(super) state_dir: Option<PathBuf>,
    /// The unix socket of the HTTP API.
    #[serde(default, deserialize_with = "value::socket")]
    #[schemars(
        with = "String",
        length(max = 107),
        regex(pattern = "^/"),
        extend("default" = "/run/pageferry/api.sock")
    )]
    pub(super) socket: Option<PathBuf>,
    /// Whether hosts may do without certificates on networks other than loopback.
    #[serde(default, deserialize_with = "value::flag")]
    #[schemars(with = "bool", extend("default" = false))]
    pub(super) allow_insecure: Option<bool>,
    /// Whether memory is encrypted on its way, except on networks that are isolated. "required" needs certificates.
    #[serde(default, deserialize_with = "value::encryption")]
    #[schemars(with = "String", extend("default" = "off", "enum" = ["off", "required"]))]
    pub(super) encryption: Option<bool>,
    /// How the host proves which host it is, in PEM files; relative paths begin at the host file's directory.
    #[serde(default)]
    #[schemars(with = "TlsTable")]
    pub(super) tls: Option<TlsTable>,
    /// How RDMA is used.
    #[serde(default)]
    #[schemars(with = "RdmaTable")]
    pub(super) rdma: Option<RdmaTable>,
    /// Other hosts, by name, and where their daemons are reached; a port that is not said is this host's own `port`.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, PeerAddresses>")]
    pub(super) peers: Option<Peers>,
}

/// The table `[tls]`: all three, or none.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a table, [tls], with ca, certificate and key")]
#[schemars(inline, extend("required" = ["ca", "certificate", "key"]))]
pub(super) struct TlsTable {
    /// The certificates of the authorities that are trusted.
    #[serde(default, deserialize_with = "value::file")]
    #[schemars(with = "String")]
    pub(super) ca: Option<PathBuf>,
    /// This host's certificate, and what it was issued by if that is not an authority itself.
    #[serde(default, deserialize_with = "value::file")]
    #[schemars(with = "String")]
    pub(super) certificate: Option<PathBuf>,
    /// The key of this host's certificate.
    #[serde(default, deserialize_with = "value::file")]
    #[schemars(with = "String")]
    pub(super) key: Option<PathBuf>,
}

/// The table `[rdma]`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a table, [rdma], with mtu, queue_depth, timeout and retries")]
#[schemars(inline)]
pub(super) struct RdmaTable {
    /// Payload bytes of a packet at most. The ports of both ends may carry less.
    #[serde(default, deserialize_with = "value::rdma_mtu")]
    #[schemars(with = "u32", extend("default" = 4096, "enum" = [256, 512, 1024, 2048, 4096]))]
    pub(super) mtu: Option<u32>,
    /// Requests that a queue pair holds; the device may hold fewer.
    #[serde(default, deserialize_with = "value::rdma_queue_depth")]
    #[schemars(with = "u32", range(min = 16, max = 4096), extend("default" = 512))]
    pub(super) queue_depth: Option<u32>,
    /// How long an answer to a packet may take: 4.096 us times two to the power of it.
    #[serde(default, deserialize_with = "value::rdma_timeout")]
    #[schemars(with = "u8", range(min = 1, max = 31), extend("default" = 18))]
    pub(super) timeout: Option<u8>,
    /// How often a packet is sent again before its queue pair fails.
    #[serde(default, deserialize_with = "value::rdma_retries")]
    #[schemars(with = "u8", range(min = 0, max = 6), extend("default" = 6))]
    pub(super) retries: Option<u8>,
}

/// `channels_per_path`, for the schema.
#[derive(JsonSchema)]
#[schemars(inline, untagged)]
#[expect(dead_code, reason = "only its schema is of use")]
enum Channels {
    /// As many as pageferry finds good.
    Auto(#[schemars(extend("const" = "auto"))] String),
    /// So many.
    Number(#[schemars(range(min = 1, max = 64))] u16),
}

/// The JSON schema of the host file, for editors and for whoever generates host files.
#[must_use]
pub fn json_schema() -> Schema {
    let mut schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<HostFile>();
    schema.insert("$id".to_owned(), "pageferry/host.schema.json".into());
    // What may be left out may not be null: TOML has no such value.
    let mut without_null = RecursiveTransform(|schema: &mut Schema| {
        if schema.get("default").is_some_and(serde_json::Value::is_null) {
            schema.remove("default");
        }
    });
    without_null.transform(&mut schema);
    schema
}
