//! The control link: messages in order, without loss or duplicates, over connections that may break.
//!
//! One thread sends and brings a lost connection back; one thread per connection receives. The numbers and what is owed are
//! in [`super::control_state`]. Each second without anything else a receipt is sent, so silence means that the peer or the
//! path is gone. The side that dialled dials again, over any of its paths; the other waits to be dialled.

mod recovery;

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::control_state::{ControlState, Outgoing};
use super::error::SessionError;
use super::handshake::dial;
use super::path::Path;
use super::stream::Stream;
use super::trust::PeerTrust;
use super::{lock, spawn};
use crate::channel::tcp::tune;
use crate::wire::control::MAX_MESSAGE_BYTES;
use crate::wire::link::{LINK_HEADER_BYTES, LinkHeader, LinkKind};
use crate::wire::preamble::{MigrationId, Preamble, Purpose, Secret};

/// A sign of life this often, however short the link timeout is.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Messages that may wait for their owner to take them before no more are read: 17 MiB of the largest.
const MAX_WAITING: usize = 16;
/// How long to wait before looking whether they were taken.
const TAKEN: Duration = Duration::from_millis(2);

/// When a control link counts as lost.
#[derive(Clone, Copy, Debug)]
pub struct ControlOptions {
    /// How long the peer may be silent before its connection is given up. A healthy one gives a sign of life each second.
    pub link_timeout: Duration,
    /// How long to try, or wait, for another connection.
    pub give_up_after: Duration,
}

impl Default for ControlOptions {
    fn default() -> Self {
        Self { link_timeout: Duration::from_secs(10), give_up_after: Duration::from_secs(60) }
    }
}

/// What happens on a control link.
#[derive(Debug)]
pub enum LinkEvent {
    /// A message came.
    Message(Vec<u8>),
    /// The connection is lost, and is being brought back. Messages may be sent meanwhile.
    Interrupted {
        /// Why.
        cause: SessionError,
    },
    /// It is back.
    Resumed {
        /// Over this path.
        path: Path,
    },
    /// It will not come back; the last event of a link.
    Lost {
        /// Why. [`SessionError::ClosedByPeer`] is the orderly end.
        cause: SessionError,
    },
}

/// An ordered, reliable stream of messages in both directions. Dropping it cuts it off at once.
#[derive(Debug)]
pub struct ControlLink {
    shared: Arc<LinkShared>,
}

/// The part of a link that its threads and the listener share.
#[derive(Debug)]
pub(super) struct LinkShared {
    state: Mutex<LinkState>,
    wake: Condvar,
    events: Sender<LinkEvent>,
    options: ControlOptions,
    dialler: Option<Dialler>,
}

/// What the side that dialled dials again.
#[derive(Debug)]
struct Dialler {
    paths: Vec<Path>,
    migration: MigrationId,
    trust: PeerTrust,
}

/// What a migration's first connection shows and asks to see.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The secret that the destination waits for; [`Secret::NONE`] where it takes anybody's migration.
    pub admission: Secret,
    /// How both sides prove which host they are.
    pub trust: PeerTrust,
}

impl Default for Opening {
    fn default() -> Self {
        Self { admission: Secret::NONE, trust: PeerTrust::default() }
    }
}

#[derive(Debug, Default)]
struct LinkState {
    core: ControlState,
    secret: Option<Secret>,
    /// The last attempt to resume: the one that was made, or the one that was taken.
    attempt: u16,
    /// The connection in use, to cut it off.
    current: Option<Arc<Stream>>,
    /// Why the connection in use is of no use any more.
    broken: Option<SessionError>,
    /// A connection that the peer made instead of the one in use.
    offered: Option<Connection>,
    /// Say goodbye once everything is confirmed.
    closing: bool,
    /// Stop now.
    over: bool,
    /// The link's thread is done.
    finished: bool,
}

#[derive(Debug)]
struct Connection {
    stream: Stream,
    peer_received: u64,
    path: Path,
}

