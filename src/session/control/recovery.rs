//! How a lost connection of a control link comes back.

use std::io;
use std::time::{Duration, Instant};

use super::{Connection, Dialler, LinkEvent, LinkShared, wait};
use crate::session::error::SessionError;
use crate::session::handshake::{dial, write_reply};
use crate::session::lock;
use crate::session::path::Path;
use crate::session::stream::Stream;
use crate::wire::preamble::{Preamble, Purpose, RefusalCode, Reply, Secret};

/// How long to wait before dialling again, at first and at most.
const REDIAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How an attempt to get another connection ended.
enum Redial {
    Connected(Connection),
    Over,
    Refused(SessionError),
    TimeOver(SessionError),
}

impl LinkShared {
    /// Brings a lost connection back. `None` when the link is over.
    pub(super) fn recover(&self, cause: SessionError) -> Result<Option<Connection>, SessionError> {
        let secret = {
            let mut state = lock(&self.state);
            state.current = None;
            if state.over {
                return Ok(None);
            }
            state.secret
        };
        let final_word = matches!(
            cause,
            SessionError::ClosedByPeer | SessionError::LinkFrame(_) | SessionError::LinkCount(_)
        );
        if final_word {
            return Err(cause);
        }
        let Some(secret) = secret else { return Err(SessionError::NotResumable(Box::new(cause))) };
        let deadline = Instant::now() + self.options.give_up_after;
        let gave_up = |last| {
            let seconds = self.options.give_up_after.as_secs();
            Err(SessionError::GaveUp { seconds, last: Box::new(last) })
        };
        match &self.dialler {
            Some(dialler) => {
                self.tell(LinkEvent::Interrupted { cause });
                match self.redial(dialler, secret, deadline) {
                    Redial::Connected(connection) => Ok(Some(connection)),
                    Redial::Over => Ok(None),
                    Redial::Refused(cause) => Err(cause),
                    Redial::TimeOver(last) => gave_up(last),
                }
            }
            None => {
                self.tell(LinkEvent::Interrupted { cause });
                match self.wait_to_be_dialled(deadline) {
                    Redial::Connected(connection) => Ok(Some(connection)),
                    Redial::Over => Ok(None),
                    Redial::Refused(last) | Redial::TimeOver(last) => gave_up(last),
                }
            }
        }
    }

    fn redial(&self, dialler: &Dialler, secret: Secret, deadline: Instant) -> Redial {
        let mut pause = REDIAL.0;
        let mut last = SessionError::NoPath;
        loop {
            for path in &dialler.paths {
                let purpose = {
                    let mut state = lock(&self.state);
                    // Used up after a day of attempts a second: the link has long been given up then.
                    state.attempt = state.attempt.saturating_add(1);
                    Purpose::ResumeControl { attempt: state.attempt, received: state.core.received() }
                };
                let preamble = Preamble::new(purpose, dialler.migration, secret);
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Redial::TimeOver(last);
                }
                match dial(path, &preamble, &dialler.trust, self.options.link_timeout.min(left)) {
                    Ok((stream, peer_received)) => {
                        return Redial::Connected(Connection { stream, peer_received, path: *path });
                    }
                    Err(cause @ SessionError::Refused { code, .. }) if code != RefusalCode::NotNow => {
                        return Redial::Refused(cause);
                    }
                    Err(cause) => last = cause,
                }
            }
            let state = lock(&self.state);
            if state.over || wait(&self.wake, state, pause).over {
                return Redial::Over;
            }
            pause = (pause * 2).min(REDIAL.1);
        }
    }

    fn wait_to_be_dialled(&self, deadline: Instant) -> Redial {
        let mut state = lock(&self.state);
        loop {
            if state.over {
                return Redial::Over;
            }
            if let Some(connection) = state.offered.take() {
                return Redial::Connected(connection);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Redial::TimeOver(SessionError::LinkBroken(io::ErrorKind::TimedOut.into()));
            }
            state = wait(&self.wake, state, left);
        }
    }

    /// The peer dialled again and has proved that it knows the secret: answers it, and uses its connection from now on. `false` when
    /// it was refused.
    pub(in crate::session) fn resume(
        &self,
        stream: Stream,
        (attempt, peer_received): (u16, u64),
        path: Path,
        deadline: Instant,
    ) -> bool {
        let refuse = |code, text: &str| {
            tracing::warn!(%path, ?code, text, "a control connection is refused");
            let _ = write_reply(&stream, &Reply::refused(code, text), deadline);
            false
        };
        let received = {
            let mut state = lock(&self.state);
            if state.over || self.dialler.is_some() {
                drop(state);
                return refuse(RefusalCode::UnknownMigration, "the control link is closed");
            }
            if attempt <= state.attempt {
                drop(state);
                let text = "this attempt was made already; it is repeated by somebody";
                return refuse(RefusalCode::WrongSecret, text);
            }
            state.attempt = attempt;
            state.core.received()
        };
        // What still comes over the old connection after this count was taken is sent again, and dropped.
        if write_reply(&stream, &Reply::accepted(received), deadline).is_ok() {
            lock(&self.state).offered = Some(Connection { stream, peer_received, path });
            self.wake.notify_all();
        }
        true
    }
}
