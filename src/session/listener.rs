//! Where connections come in: each is led to what it says it is for, once it has shown that it may.
//!
//! A connection that says nothing, or nonsense, costs one thread and a few hundred bytes for a few seconds, and when there
//! are too many of them the oldest goes: a peer that knows the protocol is done in one round trip.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::control::{ControlLink, ControlOptions, LinkEvent, LinkShared};
use super::destination::{DestinationSession, DestinationShared};
use super::error::SessionError;
use super::handshake::{read_message, read_preamble, write_message, write_reply};
use super::path::Path;
use super::{lock, spawn};
use crate::wire::data::ChannelId;
use crate::wire::preamble::{MigrationId, Preamble, PreambleError, Purpose, RefusalCode, Reply, Secret};

/// How often the accepting threads look whether they should end.
const LOOK: Duration = Duration::from_millis(100);

/// How a listener behaves.
#[derive(Clone, Copy, Debug)]
pub struct ListenerOptions {
    /// How long a connection may take to say what it is for, all in all.
    pub handshake_timeout: Duration,
    /// How many connections may be without purpose at a time.
    pub max_unknown: usize,
    /// How the control links behave that come in.
    pub control: ControlOptions,
}

impl Default for ListenerOptions {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            max_unknown: 64,
            control: ControlOptions::default(),
        }
    }
}

