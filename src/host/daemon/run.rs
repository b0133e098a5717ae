//! Starts a daemon, and keeps it going until it is told to end. Its guests and their migrations go on without it.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, UNIX_EPOCH};

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::settings::Settings;
use super::store::{Store, StoreError};
use super::tables::Tables;
use super::{Daemon, now, peer_routes, recover, routes};
use crate::engine::chain;
use crate::engine::endpoint::{Endpoint, ListenOn, ListenerOptions};
use crate::engine::journal::Journal;
use crate::host::api::host::HostInfo;
use crate::host::api::migration::{Direction, Migration};
use crate::host::config::HostFileError;
use crate::host::exit::Exit;
use crate::host::history::{History, HistoryError};
use crate::host::metrics::Metrics;
use crate::host::network::Offer;
use crate::host::peer::server::PeerServer;
use crate::host::preflight::facts;
use crate::session::trust::Trust;

/// How often it is looked whether addresses have come or gone.
const LOOK: Duration = Duration::from_secs(5);

/// How a daemon is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServeOptions {
    /// The host file; nothing is [`crate::host::config::DEFAULT_PATH`].
    pub config: Option<PathBuf>,
    /// Logs as JSON.
    pub log_json: bool,
    /// Logs more.
    pub verbose: bool,
    /// Faults may be asked for, for tests.
    pub faults_allowed: bool,
    /// The only version of the protocol that it says it speaks, for tests.
    pub claimed_protocol: Option<u16>,
}

/// Why a daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The host file.
    #[error(transparent)]
    HostFile(#[from] HostFileError),
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A part of it, or the runtime.
    #[error("{what}")]
    Start {
        /// What could not be done.
        what: String,
        /// What was answered.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> ServeError {
    move |cause| ServeError::Start { what: what.into(), cause: cause.into() }
}

/// Runs a daemon until SIGTERM or SIGINT.
#[must_use]
pub fn serve(options: &ServeOptions) -> Exit {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build();
    let done = runtime
        .map_err(failed("the daemon's threads cannot be started"))
        .and_then(|runtime| runtime.block_on(run(options)));
    match done {
        Ok(()) => Exit::Completed,
        Err(error) => {
            eprintln!("pageferry serve: {}", chain(&error));
            Exit::Failed
        }
    }
}

async fn run(options: &ServeOptions) -> Result<(), ServeError> {
    let settings = Settings::load(options.config.as_deref())?;
    let daemon = Arc::new(Daemon::new(settings, options)?);
    let settings = daemon.settings();
    let listener = api_socket(&settings.config().socket)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(failed("SIGHUP cannot be waited for"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("SIGTERM cannot be waited for"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("SIGINT cannot be waited for"))?;

    // Listening first: two hosts that come back together ask each other.
    let mut doors = Doors::new(&daemon);
    doors.follow(&daemon, true).await;
    recover::recover(&daemon).await?;
    let api = axum::serve(listener, routes::router(Arc::clone(&daemon)));
    let api = tokio::spawn(async move { api.await });
    greet(&daemon).await;

    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => doors.follow(&daemon, false).await,
            _ = hangup.recv() => {
                daemon.reload(options.config.as_deref());
                doors.follow(&daemon, true).await;
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    api.abort();
    tracing::info!("the daemon ends; its guests go on, and so do their migrations");
    let _ = std::fs::remove_file(&settings.config().socket);
    Ok(())
}

async fn greet(daemon: &Daemon) {
    let info = daemon.host_info().await;
    let file = info.host_file.as_deref().unwrap_or("none, so defaults");
    tracing::info!(
        "host {} serves (host file: {file}; API: {})",
        info.name,
        daemon.settings().config().socket.display()
    );
    for warning in info.warnings {
        tracing::warn!("{warning}");
    }
}

impl Daemon {
    fn new(settings: Settings, options: &ServeOptions) -> Result<Self, ServeError> {
        let config = settings.config();
        let store = Store::open(&config.state_dir)?;
        let journal = Journal::open(store.journal()).map_err(failed("the journal cannot be opened"))?;
        let history = History::open(store.history()).map_err(failed("the history cannot be opened"))?;
        let mut versions = facts::versions();
        if let Some(version) = options.claimed_protocol {
            (versions.oldest_protocol, versions.newest_protocol) = (version, version);
        }
        Ok(Self {
            host_file: settings.loaded.path.clone(),
            settings: RwLock::new(Arc::new(settings)),
            store,
            journal,
            history,
            metrics: Metrics::new(),
            tables: Mutex::new(Tables::default()),
            freed: Notify::new(),
            since: now(),
            listening: Mutex::default(),
            numbers: AtomicU64::new(0),
            faults_allowed: options.faults_allowed,
            versions,
        })
    }

    /// Reads the host file again. Migrations under way keep what they began with; a host file that is wrong changes nothing.
    fn reload(&self, path: Option<&Path>) {
        match Settings::load(path) {
            Ok(settings) => {
                let late = self.settings().config().restart_needed(settings.config());
                if !late.is_empty() {
                    tracing::warn!("{} take effect when the daemon is started anew", late.join(", "));
                }
                self.set_settings(settings);
                tracing::info!(
                    "the host file was read again; it holds for migrations that begin from now on"
                );
            }
            Err(error) => {
                tracing::error!("the host file is not taken over, and the one before stays: {error}");
            }
        }
    }

    /// The host, for people.
    pub(super) async fn host_info(&self) -> HostInfo {
        let settings = self.settings();
        let config = settings.config();
        let (outgoing, incoming) = {
            let tables = self.tables();
            (tables.taken(Direction::Outgoing), tables.taken(Direction::Incoming))
        };
        let listening = self.listening().iter().map(ToString::to_string).collect();
        let expires = match &settings.trust {
            Trust::Insecure => None,
            Trust::Tls(identity) => identity.expires().duration_since(UNIX_EPOCH).ok(),
        };
        HostInfo {
            name: config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            since: self.since,
            host_file: self.host_file.as_ref().map(|path| path.display().to_string()),
            performance_option: config.performance_option.name().into(),
            insecure: settings.trust.is_insecure(),
            certificate_expires: expires.map(|time| time.as_secs_f64()),
            offers: settings.offers().await.unwrap_or_default(),
            listening,
            max_migrations: config.max_migrations,
            outgoing,
            incoming,
            warnings: settings.warnings().await,
        }
    }

    /// A migration under way or over, by the beginning of its identifier, or by the name of a guest that moves.
    pub(super) fn find_migration(&self, id: &str) -> Result<Migration, String> {
        {
            let tables = self.tables();
            let moving = tables.guests.get(id).and_then(|guest| guest.record.info.migration.as_deref());
            if let Some(active) = tables.find_migration(moving.unwrap_or(id)) {
                return Ok(active.migration.clone());
            }
        }
        let last = self.tables().guests.get(id).and_then(|guest| guest.record.info.migration.clone());
        match self.history.find(last.as_deref().unwrap_or(id)) {
            // The name of a guest, perhaps, which may be elsewhere by now.
            Err(error @ HistoryError::NotFound(_)) => {
                let newest =
                    self.history.list(usize::MAX).into_iter().find(|migration| migration.guest == id);
                newest.ok_or_else(|| format!("{error}, and no guest of that name has moved"))
            }
            found => found.map_err(|error| chain(&error)),
        }
    }
}

/// The socket of the API: only its owner's.
fn api_socket(path: &Path) -> Result<UnixListener, ServeError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .map_err(failed(format!("the socket's directory {} cannot be made", directory.display())))?;
    }
    // Nobody answers there: the state directory is this daemon's, and one that was killed leaves its socket.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(failed(format!("the socket {} is in use", path.display()))(
            "another daemon answers there; stop it, or give this one a `socket` of its own",
        ));
    }
    let _ = std::fs::remove_file(path);
    let listener =
        UnixListener::bind(path).map_err(failed(format!("the API cannot listen at {}", path.display())))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(failed(format!("the rights of {} cannot be set", path.display())))?;
    Ok(listener)
}

