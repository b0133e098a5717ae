//! What the machine and the programs are, so that a result can be read later.

use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// Of the machine that measured. Nothing that tells whose it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) cores: usize,
    pub(crate) cpu: String,
    pub(crate) memory_gib: u64,
    pub(crate) kernel: String,
    /// The kernel's settings that decide about huge pages, `anonymous` and `shared`.
    pub(crate) huge_pages: [String; 2],
    pub(crate) congestion_control: String,
    pub(crate) pageferry: String,
    pub(crate) qemu: String,
    pub(crate) iperf3: String,
}

impl Facts {
    pub(crate) fn gather(binary: &Path) -> Self {
        let missing = |error: anyhow::Error| format!("none: {error}");
        Self {
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            cpu: line_of("/proc/cpuinfo", "model name").unwrap_or_default(),
            memory_gib: line_of("/proc/meminfo", "MemTotal")
                .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
                .map_or(0, |kib| kib.div_ceil(1 << 20)),
            kernel: read("/proc/sys/kernel/osrelease"),
            huge_pages: [
                chosen(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
                chosen(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
            ],
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control"),
            pageferry: version(binary),
            qemu: crate::qemu::version().unwrap_or_else(missing),
            iperf3: crate::iperf::version().unwrap_or_else(missing),
        }
    }
}

fn version(binary: &Path) -> String {
    let answer = Command::new(binary).arg("--version").output();
    answer
        .map_or_else(|error| error.to_string(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn line_of(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Of a list like `always [madvise] never`, the one in brackets.
fn chosen(text: &str) -> String {
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or(text, |(word, _)| word).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen(""), "");
    }
}
