//! `pageferry relay`: moves the guest of a stock QEMU, one process at each host for one move.

pub mod options;
mod result;

use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::time::Duration;

use crossbeam_channel::unbounded;

use self::options::{Common, DestinationOptions, RelayRequest, SourceOptions};
use self::result::RelayResult;
use crate::engine::cancel::{CancelSignal, PeerGoneSignal, cancel_pair};
use crate::engine::chain;
use crate::engine::fault::FaultPlan;
use crate::engine::relay::destination::{DestinationRelayOptions, Waiting, take};
use crate::engine::relay::source::{SourceRelayOptions, send};
use crate::engine::relay::{RelayError, RelayOutcome, RelayProgress, RelayReport};
use crate::engine::source::Secret;
use crate::guest::qemu::settings::Settings;
use crate::host::exit::Exit;
use crate::host::progress::{Progress, ProgressState};
use crate::host::{hex, logging};
use crate::session::caps::RateCaps;
use crate::session::trust::{PeerTrust, TlsError, TlsFiles, TlsIdentity, Trust};
use crate::session::{
    ControlOptions, Encryption, Listener, ListenerEvent, ListenerOptions, SessionError, admits,
};
use crate::units::PAGE_SIZE;

/// How long to go on without any data channel.
pub(in crate::host) const REOPEN_WITHIN: Duration = Duration::from_secs(10);

/// A control link that is lost is made again within 10 s or not at all: the guest runs meanwhile, or waits for its last pages.
pub(in crate::host) fn control() -> ControlOptions {
    ControlOptions { give_up_after: Duration::from_secs(10), ..ControlOptions::default() }
}

