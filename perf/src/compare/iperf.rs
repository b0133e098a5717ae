//! iperf3 as a peer: what TCP carries when the receiver throws it away from a buffer that stays in its cache.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::measure::Sample;

/// Sends for a second over loopback; `zero_copy` by `sendfile(2)` (`-Z`). With cubic, which is not paced, as pageferry.
pub(crate) fn run(connections: u64, zero_copy: bool) -> anyhow::Result<Sample> {
    let port = free_port()?;
    let mut server = Command::new("iperf3")
        .args(["-s", "-1", "-B", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .context("iperf3 is missing; scripts/perf-compare installs it as root on Debian")?;
    let answer = client(connections, zero_copy, port);
    // It ends by itself after one client, unless that one failed.
    let _ = server.kill();
    let _ = server.wait();
    sample_of(&answer?).context("iperf3's answer has another form")
}

fn client(connections: u64, zero_copy: bool, port: u16) -> anyhow::Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let mut command = Command::new("iperf3");
        command.args(["-c", "127.0.0.1", "-J", "-t", "1", "-C", "cubic", "-p", &port.to_string()]);
        command.args(["-P", &connections.to_string()]);
        if zero_copy {
            command.arg("-Z");
        }
        let output = command.output()?;
        // With -J it exits with 0 even where it could not connect.
        if let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout)
            && answer["error"].is_null()
        {
            return Ok(answer);
        }
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(Instant::now() < deadline, "iperf3 failed: {said}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// What `iperf3 -J` answers. Its CPU figures are percentages of one processor over the test.
fn sample_of(answer: &Value) -> anyhow::Result<Sample> {
    let end = &answer["end"];
    let number = |value: &Value| value.as_f64().with_context(|| format!("iperf3 says {answer}"));
    let seconds = number(&end["sum_received"]["seconds"])?;
    let bytes = number(&end["sum_received"]["bytes"])? as u64;
    let usage = &end["cpu_utilization_percent"];
    Ok(Sample {
        bytes,
        wire_bytes: bytes,
        seconds,
        source_cpu_seconds: number(&usage["host_total"])? / 100.0 * seconds,
        destination_cpu_seconds: number(&usage["remote_total"])? / 100.0 * seconds,
        ..Sample::default()
    })
}

/// Its version, or why it is not there.
pub(crate) fn version() -> anyhow::Result<String> {
    let answer = Command::new("iperf3").arg("--version").output();
    let answer = answer.context("iperf3 is missing; scripts/perf-compare installs it as root on Debian")?;
    let text = String::from_utf8_lossy(&answer.stdout);
    Ok(text.split_whitespace().nth(1).context("iperf3 does not say its version")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_iperf_says_is_understood() {
        let answer = json!({ "end": {
            "sum_sent": { "seconds": 0.5, "bytes": 2_147_483_648_u64 },
            "sum_received": { "seconds": 0.5, "bytes": 2_147_483_648_u64 },
            "cpu_utilization_percent": { "host_total": 40.0, "remote_total": 80.0 },
        }});
        let sample = sample_of(&answer).unwrap();
        assert_eq!(sample.gib_per_second(), 4.0);
        assert_eq!((sample.source_cpu_seconds, sample.destination_cpu_seconds), (0.2, 0.4));
        assert!(sample_of(&json!({ "error": "unable to connect" })).is_err());
    }
}
