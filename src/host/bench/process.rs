//! The receiving end of `bench local`: a process of its own, so that what each end costs can be told apart.

use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, Command, Stdio};

use serde::Deserialize;

use super::BenchError;
use super::options::BenchOptions;
use crate::session::Path;

/// It ends when this is dropped.
pub(super) struct ServerProcess {
    child: Child,
    /// It ends when it reads the end of this.
    _stdin: Option<ChildStdin>,
    /// The ways to it.
    pub(super) paths: Vec<Path>,
}

#[derive(Deserialize)]
struct Announced {
    listening: Vec<SocketAddr>,
}

impl ServerProcess {
    /// Starts this program once more, listening at the far end of every path, or on loopback.
    pub(super) fn start(options: &BenchOptions) -> Result<Self, BenchError> {
        let failed = BenchError::Server;
        let mut process = Command::new(std::env::current_exe().map_err(failed)?);
        process.args(["bench", "server", "--once", "--supervised"]);
        if options.verbose {
            process.arg("--verbose");
        }
        let ends: Vec<(Option<IpAddr>, IpAddr)> = match &options.paths[..] {
            [] => vec![(None, IpAddr::V4(Ipv4Addr::LOCALHOST))],
            pairs => pairs.iter().map(|pair| (Some(pair.source), pair.destination)).collect(),
        };
        for (_, destination) in &ends {
            process.arg("--listen").arg(SocketAddr::new(*destination, 0).to_string());
        }
        let mut child = process.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let mut server = Self { child, _stdin: stdin, paths: Vec::new() };
        let mut line = String::new();
        if let Some(stdout) = stdout {
            BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
        }
        // What it could not do is on stderr, which is ours as well.
        let Announced { listening } = serde_json::from_str(&line).map_err(|_| BenchError::NoServer)?;
        server.paths = ends
            .into_iter()
            .zip(listening)
            .map(|((source, _), at)| Path { source, ..Path::to(at) })
            .collect();
        Ok(server)
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
