//! What carries the pages: RDMA as long as a channel of it lives, TCP otherwise; and the way back.
//!
//! The way back is taken between two rounds, when nothing is under way: queue pairs are connected beforehand, and stand by.

use std::sync::Arc;
use std::time::Duration;

use super::{SourceOptions, SourceShared, State, opening};
use crate::channel::{ChannelError, OpenChannel, chain};
use crate::session::error::SessionError;
use crate::session::mode::TransferMode;
use crate::session::path::Path;
use crate::session::report::SessionEvent;
use crate::wire::data::ChannelId;

/// How long to wait before queue pairs are tried again, at first and at most.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4));
/// How often RDMA may be lost before it is left alone for the rest of the migration.
const MAX_FALLS: u32 = 3;

/// What carries the pages, and what stands by.
#[derive(Debug)]
pub(super) struct Carrying {
    rdma: bool,
    /// How pages go over TCP.
    over_tcp: TransferMode,
    /// Why it is not RDMA, if it should be.
    reason: Option<String>,
    /// When to try RDMA again.
    again: Option<Again>,
    falls: u32,
    standby: Vec<Standby>,
    settled: bool,
}

#[derive(Clone, Copy, Debug)]
struct Again {
    next: Duration,
    pause: Duration,
}

/// An RDMA channel that takes part from the next round on.
pub(super) struct Standby {
    id: ChannelId,
    path: Path,
    open: OpenChannel,
}

impl std::fmt::Debug for Standby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "channel {} on {}", self.id, self.path)
    }
}

impl Carrying {
    pub(super) fn new(mode: TransferMode, rdma: bool) -> Self {
        let over_tcp =
            if mode == TransferMode::Compression { TransferMode::Compression } else { TransferMode::Tcp };
        Self { rdma, over_tcp, reason: None, again: None, falls: 0, standby: Vec::new(), settled: false }
    }

    pub(super) fn is_rdma(&self) -> bool {
        self.rdma
    }

    pub(super) fn over_tcp(&self) -> TransferMode {
        self.over_tcp
    }

    pub(super) fn mode(&self) -> TransferMode {
        if self.rdma { TransferMode::Rdma } else { self.over_tcp }
    }

    pub(super) fn reason(&self) -> Option<String> {
        self.reason.clone()
    }

    pub(super) fn settle(&mut self) {
        self.settled = true;
    }

    pub(super) fn take_standby(&mut self) -> Vec<Standby> {
        std::mem::take(&mut self.standby)
    }

    /// Whether RDMA is to be tried now. It has to be told how that went.
    fn is_due(&self, now: Duration) -> bool {
        !self.settled && self.again.is_some_and(|again| again.next <= now)
    }

    fn tried(&mut self, opened: Vec<Standby>, now: Duration) {
        let Some(again) = self.again else { return };
        if opened.is_empty() {
            let pause = (again.pause * 2).min(TRY_AGAIN.1);
            self.again = Some(Again { next: now + pause, pause });
        } else {
            self.again = None;
            self.standby = opened;
        }
    }
}

impl State {
    /// The last channel is lost: where it was one of RDMA, TCP takes over on every path. Answers what to tell.
    pub(super) fn fall_back(
        &mut self,
        options: &SourceOptions,
        cause: &ChannelError,
        now: Duration,
    ) -> Option<SessionEvent> {
        if !self.carrying.rdma {
            return None;
        }
        self.carrying.falls += 1;
        self.carrying.rdma = false;
        let pause = TRY_AGAIN.0;
        let left = self.carrying.falls < MAX_FALLS;
        self.carrying.again = left.then_some(Again { next: now + pause, pause });
        let mut reason = format!("RDMA was lost, and tcp took over: {}", chain(cause));
        if !left {
            reason = format!("{reason}; it was lost {MAX_FALLS} times, and is not tried again");
        }
        self.missing.replace(opening::dealt(options), now);
        self.carrying.reason = Some(reason.clone());
        Some(SessionEvent::CarrierChanged { to: self.carrying.over_tcp, reason })
    }
}

