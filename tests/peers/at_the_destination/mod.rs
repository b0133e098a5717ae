//! The real destination against scripted sources.

pub(crate) mod data;
mod handover;
pub(crate) mod setup;
mod silence;
mod state;
mod words;

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pageferry::engine::destination::{ReceiveOptions, Received, receive};
use pageferry::engine::endpoint::Endpoint;
use pageferry::engine::journal::Journal;
use pageferry::guest::GuestError;
use pageferry::migration::handover::Arrival;
use pageferry::session::ListenerOptions;
use pageferry::session::control::ControlOptions;
use pageferry::wire::control::{Message, Setup};

use crate::LOOPBACK;
use crate::guest::{Census, StampingGuest};

/// Far below what a patient host waits for, far above what a hasty one may take.
const SOON: Duration = Duration::from_secs(20);

/// A host that waits for one guest at a time.
pub(crate) struct Host {
    endpoint: Arc<Endpoint>,
    options: ReceiveOptions,
    census: Census,
    _state: tempfile::TempDir,
}

/// A migration that is awaited or under way at a [`Host`].
pub(crate) struct Arriving {
    result: mpsc::Receiver<Option<Received<StampingGuest>>>,
    census: Census,
}

impl Host {
    /// It waits for longer than a test may take: whatever ends, ends because of what was said.
    pub(crate) fn patient() -> Self {
        let long = Duration::from_secs(30);
        let options = ReceiveOptions {
            setup_within: long,
            idle_after: long,
            fence_after: long,
            ..ReceiveOptions::default()
        };
        Self::new(options, ControlOptions { link_timeout: long, give_up_after: long })
    }

    /// It waits for seconds: for sources that say nothing.
    pub(crate) fn hasty() -> Self {
        let options = ReceiveOptions {
            setup_within: Duration::from_secs(2),
            idle_after: Duration::from_secs(2),
            fence_after: Duration::from_secs(1),
            ..ReceiveOptions::default()
        };
        let control =
            ControlOptions { link_timeout: Duration::from_secs(2), give_up_after: Duration::from_secs(1) };
        Self::new(options, control)
    }

    fn new(options: ReceiveOptions, control: ControlOptions) -> Self {
        let state = tempfile::tempdir().unwrap();
        let journal = Journal::open(state.path()).unwrap();
        let listener = ListenerOptions { control, ..ListenerOptions::default() };
        let endpoint = Arc::new(Endpoint::bind_with(&[LOOPBACK], listener, journal).unwrap());
        Self { endpoint, options, census: Census::default(), _state: state }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.endpoint.local_addresses()[0]
    }

    /// Awaits a migration, in a thread of its own. There is a place for it when this returns.
    pub(crate) fn await_one(&self) -> Arriving {
        let census = self.census.clone();
        self.await_with(move |setup| StampingGuest::skeleton(setup, &census))
    }

    /// As [`Host::await_one`], with another adapter.
    pub(crate) fn await_with(
        &self,
        mut make: impl FnMut(&Setup) -> Result<StampingGuest, GuestError> + Send + 'static,
    ) -> Arriving {
        let (endpoint, options) = (Arc::clone(&self.endpoint), self.options.clone());
        let (sender, result) = mpsc::channel();
        let (expecting, expected) = mpsc::channel();
        std::thread::spawn(move || {
            let place = endpoint.expect();
            expecting.send(()).unwrap();
            // Nobody waits any more when the time is over.
            let _ = sender.send(receive(place, &options, &mut make));
        });
        expected.recv().unwrap();
        Arriving { result, census: self.census.clone() }
    }
}

impl Arriving {
    fn end(&self, name: &str) -> Received<StampingGuest> {
        match self.result.recv_timeout(SOON) {
            Ok(received) => received.unwrap_or_else(|| panic!("{name}: no migration came")),
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("{name}: no end within {SOON:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{name}: the destination panicked"),
        }
    }

    /// The migration was given up for a cause with these words, and nothing of the guest is left.
    pub(crate) fn discarded(&self, name: &str, words: &[&str]) -> String {
        let received = self.end(name);
        let Arrival::Discarded { cause } = received.report.arrival else {
            panic!("{name}: {:?}", received.report.arrival)
        };
        println!("{name}: {cause}");
        for word in words {
            assert!(cause.contains(word), "{name}: {word:?} is not in {cause:?}");
        }
        assert!(received.guest.is_none(), "{name}");
        assert_eq!(self.census.guests(), 0, "{name}: a guest is left");
        cause
    }

    /// The guest runs here, and every page is what it wrote.
    pub(crate) fn runs(&self, name: &str) -> Received<StampingGuest> {
        let received = self.end(name);
        let arrival = &received.report.arrival;
        assert!(matches!(arrival, Arrival::Running { .. }), "{name}: {arrival:?}");
        let guest = received.guest.as_ref().unwrap();
        guest.assert_runs(name);
        assert_eq!(guest.pauses_and_resumes(), (0, 1), "{name}");
        received
    }
}

/// Whether the source was told why, before the end.
fn abort_in(heard: &[Message]) -> Option<&str> {
    heard.iter().find_map(|message| match message {
        Message::Abort(cause) => Some(cause.as_str()),
        _ => None,
    })
}
