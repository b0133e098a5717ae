//! Against real files, and the documents that are made from the code.

use std::fs;

use super::commands::{Checked, schema_text, template};
use super::file::{RDMA_KEYS, TABLES, TLS_KEYS, TOP_KEYS};
use super::show::{rate_text, shown};
use super::*;
use crate::host::exit::Exit;
use crate::host::pki::Authority;
use crate::host::quantity;

fn good(text: &str) -> Loaded {
    parse(text, Path::new("/etc/pageferry/host.toml")).unwrap_or_else(|error| panic!("{error}\nin\n{text}"))
}

fn defaults() -> HostConfig {
    HostConfig::new(kernel_name())
}

/// A host file in a directory of its own.
fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("host.toml");
    fs::write(&path, text).unwrap();
    (directory, path)
}

#[test]
fn an_empty_file_means_the_defaults() {
    let loaded = good("");
    assert_eq!(loaded.config, defaults());
    assert!(loaded.origins.values().all(|origin| *origin == Origin::Default));
    assert!(loaded.warnings.is_empty());
}

#[test]
fn every_key_arrives_with_its_line() {
    let loaded = good(
        r#"name = "host-a.example.org"
performance_option = "SMB"
networks = ["10.77.1.0/24", "eth1", { subnet = "fd00:1::/64", bandwidth_cap = "1Gbit/s" }, { interface = "eth2", isolated = true }]
bandwidth_cap = "10Gbit/s"
channels_per_path = 4
max_migrations = 3
max_storage_migrations = 4
downtime_limit = "1s 500ms"
max_rounds = 12
on_no_convergence = "throttle"
port = 9000
migration_ports = "9001-9002"
huge_pages = "hugetlb"
state_dir = "/srv/pf"
socket = "/srv/pf.sock"
allow_insecure = true
encryption = "required"

[tls]
ca = "ca.pem"
certificate = "/keys/host-a.pem"
key = "../host-a-key.pem"

[rdma]
mtu = 1024
queue_depth = 16
timeout = 31
retries = 0

[peers]
host-b = "10.0.0.2"
host-c = ["10.0.0.3:7000", "fd00::3", "[fd00::4]:7001"]
"#,
    );
    let subnet = |text: &str| NetworkMatch::Subnet(text.parse().unwrap());
    let interface = |text: &str| NetworkMatch::Interface(text.parse().unwrap());
    let network = |what, bandwidth_cap| Network { what, bandwidth_cap, isolated: false };
    let expected = HostConfig {
        name: "host-a.example.org".into(),
        performance_option: TransferMode::Rdma,
        networks: Networks::Listed(vec![
            network(subnet("10.77.1.0/24"), None),
            network(interface("eth1"), None),
            network(subnet("fd00:1::/64"), Some(125_000_000)),
            Network { isolated: true, ..network(interface("eth2"), None) },
        ]),
        max_migrations: 3,
        max_storage_migrations: 4,
        bandwidth_cap: Some(1_250_000_000),
        channels_per_path: Some(4),
        downtime_limit: Duration::from_millis(1500),
        max_rounds: 12,
        on_no_convergence: OnNoConvergence::Throttle,
        port: 9000,
        migration_ports: (9001, 9002),
        huge_pages: HugePages::Hugetlb,
        state_dir: "/srv/pf".into(),
        socket: "/srv/pf.sock".into(),
        tls: Some(TlsFiles {
            ca: "/etc/pageferry/ca.pem".into(),
            certificate: "/keys/host-a.pem".into(),
            key: "/etc/pageferry/../host-a-key.pem".into(),
        }),
        allow_insecure: true,
        requires_encryption: true,
        rdma: RdmaTuning { mtu: 1024, queue_depth: 16, timeout: 31, retries: 0 },
        peers: BTreeMap::from([
            ("host-b".into(), vec![PeerAddress::Host("10.0.0.2".parse().unwrap())]),
            (
                "host-c".into(),
                vec![
                    PeerAddress::HostAndPort("10.0.0.3:7000".parse().unwrap()),
                    PeerAddress::Host("fd00::3".parse().unwrap()),
                    PeerAddress::HostAndPort("[fd00::4]:7001".parse().unwrap()),
                ],
            ),
        ]),
    };
    assert_eq!(loaded.config, expected);
    for (key, line) in [
        ("name", 1),
        ("networks", 3),
        ("allow_insecure", 16),
        ("tls.key", 22),
        ("rdma.timeout", 27),
        ("peers.host-c", 32),
    ] {
        assert_eq!(loaded.origins[key], Origin::File { line }, "{key}");
        assert_eq!(loaded.origin_of(key), "host file");
    }
    assert_eq!(loaded.origins["use_any_network"], Origin::Default);
    assert_eq!(loaded.origin_of("use_any_network"), "default");
}

