//! Where a process that holds a guest tells what happens.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::protocol::{Event, Told};

/// A supervisor that does not read for so long is cut off; it can come again and is told how things stand.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who listens.
#[derive(Debug, Default)]
pub(super) struct Outlet {
    /// Whether it is whoever reads stdout.
    stdout: bool,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    next: u64,
    connected: Vec<(Client, UnixStream)>,
}

/// One of those who are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Client(u64);

impl Client {
    /// Whoever reads stdout.
    pub(super) const STDOUT: Self = Self(u64::MAX);
}

impl Outlet {
    /// Tells whoever reads stdout.
    pub(super) fn stdout() -> Self {
        Self { stdout: true, ..Self::default() }
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        // A list whose entries are added and removed whole.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Someone who is told `hello` first and everything from now on. `hello` is made when nothing can come in between.
    pub(super) fn join(&self, stream: UnixStream, hello: impl FnOnce() -> Event) -> std::io::Result<Client> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut clients = self.clients();
        write(&stream, &Told { reply: None, event: hello() })?;
        let client = Client(clients.next);
        clients.next += 1;
        clients.connected.push((client, stream));
        Ok(client)
    }

    /// Someone has gone.
    pub(super) fn leave(&self, client: Client) {
        self.clients().connected.retain(|(connected, _)| *connected != client);
    }

    /// Whether anybody listens.
    pub(super) fn is_heard(&self) -> bool {
        self.stdout || !self.clients().connected.is_empty()
    }

    /// Tells everybody. The guest does not stop because nobody reads.
    pub(super) fn emit(&self, event: Event) {
        self.tell(&Told { reply: None, event }, None);
    }

    /// Answers one of them.
    pub(super) fn answer(&self, client: Client, reply: Option<u64>, event: Event) {
        self.tell(&Told { reply, event }, Some(client));
    }

    fn tell(&self, told: &Told, only: Option<Client>) {
        if self.stdout {
            if let Some(line) = line(told) {
                let _ = std::io::stdout().lock().write_all(&line);
            }
            return;
        }
        let mut clients = self.clients();
        clients.connected.retain(|(client, stream)| {
            let concerned = only.is_none_or(|only| only == *client);
            !concerned || write(stream, told).is_ok()
        });
    }
}

fn line(told: &Told) -> Option<Vec<u8>> {
    let mut line = serde_json::to_vec(told).ok()?;
    line.push(b'\n');
    Some(line)
}

fn write(mut stream: &UnixStream, told: &Told) -> std::io::Result<()> {
    let written = stream.write_all(&line(told).unwrap_or_default());
    if written.is_err() {
        // Its reading thread ends with it; half a line must not be followed by another.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
    written
}