/// What comes in at a listener.
#[derive(Debug)]
pub enum ListenerEvent {
    /// A source wants to begin a migration.
    NewMigration {
        /// Its name.
        migration: MigrationId,
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
    waiting: VecDeque<(u64, Arc<TcpStream>)>,
}

impl Listener {
    /// Listens on every address; port 0 takes a free one.
    ///
    /// # Errors
    /// [`SessionError::Bind`] naming the address.
    pub fn bind(
        addresses: &[SocketAddr],
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
            let failed = |cause| SessionError::Bind { address, cause };
            let socket = TcpListener::bind(address).map_err(failed)?;
            socket.set_nonblocking(true).map_err(failed)?;
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
        let stream = Arc::new(stream);
        let number = {
            let mut unknown = lock(&self.unknown);
            if unknown.waiting.len() >= self.options.max_unknown.max(1)
                && let Some((_, oldest)) = unknown.waiting.pop_front()
            {
                let _ = oldest.shutdown(std::net::Shutdown::Both);
            }
            let number = unknown.next;
            unknown.next += 1;
            unknown.waiting.push_back((number, stream.clone()));
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

    fn listen_to(&self, stream: Arc<TcpStream>, remote: SocketAddr, number: u64) {
        let deadline = Instant::now() + self.options.handshake_timeout;
        let result = self.preamble(&stream, remote, deadline).and_then(|preamble| {
            let Preamble { purpose, migration, .. } = preamble;
            if purpose == Purpose::Query {
                return Some((preamble, self.question(&stream, remote, migration, deadline)?));
            }
            Some((preamble, Vec::new()))
        });
        self.known(number);
        let Some((preamble, question)) = result else { return };
        // Nobody else has it now, but for a moment in which the list gave it up.
        let Ok(stream) = stream.try_clone() else { return };
        self.lead(preamble, question, stream, remote, deadline);
    }

    fn preamble(&self, stream: &TcpStream, remote: SocketAddr, deadline: Instant) -> Option<Preamble> {
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

    fn refuse(
        &self,
        stream: &TcpStream,
        remote: SocketAddr,
        code: RefusalCode,
        text: &str,
        deadline: Instant,
    ) {
        tracing::warn!(%remote, ?code, text, "a connection is refused");
        self.refused.fetch_add(1, Ordering::Relaxed);
        // The peer that does not read it finds the connection closed.
        let _ = write_reply(stream, &Reply::refused(code, text), deadline);
    }

    fn question(
        &self,
        stream: &TcpStream,
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
        stream: TcpStream,
        remote: SocketAddr,
        deadline: Instant,
    ) {
        let Preamble { purpose, migration, secret, .. } = preamble;
        match purpose {
            Purpose::NewMigration => {
                let options = self.options.control;
                let link = PendingLink { stream: Some(stream), remote, options };
                let _ = self.events.send(ListenerEvent::NewMigration { migration, link });
            }
            Purpose::Query => {
                let connection = QueryConnection { stream, remote, question };
                let _ = self.events.send(ListenerEvent::Query { migration, connection });
            }
            Purpose::Data { channel } => {
                if let Some((session, _)) = self.let_in(migration, &secret, &stream, remote, deadline) {
                    session.attach(stream, ChannelId(channel), deadline);
                }
            }
            Purpose::ResumeControl { received } => {
                if let Some((_, link)) = self.let_in(migration, &secret, &stream, remote, deadline) {
                    let path = path_of(&stream, remote);
                    link.resume(stream, received, path, deadline);
                }
            }
        }
    }

    /// What a connection with this secret may reach; refuses it otherwise.
    fn let_in(
        &self,
        migration: MigrationId,
        secret: &Secret,
        stream: &TcpStream,
        remote: SocketAddr,
        deadline: Instant,
    ) -> Option<(Arc<DestinationShared>, Arc<LinkShared>)> {
        let refusal = {
            let registry = lock(&self.registry);
            match registry.get(&migration) {
                None => (RefusalCode::UnknownMigration, "there is no such migration here"),
                Some(registered) if registered.secret != *secret || secret.is_none() => {
                    (RefusalCode::WrongSecret, "the secret of the migration is wrong")
                }
                Some(registered) => return Some((registered.session.clone(), registered.link.clone())),
            }
        };
        self.refuse(stream, remote, refusal.0, refusal.1, deadline);
        None
    }
}

/// The path that a connection came over, as its dialler would name it.
fn path_of(stream: &TcpStream, remote: SocketAddr) -> Path {
    // A socket that is connected knows its own address.
    let local = stream.local_addr().unwrap_or(remote);
    Path { source: Some(remote.ip()), destination: local }
}

/// A migration that waits to be accepted or refused. Dropping it refuses it.
#[derive(Debug)]
pub struct PendingLink {
    stream: Option<TcpStream>,
    remote: SocketAddr,
    options: ControlOptions,
}

/// How long the answer to a connection may take to be written.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

impl PendingLink {
    /// Who asks.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.remote
    }

    /// Takes it.
    ///
    /// # Errors
    /// [`SessionError::Handshake`] when the peer has gone meanwhile, or [`SessionError::Thread`].
    ///
    /// # Panics
    /// Never: the connection is there until it is accepted, refused or dropped.
    pub fn accept(mut self, events: Sender<LinkEvent>) -> Result<ControlLink, SessionError> {
        let stream = self.stream.take().expect("it is taken once, here or on drop");
        write_reply(&stream, &Reply::accepted(0), Instant::now() + ANSWER_TIMEOUT)
            .map_err(|cause| SessionError::Handshake { remote: self.remote, cause })?;
        let path = path_of(&stream, self.remote);
        ControlLink::accept(stream, path, self.options, events)
    }

    /// Turns it away; the text is what the other side shows.
    pub fn refuse(mut self, text: &str) {
        self.answer(text);
    }

    fn answer(&mut self, text: &str) {
        if let Some(stream) = self.stream.take() {
            let reply = Reply::refused(RefusalCode::Declined, text);
            // The peer that does not read it finds the connection closed.
            let _ = write_reply(&stream, &reply, Instant::now() + ANSWER_TIMEOUT);
        }
    }
}

impl Drop for PendingLink {
    fn drop(&mut self) {
        self.answer("the host does not take migrations now");
    }
}

/// A question about a migration, with the connection that waits for its answer.
#[derive(Debug)]
pub struct QueryConnection {
    stream: TcpStream,
    remote: SocketAddr,
    question: Vec<u8>,
}

impl QueryConnection {
    /// Who asks.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.remote
    }

    /// The question.
    #[must_use]
    pub fn request(&self) -> &[u8] {
        &self.question
    }

    /// Answers it.
    ///
    /// # Errors
    /// [`SessionError::Query`] when the answer is too long or the peer has gone; it will ask again.
    pub fn answer(self, answer: &[u8]) -> Result<(), SessionError> {
        write_message(&self.stream, answer, Instant::now() + ANSWER_TIMEOUT)
            .map_err(|cause| SessionError::Query { remote: self.remote, cause })
    }
}
