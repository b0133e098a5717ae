//! What an emulated device hands out: regions, queue pairs and completion queues.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::{Network, Pair, failure};
use crate::channel::rdma::fabric::{
    Completion, Completions, QueuePair, Region, Remote, Request, Retries, Segment, VerbsError,
};

#[derive(Debug)]
pub(super) struct EmulatedRegion {
    pub(super) network: Network,
    pub(super) key: u32,
    pub(super) told: u32,
    pub(super) address: u64,
    pub(super) bytes: u64,
}

impl Drop for EmulatedRegion {
    fn drop(&mut self) {
        self.network.lock().memory.remove(&self.key);
    }
}

impl Region for EmulatedRegion {
    fn address(&self) -> u64 {
        self.address
    }

    fn remote_key(&self) -> u32 {
        self.told
    }

    fn segment(&self, offset: u64, bytes: u32) -> Result<Segment, VerbsError> {
        let (length, of) = (u64::from(bytes), self.bytes);
        if offset.checked_add(length).is_none_or(|end| end > of) {
            return Err(VerbsError::OutOfRange { offset, bytes: length, of });
        }
        Ok(Segment { address: self.address + offset, bytes, key: self.key })
    }
}

#[derive(Debug)]
pub(super) struct EmulatedPair {
    pub(super) network: Network,
    pub(super) number: u32,
}

impl Drop for EmulatedPair {
    fn drop(&mut self) {
        self.network.lock().destroy(self.number);
    }
}

impl EmulatedPair {
    fn modify(
        &self,
        to: &'static str,
        change: impl FnOnce(&mut Pair, Option<IpAddr>),
        peer: Option<u32>,
    ) -> Result<(), VerbsError> {
        let mut inner = self.network.lock();
        if inner.fails() {
            return Err(VerbsError::Modify { to, source: failure() });
        }
        let address = peer.and_then(|peer| inner.queue_pairs.get(&peer)).map(|peer| peer.address);
        if let Some(pair) = inner.queue_pairs.get_mut(&self.number) {
            change(pair, address);
        }
        Ok(())
    }
}

impl QueuePair for EmulatedPair {
    fn number(&self) -> u32 {
        self.number
    }

    fn receive_from(&self, _: u8, remote: &Remote, _: &Retries, writes: bool) -> Result<(), VerbsError> {
        let connect = |pair: &mut Pair, address| {
            (pair.peer, pair.peer_address, pair.writes) = (Some(remote.queue_pair), address, writes);
            pair.mtu = remote.mtu;
        };
        self.modify("ready to receive", connect, Some(remote.queue_pair))
    }

    fn send_from(&self, _: u32, retries: &Retries) -> Result<(), VerbsError> {
        self.modify("ready to send", |pair, _| (pair.sends, pair.retries) = (true, Some(*retries)), None)
    }

    fn post_send(&self, requests: &[Request]) -> Result<(), VerbsError> {
        let mut inner = self.network.lock();
        let fails = inner.fails();
        let Some(pair) = inner.queue_pairs.get_mut(&self.number) else {
            return Err(VerbsError::Post { posted: 0, source: io::ErrorKind::NotFound.into() });
        };
        assert!(pair.sends, "a queue pair that does not send yet");
        assert!(pair.waiting.len() + requests.len() <= pair.depths.send as usize, "the send queue overflows");
        let taken = if fails { requests.len() / 2 } else { requests.len() };
        pair.waiting.extend(&requests[..taken]);
        inner.carry(self.number);
        if fails { Err(VerbsError::Post { posted: taken, source: failure() }) } else { Ok(()) }
    }

    fn post_receive(&self, buffers: &[(u64, Segment)]) -> Result<(), VerbsError> {
        let mut inner = self.network.lock();
        if inner.fails() {
            return Err(VerbsError::Post { posted: 0, source: failure() });
        }
        if let Some(pair) = inner.queue_pairs.get_mut(&self.number) {
            pair.buffers.extend(buffers);
            assert!(pair.buffers.len() <= pair.depths.receive as usize, "the receive queue overflows");
        }
        Ok(())
    }

    fn give_up(&self) {
        let mut inner = self.network.lock();
        let held = inner.held.clone();
        // What a wire keeps is sent already.
        if let Some(pair) =
            inner.queue_pairs.get_mut(&self.number).filter(|pair| !held.contains(&pair.address))
        {
            pair.failed = true;
        }
        inner.carry(self.number);
    }
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Queue {
    network: Network,
    event: OwnedFd,
    done: Mutex<VecDeque<Completion>>,
    armed: AtomicU64,
}

impl Queue {
    pub(super) fn new(network: &Network) -> Result<Arc<Self>, VerbsError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event =
            event.map_err(|errno| VerbsError::CompletionQueue { entries: 0, source: errno.into() })?;
        Ok(Arc::new(Self {
            network: network.clone(),
            event,
            done: Mutex::default(),
            armed: AtomicU64::new(0),
        }))
    }

    pub(super) fn complete(&self, completion: Completion) {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push_back(completion);
        if self.armed.swap(0, Ordering::SeqCst) == 1 {
            rustix::io::write(&self.event, &1u64.to_ne_bytes()).expect("an event");
        }
    }
}

impl Completions for Queue {
    fn arm(&self) -> Result<(), VerbsError> {
        if self.network.lock().fails() {
            return Err(VerbsError::Arm(failure()));
        }
        self.armed.store(1, Ordering::SeqCst);
        Ok(())
    }

    fn take_events(&self) -> Result<(), VerbsError> {
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
        Ok(())
    }

    fn poll(&self, completions: &mut Vec<Completion>) -> Result<(), VerbsError> {
        completions.extend(self.done.lock().unwrap_or_else(PoisonError::into_inner).drain(..));
        Ok(())
    }

    fn event_descriptor(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
