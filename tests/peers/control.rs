//! The control link by hand: what a script says and hears, with or without the signs of life of an honest peer.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};
use pageferry::wire::control::{MAX_MESSAGE_BYTES, Message};
use pageferry::wire::link::{LINK_HEADER_BYTES, LinkHeader, LinkKind};

/// Longer than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(20);
/// Often enough for the shortest link timeout of these tests.
const BEAT: Duration = Duration::from_millis(100);

/// One side of a control link. Dropping it closes the connection.
pub(crate) struct Control {
    shared: Arc<Shared>,
    incoming: Receiver<Message>,
}

struct Shared {
    stream: TcpStream,
    /// Every message that was said, by its number; held while a frame is written.
    said: Mutex<Vec<Vec<u8>>>,
    heard: AtomicU64,
    /// No receipts and no heartbeats any more.
    mute: AtomicBool,
    over: AtomicBool,
}

impl Control {
    /// Takes part in a link whose handshake is done.
    pub(crate) fn over(stream: TcpStream) -> Self {
        Self::resumed(stream, Vec::new(), 0)
    }

    /// Goes on with a link after these messages in either direction.
    fn resumed(stream: TcpStream, said: Vec<Vec<u8>>, heard: u64) -> Self {
        stream.set_read_timeout(None).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        stream.set_nodelay(true).unwrap();
        let shared = Arc::new(Shared {
            stream,
            said: Mutex::new(said),
            heard: AtomicU64::new(heard),
            mute: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let (sender, incoming) = unbounded();
        let reader = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok(Some(message)) = reader.read_one() {
                let _ = sender.send(message);
            }
            reader.over.store(true, Ordering::SeqCst);
            let _ = reader.stream.shutdown(Shutdown::Both);
        });
        let beater = Arc::clone(&shared);
        std::thread::spawn(move || {
            while !beater.over.load(Ordering::SeqCst) {
                beater.receipt();
                std::thread::sleep(BEAT);
            }
        });
        Self { shared, incoming }
    }

    /// Says a message in its frame.
    pub(crate) fn say(&self, message: &Message) {
        self.say_bytes(&message.encode());
    }

    /// Says bytes in the frame of a message.
    pub(crate) fn say_bytes(&self, bytes: &[u8]) {
        let mut said = self.shared.said();
        let number = said.len() as u64;
        said.push(bytes.to_vec());
        let header = LinkHeader { kind: LinkKind::Message, bytes: bytes.len() as u32, number };
        // A peer that has had enough closes while it is still talked to.
        let _ = (&self.shared.stream).write_all(&[&header.encode()[..], bytes].concat());
    }

