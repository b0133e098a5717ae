//! Sessions between two network namespaces with two links: which interface the bytes go by, by the kernel's own counters.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::*;
use crate::session::listener::ListenOn;
use crate::testing::{Need, require};

/// More than what the kernel says on its own: ARP, neighbours, multicast.
const CHATTER: u64 = 64 << 10;
const MOVED: u64 = 8192 * PAGE_SIZE;

/// A lab of its own, removed at the end.
struct Lab {
    name: String,
}

impl Lab {
    fn up() -> Self {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let lab = Self { name: format!("s{}-{number}", std::process::id()) };
        lab.script(&["up", "--insecure", "--rate", "none"], &[]);
        // Two links to one host are two ways to each of its addresses, also where the machine's defaults are stricter (rp_filter,
        // Documentation/networking/ip-sysctl.rst).
        let lenient = "for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$file; done";
        for side in ["alpha", "beta"] {
            lab.script(&["exec"], &[side, "sh", "-c", lenient]);
        }
        lab
    }

    fn script(&self, command: &[&str], words: &[&str]) -> String {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/netns-lab");
        let output = Command::new(script)
            .args(command)
            .args(["--name", &self.name])
            .args(words)
            .output()
            .expect("the lab's script starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?} {words:?}: {stderr}");
        String::from_utf8(output.stdout).expect("it prints text")
    }

    fn ip(&self, side: &str, words: &str) {
        let words: Vec<&str> = [side, "ip"].into_iter().chain(words.split(' ')).collect();
        self.script(&["exec"], &words);
    }

