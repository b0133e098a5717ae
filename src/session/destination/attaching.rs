//! How channels come into a session: a TCP connection, as it is or under TLS, or the queue pair that is agreed on over one.

use std::sync::Arc;
use std::time::Instant;

use super::{Attached, DestinationEvent, DestinationShared, State};
use crate::channel::{AcceptedChannel, ChannelError, ChannelLink, sealed, tcp};
use crate::session::error::SessionError;
use crate::session::handshake::write_reply;
use crate::session::path::interface_of;
use crate::session::report::ChannelStats;
use crate::session::spawn;
use crate::session::stream::Stream;
use crate::wire::data::{ChannelId, MAX_CHANNELS};
use crate::wire::preamble::{RefusalCode, Reply};
#[cfg(feature = "rdma")]
pub(super) use with_rdma::Exposed;
#[cfg(not(feature = "rdma"))]
pub(super) use without_rdma::Exposed;

/// Why a channel is not attached.
enum NotAttached {
    /// The session has no place for it.
    NoPlace(&'static str),
    Channel(ChannelError),
}

impl From<ChannelError> for NotAttached {
    fn from(cause: ChannelError) -> Self {
        Self::Channel(cause)
    }
}

impl DestinationShared {
    /// The source opened a channel and has proved that it knows the secret: answers it, and receives from now on. `false` when it
    /// was refused.
    pub(in crate::session) fn attach(
        self: &Arc<Self>,
        stream: Stream,
        id: ChannelId,
        deadline: Instant,
    ) -> bool {
        let refuse = |stream: &Stream, code: RefusalCode, text: &str| {
            tracing::warn!(migration = %self.migration, channel = %id, text, "data channel refused");
            let _ = write_reply(stream, &Reply::refused(code, text), deadline);
            false
        };
        if !stream.is_encrypted()
            && let Ok(at) = stream.socket().local_addr()
            && let Some(why) = self.encryption.refuses_plain(at.ip())
        {
            return refuse(&stream, RefusalCode::Untrusted, why);
        }
        let Ok(answer) = stream.share() else { return false };
        let open = || {
            let memory = self.memory.clone();
            Ok(match stream.into_sealed() {
                Ok(stream) => sealed::receive(stream, memory, self.options.link_timeout)?,
                Err(stream) => tcp::receive(stream, memory, self.options)?,
            })
        };
        let attached = self.register(id, open, |opened| opened.link.clone());
        match attached {
            Ok((opened, stats)) => {
                let accepted = write_reply(&answer, &Reply::accepted(0), deadline).is_ok();
                self.start(id, accepted.then_some(opened), stats);
                true
            }
            Err(NotAttached::NoPlace(reason)) => refuse(&answer, RefusalCode::NotNow, reason),
            Err(NotAttached::Channel(error)) => refuse(&answer, RefusalCode::NotNow, &error.to_string()),
        }
    }

    /// Puts a channel on the list, where it has a place. Under the lock from the check to the registration, so that a fence or
    /// the end of the session sees the channel.
    fn register<T>(
        &self,
        id: ChannelId,
        open: impl FnOnce() -> Result<T, NotAttached>,
        link: impl FnOnce(&T) -> Arc<dyn ChannelLink>,
    ) -> Result<(T, ChannelStats), NotAttached> {
        let mut state = self.lock();
        if let Some(reason) = state.no_place_for(id) {
            return Err(NotAttached::NoPlace(reason));
        }
        let opened = open()?;
        let link = link(&opened);
        let interface = interface_of(link.local().ip()).ok().flatten();
        let channel = Attached { link, interface, bytes: 0, finished: false, parked: false };
        let stats = channel.stats(id);
        state.channels.insert(id, channel);
        Ok((opened, stats))
    }

    /// Receives from a channel that is on the list; `None` when the source has gone meanwhile.
    fn start(self: &Arc<Self>, id: ChannelId, opened: Option<AcceptedChannel>, stats: ChannelStats) {
        let remote = stats.remote;
        self.tell(DestinationEvent::ChannelAttached { channel: id, stats });
        let thread = self.clone();
        let started = opened.map(|AcceptedChannel { receiver, .. }| {
            spawn(&format!("pf-data-{id}"), move || thread.run(id, receiver))
        });
        match started {
            Some(Ok(handle)) => self.lock().threads.push(handle),
            Some(Err(cause)) => self.lose(id, cause),
            None => {
                let cause = ChannelError::Send(std::io::ErrorKind::BrokenPipe.into());
                self.lose(id, SessionError::ChannelLost { remote, cause: Arc::new(cause) });
            }
        }
    }
}

impl State {
    fn no_place_for(&self, id: ChannelId) -> Option<&'static str> {
        if self.ended {
            return Some("the migration takes no more data channels");
        }
        if self.fenced.contains(&id) {
            return Some("this data channel was given up");
        }
        if self.channels.contains_key(&id) {
            return Some("there was a data channel of this number already");
        }
        (self.channels.len() >= MAX_CHANNELS).then_some("the migration has had too many data channels")
    }
}

