//! `pageferry bench server`: receives memory from whoever comes, one sender at a time, and tells what that cost.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, select, unbounded};

use super::BenchError;
use super::machine::{Machine, PeakMemory, memory_left, page_faults};
use super::message::{FromDestination, FromSource, Receive, Received, VERSION, encode};
use super::options::ServerOptions;
use crate::engine::cpu::CpuMeter;
use crate::engine::source::{MigrationId, Secret};
use crate::engine::{chain, draw};
use crate::host::exit::Exit;
use crate::host::hex;
use crate::host::logging;
use crate::layout::RamLayout;
use crate::memory::huge::HugeFiller;
use crate::memory::snapshot::MemoryDigest;
use crate::memory::{Backing, GuestMemory, HugePages};
use crate::session::{
    Capabilities, ControlLink, DestinationEvent, DestinationSession, Encryption, LinkEvent, Listener,
    ListenerEvent, ListenerOptions, PendingLink, RdmaSupport, SessionError,
};
use crate::units::{Bytes, Run};

/// How often a transfer is looked at while it lasts.
const LOOK: Duration = Duration::from_millis(50);
/// How much more than announced may come before a sender is cut off: what comes between two looks.
const SLACK: u64 = 1 << 30;
/// How long the last words to a sender may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// Receives until it is ended, or until its first sender has gone if it is to.
#[must_use]
pub fn serve(options: &ServerOptions) -> Exit {
    logging::start(if options.verbose { "info" } else { "warn" });
    match listen(options) {
        Ok(()) => Exit::Completed,
        Err(error) => {
            eprintln!("pageferry: {}", chain(&error));
            Exit::Failed
        }
    }
}

fn listen(options: &ServerOptions) -> Result<(), BenchError> {
    let (sender, incoming) = unbounded();
    let listener = Listener::bind(&options.listen, ListenerOptions::default(), sender)?;
    announce(options, listener.local_addresses())?;
    if options.supervised {
        std::thread::spawn(|| {
            // The other end holds the pipe: when it is gone, so are we.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            std::process::exit(0);
        });
    }
    while let Ok(event) = incoming.recv() {
        let ListenerEvent::NewMigration { link, .. } = event else { continue };
        let remote = link.remote();
        tracing::info!(%remote, "a sender");
        match Client::take(link).and_then(|client| client.obey(&listener, &incoming)) {
            Ok(()) => tracing::info!(%remote, "the sender is done"),
            Err(error) => tracing::warn!(%remote, "the sender is gone: {}", chain(&error)),
        }
        if options.once {
            break;
        }
    }
    Ok(())
}

fn announce(options: &ServerOptions, addresses: &[SocketAddr]) -> Result<(), BenchError> {
    let mut out = std::io::stdout().lock();
    let said = if options.supervised {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        writeln!(out, "{}", serde_json::json!({ "listening": addresses }))
    } else {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        writeln!(
            out,
            "Listening on {}. Whoever reaches it may fill this machine's memory: it does not ask who comes.",
            addresses.join(", ")
        )
    };
    said.and_then(|()| out.flush()).map_err(BenchError::Output)
}

/// A sender.
struct Client {
    link: ControlLink,
    events: Receiver<LinkEvent>,
    /// What was received into last: memory that is to be warm is used again.
    memory: Option<GuestMemory>,
    transfer: Option<Transfer>,
    rdma: RdmaSupport,
}

/// Memory that is being received.
struct Transfer {
    migration: MigrationId,
    session: DestinationSession,
    events: Receiver<DestinationEvent>,
    in_use_bytes: u64,
    cpu: CpuMeter,
    faults: u64,
    peak: PeakMemory,
}

impl Client {
    fn take(pending: PendingLink) -> Result<Self, BenchError> {
        let (sender, events) = unbounded();
        let link = pending.accept(sender)?;
        Ok(Self { link, events, memory: None, transfer: None, rdma: RdmaSupport::of_this_host() })
    }

    /// Does what the sender says until it goes. Others are turned away meanwhile: two at a time would measure each other.
    fn obey(mut self, listener: &Listener, incoming: &Receiver<ListenerEvent>) -> Result<(), BenchError> {
        let outcome = loop {
            let event = select! {
                recv(incoming) -> event => {
                    if let Ok(ListenerEvent::NewMigration { link, .. }) = event {
                        link.refuse("another measurement is under way; try again when it is over");
                    }
                    continue;
                }
                recv(self.events) -> event => event.map_err(|_| BenchError::Gone)?,
                default(LOOK) => match self.look() {
                    Ok(()) => continue,
                    Err(error) => break Err(error),
                },
            };
            match event {
                LinkEvent::Message(text) => {
                    if let Err(error) = self.told(&text, listener) {
                        break Err(error);
                    }
                }
                LinkEvent::Lost { cause: SessionError::ClosedByPeer } => break Ok(()),
                LinkEvent::Lost { cause } => break Err(cause.into()),
                LinkEvent::Interrupted { .. } | LinkEvent::Resumed { .. } => {}
            }
        };
        if let Err(error) = &outcome {
            self.say(&FromDestination::Refused { why: chain(error) });
        }
        if let Some(transfer) = self.transfer.take() {
            listener.unregister(transfer.migration);
        }
        self.link.flush_and_close(GOODBYE);
        outcome
    }

