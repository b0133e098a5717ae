//! Every key of the host file with the value that holds and where it is from.

use std::path::PathBuf;

use comfy_table::{Table, presets};
use serde_json::{Map, Value, json};

use super::file::{RDMA_KEYS, TLS_KEYS, TOP_KEYS};
use super::network::{network_text, peer_text};
use super::value::huge_pages_name;
use super::{HostConfig, Loaded, Network, Networks, Origin};

/// What holds, key by key.
pub(super) struct Shown {
    path: Option<PathBuf>,
    rows: Vec<Row>,
}

struct Row {
    key: String,
    /// Null for a key that has no default.
    value: Value,
    origin: Origin,
}

/// What a configuration says, key by key.
pub(super) fn shown(loaded: &Loaded) -> Shown {
    let row = |key: String, value: Value| {
        let origin = loaded.origins.get(&key).copied().unwrap_or(Origin::Default);
        Row { key, value, origin }
    };
    let config = &loaded.config;
    let mut rows: Vec<Row> =
        TOP_KEYS.into_iter().map(|key| row(key.to_owned(), top_value(config, key))).collect();
    for key in TLS_KEYS {
        let file = config.tls.as_ref().map(|files| match key {
            "ca" => &files.ca,
            "certificate" => &files.certificate,
            _ => &files.key,
        });
        rows.push(row(format!("tls.{key}"), json!(file)));
    }
    for key in RDMA_KEYS {
        let value = match key {
            "mtu" => config.rdma.mtu,
            "queue_depth" => config.rdma.queue_depth,
            "timeout" => config.rdma.timeout.into(),
            _ => config.rdma.retries.into(),
        };
        rows.push(row(format!("rdma.{key}"), json!(value)));
    }
    for (name, addresses) in &config.peers {
        let addresses: Vec<String> = addresses.iter().map(peer_text).collect();
        rows.push(row(format!("peers.{name}"), json!(addresses)));
    }
    Shown { path: loaded.path.clone(), rows }
}

fn top_value(config: &HostConfig, key: &str) -> Value {
    match key {
        "name" => json!(config.name),
        "performance_option" => json!(config.performance_option.name()),
        "networks" => match &config.networks {
            Networks::Any => Value::Null,
            Networks::Listed(networks) => networks.iter().map(network_value).collect(),
        },
        "use_any_network" => json!(config.networks == Networks::Any),
        "bandwidth_cap" => json!(config.bandwidth_cap.map(rate_text)),
        "channels_per_path" => config.channels_per_path.map_or(json!("auto"), |channels| json!(channels)),
        "max_migrations" => json!(config.max_migrations),
        "max_storage_migrations" => json!(config.max_storage_migrations),
        "downtime_limit" => json!(humantime::format_duration(config.downtime_limit).to_string()),
        "max_rounds" => json!(config.max_rounds),
        "on_no_convergence" => json!(config.on_no_convergence.name()),
        "port" => json!(config.port),
        "migration_ports" => json!(format!("{}-{}", config.migration_ports.0, config.migration_ports.1)),
        "huge_pages" => json!(huge_pages_name(config.huge_pages)),
        "state_dir" => json!(config.state_dir),
        "socket" => json!(config.socket),
        "allow_insecure" => json!(config.allow_insecure),
        "encryption" => json!(if config.requires_encryption { "required" } else { "off" }),
        _ => Value::Null,
    }
}

fn network_value(network: &Network) -> Value {
    if network.bandwidth_cap.is_none() && !network.isolated {
        return json!(network_text(&network.what));
    }
    let which = match network.what {
        super::NetworkMatch::Subnet(_) => "subnet",
        super::NetworkMatch::Interface(_) => "interface",
    };
    let mut table = Map::from_iter([(which.to_owned(), json!(network_text(&network.what)))]);
    if let Some(cap) = network.bandwidth_cap {
        table.insert("bandwidth_cap".to_owned(), json!(rate_text(cap)));
    }
    if network.isolated {
        table.insert("isolated".to_owned(), json!(true));
    }
    Value::Object(table)
}

/// A rate in a unit that it is a whole number of, bits first, as for links.
pub(super) fn rate_text(bytes: u64) -> String {
    const UNITS: [(u128, &str); 6] = [
        (1_000_000_000, "Gbit/s"),
        (1_000_000, "Mbit/s"),
        (1_000, "kbit/s"),
        (8 << 30, "GiB/s"),
        (8 << 20, "MiB/s"),
        (8 << 10, "KiB/s"),
    ];
    let bits = u128::from(bytes) * 8;
    match UNITS.into_iter().find(|(unit, _)| bits >= *unit && bits.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", bits / unit),
        None => format!("{bytes}B/s"),
    }
}

impl Shown {
    pub(super) fn json(&self) -> String {
        let values: Map<String, Value> = self
            .rows
            .iter()
            .map(|row| {
                let (origin, line) = match row.origin {
                    Origin::Default => ("default", None),
                    Origin::File { line } => ("host file", Some(line)),
                };
                (row.key.clone(), json!({ "value": row.value, "origin": origin, "line": line }))
            })
            .collect();
        json!({ "path": self.path, "values": values }).to_string()
    }

    /// A table that can be copied from: values as the host file writes them.
    pub(super) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(["key", "value", "where from"]);
        for row in &self.rows {
            let origin = match (row.origin, &self.path) {
                (Origin::File { line }, Some(path)) => format!("{}:{line}", path.display()),
                _ => "default".to_owned(),
            };
            table.add_row([row.key.clone(), toml_text(&row.value), origin]);
        }
        let lines: Vec<String> = table.to_string().lines().map(|line| line.trim().to_owned()).collect();
        lines.join("\n")
    }
}

fn toml_text(value: &Value) -> String {
    match value {
        Value::Null => "(none)".to_owned(),
        Value::Array(elements) => {
            format!("[{}]", elements.iter().map(toml_text).collect::<Vec<_>>().join(", "))
        }
        Value::Object(fields) => {
            let fields: Vec<String> =
                fields.iter().map(|(key, value)| format!("{key} = {}", toml_text(value))).collect();
            format!("{{ {} }}", fields.join(", "))
        }
        other => other.to_string(),
    }
}
