//! How channels come about: all at once at the beginning, and one by one those that were lost.

use std::sync::Arc;
use std::time::Duration;

use super::{Lane, SourceOptions, SourceShared};
use crate::channel::OpenChannel;
use crate::channel::tcp::{self, TcpOptions};
use crate::session::error::SessionError;
use crate::session::handshake::dial_plain;
use crate::session::path::{Path, interface_of};
use crate::session::report::SessionEvent;
use crate::session::worker::Worker;
use crate::session::{lock, spawn};
use crate::wire::data::{ChannelId, MAX_CHANNELS};
use crate::wire::preamble::{Preamble, Purpose};

/// How long to wait before a lost channel is opened again, at first and at most.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(2));
/// How long one attempt may take: a path that is up answers within a round trip.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How often it is looked whether something is missing.
const LOOK: Duration = Duration::from_millis(250);

/// Paths that lack a channel.
#[derive(Debug, Default)]
pub(super) struct Missing(Vec<Lost>);

#[derive(Clone, Copy, Debug)]
struct Lost {
    path: Path,
    since: Duration,
    next: Duration,
    pause: Duration,
}

impl Missing {
    /// A path has lost a channel at this time.
    pub(super) fn push(&mut self, path: Path, now: Duration) {
        self.0.push(Lost { path, since: now, next: now + TRY_AGAIN.0, pause: TRY_AGAIN.0 });
    }

    /// One that is to be tried now. It has to be given back when it fails.
    fn due(&mut self, now: Duration) -> Option<Lost> {
        let at = self.0.iter().position(|lost| lost.next <= now)?;
        Some(self.0.remove(at))
    }

    fn failed(&mut self, lost: Lost, now: Duration) {
        let pause = (lost.pause * 2).min(TRY_AGAIN.1);
        self.0.push(Lost { next: now + pause, pause, ..lost });
    }
}

/// Opens the first channels, at the same time.
pub(super) fn dial_all(options: &SourceOptions, paths: &[Path]) -> Vec<Result<OpenChannel, SessionError>> {
    std::thread::scope(|scope| {
        let dialling: Vec<_> = paths
            .iter()
            .enumerate()
            .map(|(index, path)| {
                let id = ChannelId(index as u32);
                let name = format!("pf-dial-{id}");
                std::thread::Builder::new()
                    .name(name.clone())
                    .spawn_scoped(scope, move || dial_channel(options, id, path, options.link_timeout))
                    .map_err(|cause| SessionError::Thread { what: name, cause })
            })
            .collect();
        dialling
            .into_iter()
            .map(|thread| thread?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn dial_channel(
    options: &SourceOptions,
    id: ChannelId,
    path: &Path,
    timeout: Duration,
) -> Result<OpenChannel, SessionError> {
    let purpose = Purpose::Data { channel: id.0 };
    let preamble = Preamble::new(purpose, options.migration, options.secret);
    let stream = dial_plain(path, &preamble, timeout)?;
    let tcp_options = TcpOptions { link_timeout: options.link_timeout, ..TcpOptions::default() };
    tcp::open(stream, options.memory.clone(), tcp_options)
        .map_err(|cause| SessionError::Channel { remote: path.destination, cause })
}

impl SourceShared {
    /// Opens one more channel.
    pub(super) fn add_channel(self: &Arc<Self>, path: Path) -> Result<ChannelId, SessionError> {
        let id = {
            let mut state = self.lock();
            if state.ended {
                return Err(SessionError::Ended);
            }
            if state.next_channel as usize >= MAX_CHANNELS {
                return Err(SessionError::TooManyChannels);
            }
            state.next_channel += 1;
            ChannelId(state.next_channel - 1)
        };
        let opened = dial_channel(&self.options, id, &path, self.options.link_timeout.min(ATTEMPT));
        if matches!(opened, Err(SessionError::Connect { .. })) {
            // The destination has never heard of this number: a path that stays down does not use them up.
            let mut state = self.lock();
            if state.next_channel == id.0 + 1 {
                state.next_channel = id.0;
            }
        }
        self.attach(id, path, opened?)?;
        Ok(id)
    }

    /// Starts the threads of a channel.
    pub(super) fn attach(
        self: &Arc<Self>,
        id: ChannelId,
        path: Path,
        open: OpenChannel,
    ) -> Result<(), SessionError> {
        let OpenChannel { source, receipts, link } = open;
        let interface = match path.interface {
            Some(interface) => Some(interface.to_string()),
            None => interface_of(link.local().ip()).ok().flatten(),
        };
        let lane = Lane { id, path, link: link.clone(), interface, bytes: 0, alive: true };
        {
            let mut state = self.lock();
            if state.ended {
                return Err(SessionError::Ended);
            }
            state.lanes.push(lane);
            state.striping.add_channel(id);
            state.none_since = None;
        }
        let worker = Worker::new(self.clone(), id, source, link);
        let shared = self.clone();
        let started =
            spawn(&format!("pf-acks-{id}"), move || shared.receive(id, receipts)).and_then(|receiver| {
                lock(&self.threads).push(receiver);
                spawn(&format!("pf-push-{id}"), move || worker.run())
            });
        match started {
            Ok(thread) => lock(&self.threads).push(thread),
            Err(cause) => {
                self.forget(id);
                return Err(cause);
            }
        }
        // It takes part in the round under way.
        self.wake.notify_all();
        Ok(())
    }

    /// Starts the thread that opens lost channels again, where that is wanted. It is not waited for at the end: an attempt may
    /// have to run into its timeout first.
    pub(super) fn keep_channels_up(self: &Arc<Self>) -> Result<(), SessionError> {
        let Some(patience) = self.options.reopen else { return Ok(()) };
        let shared = self.clone();
        spawn("pf-reopen", move || while shared.reopen_one(patience) {}).map(drop)
    }

    /// Tries one channel that is missing, or waits a moment. Answers whether the session goes on.
    fn reopen_one(self: &Arc<Self>, patience: Duration) -> bool {
        let lost = {
            let mut state = self.lock();
            if state.ended || state.resting {
                return false;
            }
            let now = self.now();
            if state.none_since.is_some_and(|since| now.saturating_sub(since) > patience)
                && state.striping.round().is_some()
            {
                let last = state.last_loss.clone();
                let owed = state.abort_round();
                drop(state);
                self.tell(SessionEvent::Failed { cause: SessionError::AllChannelsLost { last }, owed });
                return true;
            }
            match state.missing.due(now) {
                Some(lost) => lost,
                None => {
                    drop(self.wait(state, LOOK));
                    return true;
                }
            }
        };
        match self.add_channel(lost.path) {
            Ok(channel) => {
                let after = self.now().saturating_sub(lost.since);
                self.tell(SessionEvent::ChannelReturned { channel, path: lost.path, after });
            }
            Err(SessionError::Ended) => return false,
            Err(error) => {
                tracing::debug!(path = %lost.path, "a lost channel does not come back yet: {error}");
                let now = self.now();
                self.lock().missing.failed(lost, now);
            }
        }
        true
    }
}
