//! The sending end: a control link to a receiving end, and one transfer after the other.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};

use super::BenchError;
use super::machine::{Machine, PeakMemory};
use super::message::{FromDestination, FromSource, Receive, Received, VERSION, encode};
use super::options::BenchOptions;
use super::writer::Writer;
use crate::engine::cpu::CpuMeter;
use crate::engine::draw;
use crate::engine::source::{MigrationId, Secret};
use crate::host::hex;
use crate::memory::GuestMemory;
use crate::memory::snapshot::MemoryDigest;
use crate::pageset::PageSet;
use crate::session::caps::RateCaps;
use crate::session::{
    Capabilities, ControlLink, ControlOptions, EncryptionPolicy, LinkEvent, Opening, Path, RdmaSupport,
    Resolved, SessionEvent, SourceOptions, SourceSession, SourceTimes, TransferMode, mode,
};
use crate::units::{PAGE_SIZE, PageIndex, RoundId};

/// How long an answer may take: populating and hashing hundreds of GiB takes minutes.
const ANSWER: Duration = Duration::from_secs(1800);
/// How long a data channel may be silent.
/// How often this process's memory is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long to wait when nothing was written.
const NOTHING_WRITTEN: Duration = Duration::from_millis(1);
/// How long the last words may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// The memory that is sent.
pub(super) struct Payload {
    pub(super) memory: GuestMemory,
    pub(super) in_use: PageSet,
    /// Of the memory as it is, until it is written to.
    digest: Option<MemoryDigest>,
}

impl Payload {
    pub(super) fn new(memory: GuestMemory) -> Result<Self, BenchError> {
        let in_use = memory.touched().map_err(BenchError::Touched)?;
        Ok(Self { memory, in_use, digest: None })
    }

    fn digest(&mut self) -> Result<MemoryDigest, BenchError> {
        let digest = match self.digest {
            Some(digest) => digest,
            None => MemoryDigest::of_paused(&self.memory).map_err(BenchError::Digest)?,
        };
        self.digest = Some(digest);
        Ok(digest)
    }

    /// Reads of each page, as a guest that runs has just done. On virtual machines the first to read a page that was left alone for
    /// seconds may wait for half a microsecond, see `docs/performance.md`.
    fn look_at(&self) {
        for run in self.in_use.runs() {
            (run.start.0..run.end()).for_each(|page| {
                std::hint::black_box(self.memory.is_zero_page(PageIndex(page)));
            });
        }
    }
}

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) mode: TransferMode,
    pub(super) channels: usize,
    pub(super) batch_pages: u64,
}

/// One transfer, measured.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) bytes: u64,
    pub(super) zero_bytes: u64,
    pub(super) wire_bytes: u64,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
    pub(super) memory_bytes: u64,
    pub(super) times: SourceTimes,
    /// Channels and bytes by interface of this end.
    pub(super) interfaces: BTreeMap<String, (usize, u64)>,
    pub(super) received: Received,
    pub(super) verified: bool,
}

/// A receiving end that one is connected to.
pub(super) struct Client {
    link: ControlLink,
    events: Receiver<LinkEvent>,
    paths: Vec<Path>,
    pub(super) machine: Machine,
    can: Capabilities,
    rdma: RdmaSupport,
}

impl Client {
    pub(super) fn connect(paths: &[Path]) -> Result<Self, BenchError> {
        let id = MigrationId(draw().map_err(BenchError::Random)?);
        let (sender, events) = unbounded();
        let link = ControlLink::dial(paths, id, &Opening::default(), ControlOptions::default(), sender)?;
        let mut client = Self {
            link,
            events,
            paths: paths.to_vec(),
            machine: Machine::default(),
            can: Capabilities::none(),
            rdma: RdmaSupport::of_this_host(),
        };
        client.say(&FromSource::Hello { version: VERSION });
        match client.hear()? {
            FromDestination::Hello { version: VERSION, machine, can } => {
                client.machine = machine;
                client.can = Capabilities::from_names(&can);
                Ok(client)
            }
            FromDestination::Hello { version, .. } => {
                Err(BenchError::Version { theirs: version, ours: VERSION })
            }
            _ => Err(BenchError::OutOfTurn),
        }
    }

    /// The mode that is used when this one is asked for.
    pub(super) fn resolve(&self, wanted: TransferMode) -> Resolved {
        mode::resolve(wanted, &Capabilities::with_rdma(self.rdma.absent()), &self.can, None, None)
    }

    fn say(&self, message: &FromSource) {
        self.link.send(encode(message));
    }

    fn hear(&self) -> Result<FromDestination, BenchError> {
        let deadline = Instant::now() + ANSWER;
        loop {
            match self.events.recv_deadline(deadline) {
                Ok(LinkEvent::Message(text)) => match FromDestination::decode(&text)? {
                    FromDestination::Refused { why } => return Err(BenchError::Refused(why)),
                    message => return Ok(message),
                },
                Ok(LinkEvent::Lost { cause }) => return Err(cause.into()),
                Ok(LinkEvent::Interrupted { .. } | LinkEvent::Resumed { .. }) => {}
                Err(_) => return Err(BenchError::Gone),
            }
        }
    }

