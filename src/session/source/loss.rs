//! What becomes of a channel that is lost, and of the round when it was the last.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{SourceShared, State};
use crate::channel::ChannelError;
use crate::session::error::SessionError;
use crate::session::report::SessionEvent;
use crate::wire::data::ChannelId;

impl SourceShared {
    /// The pushing thread of a channel failed. What the destination said before it closed the channel explains more than that
    /// the socket is closed, so the receiving thread goes first if it has something.
    pub(in crate::session) fn push_failed(&self, id: ChannelId, cause: ChannelError) {
        const A_MOMENT: Duration = Duration::from_millis(50);
        let deadline = Instant::now() + A_MOMENT;
        let mut state = self.lock();
        while state.is_alive(id) && Instant::now() < deadline {
            state = self.wait(state, A_MOMENT);
        }
        drop(state);
        self.lost(id, cause);
    }

    pub(super) fn lost(&self, id: ChannelId, cause: ChannelError) {
        let now = self.now();
        let mut state = self.lock();
        let (ended, resting) = (state.ended, state.resting);
        let Some(lane) = state.lanes.iter_mut().find(|lane| lane.id == id && lane.alive) else { return };
        lane.link.shut();
        if resting {
            // Its work is done; that is no loss.
            return;
        }
        lane.alive = false;
        if ended {
            return;
        }
        let (path, remote, cause) = (lane.path, lane.link.remote(), Arc::new(cause));
        state.last_loss = Some(cause.clone());
        let in_round = state.striping.round().is_some();
        state.striping.channel_lost(id);
        // A peer that lies on one channel is not to be believed on another.
        let refused = cause.is_violation();
        if refused {
            state.lose_all();
        }
        let none_left = state.striping.live_channels() == 0;
        if none_left {
            state.none_since.get_or_insert(now);
        }
        state.missing.push(path, now);
        let fallen_back =
            (none_left && !refused).then(|| state.fall_back(&self.options, &cause, now)).flatten();
        let waits = self.options.reopen.is_some() && !refused;
        let owed = (in_round && none_left && !waits).then(|| state.abort_round());
        // Under the lock, so that the loss of another channel cannot be told in between.
        let lost = SessionError::ChannelLost { remote, cause: cause.clone() };
        self.tell(SessionEvent::ChannelLost { channel: id, path, cause: lost });
        fallen_back.into_iter().for_each(|event| self.tell(event));
        if let Some(owed) = owed {
            let all_lost = || SessionError::AllChannelsLost { last: Some(cause.clone()) };
            let cause = refused.then(|| SessionError::NotPlaceable { remote, cause: cause.clone() });
            self.tell(SessionEvent::Failed { cause: cause.unwrap_or_else(all_lost), owed });
        }
        drop(state);
        self.wake.notify_all();
    }

    /// A channel whose threads did not start.
    pub(super) fn forget(&self, id: ChannelId) {
        let mut state = self.lock();
        if let Some(at) = state.lanes.iter().position(|lane| lane.id == id) {
            state.lanes.remove(at).link.shut();
        }
        state.striping.channel_lost(id);
    }
}

impl State {
    fn lose_all(&mut self) {
        for lane in self.lanes.iter_mut().filter(|lane| lane.alive) {
            lane.alive = false;
            lane.link.shut();
            self.striping.channel_lost(lane.id);
        }
    }
}