#[cfg(feature = "rdma")]
mod with_rdma {
    use std::net::{IpAddr, Ipv6Addr};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::{ChannelId, DestinationShared, NotAttached, Reply, Stream, write_reply};
    use crate::channel::chain;
    use crate::channel::rdma::{self, RdmaMemory, RdmaOptions};
    use crate::memory::GuestMemory;
    use crate::session::handshake::time_left;
    use crate::session::rdma::RdmaSupport;
    use crate::session::written::WrittenPages;
    use crate::wire::preamble::RefusalCode;

    /// The guest's memory as RDMA may write it, if it may.
    #[derive(Debug)]
    pub(in crate::session::destination) struct Exposed(Result<(RdmaMemory, RdmaOptions), String>);

    impl Exposed {
        pub(in crate::session::destination) fn of(
            memory: &GuestMemory,
            rdma: &RdmaSupport,
            link_timeout: Duration,
            written: &Arc<WrittenPages>,
        ) -> Self {
            let Some((fabric, options)) = rdma.on() else {
                return Self(Err(rdma.absent().unwrap_or_default().to_owned()));
            };
            let written = written.clone();
            let about_to_expose = Arc::new(move |run| written.insert(&[run]));
            let memory = RdmaMemory::to_write(fabric.clone(), memory.clone(), about_to_expose);
            Self(Ok((memory, RdmaOptions { link_timeout, ..*options })))
        }

        /// When it returns, nobody writes the memory by RDMA any more.
        pub(in crate::session::destination) fn end(&self) {
            if let Ok((memory, _)) = &self.0 {
                memory.end();
            }
        }
    }

    impl DestinationShared {
        /// As [`DestinationShared::attach`], for a channel of RDMA.
        pub(in crate::session) fn attach_rdma(
            self: &Arc<Self>,
            stream: Stream,
            id: ChannelId,
            deadline: Instant,
        ) -> bool {
            let refuse = |stream: &Stream, text: &str| {
                tracing::warn!(migration = %self.migration, channel = %id, text, "RDMA channel refused");
                let _ = write_reply(stream, &Reply::refused(RefusalCode::NotNow, text), deadline);
                false
            };
            if stream.is_encrypted() {
                return refuse(&stream, "a channel of RDMA is agreed on without TLS");
            }
            let own = stream.socket().local_addr().map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |at| at.ip());
            if let Some(reason) = self.encryption.refuses_rdma(own) {
                return refuse(&stream, &reason);
            }
            let reason = self.lock().no_place_for(id);
            if let Some(reason) = reason {
                return refuse(&stream, reason);
            }
            let (memory, options) = match &self.rdma.0 {
                Ok(exposed) => exposed,
                Err(reason) => return refuse(&stream, reason),
            };
            if write_reply(&stream, &Reply::accepted(0), deadline).is_err() {
                return false;
            }
            let Ok(stream) = stream.into_plain() else { return false };
            let left = time_left(deadline).ok();
            if left.is_none() || stream.set_read_timeout(left).is_err() {
                return false;
            }
            let accepting = match rdma::accept(stream, memory, options) {
                Ok(accepting) => accepting,
                Err(error) => {
                    tracing::warn!(migration = %self.migration, channel = %id, "RDMA channel refused: {}", chain(&error));
                    return false;
                }
            };
            match self.register(id, || Ok(accepting), |accepting| accepting.link().clone()) {
                Ok((accepting, stats)) => {
                    // From here on the source writes.
                    self.start(id, accepting.take().ok(), stats);
                    true
                }
                // Dropped, which the source sees as a connection that is closed.
                Err(NotAttached::NoPlace(_) | NotAttached::Channel(_)) => false,
            }
        }
    }
}

#[cfg(not(feature = "rdma"))]
mod without_rdma {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::{ChannelId, DestinationShared, Reply, Stream, write_reply};
    use crate::memory::GuestMemory;
    use crate::session::rdma::RdmaSupport;
    use crate::session::written::WrittenPages;
    use crate::wire::preamble::RefusalCode;

    /// Nothing is.
    #[derive(Debug)]
    pub(in crate::session::destination) struct Exposed;

    impl Exposed {
        pub(in crate::session::destination) fn of(
            _: &GuestMemory,
            _: &RdmaSupport,
            _: Duration,
            _: &Arc<WrittenPages>,
        ) -> Self {
            Self
        }

        pub(in crate::session::destination) fn end(&self) {}
    }

    impl DestinationShared {
        #[expect(clippy::needless_pass_by_value, reason = "as with RDMA")]
        pub(in crate::session) fn attach_rdma(
            self: &Arc<Self>,
            stream: Stream,
            _: ChannelId,
            deadline: Instant,
        ) -> bool {
            let reply = Reply::refused(RefusalCode::NotNow, "this host was built without RDMA");
            let _ = write_reply(&stream, &reply, deadline);
            false
        }
    }
}