/// Why a relay did not begin.
#[derive(Debug, thiserror::Error)]
pub enum RelayCommandError {
    /// QEMU, or the other end.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// The network.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The secret.
    #[error("the secret in {} cannot be read; write one with: openssl rand -hex 32 > {}", .0.display(), .0.display())]
    Secret(std::path::PathBuf, #[source] std::io::Error),
    /// Signals.
    #[error("the thread that waits for SIGINT cannot be started")]
    Signals(#[source] std::io::Error),
    /// It was ended before a guest came.
    #[error("ended before a guest came")]
    Nobody,
}

/// Carries one guest.
#[must_use]
pub fn run(request: &RelayRequest) -> Exit {
    let (common, ran) = match request {
        RelayRequest::Source(options) => {
            logging::start(if options.common.verbose { "info" } else { "error" });
            (&options.common, source(options))
        }
        RelayRequest::Destination(options) => {
            logging::start(if options.common.verbose { "info" } else { "error" });
            (&options.common, destination(options))
        }
    };
    match ran {
        Ok(report) => tell(common, matches!(request, RelayRequest::Source(_)), &report),
        Err(error) => {
            eprintln!("pageferry: {}", chain(&error));
            Exit::Failed
        }
    }
}

fn tell(common: &Common, source: bool, report: &RelayReport) -> Exit {
    let result = RelayResult::of(report);
    if common.json {
        // Names and numbers.
        println!("{}", serde_json::to_string(&result).unwrap_or_default());
    } else {
        print!("{}", result.text(source));
    }
    match (&report.outcome, &report.guest_here) {
        (RelayOutcome::Completed, _) => Exit::Completed,
        (RelayOutcome::InDoubt { .. }, _) => Exit::InDoubt,
        // A QEMU that does not even say how its guest is has ended.
        (RelayOutcome::RolledBack { .. }, None) if source && report.began => Exit::Lost,
        (RelayOutcome::RolledBack { .. }, _) => Exit::Failed,
    }
}

fn source(options: &SourceOptions) -> Result<RelayReport, RelayCommandError> {
    let common = &options.common;
    let trust = trust(common.tls.as_ref())?;
    let relay = SourceRelayOptions {
        qmp: common.qmp.clone(),
        socket: common.socket.clone(),
        settings: Settings {
            channels: options.multifd_channels,
            return_path: options.return_path,
            downtime_limit: options.downtime_limit,
        },
        placement: !common.whole_packets,
        migration: None,
        admission: secret(common.secret_file.as_deref())?,
        trust: PeerTrust { trust, name: options.peer_name.clone() },
        paths: options.paths.clone(),
        channels: options.channels,
        mode: options.mode,
        rdma: None,
        encryption: Encryption::default(),
        rate_caps: RateCaps::new(options.max_bandwidth),
        control: control(),
        reopen_within: REOPEN_WITHIN,
        cancel: interrupted()?,
        peer_gone: PeerGoneSignal::default(),
        faults: FaultPlan::default(),
    };
    let mut progress = Progress::on_stderr(common.json, common.verbose);
    let mut rate = Rate::default();
    let report = send(&relay, &mut |seen| progress.update(&rate.state(seen, options.mode)));
    progress.finish();
    Ok(report)
}

/// How fast pages are placed, as a person reads it.
#[derive(Default)]
pub(in crate::host) struct Rate {
    last: Option<(Duration, u64)>,
    bytes_per_second: Option<u64>,
}

impl Rate {
    /// Bytes of guest memory a second; `None` while that is not known yet.
    pub(in crate::host) fn update(&mut self, seen: &RelayProgress) -> Option<u64> {
        let (before, bytes) = *self.last.get_or_insert((seen.elapsed, seen.placed_pages * PAGE_SIZE));
        let over = seen.elapsed.saturating_sub(before);
        if over >= Duration::from_millis(500) {
            let now = seen.placed_pages * PAGE_SIZE;
            let rate = now.saturating_sub(bytes) as f64 / over.as_secs_f64();
            self.bytes_per_second = Some(rate as u64);
            self.last = Some((seen.elapsed, now));
        }
        self.bytes_per_second
    }

    fn state(&mut self, seen: &RelayProgress, mode: crate::session::TransferMode) -> ProgressState {
        let rate_bytes_per_second = self.update(seen);
        let none = seen.none_for.map(|none| format!("no data channel for {} s", none.as_secs()));
        ProgressState {
            phase: format!("QEMU {}", seen.qemu.status),
            mode: Some(mode.name().into()),
            interfaces: Vec::new(),
            round: u32::try_from(seen.qemu.rounds).ok().map(crate::units::RoundId),
            rate_bytes_per_second,
            remaining_bytes: Some(seen.qemu.remaining_bytes),
            expected_downtime: None,
            note: none,
        }
    }
}

fn destination(options: &DestinationOptions) -> Result<RelayReport, RelayCommandError> {
    let common = &options.common;
    let secret = secret(common.secret_file.as_deref())?;
    let trust = trust(common.tls.as_ref())?;
    let cancel = interrupted()?;
    let takes_tls = !trust.is_insecure();
    let listening = ListenerOptions { trust, control: control(), ..ListenerOptions::default() };
    let link_timeout = listening.control.link_timeout;
    let relay = DestinationRelayOptions {
        qmp: common.qmp.clone(),
        socket: common.socket.clone(),
        placement: !common.whole_packets,
        link_timeout,
        rdma: None,
        encryption: Encryption::default(),
        takes_tls,
        cancel: cancel.clone(),
        faults: FaultPlan::default(),
    };
    let waiting = Waiting::connect(&relay)?;
    let (sender, incoming) = unbounded();
    let listener = Listener::bind(&options.listen, listening, sender)?;
    announce(common, secret, listener.local_addresses());
    loop {
        let event = crossbeam_channel::select! {
            recv(incoming) -> event => event,
            recv(cancel.receiver()) -> _ => return Err(RelayCommandError::Nobody),
        };
        let Ok(event) = event else { return Err(RelayCommandError::Nobody) };
        let ListenerEvent::NewMigration { migration, proof, link } = event else { continue };
        if !admits(secret, migration, proof) {
            link.refuse("the secret that the migration begins with is wrong");
            continue;
        }
        return Ok(take(waiting, &relay, &listener, migration, link));
    }
}

fn announce(common: &Common, secret: Secret, addresses: &[SocketAddr]) {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let warning = if secret.is_none() && common.tls.is_none() {
        " Whoever reaches it may send a guest: it has neither certificates nor a secret."
    } else {
        ""
    };
    eprintln!("Waiting for a guest on {}.{warning}", addresses.join(", "));
}

fn trust(files: Option<&TlsFiles>) -> Result<Trust, TlsError> {
    Ok(match files {
        Some(files) => Trust::Tls(std::sync::Arc::new(TlsIdentity::load(files)?)),
        None => Trust::Insecure,
    })
}

/// The secret in a file: 64 hexadecimal digits.
fn secret(path: Option<&FilePath>) -> Result<Secret, RelayCommandError> {
    let Some(path) = path else { return Ok(Secret::NONE) };
    let failed = |cause| RelayCommandError::Secret(path.to_owned(), cause);
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let secret = hex::decode(text.trim()).map(Secret).filter(|secret| !secret.is_none());
    secret.ok_or_else(|| failed(std::io::Error::other("it takes 64 hexadecimal digits, not all of them 0")))
}

/// A signal that comes with SIGINT or SIGTERM.
fn interrupted() -> Result<CancelSignal, RelayCommandError> {
    use tokio::signal::unix::{SignalKind, signal};
    let (handle, cancelled) = cancel_pair();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(RelayCommandError::Signals)?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        let interrupt = signal(SignalKind::interrupt()).map_err(RelayCommandError::Signals)?;
        (interrupt, signal(SignalKind::terminate()).map_err(RelayCommandError::Signals)?)
    };
    let wait = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        handle.cancel();
    };
    std::thread::Builder::new().name("pf-signals".into()).spawn(wait).map_err(RelayCommandError::Signals)?;
    Ok(cancelled)
}
