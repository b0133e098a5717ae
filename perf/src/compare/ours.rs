//! pageferry's own programs: `bench`, `demo`, and the floor.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::measure::Sample;

/// One run of `pageferry bench`.
#[derive(Clone, Debug)]
pub(crate) struct Bench<'a> {
    pub(crate) binary: &'a Path,
    pub(crate) mode: &'a str,
    pub(crate) channels: u32,
    /// As `--fill` takes it.
    pub(crate) fill: String,
    pub(crate) bytes: u64,
    /// Whether the destination's memory is populated before.
    pub(crate) warm: bool,
    /// Where both ends run, if not on loopback.
    pub(crate) between: Option<Between<'a>>,
}

/// Two network namespaces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Between<'a> {
    pub(crate) source_prefix: &'a [String],
    pub(crate) destination_prefix: &'a [String],
    /// The destination's address.
    pub(crate) address: &'a str,
}

fn command(prefix: &[String], binary: &Path) -> Command {
    let mut words = prefix.iter();
    let Some(first) = words.next() else { return Command::new(binary) };
    let mut command = Command::new(first);
    command.args(words).arg(binary);
    command
}

/// The receiving end, which ends when this is dropped.
struct Server(Child);

impl Server {
    fn start(between: &Between<'_>, binary: &Path) -> anyhow::Result<Self> {
        let child = command(between.destination_prefix, binary)
            .args(["bench", "server", "--once", "--listen", between.address])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut server = Self(child);
        let said = server.0.stdout.take().context("its stdout is a pipe")?;
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        ensure!(line.starts_with("Listening"), "the receiving end said '{line}'");
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures once.
pub(crate) fn bench(what: &Bench<'_>) -> anyhow::Result<Sample> {
    let server = what.between.as_ref().map(|between| Server::start(between, what.binary)).transpose()?;
    let prefix = what.between.map_or(&[][..], |between| between.source_prefix);
    let mut command = command(prefix, what.binary);
    match &what.between {
        None => command.args(["bench", "local"]),
        Some(between) => command.args(["bench", "client", between.address]),
    };
    command.args(["--json", "--mode", what.mode, "--fill", &what.fill]);
    command.args(["--channels", &what.channels.to_string(), "--memory", &what.bytes.to_string()]);
    if what.warm {
        command.arg("--warm");
    }
    let output = command.output().with_context(|| format!("cannot run {}", what.binary.display()))?;
    drop(server);
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "pageferry bench failed ({}): {said}", output.status);
    sample_of_bench(&serde_json::from_slice(&output.stdout)?)
}

/// What `pageferry bench --json` answers, see `docs/bench.md`; its only case.
fn sample_of_bench(answer: &Value) -> anyhow::Result<Sample> {
    let case = &answer["cases"][0];
    let number = |key: &str| case[key].as_f64().with_context(|| format!("pageferry bench names no {key}"));
    ensure!(case["verified"] == true, "what arrived is not what was sent");
    let engine = |side: &str| case["engine_memory_bytes"][side].as_u64();
    Ok(Sample {
        bytes: number("memory_bytes")? as u64,
        wire_bytes: number("wire_bytes")? as u64,
        seconds: number("seconds")?,
        source_cpu_seconds: number("source_cpu_seconds")?,
        destination_cpu_seconds: number("destination_cpu_seconds")?,
        downtime_seconds: None,
        engine_bytes: engine("source").max(engine("destination")),
    })
}

/// Moves a guest of pageferry's own once, and answers what that took.
pub(crate) fn demo(binary: &Path, arguments: &[&str]) -> anyhow::Result<Sample> {
    let output = Command::new(binary).args(["demo", "--json"]).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "pageferry demo failed ({}): {said}", output.status);
    sample_of_demo(&serde_json::from_slice(&output.stdout)?)
}

/// What `pageferry demo --json` answers, see `docs/json.md`.
fn sample_of_demo(answer: &Value) -> anyhow::Result<Sample> {
    let number = |key: &str| answer[key].as_f64().with_context(|| format!("pageferry demo names no {key}"));
    ensure!(answer["ram_equal"] == true, "the guest's memory did not arrive whole");
    Ok(Sample {
        bytes: number("memory_bytes")? as u64,
        wire_bytes: number("wire_bytes")? as u64,
        seconds: number("total_seconds")?,
        source_cpu_seconds: number("source_cpu_seconds")?,
        destination_cpu_seconds: number("destination_cpu_seconds")?,
        downtime_seconds: Some(number("downtime_seconds")?),
        engine_bytes: None,
    })
}

/// Moves the bytes of a file by the cheapest known way (`perf/src/floor`), which is a program beside this one.
pub(crate) fn floor(file: &Path, way: &str, channels: u32) -> anyhow::Result<Sample> {
    let program = std::env::current_exe()?.with_file_name("floor");
    let output = Command::new(&program)
        .args(["send", "--way", way, "--channels", &channels.to_string(), "--file"])
        .arg(file)
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(output.status.success(), "the floor failed: {}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    let number = |key: &str| answer[key].as_f64().with_context(|| format!("the floor names no {key}"));
    let bytes = number("bytes")? as u64;
    Ok(Sample {
        bytes,
        wire_bytes: bytes,
        seconds: number("seconds")?,
        source_cpu_seconds: number("source_cpu_seconds")?,
        destination_cpu_seconds: number("destination_cpu_seconds")?,
        ..Sample::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_bench_says_is_understood() {
        let case = json!({
            "memory_bytes": 1 << 30, "bytes": 1 << 30, "wire_bytes": 500, "seconds": 0.5, "source_cpu_seconds": 0.1,
            "destination_cpu_seconds": 0.2, "verified": true,
            "engine_memory_bytes": { "source": 7, "destination": 9 },
        });
        let sample = sample_of_bench(&json!({ "cases": [case] })).unwrap();
        assert_eq!((sample.gib_per_second(), sample.wire_bytes, sample.engine_bytes), (2.0, 500, Some(9)));
        let mut wrong = case;
        wrong["verified"] = json!(false);
        assert!(sample_of_bench(&json!({ "cases": [wrong] })).is_err());
        assert!(sample_of_bench(&json!({ "cases": [] })).is_err());
    }

    #[test]
    fn what_demo_says_is_understood() {
        let answer = json!({
            "memory_bytes": 1 << 30, "wire_bytes": 5, "total_seconds": 2.0, "source_cpu_seconds": 0.1,
            "destination_cpu_seconds": 0.2, "downtime_seconds": 0.012, "ram_equal": true,
        });
        assert_eq!(sample_of_demo(&answer).unwrap().downtime_seconds, Some(0.012));
        assert!(sample_of_demo(&json!({ "ram_equal": null })).is_err());
    }
}
