//! Where connections come in: each is led to what it says it is for, once it has shown that it may.
//!
//! A connection that says nothing, or nonsense, costs one thread and a few hundred bytes for a few seconds, and when there
//! are too many of them the oldest goes: a peer that knows the protocol is done in one round trip.

mod pending;

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::pending::path_of;
pub use self::pending::{PendingLink, QueryConnection};
use super::control::{ControlLink, ControlOptions, LinkShared};
use super::destination::{DestinationSession, DestinationShared};
use super::error::SessionError;
use super::handshake::{read_message, read_preamble, write_reply};
use super::path::InterfaceName;
use super::stream::Stream;
use super::trust::Trust;
use super::{lock, spawn};
use crate::channel::tcp::listen;
use crate::wire::data::ChannelId;
use crate::wire::preamble::{
    MigrationId, Preamble, PreambleError, Proof, Purpose, RefusalCode, Reply, Secret,
};

/// How often the accepting threads look whether they should end.
const LOOK: Duration = Duration::from_millis(100);

/// How a listener behaves.
#[derive(Clone, Debug)]
pub struct ListenerOptions {
    /// How long a connection may take to say what it is for, all in all.
    pub handshake_timeout: Duration,
    /// How many connections may be without purpose at a time.
    pub max_unknown: usize,
    /// How the control links behave that come in.
    pub control: ControlOptions,
    /// How whoever comes in proves which host it is. Data channels prove with their migration's secret that they belong to it.
    pub trust: Trust,
}

impl Default for ListenerOptions {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            max_unknown: 64,
            control: ControlOptions::default(),
            trust: Trust::Insecure,
        }
    }
}

/// An address to listen at, and the interface by which to be reached, and no other, if one is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenOn {
    /// The address; port 0 takes a free one.
    pub address: SocketAddr,
    /// The interface.
    pub interface: Option<InterfaceName>,
}

impl From<SocketAddr> for ListenOn {
    fn from(address: SocketAddr) -> Self {
        Self { address, interface: None }
    }
}

/// What comes in at a listener.
#[derive(Debug)]
pub enum ListenerEvent {
    /// A source wants to begin a migration.
    NewMigration {
        /// Its name.
        migration: MigrationId,
        /// What it shows of the secret that it was told, if it was.
        proof: Proof,
        /// To be accepted or refused.
        link: PendingLink,
    },
    /// Someone has a question about a migration.
    Query {
        /// Its name.
        migration: MigrationId,
        /// The question, to be answered.
        connection: QueryConnection,
    },
}

/// What a listener has turned away so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenerStats {
    /// Connections that were answered with a refusal.
    pub refused: u64,
    /// Connections that were closed because they said nothing, or too late, or too many did.
    pub dropped: u64,
}

/// Whether a migration that begins proves that its source knows the secret; without a secret every one does.
#[must_use]
pub fn admits(secret: Secret, migration: MigrationId, proof: Proof) -> bool {
    secret.is_none() || secret.prove(Purpose::NewMigration, migration) == proof
}

/// Listens on some addresses. Dropping it closes them; connections that were led on live on.
#[derive(Debug)]
pub struct Listener {
    shared: Arc<ListenerShared>,
    addresses: Vec<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct ListenerShared {
    options: ListenerOptions,
    events: Sender<ListenerEvent>,
    registry: Mutex<HashMap<MigrationId, Registered>>,
    unknown: Mutex<Unknown>,
    refused: AtomicU64,
    dropped: AtomicU64,
    over: AtomicBool,
}

#[derive(Debug)]
struct Registered {
    secret: Secret,
    session: Arc<DestinationShared>,
    link: Arc<LinkShared>,
}

/// Connections that have not said yet what they are for, oldest first.
#[derive(Debug, Default)]
struct Unknown {
    next: u64,
    waiting: VecDeque<(u64, TcpStream)>,
}

impl Listener {
    /// Listens on every address; port 0 takes a free one.
    ///
    /// # Errors
    /// [`SessionError::Bind`] naming the address.
    pub fn bind<A: Into<ListenOn> + Copy>(
        addresses: &[A],
        options: ListenerOptions,
        events: Sender<ListenerEvent>,
    ) -> Result<Self, SessionError> {
        let shared = ListenerShared {
            options,
            events,
            registry: Mutex::default(),
            unknown: Mutex::default(),
            refused: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            over: AtomicBool::new(false),
        };
        let mut listener = Self { shared: Arc::new(shared), addresses: Vec::new(), threads: Vec::new() };
        for &address in addresses {
            let ListenOn { address, interface } = address.into();
            let failed = |cause| SessionError::Bind { address, cause };
            let socket = listen(address, interface.as_ref().map(InterfaceName::as_str)).map_err(failed)?;
            listener.addresses.push(socket.local_addr().map_err(failed)?);
            let shared = listener.shared.clone();
            listener.threads.push(spawn("pf-listen", move || shared.accept(&socket))?);
        }
        Ok(listener)
    }

