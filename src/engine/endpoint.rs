//! Where a host listens: takes in migrations, and answers questions about tokens for as long as it lives.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, select, unbounded};

use super::cancel::CancelSignal;
use super::chain;
use super::journal::Journal;
use crate::migration::handover::answer_without_guest;
use crate::session::SessionError;
pub use crate::session::listener::{ListenOn, ListenerOptions};
use crate::session::listener::{Listener, ListenerEvent, PendingLink, QueryConnection};
use crate::wire::control::Message;
use crate::wire::preamble::{MigrationId, Proof, Purpose, Secret};

/// One particular migration, and the one-time secret that its source was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Its name.
    pub migration: MigrationId,
    /// What its source has to prove that it knows.
    pub secret: Secret,
}

/// The listening side of a host.
pub struct Endpoint {
    /// `None` only while this value is dropped.
    listener: Option<Listener>,
    link_timeout: Duration,
    takes_tls: bool,
    journal: Journal,
    shared: Arc<Shared>,
    arrivals: Receiver<(MigrationId, PendingLink)>,
    router: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How many migrations may come in, of any source.
    places: usize,
    /// Migrations that are waited for in particular, and who waits.
    awaited: HashMap<MigrationId, (Secret, Sender<(MigrationId, PendingLink)>)>,
    /// Migrations under way, and who answers for them.
    live: HashMap<MigrationId, Sender<QueryConnection>>,
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is a counter and a map, whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Endpoint {
    /// Listens on every address. Questions are answered from now on; a migration is taken in where
    /// [`Endpoint::expect`] made a place for it, and refused as busy otherwise.
    ///
    /// # Errors
    /// [`SessionError`] naming the address that cannot be bound.
    pub fn bind(addresses: &[SocketAddr], journal: Journal) -> Result<Self, SessionError> {
        Self::bind_with(addresses, ListenerOptions::default(), journal)
    }

    /// As [`Endpoint::bind`], with other times after which a silent connection counts as dead.
    ///
    /// # Errors
    /// As [`Endpoint::bind`].
    pub fn bind_with(
        addresses: &[SocketAddr],
        options: ListenerOptions,
        journal: Journal,
    ) -> Result<Self, SessionError> {
        let addresses: Vec<ListenOn> = addresses.iter().copied().map(ListenOn::from).collect();
        Self::bind_on(&addresses, options, journal)
    }

    /// As [`Endpoint::bind_with`], each address by an interface of its own where one is named.
    ///
    /// # Errors
    /// As [`Endpoint::bind`].
    pub fn bind_on(
        addresses: &[ListenOn],
        options: ListenerOptions,
        journal: Journal,
    ) -> Result<Self, SessionError> {
        let (link_timeout, takes_tls) = (options.control.link_timeout, !options.trust.is_insecure());
        let (sender, events) = unbounded();
        let listener = Listener::bind(addresses, options, sender)?;
        let (arrived, arrivals) = unbounded();
        let shared = Arc::new(Shared::default());
        let router = Router { shared: Arc::clone(&shared), journal: journal.clone(), arrived };
        let thread = std::thread::Builder::new()
            .name("pf-endpoint".into())
            .spawn(move || events.into_iter().for_each(|event| router.route(event)))
            .map_err(|cause| SessionError::Thread { what: "pf-endpoint".into(), cause })?;
        let listener = Some(listener);
        Ok(Self { listener, link_timeout, takes_tls, journal, shared, arrivals, router: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        self.listener().local_addresses().to_vec()
    }

    pub(super) fn listener(&self) -> &Listener {
        self.listener.as_ref().expect("it is there until the endpoint is dropped")
    }

    /// After which time a silent channel counts as lost.
    pub(super) fn link_timeout(&self) -> Duration {
        self.link_timeout
    }

    /// Whether connections may come under TLS: the host has certificates.
    pub(super) fn takes_tls(&self) -> bool {
        self.takes_tls
    }

    pub(super) fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Makes a place for one migration: from now on one is taken in, to be received by
    /// [`super::destination::receive`].
    #[must_use]
    pub fn expect(&self) -> Place<'_> {
        self.shared.state().places += 1;
        Place { endpoint: self, arrivals: self.arrivals.clone(), only: None, taken: false }
    }

    /// Makes a place for one particular migration, whose source proves that it knows the secret; every other one is refused.
    #[must_use]
    pub fn expect_only(&self, admission: Admission) -> Place<'_> {
        let (arrived, arrivals) = unbounded();
        self.shared.state().awaited.insert(admission.migration, (admission.secret, arrived));
        Place { endpoint: self, arrivals, only: Some(admission.migration), taken: false }
    }

    /// Has questions about a migration come to whoever runs it.
    pub(super) fn answer_for(&self, migration: MigrationId) -> Receiver<QueryConnection> {
        let (sender, receiver) = unbounded();
        self.shared.state().live.insert(migration, sender);
        receiver
    }

    /// The migration is over: the journal answers for it from now on, and answers what has come meanwhile.
    pub(super) fn journal_answers(&self, migration: MigrationId, left: &Receiver<QueryConnection>) {
        self.shared.state().live.remove(&migration);
        for question in left.try_iter() {
            answer_from_journal(&self.journal, question);
        }
    }
}

/// A place for one migration. Dropping it takes the place back.
pub struct Place<'a> {
    endpoint: &'a Endpoint,
    arrivals: Receiver<(MigrationId, PendingLink)>,
    only: Option<MigrationId>,
    taken: bool,
}

