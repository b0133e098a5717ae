//! What came in and waits for an answer: a migration that wants to begin, a question.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use crate::session::control::{ControlLink, ControlOptions, LinkEvent};
use crate::session::error::SessionError;
use crate::session::handshake::{write_message, write_reply};
use crate::session::path::Path;
use crate::session::stream::Stream;
use crate::wire::preamble::{RefusalCode, Reply};

/// How long the answer to a connection may take to be written.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The path that a connection came over, as its dialler would name it.
pub(super) fn path_of(stream: &Stream, remote: SocketAddr) -> Path {
    // A socket that is connected knows its own address.
    let local = stream.socket().local_addr().unwrap_or(remote);
    Path { source: Some(remote.ip()), destination: local, interface: None }
}

/// A migration that waits to be accepted or refused. Dropping it refuses it.
#[derive(Debug)]
pub struct PendingLink {
    stream: Option<Stream>,
    remote: SocketAddr,
    options: ControlOptions,
}

impl PendingLink {
    pub(super) fn new(stream: Stream, remote: SocketAddr, options: ControlOptions) -> Self {
        Self { stream: Some(stream), remote, options }
    }

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
    stream: Stream,
    remote: SocketAddr,
    question: Vec<u8>,
}

impl QueryConnection {
    pub(super) fn new(stream: Stream, remote: SocketAddr, question: Vec<u8>) -> Self {
        Self { stream, remote, question }
    }

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
