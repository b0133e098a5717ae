//! How channels come about: all at once at the beginning, and one by one those that were lost.

use std::sync::Arc;
use std::time::Duration;

use super::rdma_side::RdmaSide;
use super::{Lane, SourceOptions, SourceShared};
use crate::channel::tcp::{self, TcpOptions};
use crate::channel::{ChannelError, OpenChannel, sealed};
use crate::session::error::SessionError;
use crate::session::handshake::{dial, dial_plain};
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

    /// Exactly these lack one, and are to be tried now.
    pub(super) fn replace(&mut self, paths: Vec<Path>, now: Duration) {
        let lost = |path| Lost { path, since: now, next: now, pause: TRY_AGAIN.0 };
        self.0 = paths.into_iter().map(lost).collect();
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

/// The paths of all channels: they are dealt to the paths in turn.
pub(super) fn dealt(options: &SourceOptions) -> Vec<Path> {
    options.paths.iter().copied().cycle().take(options.channels.max(1)).collect()
}

type Dialled = (ChannelId, Path, Result<OpenChannel, SessionError>);

fn dial_channel(
    options: &SourceOptions,
    rdma: Option<&RdmaSide>,
    id: ChannelId,
    path: &Path,
    timeout: Duration,
) -> Result<OpenChannel, SessionError> {
    let opened = match rdma {
        Some(rdma) => {
            if let Some(why) = options.encryption.forbids_rdma(path) {
                return Err(SessionError::NoRdma(why));
            }
            rdma.look_at(path)?;
            let purpose = Purpose::RdmaData { channel: id.0 };
            let preamble = Preamble::new(purpose, options.migration, options.secret);
            rdma.open(dial_plain(path, &preamble, timeout)?)
        }
        None => open_tcp(options, id, path, timeout)?,
    };
    opened.map_err(|cause| SessionError::Channel { remote: path.destination, cause })
}

/// A TCP connection that carries pages, encrypted where a host demands that.
fn open_tcp(
    options: &SourceOptions,
    id: ChannelId,
    path: &Path,
    timeout: Duration,
) -> Result<Result<OpenChannel, ChannelError>, SessionError> {
    let preamble = Preamble::new(Purpose::Data { channel: id.0 }, options.migration, options.secret);
    let memory = options.memory.clone();
    if !options.encryption.demands(path) {
        let tcp_options = TcpOptions { link_timeout: options.link_timeout, ..TcpOptions::default() };
        return Ok(tcp::open(dial_plain(path, &preamble, timeout)?, memory, tcp_options));
    }
    if let Some(why) = options.encryption.cannot(path) {
        return Err(SessionError::NoEncryption(why));
    }
    let (stream, _) = dial(path, &preamble, &options.encryption.trust, timeout)?;
    let stream = stream
        .into_sealed()
        .map_err(|_| SessionError::NoEncryption("the connection came about without TLS".to_owned()))?;
    Ok(sealed::open(stream, memory, options.link_timeout))
}

impl SourceShared {
    /// Guest RAM on the devices, where the next channel is one of RDMA.
    fn rdma_if(&self, carried_by_rdma: bool) -> Option<&RdmaSide> {
        self.rdma.as_ref().filter(|_| carried_by_rdma)
    }

    /// Opens the first channels, at the same time.
    pub(super) fn dial_all(&self, paths: &[Path]) -> Vec<Dialled> {
        let (first, carried_by_rdma) = {
            let mut state = self.lock();
            let first = state.next_channel;
            state.next_channel += paths.len() as u32;
            (first, state.carrying.is_rdma())
        };
        let (options, rdma) = (&self.options, self.rdma_if(carried_by_rdma));
        std::thread::scope(|scope| {
            let dialling: Vec<_> = (first..)
                .map(ChannelId)
                .zip(paths)
                .map(|(id, path)| {
                    let name = format!("pf-dial-{id}");
                    let thread = std::thread::Builder::new()
                        .name(name.clone())
                        .spawn_scoped(scope, move || {
                            dial_channel(options, rdma, id, path, options.link_timeout)
                        })
                        .map_err(|cause| SessionError::Thread { what: name, cause });
                    (id, *path, thread)
                })
                .collect();
            let ended = dialling.into_iter().map(|(id, path, thread)| {
                let dialled = thread.and_then(|thread| {
                    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                });
                (id, path, dialled)
            });
            ended.collect()
        })
    }

    /// Dials one more channel, which takes no part yet.
    pub(super) fn dial_one(
        &self,
        path: Path,
        carried_by_rdma: bool,
    ) -> Result<(ChannelId, OpenChannel), SessionError> {
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
        let rdma = self.rdma_if(carried_by_rdma);
        let opened = dial_channel(&self.options, rdma, id, &path, self.options.link_timeout.min(ATTEMPT));
        if matches!(
            opened,
            Err(SessionError::Connect { .. } | SessionError::NoRdma(_) | SessionError::NoEncryption(_))
        ) {
            // The destination has never heard of this number: a path that stays down does not use them up.
            let mut state = self.lock();
            if state.next_channel == id.0 + 1 {
                state.next_channel = id.0;
            }
        }
        Ok((id, opened?))
    }

    /// Opens one more channel.
    pub(super) fn add_channel(self: &Arc<Self>, path: Path) -> Result<ChannelId, SessionError> {
        let carried_by_rdma = self.is_carried_by_rdma();
        let (id, open) = self.dial_one(path, carried_by_rdma)?;
        if self.is_carried_by_rdma() != carried_by_rdma {
            // RDMA was lost, or came back, in between: the other kind of channel is wanted now.
            return Err(SessionError::NoRdma("what carries the pages has changed meanwhile".to_owned()));
        }
        self.attach(id, path, open)?;
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
        let lane = Lane { id, path, link: link.clone(), interface: interface.clone(), bytes: 0, alive: true };
        let findings = {
            let mut state = self.lock();
            if state.ended {
                return Err(SessionError::Ended);
            }
            state.lanes.push(lane);
            state.striping.add_channel(id);
            state.none_since = None;
            state.findings(interface)
        };
        let worker = Worker::new(self.clone(), id, source, link, findings);
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
                    drop(state);
                    if !self.try_rdma_again() {
                        drop(self.wait(self.lock(), LOOK));
                    }
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