impl ControlLink {
    /// Begins a migration at the host at the other end of the paths, which are tried one after the other.
    ///
    /// # Errors
    /// Why the last path did not lead to it, or its refusal.
    pub fn dial(
        paths: &[Path],
        migration: MigrationId,
        opening: &Opening,
        options: ControlOptions,
        events: Sender<LinkEvent>,
    ) -> Result<Self, SessionError> {
        let preamble = Preamble::new(Purpose::NewMigration, migration, opening.admission);
        let mut last = SessionError::NoPath;
        for path in paths {
            match dial(path, &preamble, &opening.trust, options.link_timeout) {
                Ok((stream, peer_received)) => {
                    let dialler = Dialler { paths: paths.to_vec(), migration, trust: opening.trust.clone() };
                    let first = Connection { stream, peer_received, path: *path };
                    return Self::start(first, Some(dialler), options, events);
                }
                Err(
                    error @ (SessionError::Refused { .. }
                    | SessionError::Preamble { .. }
                    | SessionError::Untrusted { .. }),
                ) => {
                    return Err(error);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Takes a connection that the peer made.
    pub(super) fn accept(
        stream: Stream,
        path: Path,
        options: ControlOptions,
        events: Sender<LinkEvent>,
    ) -> Result<Self, SessionError> {
        Self::start(Connection { stream, peer_received: 0, path }, None, options, events)
    }

    fn start(
        first: Connection,
        dialler: Option<Dialler>,
        options: ControlOptions,
        events: Sender<LinkEvent>,
    ) -> Result<Self, SessionError> {
        let state = Mutex::new(LinkState::default());
        let shared = Arc::new(LinkShared { state, wake: Condvar::new(), events, options, dialler });
        let thread = shared.clone();
        spawn("pf-control", move || thread.run(first))?;
        Ok(Self { shared })
    }

    /// Sends a message. Never blocks: what cannot be sent yet is kept.
    ///
    /// # Panics
    /// If it is longer than [`MAX_MESSAGE_BYTES`]: the encoder does not make such.
    pub fn send(&self, message: Vec<u8>) {
        assert!(message.len() <= MAX_MESSAGE_BYTES, "a control message of {} bytes", message.len());
        lock(&self.shared.state).core.queue(message);
        self.shared.wake.notify_all();
    }

    /// Makes the link one that can be resumed: until then a lost connection is the end.
    pub fn set_secret(&self, secret: Secret) {
        lock(&self.shared.state).secret = Some(secret).filter(|secret| !secret.is_none());
    }

    /// Waits until the peer has confirmed every message and says goodbye, or until the time is over.
    /// Answers whether everything was confirmed.
    pub fn flush_and_close(self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let mut state = lock(&self.shared.state);
        state.closing = true;
        self.shared.wake.notify_all();
        while !state.finished {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = wait(&self.shared.wake, state, left);
        }
        state.core.is_flushed()
    }

    pub(super) fn shared(&self) -> Arc<LinkShared> {
        self.shared.clone()
    }

    /// Cuts the connection in use, as a failing network would.
    #[cfg(test)]
    pub(super) fn cut(&self) {
        for _ in 0..1000 {
            if let Some(stream) = &lock(&self.shared.state).current {
                let _ = stream.socket().shutdown(std::net::Shutdown::Both);
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the link has no connection");
    }
}

impl Drop for ControlLink {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.over = true;
        if let Some(stream) = state.current.as_ref().filter(|_| !state.finished) {
            let _ = stream.socket().shutdown(std::net::Shutdown::Both);
        }
        self.shared.wake.notify_all();
    }
}

fn wait<'a>(
    wake: &Condvar,
    state: std::sync::MutexGuard<'a, LinkState>,
    at_most: Duration,
) -> std::sync::MutexGuard<'a, LinkState> {
    wake.wait_timeout(state, at_most).unwrap_or_else(std::sync::PoisonError::into_inner).0
}

/// How the use of a connection ended.
enum End {
    /// Nothing more is to be sent or received.
    Over,
    /// It broke.
    Broken(SessionError),
}

impl LinkShared {
    /// The link's thread.
    fn run(&self, first: Connection) {
        let mut connection = first;
        while let End::Broken(cause) = self.carry(connection) {
            match self.recover(cause) {
                Ok(Some(next)) => {
                    self.tell(LinkEvent::Resumed { path: next.path });
                    connection = next;
                }
                Ok(None) => break,
                Err(cause) => {
                    self.tell(LinkEvent::Lost { cause });
                    break;
                }
            }
        }
        let mut state = lock(&self.state);
        state.finished = true;
        state.over = true;
        self.wake.notify_all();
    }

    fn tell(&self, event: LinkEvent) {
        // Nobody listens any more: the link's owner has gone, and the link ends soon.
        let _ = self.events.send(event);
    }

    /// Uses a connection until it breaks or the link is over.
    fn carry(&self, connection: Connection) -> End {
        let Connection { stream, peer_received, .. } = connection;
        if let Err(cause) = tune(stream.socket(), self.options.link_timeout) {
            return End::Broken(SessionError::LinkBroken(cause));
        }
        let stream = Arc::new(stream);
        {
            let mut state = lock(&self.state);
            if state.over {
                return End::Over;
            }
            if let Err(count) = state.core.connected(peer_received) {
                return End::Broken(count.into());
            }
            state.broken = None;
            state.current = Some(stream.clone());
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = std::thread::Builder::new().name("pf-control-in".to_owned());
            let end = match reader.spawn_scoped(scope, || self.receive(&stream, &done)) {
                Ok(_) => self.send_all(&stream),
                Err(cause) => End::Broken(SessionError::Thread { what: "pf-control-in".to_owned(), cause }),
            };
            done.store(true, Ordering::Relaxed);
            let _ = stream.socket().shutdown(std::net::Shutdown::Both);
            end
        })
    }

    /// Sends what is due until the connection breaks or the link is over.
    fn send_all(&self, stream: &Stream) -> End {
        let beat = HEARTBEAT.min(self.options.link_timeout / 3);
        let mut next_beat = Instant::now() + beat;
        loop {
            let mut state = lock(&self.state);
            let frame = loop {
                if state.over {
                    return End::Over;
                }
                if let Some(cause) = state.broken.take() {
                    return End::Broken(cause);
                }
                if state.offered.is_some() {
                    let replaced = io::Error::new(io::ErrorKind::ConnectionReset, "the peer made another");
                    return End::Broken(SessionError::LinkBroken(replaced));
                }
                if let Some(frame) = state.core.outgoing() {
                    break encode(&frame);
                }
                if state.closing && state.core.is_flushed() {
                    let number = state.core.received();
                    let goodbye = LinkHeader { kind: LinkKind::Goodbye, bytes: 0, number }.encode();
                    drop(state);
                    self.say_goodbye(stream, &goodbye);
                    return End::Over;
                }
                let left = next_beat.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    state.core.heartbeat();
                } else {
                    state = wait(&self.wake, state, left);
                }
            };
            drop(state);
            next_beat = Instant::now() + beat;
            if let Err(cause) = (&mut &*stream).write_all(&frame) {
                let mut state = lock(&self.state);
                return End::Broken(state.broken.take().unwrap_or(SessionError::LinkBroken(cause)));
            }
        }
    }

    /// Closes in a way that lets the peer read the goodbye: a socket closed with bytes unread would reset the connection.
    fn say_goodbye(&self, mut stream: &Stream, goodbye: &[u8]) {
        if stream.write_all(goodbye).is_err() || stream.socket().shutdown(std::net::Shutdown::Write).is_err()
        {
            return;
        }
        let deadline = Instant::now() + HEARTBEAT;
        let mut state = lock(&self.state);
        while state.broken.is_none() && !state.over {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = wait(&self.wake, state, left);
        }
    }

    /// Receives until the connection breaks, or `done` says that it is not used any more.
    fn receive(&self, stream: &Stream, done: &AtomicBool) {
        loop {
            // A peer that talks faster than it is listened to waits in its socket, not in this host's memory. It does so here, where
            // no lock is held: a queue with a bound would have the owner wait for the lock that its own events are sent under.
            while self.events.len() >= MAX_WAITING && !done.load(Ordering::Relaxed) {
                std::thread::sleep(TAKEN);
            }
            if let Err(cause) = self.receive_one(stream) {
                lock(&self.state).broken.get_or_insert(cause);
                self.wake.notify_all();
                return;
            }
        }
    }

    fn receive_one(&self, mut stream: &Stream) -> Result<(), SessionError> {
        let broken = |cause: io::Error| match cause.kind() {
            io::ErrorKind::WouldBlock => {
                SessionError::LinkSilent { seconds: self.options.link_timeout.as_secs() }
            }
            io::ErrorKind::UnexpectedEof => {
                SessionError::LinkBroken(io::Error::new(cause.kind(), "the peer closed it without a goodbye"))
            }
            _ => SessionError::LinkBroken(cause),
        };
        let mut head = [0; LINK_HEADER_BYTES];
        stream.read_exact(&mut head).map_err(broken)?;
        let header = LinkHeader::decode(&head).map_err(SessionError::LinkFrame)?;
        let mut message = vec![0; header.bytes as usize];
        stream.read_exact(&mut message).map_err(broken)?;
        let mut state = lock(&self.state);
        match header.kind {
            LinkKind::Message => {
                if state.core.message(header.number)? {
                    // Under the lock, so that a connection that replaces this one cannot overtake it.
                    self.tell(LinkEvent::Message(message));
                }
            }
            LinkKind::Receipt => state.core.receipt(header.number)?,
            LinkKind::Goodbye => {
                state.core.receipt(header.number)?;
                return Err(SessionError::ClosedByPeer);
            }
        }
        self.wake.notify_all();
        Ok(())
    }
}

fn encode(frame: &Outgoing) -> Vec<u8> {
    let (kind, number, message): (_, _, &[u8]) = match frame {
        Outgoing::Message { number, bytes } => (LinkKind::Message, *number, bytes),
        Outgoing::Receipt(count) => (LinkKind::Receipt, *count, &[]),
    };
    let header = LinkHeader { kind, bytes: message.len() as u32, number };
    let mut bytes = Vec::with_capacity(LINK_HEADER_BYTES + message.len());
    bytes.extend(header.encode());
    bytes.extend(message);
    bytes
}