    /// Where it listens, in the order of [`Listener::bind`], with the ports that were taken.
    #[must_use]
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Lets connections with this secret into a migration: data channels into the session, and new connections for the link.
    pub fn register(
        &self,
        migration: MigrationId,
        secret: Secret,
        session: &DestinationSession,
        link: &ControlLink,
    ) {
        let registered = Registered { secret, session: session.shared(), link: link.shared() };
        lock(&self.shared.registry).insert(migration, registered);
    }

    /// Lets nothing more into a migration.
    pub fn unregister(&self, migration: MigrationId) {
        lock(&self.shared.registry).remove(&migration);
    }

    /// What was turned away.
    #[must_use]
    pub fn stats(&self) -> ListenerStats {
        ListenerStats {
            refused: self.shared.refused.load(Ordering::Relaxed),
            dropped: self.shared.dropped.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        for (_, stream) in &lock(&self.shared.unknown).waiting {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
    }
}

impl ListenerShared {
    fn accept(self: &Arc<Self>, socket: &TcpListener) {
        let look = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
        while !self.over.load(Ordering::Relaxed) {
            match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&look)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => tracing::warn!(error = %errno, "waiting for connections failed"),
            }
            match socket.accept() {
                Ok((stream, remote)) => self.greet(stream, remote),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Out of descriptors, most likely: some are freed soon.
                    tracing::warn!(%error, "a connection could not be accepted");
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    /// Gives a connection a thread to say what it is for.
    fn greet(self: &Arc<Self>, stream: TcpStream, remote: SocketAddr) {
        if let Err(error) = stream.set_nonblocking(false) {
            tracing::warn!(%error, %remote, "a connection cannot be used");
            return;
        }
        let watched = match stream.try_clone() {
            Ok(watched) => watched,
            Err(error) => {
                tracing::warn!(%error, %remote, "a connection cannot be used");
                return;
            }
        };
        let number = {
            let mut unknown = lock(&self.unknown);
            if unknown.waiting.len() >= self.options.max_unknown.max(1)
                && let Some((_, oldest)) = unknown.waiting.pop_front()
            {
                let _ = oldest.shutdown(std::net::Shutdown::Both);
            }
            let number = unknown.next;
            unknown.next += 1;
            unknown.waiting.push_back((number, watched));
            number
        };
        let shared = self.clone();
        let greeter = spawn("pf-greet", move || {
            shared.listen_to(stream, remote, number);
        });
        if let Err(error) = greeter {
            tracing::warn!(%error, %remote, "a connection is dropped");
            self.known(number);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The connection needs no watching any more.
    fn known(&self, number: u64) {
        lock(&self.unknown).waiting.retain(|(waiting, _)| *waiting != number);
    }

    fn listen_to(&self, socket: TcpStream, remote: SocketAddr, number: u64) {
        let deadline = Instant::now() + self.options.handshake_timeout;
        let greeted = self.secured(socket, remote, deadline).and_then(|stream| {
            let preamble = self.preamble(&stream, remote, deadline)?;
            if !self.may(&stream, preamble.purpose, remote, deadline) {
                return None;
            }
            let question = match preamble.purpose {
                Purpose::Query => self.question(&stream, remote, preamble.migration, deadline)?,
                _ => Vec::new(),
            };
            Some((stream, preamble, question))
        });
        self.known(number);
        if let Some((stream, preamble, question)) = greeted {
            self.lead(preamble, question, stream, remote, deadline);
        }
    }

    /// The connection under TLS where it begins so. Whoever makes one then has proved which host it is, before anything else of
    /// it is read.
    #[cfg(feature = "tls")]
    fn secured(&self, socket: TcpStream, remote: SocketAddr, deadline: Instant) -> Option<Stream> {
        use super::handshake::{explain, time_left};
        use super::stream::tls::TlsStream;
        /// The first byte of a TLS handshake (RFC 8446, 5.1).
        const HANDSHAKE_RECORD: u8 = 22;
        let mut first = [0];
        let seen = time_left(deadline)
            .and_then(|left| socket.set_read_timeout(Some(left)))
            .and_then(|()| socket.peek(&mut first));
        let why = match (seen, &self.options.trust) {
            (Ok(0) | Err(_), _) => "it said nothing".to_owned(),
            (Ok(_), _) if first[0] != HANDSHAKE_RECORD => return Some(Stream::Plain(socket)),
            (Ok(_), Trust::Insecure) => "it speaks TLS, and this host has no certificates".to_owned(),
            (Ok(_), Trust::Tls(identity)) => {
                match TlsStream::accept(socket, identity.server_config(), deadline) {
                    Ok(stream) => return Some(Stream::Tls(Arc::new(stream))),
                    Err(error) => explain(&error),
                }
            }
        };
        tracing::warn!(%remote, "a connection is refused: {why}");
        self.dropped.fetch_add(1, Ordering::Relaxed);
        None
    }

    #[cfg(not(feature = "tls"))]
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "as with TLS")]
    fn secured(&self, socket: TcpStream, _: SocketAddr, _: Instant) -> Option<Stream> {
        Some(Stream::Plain(socket))
    }

    /// Whether whoever is at the other end may come for this. Data channels show that they belong to a migration, whose session
    /// knows whether they may be plain; everything else comes from a host that has proved which one it is, where hosts do.
    fn may(&self, stream: &Stream, purpose: Purpose, remote: SocketAddr, deadline: Instant) -> bool {
        let data = matches!(purpose, Purpose::Data { .. } | Purpose::RdmaData { .. });
        let why = match stream {
            Stream::Plain(_) if data || self.options.trust.is_insecure() => return true,
            Stream::Plain(_) => {
                "this host takes only hosts that prove who they are, by a certificate of its CA"
            }
            #[cfg(feature = "tls")]
            Stream::Tls(stream) => {
                tracing::debug!(%remote, peer = stream.peer_name(), "a host has proved who it is");
                return true;
            }
        };
        self.refuse(stream, remote, RefusalCode::Untrusted, why, deadline);
        false
    }

    fn preamble(&self, stream: &Stream, remote: SocketAddr, deadline: Instant) -> Option<Preamble> {
        let bytes = read_preamble(stream, deadline)
            .inspect_err(|error| {
                tracing::warn!(%error, %remote, "a connection did not say what it is for");
                self.dropped.fetch_add(1, Ordering::Relaxed);
            })
            .ok()?;
        match Preamble::decode(&bytes) {
            Ok(preamble) => Some(preamble),
            Err(error) => {
                let code = match error {
                    PreambleError::Version { .. } => RefusalCode::Version,
                    _ => RefusalCode::Malformed,
                };
                self.refuse(stream, remote, code, &error.to_string(), deadline);
                None
            }
        }
    }

    fn refuse(&self, stream: &Stream, remote: SocketAddr, code: RefusalCode, text: &str, deadline: Instant) {
        tracing::warn!(%remote, ?code, text, "a connection is refused");
        self.refused.fetch_add(1, Ordering::Relaxed);
        // The peer that does not read it finds the connection closed.
        let _ = write_reply(stream, &Reply::refused(code, text), deadline);
    }

    fn question(
        &self,
        stream: &Stream,
        remote: SocketAddr,
        migration: MigrationId,
        deadline: Instant,
    ) -> Option<Vec<u8>> {
        write_reply(stream, &Reply::accepted(0), deadline)
            .and_then(|()| read_message(stream, deadline))
            .inspect_err(|error| {
                tracing::warn!(%error, %remote, %migration, "a question did not arrive");
                self.dropped.fetch_add(1, Ordering::Relaxed);
            })
            .ok()
    }

    /// Leads a connection to what it is for.
    fn lead(
        &self,
        preamble: Preamble,
        question: Vec<u8>,
        stream: Stream,
        remote: SocketAddr,
        deadline: Instant,
    ) {
        let Preamble { purpose, migration, proof, .. } = preamble;
        let let_in = |stream: &Stream| self.let_in(&preamble, stream, remote, deadline);
        let taken = match purpose {
            Purpose::NewMigration => {
                let link = PendingLink::new(stream, remote, self.options.control);
                let _ = self.events.send(ListenerEvent::NewMigration { migration, proof, link });
                true
            }
            Purpose::Query => {
                let connection = QueryConnection::new(stream, remote, question);
                let _ = self.events.send(ListenerEvent::Query { migration, connection });
                true
            }
            Purpose::Data { channel } => let_in(&stream)
                .is_none_or(|(session, _)| session.attach(stream, ChannelId(channel), deadline)),
            Purpose::RdmaData { channel } => let_in(&stream)
                .is_none_or(|(session, _)| session.attach_rdma(stream, ChannelId(channel), deadline)),
            Purpose::ResumeControl { attempt, received } => let_in(&stream).is_none_or(|(_, link)| {
                let path = path_of(&stream, remote);
                link.resume(stream, (attempt, received), path, deadline)
            }),
        };
        if !taken {
            // Refused by what it was led to, in its own words.
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What a connection may reach that proves that it knows the migration's secret; refuses it otherwise.
    fn let_in(
        &self,
        preamble: &Preamble,
        stream: &Stream,
        remote: SocketAddr,
        deadline: Instant,
    ) -> Option<(Arc<DestinationShared>, Arc<LinkShared>)> {
        let refusal = {
            let registry = lock(&self.registry);
            match registry.get(&preamble.migration) {
                None => (RefusalCode::UnknownMigration, "there is no such migration here"),
                Some(registered) if !preamble.proves(&registered.secret) => {
                    (RefusalCode::WrongSecret, "the secret of the migration is wrong")
                }
                Some(registered) => return Some((registered.session.clone(), registered.link.clone())),
            }
        };
        self.refuse(stream, remote, refusal.0, refusal.1, deadline);
        None
    }
}
