//! QEMU as a peer: two of them, one migrating to the other, told what to do by QMP.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use crate::measure::Sample;

const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(5);

/// What the RAM of a QEMU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ram {
    /// A file that it shares with whoever maps it; made by QEMU where it is missing.
    File(PathBuf),
    /// Private memory, for which QEMU asks for transparent huge pages.
    Private,
}

/// A migration to measure.
#[derive(Clone, Debug)]
pub(crate) struct Migration<'a> {
    /// The source's RAM and its size.
    pub(crate) source: Ram,
    pub(crate) destination: Ram,
    pub(crate) bytes: u64,
    /// Channels of multifd.
    pub(crate) channels: u32,
    /// `none` or `zstd`.
    pub(crate) compression: &'a str,
    /// Where the destination listens.
    pub(crate) address: &'a str,
    /// What each command line begins with: `ip netns exec NAME`, or nothing.
    pub(crate) source_prefix: &'a [String],
    pub(crate) destination_prefix: &'a [String],
    /// More arguments of both, such as an accelerator and a disk to boot from.
    pub(crate) machine: &'a [String],
    /// Whether the source's guest runs. It is given this long before the migration begins.
    pub(crate) runs_for: Option<Duration>,
    /// Where sockets go.
    pub(crate) directory: &'a Path,
}

/// A QEMU that ends when this is dropped.
pub(crate) struct Qemu {
    child: Child,
    /// Its own process: what began it may be `ip netns exec`, which becomes it.
    monitor: Qmp,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    pub(crate) fn start(
        prefix: &[String],
        ram: &Ram,
        bytes: u64,
        more: &[String],
        socket: &Path,
    ) -> anyhow::Result<Self> {
        // Left over by another.
        let _ = std::fs::remove_file(socket);
        let backend = match ram {
            Ram::File(path) => {
                format!("memory-backend-file,id=ram0,size={bytes},share=on,mem-path={}", path.display())
            }
            Ram::Private => format!("memory-backend-ram,id=ram0,size={bytes}"),
        };
        let mut words: Vec<String> = prefix.to_vec();
        words.push("qemu-system-x86_64".into());
        let fixed = ["-nodefaults", "-display", "none", "-machine", "q35,memory-backend=ram0"];
        words.extend(fixed.map(String::from));
        words.extend(["-object".into(), backend, "-m".into(), format!("{}M", bytes >> 20)]);
        words.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", socket.display())]);
        words.extend(more.iter().cloned());
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", words.join(" ")))?;
        match Qmp::connect(socket, &mut child) {
            Ok(monitor) => Ok(Self { child, monitor }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    pub(crate) fn command(&mut self, name: &str, arguments: Value) -> anyhow::Result<Value> {
        self.monitor.command(name, arguments)
    }

    /// User and system time so far, of all its threads.
    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        cpu_seconds_of(&stat).context("/proc/PID/stat has another form")
    }
}

/// From `/proc/PID/stat`, see `proc_pid_stat(5)`.
fn cpu_seconds_of(stat: &str) -> Option<f64> {
    // Behind the name, which may hold anything: the state is field 3, user and system time are 14 and 15.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The monitor: one command, one answer, and events in between.
struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Those that came while an answer was waited for.
    events: VecDeque<Value>,
}

impl Qmp {
    fn connect(socket: &Path, child: &mut Child) -> anyhow::Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                break stream;
            }
            if let Some(status) = child.try_wait()? {
                bail!("QEMU ended early: {status}");
            }
            ensure!(Instant::now() < deadline, "QEMU does not open its monitor");
            std::thread::sleep(LOOK);
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let lines = BufReader::new(stream.try_clone()?);
        let mut qmp = Self { lines, stream, events: VecDeque::new() };
        qmp.read("connecting")?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn command(&mut self, name: &str, arguments: Value) -> anyhow::Result<Value> {
        writeln!(self.stream, "{}", json!({ "execute": name, "arguments": arguments }))?;
        loop {
            let mut answer = self.read(name)?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {name}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            self.events.push_back(answer);
        }
    }

    fn read(&mut self, during: &str) -> anyhow::Result<Value> {
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line)? > 0, "QEMU closed its monitor at {during}");
        Ok(serde_json::from_str(&line)?)
    }

    /// Until a migration is over, as its events say. To be asked would cost QEMU processor time.
    fn wait_for_migration(&mut self) -> anyhow::Result<()> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read("its migration")?,
            };
            match event["data"]["status"].as_str().filter(|_| event["event"] == "MIGRATION") {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU's migration failed"),
                _ => {}
            }
        }
    }
}