#[test]
fn the_words_of_hyper_v_are_understood_in_any_case() {
    for (word, mode) in [
        ("TCPIP", TransferMode::Tcp),
        ("Compression", TransferMode::Compression),
        ("SMB", TransferMode::Rdma),
        ("smb", TransferMode::Rdma),
        ("Auto", TransferMode::Auto),
        ("TCP", TransferMode::Tcp),
    ] {
        let loaded = good(&format!("performance_option = {word:?}"));
        assert_eq!(loaded.config.performance_option, mode, "{word}");
    }
}

#[test]
fn any_network_wins_over_a_list_as_in_hyper_v_and_a_warning_says_so() {
    let loaded = good("use_any_network = true\nnetworks = [\"eth0\"]");
    assert_eq!(loaded.config.networks, Networks::Any);
    let what =
        "networks: the list, its order and its caps are not used, because use_any_network is true".to_owned();
    assert_eq!(loaded.warnings, [Problem { line: Some(2), what }]);
    let loaded = good("use_any_network = false\nnetworks = [\"eth0\"]");
    assert!(matches!(loaded.config.networks, Networks::Listed(_)));
    assert!(loaded.warnings.is_empty());
}

#[test]
fn networks_may_stand_in_tables_of_their_own() {
    let loaded = good("[[networks]]\nsubnet = \"10.0.0.0/8\"\n[[networks]]\ninterface = \"eth1\"\n");
    let Networks::Listed(networks) = loaded.config.networks else { panic!("a list is a list") };
    assert_eq!(networks.len(), 2);
}

#[test]
fn a_kernel_name_that_no_certificate_can_hold_asks_for_a_name() {
    let path = Path::new("host.toml");
    let error = resolve::resolve("port = 1", path, "my_host").unwrap_err();
    assert_eq!(
        error.to_string(),
        "host.toml: name: it is not there, and the kernel's, \"my_host\", cannot stand in a certificate; add a line like name = \
         \"host-a\""
    );
    assert!(resolve::resolve("name = \"a\"", path, "my_host").is_ok());
    // What cannot be read as a whole is not accused of lacking parts.
    let error = resolve::resolve("name = [", path, "my_host").unwrap_err();
    assert_eq!(error.problems().len(), 1);
}

#[test]
fn only_the_default_file_may_be_missing() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("host.toml");
    let loaded = load_or_default(None, &missing).unwrap();
    assert_eq!((loaded.config, loaded.path), (defaults(), None));
    let error = load(Some(&missing)).unwrap_err().to_string();
    let said =
        format!("{}: there is no such host file; `pageferry config init` writes one", missing.display());
    assert_eq!(error, said);
    let error = load(Some(directory.path())).unwrap_err().to_string();
    let said = format!("{}: the host file cannot be read: ", directory.path().display());
    assert!(error.starts_with(&said), "{error}");
}

#[test]
fn bytes_that_are_no_text_have_a_line() {
    let (_directory, path) = written("");
    fs::write(&path, b"port = 1\n# caf\xe9\n").unwrap();
    let said = format!("{}:2: it is not text in UTF-8; save the file in that encoding", path.display());
    assert_eq!(load(Some(&path)).unwrap_err().to_string(), said);
}