impl<'a> Place<'a> {
    pub(super) fn endpoint(&self) -> &'a Endpoint {
        self.endpoint
    }

    /// Waits for the migration; `None` when it was cancelled before.
    pub(super) fn wait(mut self, cancel: &CancelSignal) -> Option<(MigrationId, PendingLink)> {
        select! {
            recv(self.arrivals) -> arrived => {
                self.taken = arrived.is_ok();
                arrived.ok()
            }
            recv(cancel.0) -> _ => None,
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.taken {
            let mut state = self.endpoint.shared.state();
            if let Some(only) = self.only {
                // One that has come at this very moment is refused by dropping its link.
                state.awaited.remove(&only);
                return;
            }
            // A migration may have come at this very moment: then the place is gone, and dropping the link refuses it.
            if state.places > 0 {
                state.places -= 1;
            } else if let Ok((_, link)) = self.endpoint.arrivals.try_recv() {
                link.refuse("this host was told not to wait any longer");
            }
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // The router ends when nothing can come in any more.
        self.listener = None;
        if let Some(router) = self.router.take() {
            let _ = router.join();
        }
    }
}

struct Router {
    shared: Arc<Shared>,
    journal: Journal,
    arrived: Sender<(MigrationId, PendingLink)>,
}

impl Router {
    fn route(&self, event: ListenerEvent) {
        match event {
            ListenerEvent::NewMigration { migration, proof, link } => {
                let mut state = self.shared.state();
                if let Some((secret, arrived)) = state.awaited.get(&migration) {
                    if !proves(secret, &proof, migration) {
                        drop(state);
                        tracing::warn!(%migration, remote = %link.remote(), "a migration shows a wrong secret");
                        return link.refuse("the secret that the migration begins with is wrong");
                    }
                    let arrived = arrived.clone();
                    // Once only: the same proof, overheard, opens nothing more.
                    state.awaited.remove(&migration);
                    let _ = arrived.send((migration, link));
                    return;
                }
                if state.places == 0 {
                    drop(state);
                    tracing::warn!(%migration, remote = %link.remote(), "a migration comes that nobody waits for");
                    return link.refuse("this host is not waiting for a guest, or is busy with another one");
                }
                state.places -= 1;
                // Whoever has the place waits on the other end.
                let _ = self.arrived.send((migration, link));
            }
            ListenerEvent::Query { migration, connection } => {
                let live = self.shared.state().live.get(&migration).cloned();
                let left = match live {
                    Some(live) => live.send(connection).err().map(|unsent| unsent.0),
                    None => Some(connection),
                };
                if let Some(connection) = left {
                    answer_from_journal(&self.journal, connection);
                }
            }
        }
    }
}

fn proves(secret: &Secret, proof: &Proof, migration: MigrationId) -> bool {
    !secret.is_none() && secret.prove(Purpose::NewMigration, migration) == *proof
}

/// Answers a question about a token whose guest nobody here holds.
pub(super) fn answer_from_journal(journal: &Journal, connection: QueryConnection) {
    let answer = match Message::decode(connection.request()) {
        Ok(asked) => decide_from_journal(journal, &asked),
        Err(error) => Message::Abort(format!("that is no message: {}", chain(&error))),
    };
    tracing::info!(answer = answer.name(), "a question about a token is answered from the journal");
    if let Err(error) = connection.answer(&answer.encode()) {
        tracing::info!("the one who asked has gone, and will ask again: {}", chain(&error));
    }
}

fn decide_from_journal(journal: &Journal, asked: &Message) -> Message {
    let (Message::Query(token) | Message::Commit(token)) = asked else {
        return answer_without_guest(asked, None).1;
    };
    let recorded = journal.decision(*token);
    let decided = recorded.and_then(|recorded| match answer_without_guest(asked, recorded) {
        (None, answer) => Ok(answer),
        // Someone may decide at the same moment: what stands is the answer.
        (Some(decision), _) => {
            journal.decide(*token, decision).map(|stands| answer_without_guest(asked, Some(stands)).1)
        }
    });
    decided.unwrap_or_else(|error| Message::Abort(chain(&error)))
}

#[cfg(test)]
mod tests;