/// Migrates once.
pub(crate) fn migrate(what: &Migration<'_>) -> anyhow::Result<Sample> {
    let mut source_more = what.machine.to_vec();
    if what.runs_for.is_none() {
        source_more.push("-S".into());
    }
    let mut destination_more = what.machine.to_vec();
    destination_more.extend(["-incoming", "defer"].map(String::from));
    let (socket_a, socket_b) = (what.directory.join("source"), what.directory.join("destination"));
    let mut source = Qemu::start(what.source_prefix, &what.source, what.bytes, &source_more, &socket_a)?;
    let mut destination =
        Qemu::start(what.destination_prefix, &what.destination, what.bytes, &destination_more, &socket_b)?;
    for side in [&mut source, &mut destination] {
        let on = |capability| json!({ "capability": capability, "state": true });
        side.command("migrate-set-capabilities", json!({ "capabilities": [on("multifd"), on("events")] }))?;
        side.command(
            "migrate-set-parameters",
            json!({
                "multifd-channels": what.channels,
                "multifd-compression": what.compression,
                // Without a limit; QEMU's own is 128 MiB/s.
                "max-bandwidth": 1_u64 << 40,
            }),
        )?;
    }
    let uri = format!("tcp:{}", what.address);
    destination.command("migrate-incoming", json!({ "uri": uri }))?;
    if let Some(time) = what.runs_for {
        std::thread::sleep(time);
    }
    let (source_cpu, destination_cpu) = (source.cpu_seconds()?, destination.cpu_seconds()?);
    source.command("migrate", json!({ "uri": uri }))?;
    let over = source.monitor.wait_for_migration();
    let info = source.command("query-migrate", json!({}))?;
    over.with_context(|| format!("QEMU says {info}"))?;
    let mut sample = sample_of(&info, what.bytes)?;
    sample.source_cpu_seconds = source.cpu_seconds()? - source_cpu;
    sample.destination_cpu_seconds = destination.cpu_seconds()? - destination_cpu;
    Ok(sample)
}

/// What `query-migrate` says of a migration that is over (QEMU's `qapi/migration.json`).
fn sample_of(info: &Value, bytes: u64) -> anyhow::Result<Sample> {
    let number = |value: &Value| value.as_f64().context("query-migrate answers in another form");
    Ok(Sample {
        bytes,
        wire_bytes: number(&info["ram"]["transferred"])? as u64,
        seconds: number(&info["total-time"])? / 1e3,
        downtime_seconds: Some(number(&info["downtime"])? / 1e3),
        ..Sample::default()
    })
}

/// Its version, or why it is not there.
pub(crate) fn version() -> anyhow::Result<String> {
    let answer = Command::new("qemu-system-x86_64").arg("--version").output();
    let answer = answer.context("QEMU is missing; scripts/perf-compare installs it as root on Debian")?;
    let text = String::from_utf8_lossy(&answer.stdout);
    Ok(version_of(&text).context("QEMU does not say its version")?.to_owned())
}

fn version_of(text: &str) -> Option<&str> {
    text.lines().next()?.split_whitespace().nth(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_says_is_understood() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright (c)";
        assert_eq!(version_of(text), Some("10.0.2"));
        let info = json!({
            "status": "completed", "total-time": 1614, "downtime": 230, "setup-time": 1,
            "ram": { "transferred": 2_152_000_000_u64, "total": 2_147_483_648_u64 },
        });
        let sample = sample_of(&info, 2 << 30).unwrap();
        assert_eq!((sample.seconds, sample.downtime_seconds), (1.614, Some(0.23)));
        assert_eq!(sample.wire_bytes, 2_152_000_000);
        assert!(sample_of(&json!({ "status": "completed" }), 1).is_err());
    }

    #[test]
    fn processor_time_stands_behind_a_name_of_any_form() {
        let stat = "77 (a ) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 4 0 9 1 2";
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        assert_eq!(cpu_seconds_of(stat), Some(200.0 / ticks));
        assert_eq!(cpu_seconds_of("77 (a"), None);
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        assert!(cpu_seconds_of(&own).is_some());
    }
}
