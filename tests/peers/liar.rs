//! A destination by script: it follows the protocol up to a point, and then does something else.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::units::RoundId;
use pageferry::wire::control::{Accept, Message};
use pageferry::wire::data::{FrameKind, HEADER_BYTES, Header, Receipt};
use pageferry::wire::link::{LINK_HEADER_BYTES, LinkHeader, LinkKind};
use pageferry::wire::preamble::{PREAMBLE_BYTES, Preamble, Purpose, RefusalCode, Reply};

use crate::control::{Control, Noise};
use crate::{LOOPBACK, TOKEN};

const SECRET: [u8; 32] = [42; 32];

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// The source has said that it wants to begin a migration.
    Preamble,
    /// `Setup` has come; the source waits for `Accept`.
    Setup,
    /// The data channels are dialled; the source waits until they are accepted.
    Channels,
    /// Pages of the first round have come, and none is ever confirmed.
    Round,
    /// The first round's barrier has come, and is never confirmed.
    Barrier,
    /// The guest is paused, its state sent, its last pages under way and never confirmed.
    LastRound,
    /// `Finish` has come; the source waits for `Ready`.
    Finish,
    /// `Commit` has come; the source waits for `Running`.
    Commit,
}

impl Point {
    /// Where the source hears control messages, in order.
    pub(crate) const TALKING: [Self; 7] = [
        Self::Setup,
        Self::Channels,
        Self::Round,
        Self::Barrier,
        Self::LastRound,
        Self::Finish,
        Self::Commit,
    ];
}

/// What happens then.
#[derive(Clone, Debug)]
pub(crate) enum Deed {
    /// No sign of life on any connection, old or new, but all stay open.
    FallSilent,
    /// Heartbeats, and nothing else.
    Idle,
    /// Every connection is closed; new ones are refused by a host that knows nothing of the migration.
    Close,
    /// As [`Deed::Close`], and nobody listens there any more.
    Die,
    /// A control message, in place of the right one.
    Say(Message),
    /// Bytes on the control link that are no message.
    MakeNoise(Noise),
    /// Bytes in place of the reply to a preamble.
    Reply(Vec<u8>),
    /// Bytes on a data channel, in place of a receipt.
    Receipt(Vec<u8>),
}

/// How a question about the token is answered.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// With a message.
    Say(Message),
    /// With bytes in the frame of a message.
    Bytes(Vec<u8>),
    /// Not at all; the connection stays open.
    Silence,
    /// The connection is closed.
    Close,
}

/// The scripted destination. Dropping it closes everything.
pub(crate) struct Liar {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    point: Point,
    deed: Deed,
    /// For one question each; the last one for all that follow.
    answers: Mutex<Vec<Answer>>,
    address: SocketAddr,
    /// The deed is done.
    done: AtomicBool,
    /// No new connection is answered.
    silent: AtomicBool,
    /// Nobody listens any more.
    dead: AtomicBool,
    control: Mutex<Option<Arc<Control>>>,
    /// Every connection but the control link's.
    streams: Mutex<Vec<TcpStream>>,
    heard: Mutex<Vec<Message>>,
    asked: Mutex<Vec<Message>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Liar {
    /// A destination that answers questions with `answers`.
    pub(crate) fn start(point: Point, deed: Deed, answers: Vec<Answer>) -> Self {
        let listener = TcpListener::bind(LOOPBACK).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            point,
            deed,
            answers: Mutex::new(answers),
            address,
            done: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            control: Mutex::default(),
            streams: Mutex::default(),
            heard: Mutex::default(),
            asked: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if accepting.dead.load(Ordering::SeqCst) {
                    break;
                }
                let shared = Arc::clone(&accepting);
                // A source that closes in the middle of something is what these tests are about.
                std::thread::spawn(move || shared.receive(stream).ok());
            }
        });
        Self { address, shared }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The questions that were asked over connections of their own.
    pub(crate) fn asked(&self) -> Vec<Message> {
        lock(&self.shared.asked).clone()
    }

    /// Whether the source says over the control link why it gives up, soon.
    pub(crate) fn hears_abort(&self) -> Option<String> {
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            let abort = lock(&self.shared.heard).iter().find_map(|message| match message {
                Message::Abort(cause) => Some(cause.clone()),
                _ => None,
            });
            if abort.is_some() {
                return abort;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.shared.die();
        self.shared.close();
    }
}

impl Shared {
    fn receive(self: &Arc<Self>, stream: TcpStream) -> io::Result<()> {
        lock(&self.streams).push(stream.try_clone()?);
        if self.silent.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut preamble = [0; PREAMBLE_BYTES];
        (&stream).read_exact(&mut preamble)?;
        let preamble = Preamble::decode(&preamble).map_err(io::Error::other)?;
        match preamble.purpose {
            Purpose::NewMigration => self.migration(stream),
            Purpose::Data { .. } => self.channel(&stream),
            Purpose::RdmaData { .. } => {
                let reply = Reply::refused(RefusalCode::NotNow, "this host has no RDMA");
                (&stream).write_all(&reply.encode())?;
                stream.shutdown(Shutdown::Both)
            }
            Purpose::Query => self.question(&stream),
            Purpose::ResumeControl { .. } => {
                let reply = Reply::refused(RefusalCode::UnknownMigration, "this host was started anew");
                (&stream).write_all(&reply.encode())?;
                stream.shutdown(Shutdown::Both)
            }
        }
    }