    /// Writes bytes as they are.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let _said = self.shared.said();
        let _ = (&self.shared.stream).write_all(bytes);
    }

    pub(crate) fn make(&self, noise: &Noise) {
        match noise {
            Noise::Said(bytes) => self.say_bytes(bytes),
            Noise::Written(bytes) => self.write(bytes),
        }
    }

    /// The next message; `None` when the peer has closed the link.
    pub(crate) fn hear(&self) -> Option<Message> {
        match self.incoming.recv_timeout(LONG) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the peer neither says anything nor closes"),
        }
    }

    /// Everything that is heard until the peer closes the link.
    pub(crate) fn hear_out(&self) -> Vec<Message> {
        std::iter::from_fn(|| self.hear()).collect()
    }

    /// Gives no sign of life any more; the connection stays open.
    pub(crate) fn fall_silent(&self) {
        self.shared.mute.store(true, Ordering::SeqCst);
    }

    pub(crate) fn close(&self) {
        self.shared.over.store(true, Ordering::SeqCst);
        let _ = self.shared.stream.shutdown(Shutdown::Both);
    }

    /// The same link over another connection, whose other side says that it has `received` messages: the rest is said again.
    pub(crate) fn over_another(&self, stream: TcpStream, received: u64, heard: u64) -> Self {
        let mut had = self.shared.said().clone();
        let rest = had.split_off(received as usize);
        let resumed = Self::resumed(stream, had, heard);
        rest.iter().for_each(|bytes| resumed.say_bytes(bytes));
        resumed
    }

    /// How many messages were heard.
    pub(crate) fn heard(&self) -> u64 {
        self.shared.heard.load(Ordering::SeqCst)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn said(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receipt(&self) {
        let _said = self.said();
        if !self.mute.load(Ordering::SeqCst) {
            let number = self.heard.load(Ordering::SeqCst);
            let receipt = LinkHeader { kind: LinkKind::Receipt, bytes: 0, number };
            let _ = (&self.stream).write_all(&receipt.encode());
        }
    }

    /// Reads up to the next message; `None` at a goodbye.
    fn read_one(&self) -> io::Result<Option<Message>> {
        loop {
            let mut head = [0; LINK_HEADER_BYTES];
            (&self.stream).read_exact(&mut head)?;
            let header = LinkHeader::decode(&head).map_err(io::Error::other)?;
            let mut bytes = vec![0; header.bytes as usize];
            (&self.stream).read_exact(&mut bytes)?;
            match header.kind {
                LinkKind::Goodbye => return Ok(None),
                LinkKind::Receipt => {}
                LinkKind::Message => {
                    self.heard.fetch_add(1, Ordering::SeqCst);
                    self.receipt();
                    return Message::decode(&bytes).map(Some).map_err(io::Error::other);
                }
            }
        }
    }
}

/// Bytes that no honest peer puts on a control link.
#[derive(Clone, Debug)]
pub(crate) enum Noise {
    /// In the frame of a message.
    Said(Vec<u8>),
    /// As they are.
    Written(Vec<u8>),
}

/// What is no message, or no frame of one.
pub(crate) fn nonsense() -> Vec<(&'static str, Noise, &'static str)> {
    let frame = |kind, bytes| LinkHeader { kind, bytes, number: 0 }.encode().to_vec();
    let with_length = |bytes: u32| {
        let mut frame = frame(LinkKind::Message, 0);
        frame[8..12].copy_from_slice(&bytes.to_le_bytes());
        frame
    };
    let mut unknown_kind = frame(LinkKind::Receipt, 0);
    unknown_kind[4] = 9;
    let mut receipt_of_the_unsent = frame(LinkKind::Receipt, 0);
    receipt_of_the_unsent[12..].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut message_left_out = frame(LinkKind::Message, 0);
    message_left_out[12..].copy_from_slice(&999u64.to_le_bytes());
    vec![
        ("garbage for a message", Noise::Said(vec![0xff; 100]), "not well-formed"),
        ("an empty message", Noise::Said(vec![]), "no body that this version knows"),
        ("a message of the future", Noise::Said(vec![0x9a, 0x06, 0x00]), "no body that this version knows"),
        // Field 6 (Ready), 3 bytes: its field 1 with a token of 1 byte.
        ("a short token", Noise::Said(vec![0x32, 3, 0x0a, 1, 7]), "a token has a length of 1"),
        // Field 6, said to have 2^63 bytes.
        (
            "a length within a message",
            Noise::Said(vec![0x32, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
            "not well-formed",
        ),
        (
            "no frame",
            Noise::Written(b"HTTP/1.1 200 OK\r\n\r\n and more".to_vec()),
            "a control frame begins with HTTP",
        ),
        ("a frame of 4 GiB", Noise::Written(with_length(u32::MAX)), "a control message of 4294967295 bytes"),
        (
            "a frame that is a byte too long",
            Noise::Written(with_length(MAX_MESSAGE_BYTES as u32 + 1)),
            "a control message of 1114113 bytes",
        ),
        ("an unknown kind of frame", Noise::Written(unknown_kind), "kind 9"),
        (
            "a receipt of what was not sent",
            Noise::Written(receipt_of_the_unsent),
            "it has 18446744073709551615 messages",
        ),
        ("a message left out", Noise::Written(message_left_out), "message 999 came where"),
    ]
}