    fn say(&self, message: &FromDestination) {
        self.link.send(encode(message));
    }

    fn told(&mut self, text: &[u8], listener: &Listener) -> Result<(), BenchError> {
        match FromSource::decode(text)? {
            FromSource::Hello { version: VERSION } => {
                let can = Capabilities::with_rdma(self.rdma.absent()).names();
                self.say(&FromDestination::Hello { version: VERSION, machine: Machine::this(), can });
                Ok(())
            }
            FromSource::Hello { version } => Err(BenchError::Version { theirs: version, ours: VERSION }),
            FromSource::Receive(receive) => self.receive(&receive, listener),
            FromSource::Done => self.done(listener),
        }
    }

    fn receive(&mut self, receive: &Receive, listener: &Listener) -> Result<(), BenchError> {
        let migration = hex::decode(&receive.migration).map(MigrationId).ok_or(BenchError::OutOfTurn)?;
        if self.transfer.is_some() {
            return Err(BenchError::OutOfTurn);
        }
        let kept = self
            .memory
            .take()
            .filter(|memory| receive.warm && memory.layout().total_bytes() == receive.memory_bytes);
        if kept.is_none()
            && let Some(why) = receive.objection(memory_left()?)
        {
            self.say(&FromDestination::Refused { why });
            return Ok(());
        }
        let memory = match kept {
            Some(memory) => memory,
            None => fresh(receive.memory_bytes)?,
        };
        if receive.warm {
            // Populates it as what arrives does, and takes out what came last.
            let all = Run::new(0, memory.layout().total_pages());
            HugeFiller::default().prepare(&memory, &[all], |_| true);
            memory.zero_run(all);
        }
        let secret = Secret(draw().map_err(BenchError::Random)?);
        let (sender, events): (Sender<DestinationEvent>, _) = unbounded();
        let plain = Encryption::default();
        let session = DestinationSession::with(
            memory.clone(),
            migration,
            super::LINK_TIMEOUT,
            &self.rdma,
            plain,
            sender,
        );
        listener.register(migration, secret, &session, &self.link);
        let in_use_bytes = if receive.warm { receive.memory_bytes } else { receive.in_use_bytes };
        let (peak, faults, cpu) = (PeakMemory::start(), page_faults(), CpuMeter::start());
        self.memory = Some(memory);
        self.transfer = Some(Transfer { migration, session, events, in_use_bytes, cpu, faults, peak });
        self.say(&FromDestination::Ready { secret: hex::encode(&secret.0) });
        Ok(())
    }

    /// That what comes is no more than was announced, and follows the rules.
    fn look(&mut self) -> Result<(), BenchError> {
        let Some(transfer) = &mut self.transfer else { return Ok(()) };
        let came = transfer.peak.look();
        if came > transfer.in_use_bytes.saturating_add(SLACK) {
            return Err(BenchError::MoreThanAnnounced(Bytes(transfer.in_use_bytes)));
        }
        for event in transfer.events.try_iter() {
            if let DestinationEvent::Violation { cause, .. } = event {
                return Err(cause.into());
            }
        }
        Ok(())
    }

    fn done(&mut self, listener: &Listener) -> Result<(), BenchError> {
        let (Some(mut transfer), Some(memory)) = (self.transfer.take(), &self.memory) else {
            return Err(BenchError::OutOfTurn);
        };
        let cpu_seconds = transfer.cpu.elapsed().as_secs_f64();
        let page_faults = page_faults().saturating_sub(transfer.faults);
        transfer.peak.look();
        listener.unregister(transfer.migration);
        let stats = transfer.session.stats();
        transfer.session.close();
        let digest = MemoryDigest::of_paused(memory).map_err(BenchError::Digest)?;
        self.say(&FromDestination::Received(Received {
            cpu_seconds,
            page_faults,
            placing_seconds: stats.placing.as_secs_f64(),
            unpacking_seconds: stats.unpacking.as_secs_f64(),
            memory_bytes: transfer.peak.bytes(),
            digest: format!("{:032x}", digest.digest),
            nonzero_pages: digest.nonzero_pages,
        }));
        Ok(())
    }
}

fn fresh(bytes: u64) -> Result<GuestMemory, BenchError> {
    let failed = |cause| BenchError::Memory { bytes, cause };
    let layout = RamLayout::flat(bytes).map_err(|error| failed(std::io::Error::other(error)))?;
    GuestMemory::allocate(layout, Backing::Memfd, HugePages::Transparent).map_err(failed)
}