/// Where other hosts come in: their daemons, and questions about guests whose process has gone.
struct Doors {
    server: PeerServer,
    answering: Option<(Vec<Offer>, Endpoint)>,
    said: Vec<String>,
}

impl Doors {
    fn new(daemon: &Arc<Daemon>) -> Self {
        let router = peer_routes::router(Arc::clone(daemon));
        let asked = Arc::clone(daemon);
        let server = PeerServer::new(router, move || asked.settings().trust.clone());
        Self { server, answering: None, said: Vec::new() }
    }

    /// Listens at the addresses of now. What does not work is said once.
    async fn follow(&mut self, daemon: &Daemon, anew: bool) {
        let settings = daemon.settings();
        let mut failed = Vec::new();
        match settings.offers().await {
            Ok(offers) => {
                failed.extend(self.server.listen_at(&offers, settings.config().port));
                let stands = self.answering.as_ref().is_some_and(|(at, _)| *at == offers);
                if anew || !stands {
                    failed.extend(self.answer_at(daemon, &settings, offers));
                }
            }
            Err(error) => failed.push(chain(&error)),
        }
        for why in failed.iter().filter(|why| !self.said.contains(why)) {
            tracing::error!("{why}");
        }
        self.said = failed;
        *daemon.listening() = self.server.addresses();
    }

    fn answer_at(&mut self, daemon: &Daemon, settings: &Settings, offers: Vec<Offer>) -> Option<String> {
        // The old one first: it has the ports.
        self.answering = None;
        let port = settings.config().migration_ports.0;
        let at: Vec<ListenOn> = offers
            .iter()
            .map(|offer| ListenOn {
                address: SocketAddr::new(offer.address, port),
                interface: offer.interface.parse().ok(),
            })
            .collect();
        if at.is_empty() {
            return Some(
                "no address of this host may be used by migrations now (networks in the host file)".into(),
            );
        }
        let options = ListenerOptions { trust: settings.trust.clone(), ..ListenerOptions::default() };
        match Endpoint::bind_on(&at, options, daemon.journal.clone()) {
            Ok(endpoint) => {
                self.answering = Some((offers, endpoint));
                None
            }
            Err(error) => {
                Some(format!("questions about guests that moved cannot be answered: {}", chain(&error)))
            }
        }
    }
}