#[test]
fn the_new_file_shows_the_defaults_and_every_key() {
    let text = template();
    assert_eq!(good(&text).config, defaults(), "as it is written");
    let uncommented: String = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(setting) if setting.starts_with(|letter: char| letter.is_ascii_lowercase()) => {
                format!("{setting}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    let loaded = good(&uncommented);
    assert_eq!(loaded.config, defaults(), "uncommented");
    let from_file = loaded.origins.values().filter(|origin| **origin != Origin::Default).count();
    assert_eq!(from_file, TOP_KEYS.len() - 2, "all but networks and bandwidth_cap have a default");

    // With the examples as well, in place of the one default that goes against them, every key is there.
    let examples =
        uncommented.replace("\n#   ", "\n").replace("use_any_network = true\n", "use_any_network = false\n");
    let loaded = good(&examples);
    for key in TOP_KEYS.into_iter().chain(TABLES) {
        assert_ne!(loaded.origins[key], Origin::Default, "{key} is not in the new file");
    }
    let tables = TLS_KEYS
        .map(|key| format!("tls.{key}"))
        .into_iter()
        .chain(RDMA_KEYS.map(|key| format!("rdma.{key}")));
    for key in tables {
        assert_ne!(loaded.origins[&key], Origin::Default, "{key} is not in the new file");
    }
    assert_eq!(loaded.config.rdma, defaults().rdma, "the example shows the defaults");
}

#[test]
fn a_new_file_is_not_written_over_another() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("etc/host.toml");
    assert_eq!(init(Some(&path), false), Exit::Completed);
    fs::write(&path, "port = 1").unwrap();
    assert_eq!(init(Some(&path), false), Exit::Failed);
    assert_eq!(fs::read_to_string(&path).unwrap(), "port = 1");
    assert_eq!(init(Some(&path), true), Exit::Completed);
    assert_eq!(fs::read_to_string(&path).unwrap(), template());
}

#[test]
fn the_schema_in_the_documents_is_the_one_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/host.schema.json");
    let schema = schema_text() + "\n";
    if std::env::var_os("PAGEFERRY_BLESS").is_some() {
        fs::write(path, &schema).expect("docs can be written");
    }
    let documented = fs::read_to_string(path).unwrap_or_default();
    assert!(documented == schema, "{path} is out of date; PAGEFERRY_BLESS=1 rewrites it:\n{schema}");
}

#[test]
fn the_schema_knows_every_key_and_its_default() {
    let schema = json_schema();
    let properties = schema.get("properties").and_then(serde_json::Value::as_object).unwrap();
    let mut keys: Vec<&str> = TOP_KEYS.into_iter().chain(TABLES).collect();
    keys.sort_unstable();
    assert_eq!(properties.keys().map(String::as_str).collect::<Vec<_>>(), keys);
    let defaults_in_schema: String = properties
        .iter()
        .filter_map(|(key, property)| Some(format!("{key} = {}\n", property.get("default")?)))
        .collect();
    let loaded = good(&defaults_in_schema);
    assert_eq!(loaded.config, defaults());
    let from_file = loaded.origins.values().filter(|origin| **origin != Origin::Default).count();
    assert_eq!(from_file, 14, "{defaults_in_schema}");
}

#[test]
fn every_key_is_described() {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/host-file.md")).unwrap();
    for key in TOP_KEYS.into_iter().chain(TABLES).chain(TLS_KEYS).chain(RDMA_KEYS) {
        assert!(page.contains(&format!("`{key}`")) || page.contains(&format!("`[{key}]`")), "{key}");
    }
}