    /// Has the calling thread, and those that it starts, use a side's network. For a thread that ends with its part of the test.
    fn enter(&self, side: &str) {
        let space = File::open(format!("/run/netns/{}-{side}", self.name)).unwrap();
        move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// Runs something within a side's network.
    fn within<T: Send>(&self, side: &str, run: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let within = scope.spawn(|| {
                self.enter(side);
                run()
            });
            within.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The bytes that alpha has sent by each link.
    fn sent(&self) -> [u64; 2] {
        ["pf0", "pf1"].map(|link| {
            let counter = format!("/sys/class/net/{link}/statistics/tx_bytes");
            self.script(&["exec"], &["alpha", "cat", &counter]).trim().parse().unwrap()
        })
    }

    /// A destination in beta, at both of its addresses, and a link to it from alpha.
    fn host(&self, listen: &[ListenOn]) -> Host {
        let (sender, incoming) = unbounded();
        let listener =
            self.within("beta", || Listener::bind(listen, ListenerOptions::default(), sender).unwrap());
        let first = Path::to(listener.local_addresses()[0]);
        let links = self
            .within("alpha", || links_over(first, &incoming, Opening::default(), ControlOptions::default()));
        let (sender, events) = unbounded();
        let memory = memory(Backing::Memfd);
        let session = DestinationSession::new(memory.clone(), MIGRATION, sender);
        listener.register(MIGRATION, SECRET, &session, &links.destination);
        Host { listener, memory, session, events, links }
    }

    /// Moves a whole memory over these paths.
    fn moves(&self, host: &Host, paths: &[Path], caps: RateCaps) -> SessionStats {
        let source = memory(Backing::Memfd);
        let mut seed = 21;
        (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
        let mut over = options(&source, host, paths.len(), TransferMode::Tcp);
        over.paths = paths.to_vec();
        over.rate_caps = caps;
        let (sender, events) = unbounded();
        let session = self.within("alpha", || SourceSession::open(over, sender).unwrap());
        session.place(RoundId(0), PageSet::full(8192));
        placed(&events);
        assert_equal(&source, &host.memory);
        session.stats()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/netns-lab");
        let _ = Command::new(script).args(["down", "--name", &self.name]).status();
    }
}

fn both_addresses() -> [ListenOn; 2] {
    ["10.77.0.2:0", "10.77.1.2:0"].map(|address| ListenOn::from(address.parse::<SocketAddr>().unwrap()))
}

/// The way to an address of the listener, by an interface.
fn by(host: &Host, address: usize, interface: &str) -> Path {
    Path { interface: interface.parse().ok(), ..Path::to(host.listener.local_addresses()[address]) }
}

#[test]
fn a_path_by_an_interface_leaves_by_no_other_whatever_the_routes_say() {
    if !require(&[Need::Netns]) {
        return;
    }
    let lab = Lab::up();
    let host = lab.host(&both_addresses());
    // The routing table would have it go by the other link.
    lab.ip("alpha", "route add 10.77.0.2/32 dev pf1");
    let before = lab.sent();
    lab.moves(&host, &[Path::to(host.listener.local_addresses()[0])], RateCaps::default());
    let after = lab.sent();
    assert!(after[1] - before[1] > MOVED, "without an interface the routes decide: {before:?} {after:?}");
    assert!(after[0] - before[0] < CHATTER, "{before:?} {after:?}");
    host.session.close();

    let host = lab.host(&both_addresses());
    let before = lab.sent();
    let stats = lab.moves(&host, &[by(&host, 0, "pf0")], RateCaps::default());
    let after = lab.sent();
    assert!(after[0] - before[0] > MOVED, "{before:?} {after:?}");
    assert!(after[1] - before[1] < CHATTER, "{before:?} {after:?}");
    assert_eq!(stats.channels[0].interface.as_deref(), Some("pf0"));
}

#[test]
fn a_listener_by_an_interface_is_reached_by_no_other() {
    if !require(&[Need::Netns]) {
        return;
    }
    let lab = Lab::up();
    let listen = ListenOn { interface: "pf0".parse().ok(), ..both_addresses()[0] };
    let host = lab.host(&[listen]);
    let preamble = crate::wire::preamble::Preamble::new(
        crate::wire::preamble::Purpose::Data { channel: 0 },
        MIGRATION,
        SECRET,
    );
    lab.ip("alpha", "route add 10.77.0.2/32 dev pf1");
    let around = by(&host, 0, "pf1");
    let error = lab.within("alpha", || handshake::dial_plain(&around, &preamble, PATIENCE)).unwrap_err();
    assert!(matches!(error, SessionError::Connect { .. }), "{error:?}");
    lab.within("alpha", || handshake::dial_plain(&by(&host, 0, "pf0"), &preamble, PATIENCE)).unwrap();

    let missing = by(&host, 0, "none0");
    let error = lab.within("alpha", || handshake::dial_plain(&missing, &preamble, PATIENCE)).unwrap_err();
    let SessionError::Connect { cause, .. } = error else { panic!("{error:?}") };
    assert!(cause.to_string().contains("the interface none0 cannot be used"), "{cause}");
}

#[test]
fn a_cap_on_one_interface_leaves_the_other_free() {
    if !require(&[Need::Netns]) {
        return;
    }
    let lab = Lab::up();
    let host = lab.host(&both_addresses());
    let caps = RateCaps::default();
    caps.set_interfaces(BTreeMap::from([("pf0".to_owned(), 1 << 20)]));
    let (begin, before) = (Instant::now(), lab.sent());
    let stats = lab.moves(&host, &[by(&host, 0, "pf0"), by(&host, 1, "pf1")], caps);
    let (took, after) = (begin.elapsed(), lab.sent());
    // A batch of 1 MiB is sent before it is paid for, the last one too.
    let allowed = took.as_secs_f64() * f64::from(1 << 20) + f64::from(3 << 20);
    let [slow, free] = [0, 1].map(|link| after[link] - before[link]);
    assert!((slow as f64) < allowed, "{slow} bytes by pf0 in {took:?}");
    assert!(slow + free > MOVED && free > MOVED / 2, "{slow} and {free}");
    let bytes = |interface: &str| {
        let channels =
            stats.channels.iter().filter(|channel| channel.interface.as_deref() == Some(interface));
        channels.map(|channel| channel.bytes).sum::<u64>()
    };
    assert!(bytes("pf0") <= slow && bytes("pf1") <= free, "{stats:?}");
}
