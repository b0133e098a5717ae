//! A lab of two network namespaces with a slow link, and places that end with what they were made for.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// Two namespaces and a link of 1 Gbit/s between them (`scripts/netns-lab`). Removed when dropped.
pub(crate) struct Lab {
    script: PathBuf,
    name: String,
    pub(crate) source_prefix: Vec<String>,
    pub(crate) destination_prefix: Vec<String>,
}

/// The destination's address in the lab.
pub(crate) const DESTINATION: &str = "10.77.0.2";

impl Lab {
    pub(crate) fn up(root: &Path, binary: &Path, rate: &str) -> anyhow::Result<Self> {
        let script = root.join("scripts/netns-lab");
        let name = format!("pfperf{}", std::process::id());
        let prefix =
            |side: &str| ["ip", "netns", "exec", &format!("{name}-{side}")].map(String::from).to_vec();
        let lab = Self { script, source_prefix: prefix("alpha"), destination_prefix: prefix("beta"), name };
        let status = lab
            .command("up")
            .args(["--links", "1", "--rate", rate, "--insecure", "--binary"])
            .arg(binary)
            .status()
            .context("cannot run scripts/netns-lab")?;
        ensure!(status.success(), "no lab of two namespaces: it takes root, ip and tc");
        Ok(lab)
    }

    fn command(&self, word: &str) -> Command {
        let mut command = Command::new(&self.script);
        command.args([word, "--name", &self.name]).stdout(Stdio::null());
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.command("down").arg("--kill").status() {
            eprintln!("the lab {} stays: {error}", self.name);
        }
    }
}

/// A directory, or a file in shared memory, that goes when this is dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// A file of that name in shared memory, not made yet.
    pub(crate) fn shared(name: &str) -> Self {
        Self(PathBuf::from(format!("/dev/shm/pageferry-perf-{}-{name}", std::process::id())))
    }

    pub(crate) fn directory() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("pageferry-perf-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing to do where it was never made.
        let _ =
            if self.0.is_dir() { std::fs::remove_dir_all(&self.0) } else { std::fs::remove_file(&self.0) };
    }
}