#[test]
fn what_is_shown_is_what_holds() {
    let (_directory, path) = written(
        "networks = [\"eth0\", { subnet = \"10.0.0.0/8\", bandwidth_cap = \"1Gbit/s\", isolated = true }]\nport = 99\n\n[peers]\nb = \"10.0.0.2\"\n",
    );
    let loaded = load(Some(&path)).unwrap();
    let table = shown(&loaded).table();
    let row = |key: &str| {
        let row = table.lines().find(|line| line.split_whitespace().next() == Some(key));
        row.unwrap_or_else(|| panic!("{key} is in\n{table}")).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(row("port"), format!("port 99 {}:2", path.display()));
    assert_eq!(row("max_rounds"), "max_rounds 30 default");
    assert_eq!(row("encryption"), "encryption \"off\" default");
    assert_eq!(row("rdma.queue_depth"), "rdma.queue_depth 512 default");
    assert_eq!(row("performance_option"), "performance_option \"compression\" default");
    assert_eq!(row("bandwidth_cap"), "bandwidth_cap (none) default");
    assert_eq!(
        row("networks"),
        format!(
            "networks [\"eth0\", {{ bandwidth_cap = \"1Gbit/s\", isolated = true, subnet = \"10.0.0.0/8\" }}] {}:1",
            path.display()
        )
    );
    assert_eq!(row("peers.b"), format!("peers.b [\"10.0.0.2\"] {}:5", path.display()));
    let json: serde_json::Value = serde_json::from_str(&shown(&loaded).json()).unwrap();
    let port = serde_json::json!({ "value": 99, "origin": "host file", "line": 2 });
    assert_eq!(json["values"]["port"], port);
    assert_eq!(json["values"]["tls.ca"]["value"], serde_json::Value::Null);
    assert_eq!(json["path"], path.display().to_string());
}

#[test]
fn rates_are_shown_so_that_they_can_be_written() {
    for (bytes, text) in [
        (1_250_000_000, "10Gbit/s"),
        (312_500_000, "2500Mbit/s"),
        (125, "1kbit/s"),
        (1 << 20, "1MiB/s"),
        (12, "12B/s"),
    ] {
        assert_eq!(rate_text(bytes), text);
        assert_eq!(quantity::rate(text), Ok(bytes));
    }
}

#[test]
fn what_a_running_daemon_cannot_change_is_named() {
    let old = good("").config;
    let new = good(
        "port = 9\nmax_rounds = 3\nstate_dir = \"/x\"\n[tls]\nca = \"a\"\ncertificate = \"b\"\nkey = \"c\"",
    )
    .config;
    assert_eq!(old.restart_needed(&new), ["port", "state_dir", "tls"]);
    assert!(old.restart_needed(&old).is_empty());
}

#[test]
fn a_check_says_what_others_can_do() {
    let (_directory, path) = written("name = \"host-a\"\n");
    let found = Checked::of(Some(&path));
    assert!(found.problems.is_empty());
    assert_eq!(
        found.complaints(),
        format!(
            "{}: warning: there is no [tls], so the daemon listens on loopback only; `pageferry pki` makes certificates",
            path.display()
        )
    );
    assert_eq!(found.verdict(), format!("OK: {} (host host-a)", path.display()));
    assert_eq!(check(Some(&path), false), Exit::Completed);
    fs::write(&path, "allow_insecure = true\n").unwrap();
    let found = Checked::of(Some(&path));
    assert_eq!(
        found.complaints(),
        format!(
            "{}:1: warning: allow_insecure: whoever reaches port 7433 or 7434-7533 can read and change guests on their way; \
             `pageferry pki` makes certificates",
            path.display()
        )
    );
    fs::write(&path, "prot = 1\nport = 0\n").unwrap();
    let found = Checked::of(Some(&path));
    assert_eq!(found.problems.len(), 2);
    assert_eq!(found.verdict(), "");
    let json: serde_json::Value = serde_json::from_str(&found.json()).unwrap();
    assert_eq!(
        json["problems"][0],
        serde_json::json!({ "line": 1, "what": "there is no key prot; did you mean port?" })
    );
    assert_eq!(json["ok"], false);
    assert_eq!(check(Some(&path), true), Exit::Failed);
    assert_eq!(show(Some(&path), false), Exit::Failed);
}

#[test]
fn a_check_tries_the_certificates() {
    let tls = "[tls]\nca = \"ca.pem\"\ncertificate = \"host-a.pem\"\nkey = \"host-a-key.pem\"\n";
    let (directory, path) = written(&format!("name = \"host-a\"\n{tls}"));
    let at = |name: &str| directory.path().join(name).display().to_string();
    let found = Checked::of(Some(&path));
    let missing = format!(
        "{}:3: tls.ca: the CA certificate {} cannot be used: No such file or directory (os error 2)",
        path.display(),
        at("ca.pem")
    );
    assert_eq!(found.complaints().lines().next(), Some(missing.as_str()));

    let authority = Authority::create().unwrap();
    authority.write_host(directory.path(), "host-a", &[]).unwrap();
    let found = Checked::of(Some(&path));
    assert_eq!(found.complaints(), "");
    assert_eq!(found.verdict(), format!("OK: {} (host host-a)", path.display()));
    assert_eq!(load(Some(&path)).unwrap().identity().unwrap().unwrap().host_name(), "host-a");

    fs::write(&path, format!("name = \"host-b\"\n{tls}")).unwrap();
    assert_eq!(
        Checked::of(Some(&path)).complaints(),
        format!(
            "{}:4: tls.certificate: {} is the certificate of host-a, and this host is host-b; issue one for it (`pageferry pki \
             issue host-b`), or set name",
            path.display(),
            at("host-a.pem")
        )
    );

    fs::write(&path, format!("name = \"Host-A\"\n{tls}")).unwrap();
    let key = directory.path().join("host-a-key.pem");
    fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(
        Checked::of(Some(&path)).complaints(),
        format!(
            "{}:5: warning: tls.key: other users may read {}, and be this host with it; chmod 600 it",
            path.display(),
            at("host-a-key.pem")
        )
    );
}