    /// Sends the memory once, and hears what that cost the other end.
    pub(super) fn transfer(
        &self,
        payload: &mut Payload,
        setting: Setting,
        options: &BenchOptions,
    ) -> Result<Measured, BenchError> {
        let migration: [u8; 16] = draw().map_err(BenchError::Random)?;
        let memory_bytes = payload.memory.layout().total_bytes();
        self.say(&FromSource::Receive(Receive {
            migration: hex::encode(&migration),
            memory_bytes,
            in_use_bytes: payload.in_use.len() * PAGE_SIZE,
            warm: options.warm,
        }));
        let FromDestination::Ready { secret } = self.hear()? else { return Err(BenchError::OutOfTurn) };
        let secret = hex::decode(&secret).map(Secret).ok_or(BenchError::OutOfTurn)?;
        let (sender, events) = unbounded();
        let session = SourceSession::open(
            SourceOptions {
                migration: MigrationId(migration),
                secret,
                paths: self.paths.clone(),
                channels: setting.channels,
                memory: payload.memory.clone(),
                mode: setting.mode,
                rdma: self.rdma.clone(),
                encryption: EncryptionPolicy::default(),
                rate_caps: RateCaps::default(),
                link_timeout: super::LINK_TIMEOUT,
                reopen: None,
                cut: None,
            },
            sender,
        )?;
        session.set_batch_pages(setting.batch_pages);
        let mut measured = Rounds { session: &session, events: &events, peak: PeakMemory::start() }
            .send(payload, options)?;
        session.rest();
        self.say(&FromSource::Done);
        let FromDestination::Received(received) = self.hear()? else { return Err(BenchError::OutOfTurn) };
        session.close();
        let digest = payload.digest()?;
        measured.verified = received.nonzero_pages == digest.nonzero_pages
            && received.digest == format!("{:032x}", digest.digest);
        measured.received = received;
        Ok(measured)
    }

    pub(super) fn close(self) {
        self.link.flush_and_close(GOODBYE);
    }
}

/// The rounds of one transfer.
struct Rounds<'a> {
    session: &'a SourceSession,
    events: &'a Receiver<SessionEvent>,
    peak: PeakMemory,
}

impl Rounds<'_> {
    fn send(mut self, payload: &mut Payload, options: &BenchOptions) -> Result<Measured, BenchError> {
        payload.look_at();
        let mut writer = match options.dirty_bytes_per_second {
            0 => None,
            rate => {
                payload.digest = None;
                Some(Writer::start(&payload.memory, &payload.in_use, rate)?)
            }
        };
        let (cpu, began) = (CpuMeter::start(), Instant::now());
        let over = options.duration.map(|duration| began + duration);
        let (mut bytes, mut zero_bytes, mut rounds, mut standing) = (0, 0, 0, false);
        let mut next = Some(payload.in_use.clone());
        while let Some(pages) = next {
            self.session.place(RoundId(rounds), pages);
            let (placed, zeros) = self.wait_placed()?;
            bytes += placed * PAGE_SIZE;
            zero_bytes += zeros * PAGE_SIZE;
            rounds += 1;
            let done = over.is_none_or(|over| Instant::now() >= over);
            next = match &mut writer {
                None => (!done).then(|| payload.in_use.clone()),
                Some(writer) => following(writer, over, &mut standing)?,
            };
        }
        let (seconds, cpu_seconds) = (began.elapsed().as_secs_f64(), cpu.elapsed().as_secs_f64());
        self.peak.look();
        let stats = self.session.stats();
        let mut interfaces: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for channel in stats.channels {
            let entry = interfaces.entry(channel.interface.unwrap_or_default()).or_default();
            *entry = (entry.0 + 1, entry.1 + channel.bytes);
        }
        Ok(Measured {
            bytes,
            zero_bytes,
            wire_bytes: stats.wire_bytes,
            rounds,
            seconds,
            cpu_seconds,
            memory_bytes: self.peak.bytes(),
            times: self.session.times(),
            interfaces,
            received: Received::default(),
            verified: false,
        })
    }

    /// Waits for the end of the round: how many pages it placed, and how many of them were zero.
    fn wait_placed(&mut self) -> Result<(u64, u64), BenchError> {
        loop {
            match self.events.recv_timeout(LOOK) {
                Ok(SessionEvent::Placed { stats, .. }) => return Ok((stats.pages, stats.zero_pages)),
                Ok(SessionEvent::Failed { cause, .. } | SessionEvent::ChannelLost { cause, .. }) => {
                    // A figure for fewer channels than were asked for would mislead.
                    return Err(cause.into());
                }
                Ok(SessionEvent::CarrierChanged { reason, .. }) => return Err(BenchError::NoRdma(reason)),
                Ok(SessionEvent::ChannelReturned { .. } | SessionEvent::PathLeftOut { .. }) => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.peak.look();
                }
                Err(RecvTimeoutError::Disconnected) => return Err(BenchError::Gone),
            }
        }
    }
}

/// The pages of the next round; none when the last is over, before which the writer stands still.
fn following(
    writer: &mut Writer,
    over: Option<Instant>,
    standing: &mut bool,
) -> Result<Option<PageSet>, BenchError> {
    if *standing {
        return Ok(None);
    }
    loop {
        if over.is_none_or(|over| Instant::now() >= over) {
            writer.pause();
            *standing = true;
        }
        let dirty = writer.drain()?;
        if !dirty.is_empty() {
            return Ok(Some(dirty));
        }
        if *standing {
            return Ok(None);
        }
        std::thread::sleep(NOTHING_WRITTEN);
    }
}
