//! Host files that cannot be, and every word that is said about them.

use std::path::Path;

use super::parse;

/// What is written, and all that is said about it.
const BAD: &[(&str, &str)] = &[
    (
        "name = host-a",
        "/srv/host.toml:1: not TOML at host-a: string values must be quoted, expected literal string; write key = value, and texts in quotes",
    ),
    (
        r#"name = "host-a
"#,
        r#"/srv/host.toml:1: not TOML: invalid basic string, expected `"`; write key = value, and texts in quotes"#,
    ),
    (
        "port\n",
        "/srv/host.toml:1: not TOML: key with no value, expected `=`; write key = value, and texts in quotes",
    ),
    (
        "[tls",
        "/srv/host.toml:1: not TOML: unclosed table, expected `]`; write key = value, and texts in quotes",
    ),
    (
        r#"name = "x" "y""#,
        "/srv/host.toml:1: not TOML: unexpected key or value, expected newline, `#`; write key = value, and texts in quotes",
    ),
    ("port = 1\nport = 2", "/srv/host.toml:2: port is there twice; take one out"),
    (
        r#"# one

name = """#,
        r#"/srv/host.toml:3: name: "" cannot be a host's name in a certificate: it is empty; write a name like "host-a""#,
    ),
    ("name = 5", r#"/srv/host.toml:1: name: 5 cannot be; write a name in quotes, like "host-a""#),
    (
        r#"name = "host_a""#,
        r#"/srv/host.toml:1: name: "host_a" cannot be a host's name in a certificate: it may have only letters, digits, hyphens and dots; write a name like "host-a""#,
    ),
    (
        r#"name = "a..b""#,
        r#"/srv/host.toml:1: name: "a..b" cannot be a host's name in a certificate: there is nothing before, between or after its dots; write a name like "host-a""#,
    ),
    (
        r#"name = "-a""#,
        r#"/srv/host.toml:1: name: "-a" cannot be a host's name in a certificate: a part begins or ends with a hyphen; write a name like "host-a""#,
    ),
    (
        r#"name = "10.0.0.1""#,
        r#"/srv/host.toml:1: name: "10.0.0.1" cannot be a host's name in a certificate: its last part is a number, as in an address; write a name like "host-a""#,
    ),
    (r#"nam = "a""#, "/srv/host.toml:1: there is no key nam; did you mean name?"),
    (
        r#"Performance-Option = "tcp""#,
        "/srv/host.toml:1: there is no key Performance-Option; did you mean performance_option?",
    ),
    (
        "\n\nfrobnicate = 1",
        "/srv/host.toml:3: there is no key frobnicate; `pageferry config init` writes a host file with every key",
    ),
    (
        "[server]\nport = 1",
        "/srv/host.toml:1: there is no key server; `pageferry config init` writes a host file with every key",
    ),
    (
        r#"performance_option = "turbo""#,
        r#"/srv/host.toml:1: performance_option: "turbo" is no performance option; write "tcp", "compression", "rdma" or "auto" (or, as in Hyper-V, "TCPIP", "Compression" or "SMB")"#,
    ),
    (
        r#"performance_option = ["tcp"]"#,
        r#"/srv/host.toml:1: performance_option: an array cannot be; write "tcp", "compression", "rdma" or "auto""#,
    ),
    (
        "networks = []",
        "/srv/host.toml:1: networks: the list is empty, so nothing could migrate; add a subnet or an interface, or take the key out to use any network",
    ),
    (
        r#"networks = "eth0""#,
        r#"/srv/host.toml:1: networks: "eth0" cannot be; write an array, like ["10.77.1.0/24", "eth1"]"#,
    ),
    (
        r#"networks = ["eth0", 5]"#,
        r#"/srv/host.toml:1: networks: 5 cannot be; write a subnet or an interface in quotes, like "10.77.1.0/24" or "eth1""#,
    ),
    (
        r#"networks = ["10.77.1.5/24"]"#,
        r#"/srv/host.toml:1: networks: "10.77.1.5/24" is an address in a subnet; write "10.77.1.0/24" for the subnet"#,
    ),
    (
        r#"networks = ["10.0.0.1"]"#,
        r#"/srv/host.toml:1: networks: "10.0.0.1" is an address; write the subnet, or "10.0.0.1/32" for it alone"#,
    ),
    (
        r#"networks = ["10.0.0.0/33"]"#,
        r#"/srv/host.toml:1: networks: "10.0.0.0/33" is no subnet; write it like "10.77.1.0/24" or "fd00:1::/64""#,
    ),
    (
        r#"networks = [
  "eth0",
  "a name that is too long",
]"#,
        r#"/srv/host.toml:3: networks: "a name that is too long" is neither a subnet nor the name of an interface; write it like "10.77.1.0/24" or "eth1""#,
    ),
    (
        r#"networks = ["eth0", { interface = "eth0" }]"#,
        "/srv/host.toml:1: networks: eth0 is there twice; take one out",
    ),
    (
        r#"networks = [{ subnet = "10.0.0.0/8", interface = "eth0" }]"#,
        "/srv/host.toml:1: networks: a network is a subnet or an interface; leave one of the two out",
    ),
    (
        r#"[[networks]]
bandwidth_cap = "1Gbit/s""#,
        r#"/srv/host.toml:1: networks: which network is not said; add subnet = "10.77.1.0/24" or interface = "eth1""#,
    ),
    (
        r#"[[networks]]
subnet = "all""#,
        r#"/srv/host.toml:2: networks.subnet: "all" is no subnet; write it like "10.77.1.0/24" or "fd00:1::/64""#,
    ),
    (
        r#"[[networks]]
interface = "eth 0""#,
        r#"/srv/host.toml:2: networks.interface: "eth 0" is no name of a network interface: it has 1 to 15 bytes, none of them a space or a slash; `ip link` lists this host's interfaces"#,
    ),
    (
        r#"[[networks]]
interface = "eth0"
cap = "1Gbit/s""#,
        "/srv/host.toml:3: there is no key networks.cap; did you mean bandwidth_cap?",
    ),
    (
        r#"[[networks]]
interface = "eth0"
speed = 1"#,
        "/srv/host.toml:3: there is no key networks.speed; there are bandwidth_cap, interface, isolated, subnet",
    ),
    (
        r#"use_any_network = "yes""#,
        r#"/srv/host.toml:1: use_any_network: "yes" cannot be; write true or false, without quotes"#,
    ),
    (
        "use_any_network = false",
        r#"/srv/host.toml:1: use_any_network: false leaves no network to migrations without a list; add one, like networks = ["10.77.1.0/24"]"#,
    ),
    (
        "bandwidth_cap = 10",
        r#"/srv/host.toml:1: bandwidth_cap: 10 cannot be; write a rate in quotes, like "10Gbit/s""#,
    ),
    (
        r#"bandwidth_cap = "fast""#,
        r#"/srv/host.toml:1: bandwidth_cap: "fast" is no rate; write it like 100MiB/s (bytes) or 10Gbit/s (bits)"#,
    ),
    (
        r#"bandwidth_cap = "10Gb/s""#,
        r#"/srv/host.toml:1: bandwidth_cap: "10Gb/s" could mean bits or bytes; write 10Gbit/s or 10GB/s"#,
    ),
    (
        r#"bandwidth_cap = "0""#,
        r#"/srv/host.toml:1: bandwidth_cap: "0" would let nothing through; leave the key out where there is no limit"#,
    ),
    (
        "channels_per_path = 0",
        r#"/srv/host.toml:1: channels_per_path: 0 cannot be; write "auto" or a number from 1 to 64"#,
    ),
    (
        "channels_per_path = 65",
        r#"/srv/host.toml:1: channels_per_path: 65 cannot be; write "auto" or a number from 1 to 64"#,
    ),
    (
        r#"channels_per_path = "many""#,
        r#"/srv/host.toml:1: channels_per_path: "many" is no number of channels; write "auto" or a number from 1 to 64"#,
    ),
    (
        "max_migrations = 0",
        "/srv/host.toml:1: max_migrations: 0 cannot be; write a whole number from 1 on, like 2",
    ),
    (
        "max_migrations = -1",
        "/srv/host.toml:1: max_migrations: -1 cannot be; write a whole number from 1 on, like 2",
    ),
    (
        "max_migrations = 99999999999999999999",
        "/srv/host.toml:1: max_migrations: 99999999999999999999 cannot be; write a whole number from 1 on, like 2",
    ),
    (
        r#"max_storage_migrations = "2""#,
        r#"/srv/host.toml:1: max_storage_migrations: "2" cannot be; write a whole number from 1 on, like 2"#,
    ),
    (
        "max_rounds = 1.5",
        "/srv/host.toml:1: max_rounds: 1.5 cannot be; write a whole number from 1 on, like 2",
    ),
    (
        "downtime_limit = 300",
        r#"/srv/host.toml:1: downtime_limit: 300 cannot be; write a duration in quotes, like "300ms""#,
    ),
    (
        r#"downtime_limit = "300""#,
        r#"/srv/host.toml:1: downtime_limit: "300" is no duration (time unit needed, for example 300sec or 300ms); write it like 300ms or 2s"#,
    ),
    (
        r#"downtime_limit = "0s""#,
        r#"/srv/host.toml:1: downtime_limit: "0s" is no time at all; write it like 300ms"#,
    ),
    (
        r#"on_no_convergence = "hope""#,
        r#"/srv/host.toml:1: on_no_convergence: "hope" is no choice; write "cancel", "switch" or "throttle""#,
    ),
    ("port = 0", "/srv/host.toml:1: port: 0 cannot be; write a port from 1 to 65535, like 7433"),
    ("port = 65536", "/srv/host.toml:1: port: 65536 cannot be; write a port from 1 to 65535, like 7433"),
    (
        "port = 1979-05-27",
        "/srv/host.toml:1: port: a table or a date cannot be; write a port from 1 to 65535, like 7433",
    ),
    (
        r#"migration_ports = "7434""#,
        r#"/srv/host.toml:1: migration_ports: "7434" is no range of ports; write the first and the last, like "7434-7533""#,
    ),
    (
        r#"migration_ports = "7434-7434""#,
        r#"/srv/host.toml:1: migration_ports: "7434-7434" is one port, and the first is the daemon's own; write at least two, like "7434-7533""#,
    ),
    (
        r#"migration_ports = "7533-7434""#,
        r#"/srv/host.toml:1: migration_ports: "7533-7434" ends before it begins; write "7434-7533""#,
    ),
    (
        r#"migration_ports = "0-10""#,
        r#"/srv/host.toml:1: migration_ports: "0-10" is no range of ports; write the first and the last, like "7434-7533""#,
    ),
    (
        "migration_ports = [7434, 7533]",
        r#"/srv/host.toml:1: migration_ports: an array cannot be; write a range of ports in quotes, like "7434-7533""#,
    ),
    (
        r#"migration_ports = "7000-8000""#,
        "/srv/host.toml:1: migration_ports: port 7433 is among the migration_ports 7000-8000; choose one outside, or other ports for migrations",
    ),
    (
        "port = 7500",
        "/srv/host.toml:1: port: port 7500 is among the migration_ports 7434-7533; choose one outside, or other ports for migrations",
    ),
    (
        r#"port = 8000
migration_ports = "8000-8010""#,
        "/srv/host.toml:2: migration_ports: port 8000 is among the migration_ports 8000-8010; choose one outside, or other ports for migrations",
    ),
    (
        "huge_pages = true",
        r#"/srv/host.toml:1: huge_pages: true cannot be; write "no", "transparent" or "hugetlb""#,
    ),
    (
        r#"huge_pages = "1GiB""#,
        r#"/srv/host.toml:1: huge_pages: "1GiB" is no kind of pages; write "no", "transparent" or "hugetlb""#,
    ),
    (
        r#"state_dir = "var""#,
        r#"/srv/host.toml:1: state_dir: "var" does not begin with a slash; write the whole path, like "/var""#,
    ),
    (r#"state_dir = """#, r#"/srv/host.toml:1: state_dir: "" names nothing; write a path"#),
    (
        r#"socket = "api.sock""#,
        r#"/srv/host.toml:1: socket: "api.sock" does not begin with a slash; write the whole path, like "/api.sock""#,
    ),
    (
        r#"socket = "/run/""#,
        r#"/srv/host.toml:1: socket: "/run/" is a directory; write the socket's own path, like "/run/pageferry/api.sock""#,
    ),
    (
        "socket = \"/a\\u0000b\"",
        "/srv/host.toml:1: socket: \"/a\\0b\" has a zero byte, which no path has; take it out",
    ),
    (
        "allow_insecure = 1",
        "/srv/host.toml:1: allow_insecure: 1 cannot be; write true or false, without quotes",
    ),
    (
        "tls = true",
        "/srv/host.toml:1: tls: true cannot be; write a table, [tls], with ca, certificate and key",
    ),
    (
        "[tls]",
        "/srv/host.toml:1: tls: ca, certificate, key are missing; give all of ca, certificate and key, or take [tls] out (`pageferry pki issue` prints the lines)",
    ),
    (
        r#"[tls]
ca = "ca.pem""#,
        "/srv/host.toml:1: tls: certificate, key are missing; give all of ca, certificate and key, or take [tls] out (`pageferry pki issue` prints the lines)",
    ),
    (
        r#"[tls]
ca = ""
certificate = "c"
key = "k""#,
        r#"/srv/host.toml:2: tls.ca: "" names nothing; write a path"#,
    ),
    (
        r#"[tls]
cert = "c""#,
        "/srv/host.toml:2: there is no key tls.cert; did you mean certificate?",
    ),
    (
        r#"[tls]
ca = "a"
certificate = "c"
key = "k"
allow_insecure = true"#,
        "/srv/host.toml:5: there is no key tls.allow_insecure; allow_insecure belongs above the first line in brackets, since all keys below such a line are part of it",
    ),
    (
        r#"[tls]
ca = "a"
certificate = "c"
key = "k"
password = "p""#,
        "/srv/host.toml:5: there is no key tls.password; there are ca, certificate, key",
    ),
    (
        r#"[[networks]]
interface = "eth0"
isolated = "yes""#,
        r#"/srv/host.toml:3: networks.isolated: "yes" cannot be; write true or false, without quotes"#,
    ),
    (
        r#"encryption = "on""#,
        r#"/srv/host.toml:1: encryption: "on" is no choice; write "off" or "required""#,
    ),
    ("encryption = true", r#"/srv/host.toml:1: encryption: true cannot be; write "off" or "required""#),
    (
        r#"port = 1
encryption = "required""#,
        r#"/srv/host.toml:2: encryption: "required" takes certificates, and there is no [tls]; add it (`pageferry pki issue` prints the lines), or write "off""#,
    ),
    (
        r#"encryption = "required"
[tls]
ca = "a"
certificate = "c""#,
        "/srv/host.toml:2: tls: key is missing; give all of ca, certificate and key, or take [tls] out (`pageferry pki issue` prints the lines)",
    ),
    (
        "rdma = true",
        "/srv/host.toml:1: rdma: true cannot be; write a table, [rdma], with mtu, queue_depth, timeout and retries",
    ),
    (
        "[rdma]\nmtu = 1500\nqueue_depth = 15\ntimeout = 32\nretries = 7",
        "/srv/host.toml:2: rdma.mtu: 1500 cannot be; write 256, 512, 1024, 2048 or 4096
/srv/host.toml:3: rdma.queue_depth: 15 cannot be; write a whole number from 16 to 4096
/srv/host.toml:4: rdma.timeout: 32 cannot be; write a whole number from 1 to 31; 18 is 4.096 us x 2^18, about a second
/srv/host.toml:5: rdma.retries: 7 cannot be; write a whole number from 0 to 6",
    ),
    (
        "[rdma]\nmtu = \"4096\"",
        r#"/srv/host.toml:2: rdma.mtu: "4096" cannot be; write 256, 512, 1024, 2048 or 4096"#,
    ),
    ("[rdma]\ndepth = 9", "/srv/host.toml:2: there is no key rdma.depth; did you mean queue_depth?"),
    (
        r#"peers = "10.0.0.2""#,
        r#"/srv/host.toml:1: peers: "10.0.0.2" cannot be; write a table, with a line like host-b = "10.0.0.2" for each host"#,
    ),
    (
        r#"[peers]
host-b = "host-b.example.org""#,
        r#"/srv/host.toml:2: peers.host-b: "host-b.example.org" is no IP address, with or without a port; write it like "10.0.0.2", "10.0.0.2:7433" or "[fd00::2]:7433""#,
    ),
    (
        "[peers]\nhost-b = 7433",
        r#"/srv/host.toml:2: peers.host-b: 7433 cannot be; write an address in quotes, like "10.0.0.2" or "10.0.0.2:7433", or an array of such"#,
    ),
    (
        "[peers]\nhost-b = []",
        r#"/srv/host.toml:2: peers.host-b: there is no address; write one, like "10.0.0.2""#,
    ),
    (
        r#"[peers]
host-b = [
  "10.0.0.2",
  "10.0.0.2.3",
]"#,
        r#"/srv/host.toml:4: peers.host-b: "10.0.0.2.3" is no IP address, with or without a port; write it like "10.0.0.2", "10.0.0.2:7433" or "[fd00::2]:7433""#,
    ),
    (
        r#"[peers]
host-b = ["10.0.0.2", "10.0.0.2"]"#,
        r#"/srv/host.toml:2: peers.host-b: "10.0.0.2" is there twice; take one out"#,
    ),
    (
        r#"[peers]
host-b = "0.0.0.0""#,
        r#"/srv/host.toml:2: peers.host-b: "0.0.0.0" is no address of one host; write that host's own, like "10.0.0.2""#,
    ),
    (
        r#"[peers]
host-b = "10.0.0.2:0""#,
        r#"/srv/host.toml:2: peers.host-b: "10.0.0.2:0" has port 0, which nobody listens at; write the daemon's, or leave it out"#,
    ),
    (
        r#"[peers]
"host b" = "10.0.0.2""#,
        r#"/srv/host.toml:2: peers."host b": "host b" cannot be a host's name in a certificate: it may have only letters, digits, hyphens and dots; write a name like "host-a""#,
    ),
    (
        r#"port = 0
prot = 1
networks = ["eth0", "10.0.0.1"]

[tls]
ca = 1

[peers]
a = "b"
c = "d""#,
        r#"/srv/host.toml:1: port: 0 cannot be; write a port from 1 to 65535, like 7433
/srv/host.toml:2: there is no key prot; did you mean port?
/srv/host.toml:3: networks: "10.0.0.1" is an address; write the subnet, or "10.0.0.1/32" for it alone
/srv/host.toml:6: tls.ca: 1 cannot be; write a file in quotes, like "ca.pem"
/srv/host.toml:9: peers.a: "b" is no IP address, with or without a port; write it like "10.0.0.2", "10.0.0.2:7433" or "[fd00::2]:7433"
/srv/host.toml:10: peers.c: "d" is no IP address, with or without a port; write it like "10.0.0.2", "10.0.0.2:7433" or "[fd00::2]:7433""#,
    ),
];

#[test]
fn every_bad_file_is_told_what_is_wrong_where_and_what_to_do() {
    for (text, said) in BAD {
        match parse(text, Path::new("/srv/host.toml")) {
            Ok(loaded) => panic!("{text:?} was taken for {:?}", loaded.config),
            Err(error) => assert_eq!(error.to_string(), *said, "said of\n{text}"),
        }
    }
}

/// What is too long, one byte more than what is not.
#[test]
fn lengths_have_limits() {
    let label = "a".repeat(63);
    let longest = [label.as_str(), &label, &label, &label[..61]].join(".");
    let cases = [
        ("name", label.clone(), "a part between dots has more than 63 bytes; "),
        ("name", longest, "it has more than 253 bytes; "),
        (
            "state_dir",
            format!("/{}", "d".repeat(59)),
            "has 61 bytes; it may have 60, because the path of a unix socket ",
        ),
        ("socket", format!("/{}", "s".repeat(106)), "has 108 bytes; the path of a unix socket may have 107 "),
    ];
    for (key, value, why) in cases {
        let path = Path::new("/srv/host.toml");
        assert!(parse(&format!("{key} = {value:?}"), path).is_ok(), "{key} of {} bytes", value.len());
        let said = parse(&format!("{key} = \"{value}a\""), path).unwrap_err().to_string();
        assert!(said.starts_with(&format!("/srv/host.toml:1: {key}: \"{value}a\" ")), "{said}");
        assert!(said.contains(why), "{said}");
    }
}
