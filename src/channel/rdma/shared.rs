//! What the two threads of an RDMA channel's source share, and the one of them that waits for confirmations.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::RdmaError;
use super::fabric::{Completion, Completions};
use super::link::{RdmaLink, connection, wait};
use super::posting::Posting;
use super::registered::Registered;
use crate::channel::{ChannelError, ChannelLink, ChannelReceipts};
use crate::sys::verbs::Status;
use crate::wire::data::{RECEIPT_BYTES, Receipt};
use crate::wire::rdma::{FromDestination, FromDestinationHeader};

/// How often a wait looks whether the channel still lives.
const LOOK: Duration = Duration::from_millis(200);
/// How long a queue pair may take to fail after the destination closed its connection, on a slow machine too.
const A_MOMENT: Duration = Duration::from_secs(1);

/// What the source knows of a piece at the destination.
#[derive(Clone, Debug)]
pub(super) enum Key {
    Unknown,
    /// It was asked for.
    Asked,
    Known {
        key: u32,
        address: u64,
    },
    Refused(String),
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) posting: Posting,
    pub(super) keys: Vec<Key>,
    /// Kept for its room.
    pub(super) completions: Vec<Completion>,
    pub(super) failed: Option<RdmaError>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) link: Arc<RdmaLink>,
    pub(super) sent: Arc<dyn Completions>,
    pub(super) state: Mutex<State>,
    pub(super) pieces: u32,
    /// Room, credits, keys, or the end.
    pub(super) changed: Condvar,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the completions that are there.
    pub(super) fn reap(&self, state: &mut State) -> Result<(), ChannelError> {
        let mut completions = std::mem::take(&mut state.completions);
        completions.clear();
        let polled = self.sent.poll(&mut completions);
        for completion in &completions {
            if completion.status != Status::SUCCESS {
                // The first failure is the cause; all after it are flushed.
                state.failed.get_or_insert(RdmaError::Work(completion.status));
            } else if state.posting.completed(completion.id).is_err() {
                state.failed.get_or_insert(RdmaError::Work(Status::LOCAL_FAULT));
            }
        }
        state.completions = completions;
        polled.map_err(|cause| self.link.device_error(cause))?;
        match &state.failed {
            Some(failed) => Err(failed.clone().into()),
            None => Ok(()),
        }
    }

    /// Waits until `ready` answers something, at most for `patience` if there is one.
    pub(super) fn wait<T>(
        &self,
        patience: Option<(Duration, &'static str)>,
        mut ready: impl FnMut(&mut State) -> Option<Result<T, RdmaError>>,
    ) -> Result<T, ChannelError> {
        let begin = Instant::now();
        let mut state = self.lock();
        loop {
            self.reap(&mut state)?;
            if let Some(answer) = ready(&mut state) {
                return Ok(answer?);
            }
            if self.link.is_shut() {
                return Err(ChannelError::Closed);
            }
            if let Some((patience, what)) = patience.filter(|(patience, _)| begin.elapsed() > *patience) {
                return Err(RdmaError::Late { what, seconds: patience.as_secs() }.into());
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes in a key of the destination.
    fn learn(&self, piece: u32, key: Key) {
        self.lock().keys[piece as usize] = key;
        self.changed.notify_all();
    }

    fn confirmed(&self, receipt: &Receipt) -> Result<(), ChannelError> {
        let mut state = self.lock();
        match receipt {
            Receipt::Placed(frame) => {
                let sent = state.posting.sent();
                let known = state.posting.confirmed(*frame);
                known.map_err(|_| ChannelError::ConfirmsTooMuch { got: *frame, sent })?;
            }
            Receipt::Barrier(barrier) => state.posting.reached(barrier.0),
            Receipt::Error(_) => {}
        }
        self.changed.notify_all();
        Ok(())
    }
}

pub(super) struct RdmaReceipts {
    pub(super) shared: Arc<Shared>,
    pub(super) registered: Arc<Registered>,
}

impl Drop for RdmaReceipts {
    fn drop(&mut self) {
        // The other thread waits for what nobody reads any more.
        self.shared.link.shut();
        self.shared.changed.notify_all();
    }
}

impl RdmaReceipts {
    fn read(&self) -> Result<FromDestination, ChannelError> {
        let link = &self.shared.link;
        let mut head = [0; RECEIPT_BYTES];
        link.read(&mut head)?;
        let header = FromDestinationHeader::decode(&head, self.shared.pieces).map_err(RdmaError::Frame)?;
        let mut rest = vec![0; header.rest_bytes()];
        link.read(&mut rest)?;
        Ok(header.with_rest(&rest))
    }

    /// Why the connection is closed: a queue pair that fails is closed by the destination at once, and how it failed is known here
    /// a moment later.
    fn closed(&self, error: ChannelError) -> ChannelError {
        if !matches!(error, ChannelError::Closed) || self.shared.link.is_shut() {
            return error;
        }
        let deadline = Instant::now() + A_MOMENT;
        loop {
            // What completes first may have gone well: the failure is behind it.
            if let Err(cause) = self.complete() {
                return cause;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match wait([self.shared.sent.event_descriptor()], left) {
                Ok([true]) => {}
                Ok([false]) | Err(_) => return error,
            }
        }
    }

    /// Takes what has completed, and asks to be told of more.
    fn complete(&self) -> Result<(), ChannelError> {
        let failed = |cause| self.shared.link.device_error(cause);
        self.shared.sent.take_events().map_err(failed)?;
        self.shared.sent.arm().map_err(failed)?;
        let mut state = self.shared.lock();
        let reaped = self.shared.reap(&mut state);
        drop(state);
        self.shared.changed.notify_all();
        reaped
    }
}

impl ChannelReceipts for RdmaReceipts {
    fn next(&mut self) -> Result<Receipt, ChannelError> {
        loop {
            let link = &self.shared.link;
            let [event, gone] = self.registered.domain.watched();
            let watched = [connection(link), self.shared.sent.event_descriptor(), event, gone];
            let [told, completed, event, gone] = wait(watched, link.timeout)?;
            if event || gone {
                self.registered.check_device()?;
            }
            // What the destination says explains more than how the queue pair fails.
            if told {
                match self.read().map_err(|error| self.closed(error))? {
                    FromDestination::Receipt(Receipt::Error(text)) => return Err(ChannelError::Peer(text)),
                    FromDestination::Receipt(receipt) => {
                        self.shared.confirmed(&receipt)?;
                        return Ok(receipt);
                    }
                    FromDestination::Key { piece, key, address } => {
                        self.shared.learn(piece, Key::Known { key, address });
                    }
                    FromDestination::NoKey { piece, text } => self.shared.learn(piece, Key::Refused(text)),
                }
            } else if completed {
                self.complete()?;
            }
        }
    }
}