impl SourceShared {
    pub(super) fn is_carried_by_rdma(&self) -> bool {
        self.lock().carrying.is_rdma()
    }

    /// Not one channel of RDMA opened at the beginning.
    pub(super) fn do_without_rdma(&self, tried: &[(ChannelId, Path, Result<OpenChannel, SessionError>)]) {
        let why = tried.iter().find_map(|(_, path, dialled)| Some((path, dialled.as_ref().err()?)));
        let why = why.map_or_else(String::new, |(path, cause)| format!("{} (on {path})", why_not(cause)));
        let reason = format!("RDMA is not to be had, and tcp is used: {why}");
        let mut state = self.lock();
        state.carrying.rdma = false;
        state.carrying.reason = Some(reason.clone());
        let to = state.carrying.over_tcp;
        drop(state);
        self.tell(SessionEvent::CarrierChanged { to, reason });
    }

    /// A channel did not open at the beginning, and others did.
    pub(super) fn did_not_open(&self, channel: ChannelId, path: Path, cause: SessionError) {
        if self.is_carried_by_rdma() && is_lack_of_rdma(&cause) {
            return self.tell(SessionEvent::PathLeftOut { path, reason: why_not(&cause) });
        }
        self.lock().missing.push(path, Duration::ZERO);
        self.tell(SessionEvent::ChannelLost { channel, path, cause });
    }

    /// Connects queue pairs again where that is wanted and due. Answers whether it was.
    pub(super) fn try_rdma_again(self: &Arc<Self>) -> bool {
        if !self.lock().carrying.is_due(self.now()) {
            return false;
        }
        let mut opened = Vec::new();
        for path in opening::dealt(&self.options) {
            match self.dial_one(path, true) {
                Ok((id, open)) => opened.push(Standby { id, path, open }),
                Err(SessionError::Ended) => return true,
                Err(error) => tracing::debug!(%path, "RDMA does not come back yet: {}", chain(&error)),
            }
        }
        let now = self.now();
        let mut state = self.lock();
        if !state.ended {
            state.carrying.tried(opened, now);
        }
        true
    }

    /// Between two rounds: queue pairs that stand by take over from TCP.
    pub(super) fn come_back(self: &Arc<Self>) {
        let standby = {
            let mut state = self.lock();
            if state.carrying.standby.is_empty() || state.carrying.settled || state.ended {
                return;
            }
            for lane in state.lanes.iter_mut().filter(|lane| lane.alive) {
                lane.alive = false;
                lane.link.shut();
            }
            // The next barrier names them, so that the destination closes them too.
            let retired: Vec<_> = state.lanes.iter().map(|lane| lane.id).collect();
            for id in retired {
                state.striping.channel_lost(id);
            }
            state.missing.replace(Vec::new(), Duration::ZERO);
            state.carrying.rdma = true;
            state.carrying.reason = None;
            state.carrying.take_standby()
        };
        self.wake.notify_all();
        let reason = "the queue pairs connect again".to_owned();
        self.tell(SessionEvent::CarrierChanged { to: TransferMode::Rdma, reason });
        for Standby { id, path, open } in standby {
            if let Err(cause) = self.attach(id, path, open) {
                self.did_not_open(id, path, cause);
            }
        }
    }
}

/// Whether an attempt failed for want of RDMA, and not because the other host is out of reach.
fn is_lack_of_rdma(error: &SessionError) -> bool {
    #[cfg(feature = "rdma")]
    if let SessionError::Channel { cause: ChannelError::Rdma(_), .. } = error {
        return true;
    }
    matches!(error, SessionError::NoRdma(_))
}

fn why_not(error: &SessionError) -> String {
    match error {
        // Which end it is, it says itself.
        SessionError::Channel { cause, .. } => chain(cause),
        other => chain(other),
    }
}
