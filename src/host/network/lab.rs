//! Network namespaces with links between them, for tests: the real kernel, and nothing that outlives the test.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::LinkNameSpaceType;

/// Namespaces with names of their own, so that tests can run at the same time.
pub(crate) struct Lab {
    prefix: String,
    names: Vec<String>,
}

impl Lab {
    /// Makes these namespaces, each with its loopback up.
    pub(crate) fn new(names: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("pf{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let lab = Self { prefix, names: names.iter().map(|name| (*name).to_owned()).collect() };
        for name in names {
            run(&format!("netns add {}", lab.full(name)));
            lab.ip(name, "link set lo up");
            // Otherwise a fresh link carries IPv6 only when the kernel has asked for two seconds whether its address is free.
            lab.set(name, "ipv6/conf/default/accept_dad", "0");
        }
        lab
    }

    fn full(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// `ip` in one of them.
    pub(crate) fn ip(&self, name: &str, arguments: &str) {
        run(&format!("-n {} {arguments}", self.full(name)));
    }

    /// Writes a setting below `/proc/sys/net` of one of them.
    pub(crate) fn set(&self, name: &str, setting: &str, value: &str) {
        self.run(name, async || std::fs::write(format!("/proc/sys/net/{setting}"), value).unwrap());
    }

    /// Joins two of them by a link whose ends, given by namespace and interface, have this MTU and are up.
    pub(crate) fn join(&self, one: (&str, &str), other: (&str, &str), mtu: u32) {
        let peer = self.full(other.0);
        self.ip(
            one.0,
            &format!("link add {} mtu {mtu} type veth peer name {} mtu {mtu} netns {peer}", one.1, other.1),
        );
        self.ip(one.0, &format!("link set {} up", one.1));
        self.ip(other.0, &format!("link set {} up", other.1));
    }

    /// Runs this in one of them, on a thread and a runtime of its own.
    pub(crate) fn run<T: Send>(&self, name: &str, task: impl AsyncFnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(format!("/var/run/netns/{}", self.full(name))).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                use std::os::fd::AsFd;
                let kind = Some(LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).unwrap();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(task())
            });
            thread.join().unwrap()
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", &self.full(name)]).output();
        }
    }
}

fn run(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {said}");
}
