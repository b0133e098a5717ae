//! A source by script: it follows the protocol up to a stage, from where a test goes on by hand.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use pageferry::units::{RoundId, Run};
use pageferry::wire::control::{Message, Setup, Token};
use pageferry::wire::data::{
    BarrierId, ChannelId, FrameKind, RECEIPT_BYTES, Receipt, ReceiptHeader, encode_barrier, encode_pages,
};
use pageferry::wire::link::{LINK_HEADER_BYTES, LinkHeader, LinkKind};
use pageferry::wire::preamble::{
    Answer, MigrationId, Preamble, Purpose, REPLY_BYTES, RefusalCode, ReplyHeader, Secret,
};

use crate::control::{Control, LONG};
use crate::guest::{self, stamped, state_with};

/// Pages that the script's guest has written.
pub(crate) const WRITTEN: u64 = 8;

/// How far the script has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// The destination waits for `Setup`.
    Connected,
    /// It waits for channels and pages.
    Accepted,
    /// It has every page of a round, and waits for more.
    Placed,
    /// It has some of the guest's state.
    StateSent,
    /// It has everything, and waits for `Commit`.
    Ready,
}

impl Stage {
    pub(crate) const ALL: [Self; 5] =
        [Self::Connected, Self::Accepted, Self::Placed, Self::StateSent, Self::Ready];
}

/// The scripted source. Dropping it closes its connections.
pub(crate) struct Cheat {
    /// To resume the control link.
    attempts: u16,
    pub(crate) address: SocketAddr,
    pub(crate) migration: MigrationId,
    pub(crate) control: Control,
    /// What `Accept` said.
    pub(crate) secret: Secret,
    /// What `Ready` said.
    pub(crate) token: Token,
    pub(crate) channels: Vec<Channel>,
}

/// A data channel by hand.
pub(crate) struct Channel {
    pub(crate) stream: TcpStream,
    sequence: u64,
}

/// The description of the script's guest.
pub(crate) fn setup() -> Setup {
    Setup {
        name: "cheat".into(),
        guest: guest::KIND.into(),
        config: guest::CONFIG.to_vec(),
        layout: guest::layout(),
        touched_pages: WRITTEN,
        mode: "tcp".into(),
        capabilities: vec![],
    }
}

/// Connects and says what for; answers how many messages the other side has, or its refusal.
pub(crate) fn dial(
    address: SocketAddr,
    preamble: &Preamble,
) -> Result<(TcpStream, u64), (RefusalCode, String)> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(&preamble.encode()).unwrap();
    let mut head = [0; REPLY_BYTES];
    stream.read_exact(&mut head).unwrap();
    let header = ReplyHeader::decode(&head).unwrap();
    let mut text = vec![0; header.text_bytes()];
    stream.read_exact(&mut text).unwrap();
    match header.with_text(&text).unwrap().answer {
        Answer::Accepted { received } => Ok((stream, received)),
        Answer::Refused { code, text } => Err((code, text)),
    }
}

/// Asks over a connection of its own.
pub(crate) fn ask(address: SocketAddr, migration: MigrationId, question: &Message) -> io::Result<Message> {
    let preamble = Preamble::new(Purpose::Query, migration, Secret::NONE);
    let (mut stream, _) = dial(address, &preamble).expect("anybody may ask");
    let bytes = question.encode();
    let header = LinkHeader { kind: LinkKind::Message, bytes: bytes.len() as u32, number: 0 };
    stream.write_all(&[&header.encode()[..], &bytes].concat())?;
    let mut head = [0; LINK_HEADER_BYTES];
    stream.read_exact(&mut head)?;
    let header = LinkHeader::decode(&head).map_err(io::Error::other)?;
    let mut answer = vec![0; header.bytes as usize];
    stream.read_exact(&mut answer)?;
    Message::decode(&answer).map_err(io::Error::other)
}