    fn accept(stream: &TcpStream) -> io::Result<()> {
        (&*stream).write_all(&Reply::accepted(0).encode())
    }

    fn migration(self: &Arc<Self>, stream: TcpStream) -> io::Result<()> {
        if self.point == Point::Preamble {
            self.act(Some(&stream));
            return Ok(());
        }
        Self::accept(&stream)?;
        let control = Arc::new(Control::over(stream));
        *lock(&self.control) = Some(Arc::clone(&control));
        while let Some(message) = control.hear() {
            lock(&self.heard).push(message.clone());
            let (point, answer) = match message {
                Message::Setup(_) => {
                    (Point::Setup, Message::Accept(Accept { secret: SECRET, capabilities: vec![] }))
                }
                Message::Finish { .. } => (Point::Finish, Message::Ready(TOKEN)),
                Message::Commit(token) => (Point::Commit, Message::Running(token)),
                _ => continue,
            };
            if self.point == point {
                self.act(None);
            } else {
                control.say(&answer);
            }
        }
        Ok(())
    }

    fn channel(&self, stream: &TcpStream) -> io::Result<()> {
        if self.point == Point::Channels {
            self.act(None);
            match &self.deed {
                Deed::FallSilent | Deed::Idle => return Ok(()),
                Deed::Close | Deed::Die => return stream.shutdown(Shutdown::Both),
                Deed::Reply(bytes) => {
                    (&*stream).write_all(bytes)?;
                    return stream.shutdown(Shutdown::Both);
                }
                _ => {}
            }
        }
        Self::accept(stream)?;
        loop {
            let mut head = [0; HEADER_BYTES];
            (&*stream).read_exact(&mut head)?;
            let header = Header::decode(&head).map_err(io::Error::other)?;
            let body = header.table_bytes() as u64 + u64::from(header.payload_bytes);
            io::copy(&mut stream.take(body), &mut io::sink())?;
            let (first, is_barrier) =
                (header.round == RoundId(0), matches!(header.kind, FrameKind::Barrier(_)));
            let held = match self.point {
                Point::Round => true,
                Point::Barrier => first && is_barrier,
                Point::LastRound => !first,
                _ => false,
            };
            if held {
                self.act(Some(stream));
                continue;
            }
            let receipt = match header.kind {
                FrameKind::Barrier(barrier) => Receipt::Barrier(barrier),
                _ => Receipt::Placed(header.sequence),
            };
            (&*stream).write_all(&receipt.encode())?;
        }
    }

    fn question(&self, mut stream: &TcpStream) -> io::Result<()> {
        Self::accept(stream)?;
        let mut head = [0; LINK_HEADER_BYTES];
        stream.read_exact(&mut head)?;
        let header = LinkHeader::decode(&head).map_err(io::Error::other)?;
        let mut question = vec![0; header.bytes as usize];
        stream.read_exact(&mut question)?;
        lock(&self.asked).push(Message::decode(&question).map_err(io::Error::other)?);
        let answer = {
            let mut answers = lock(&self.answers);
            if answers.len() > 1 { Some(answers.remove(0)) } else { answers.first().cloned() }
        };
        let bytes = match answer.unwrap_or(Answer::Close) {
            Answer::Say(message) => message.encode(),
            Answer::Bytes(bytes) => bytes,
            Answer::Silence => return Ok(()),
            Answer::Close => return stream.shutdown(Shutdown::Both),
        };
        let header = LinkHeader { kind: LinkKind::Message, bytes: bytes.len() as u32, number: 0 };
        stream.write_all(&[&header.encode()[..], &bytes].concat())
    }

    /// The point is reached: does the deed, once.
    fn act(&self, stream: Option<&TcpStream>) {
        if self.done.swap(true, Ordering::SeqCst) {
            return;
        }
        let control = lock(&self.control).clone();
        match (&self.deed, control, stream) {
            (Deed::FallSilent, control, _) => {
                self.silent.store(true, Ordering::SeqCst);
                if let Some(control) = control {
                    control.fall_silent();
                }
            }
            (Deed::Close, ..) => self.close(),
            (Deed::Die, ..) => {
                self.die();
                self.close();
            }
            (Deed::Say(message), Some(control), _) => control.say(message),
            (Deed::MakeNoise(noise), Some(control), _) => control.make(noise),
            (Deed::Reply(bytes) | Deed::Receipt(bytes), _, Some(mut stream)) => {
                let _ = stream.write_all(bytes);
            }
            _ => {}
        }
    }

    fn close(&self) {
        for stream in lock(&self.streams).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(control) = lock(&self.control).as_ref() {
            control.close();
        }
    }

    /// Listens no more.
    fn die(&self) {
        if !self.dead.swap(true, Ordering::SeqCst) {
            // To wake the thread that accepts; it has gone already when this fails.
            let _ = TcpStream::connect(self.address);
        }
    }
}