impl Cheat {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let migration = MigrationId(pageferry::engine::draw().unwrap());
        let preamble = Preamble::new(Purpose::NewMigration, migration, Secret::NONE);
        let (stream, _) = dial(address, &preamble).expect("a place for a migration");
        Self {
            address,
            migration,
            control: Control::over(stream),
            secret: Secret::NONE,
            token: Token([0; 16]),
            channels: Vec::new(),
            attempts: 0,
        }
    }

    /// A source that has come as far as that, honestly.
    pub(crate) fn at(address: SocketAddr, stage: Stage) -> Self {
        let mut cheat = Self::connect(address);
        if stage >= Stage::Accepted {
            cheat.set_up(&setup());
        }
        if stage >= Stage::Placed {
            cheat.place();
        }
        if stage >= Stage::StateSent {
            cheat.control.say(&Message::State(state_with(WRITTEN)));
        }
        if stage >= Stage::Ready {
            cheat.finish();
        }
        cheat
    }

    pub(crate) fn set_up(&mut self, setup: &Setup) {
        self.control.say(&Message::Setup(setup.clone()));
        match self.control.hear() {
            Some(Message::Accept(accept)) => self.secret = Secret(accept.secret),
            other => panic!("{other:?} in place of Accept"),
        }
    }

    /// Opens one more channel; answers its place in the list.
    pub(crate) fn open_channel(&mut self) -> usize {
        let channel = self.channels.len() as u32;
        let preamble = Preamble::new(Purpose::Data { channel }, self.migration, self.secret);
        let (stream, _) = dial(self.address, &preamble).expect("a data channel");
        self.channels.push(Channel { stream, sequence: 0 });
        channel as usize
    }

    /// Places the pages of the script's guest over a new channel, and waits for the barrier.
    pub(crate) fn place(&mut self) {
        let channel = self.open_channel();
        self.channels[channel].place(&[]);
    }

    /// Says `Finish`, and hears `Ready`.
    pub(crate) fn finish(&mut self) {
        let state_bytes = state_with(WRITTEN).len() as u64;
        self.control.say(&Message::Finish { state_bytes, stopped_at: pageferry::engine::wall_clock() });
        match self.control.hear() {
            Some(Message::Ready(token)) => self.token = token,
            other => panic!("{other:?} in place of Ready"),
        }
    }

    /// Asks about the token over a connection of its own.
    pub(crate) fn ask(&self, question: &Message) -> io::Result<Message> {
        ask(self.address, self.migration, question)
    }

    /// Dials the control link again after its connection was lost, saying that `heard` messages have come; or the refusal.
    pub(crate) fn resume(&mut self, secret: Secret, heard: u64) -> Result<(), (RefusalCode, String)> {
        self.attempts += 1;
        let purpose = Purpose::ResumeControl { attempt: self.attempts, received: heard };
        let (stream, received) = dial(self.address, &Preamble::new(purpose, self.migration, secret))?;
        self.control = self.control.over_another(stream, received, heard);
        Ok(())
    }
}

/// A frame of pages; its payload may have any length.
pub(crate) fn frame(kind: FrameKind, sequence: u64, runs: &[Run], payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_pages(kind, RoundId(0), sequence, runs, payload.len() as u32, &mut bytes);
    bytes.extend(payload);
    bytes
}

impl Channel {
    /// Sends bytes as they are. A peer that has had enough closes while it is still sent to.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends the pages of the script's guest and a barrier that gives channels up, and waits for the barrier.
    pub(crate) fn place(&mut self, fenced: &[ChannelId]) {
        let pages: Vec<u8> = (0..WRITTEN).flat_map(|page| stamped(page, 1)).collect();
        self.write(&frame(FrameKind::Raw, self.sequence + 1, &[Run::new(0, WRITTEN)], &pages));
        self.write(&encode_barrier(BarrierId(1), RoundId(0), self.sequence + 2, fenced));
        self.sequence += 2;
        loop {
            match self.receipt() {
                Receipt::Placed(_) => {}
                Receipt::Barrier(BarrierId(1)) => return,
                other => panic!("{other:?} in place of the barrier"),
            }
        }
    }

    fn receipt(&mut self) -> Receipt {
        let mut head = [0; RECEIPT_BYTES];
        self.stream.read_exact(&mut head).unwrap();
        let header = ReceiptHeader::decode(&head).unwrap();
        let mut text = vec![0; header.text_bytes()];
        self.stream.read_exact(&mut text).unwrap();
        header.with_text(&text)
    }
}
