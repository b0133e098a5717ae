//! What an RDMA channel needs of this host's devices, as traits: [`super::device`] has the real ones, and tests an emulation
//! that can fail at every call.
//!
//! The traits have the shape of [`crate::sys::verbs`], and its errors.

use std::fmt::Debug;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Reason;
use crate::memory::Mapping;
pub use crate::sys::verbs::{
    Access, Completion, Depths, Remote, Retries, Segment, SendOperation, VerbsError,
};

/// The RDMA devices of a host.
pub trait Fabric: Debug + Send + Sync {
    /// Why there is none that a migration can use; `None` when there is one.
    fn reason(&self) -> Option<Reason>;

    /// The port that has an address of this host.
    ///
    /// # Errors
    /// Why there is none.
    fn port_at(&self, address: IpAddr) -> Result<Port, Reason>;

    /// What registered memory belongs to, on the device of that name.
    ///
    /// # Errors
    /// What the device says.
    fn domain(&self, device: &str) -> Result<Arc<dyn Domain>, VerbsError>;

    /// Why this process cannot register so many bytes with that device, if so.
    fn reason_against_locking(&self, device: &str, bytes: u64) -> Option<Reason>;
}

/// A port of a device, and one of its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The device's name, such as `mlx5_0`.
    pub device: String,
    /// The port's number, from 1.
    pub number: u8,
    /// The address.
    pub gid: [u8; 16],
    /// Its place in the port's table.
    pub gid_index: u8,
    /// Payload bytes of a packet.
    pub mtu: u32,
    /// Requests that a queue pair holds at most.
    pub queue_depth: u32,
    /// What it carries, where it says.
    pub bits_per_second: Option<u64>,
}

/// A protection domain: memory and queue pairs that belong together.
pub trait Domain: Debug + Send + Sync {
    /// Registers a range of one of the mappings.
    ///
    /// # Errors
    /// [`VerbsError::Register`] or [`VerbsError::OutOfRange`].
    fn register(
        &self,
        mappings: &Arc<[Mapping]>,
        which: usize,
        offset: u64,
        bytes: u64,
        access: Access,
    ) -> Result<Arc<dyn Region>, VerbsError>;

    /// A queue pair with two completion queues of its own.
    ///
    /// # Errors
    /// What the device says.
    fn queue_pair(&self, depths: Depths) -> Result<Connection, VerbsError>;

    /// One of them becomes readable when something happens to the device, for [`Domain::is_gone`] to look at.
    fn watched(&self) -> [BorrowedFd<'_>; 2];

    /// Whether the device is being taken away. Its driver waits until all that was made of it is given back.
    fn is_gone(&self) -> bool;
}

/// A registered range; dropping it takes it from the device.
pub trait Region: Debug + Send + Sync {
    /// Where it begins, as a peer addresses it.
    fn address(&self) -> u64;
    /// The key by which a peer may write it.
    fn remote_key(&self) -> u32;
    /// A part of it, for a work request.
    ///
    /// # Errors
    /// [`VerbsError::OutOfRange`].
    fn segment(&self, offset: u64, bytes: u32) -> Result<Segment, VerbsError>;
}

/// A queue pair and where its work completes.
#[derive(Debug)]
pub struct Connection {
    /// The queue pair. When it is dropped the device no longer writes or reads memory through it.
    pub queue_pair: Box<dyn QueuePair>,
    /// Where its requests complete.
    pub sent: Arc<dyn Completions>,
    /// Where its receive buffers complete.
    pub received: Arc<dyn Completions>,
}

/// A request of one segment, or of no bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The number that its completion has.
    pub id: u64,
    /// What is to be done.
    pub operation: SendOperation,
    /// With what.
    pub segment: Option<Segment>,
    /// Whether its success is completed too.
    pub signalled: bool,
}

/// A reliable connection.
pub trait QueuePair: Debug + Send + Sync {
    /// The number by which the peer names it.
    fn number(&self) -> u32;

    /// Lets the peer write, and messages come.
    ///
    /// # Errors
    /// [`VerbsError::Modify`].
    fn receive_from(
        &self,
        port: u8,
        remote: &Remote,
        retries: &Retries,
        writes: bool,
    ) -> Result<(), VerbsError>;

    /// After [`QueuePair::receive_from`], sends too; `packet` is the number of the first one.
    ///
    /// # Errors
    /// [`VerbsError::Modify`].
    fn send_from(&self, packet: u32, retries: &Retries) -> Result<(), VerbsError>;

    /// Posts requests, in order and together.
    ///
    /// # Errors
    /// [`VerbsError::Post`]; some may have been taken.
    fn post_send(&self, requests: &[Request]) -> Result<(), VerbsError>;

    /// Posts buffers, each with the number that its completion has.
    ///
    /// # Errors
    /// [`VerbsError::Post`]; some may have been taken.
    fn post_receive(&self, buffers: &[(u64, Segment)]) -> Result<(), VerbsError>;

    /// Gives it up: what is under way ends as flushed. Failing means that it is of no use already.
    fn give_up(&self);
}

/// A completion queue.
pub trait Completions: Debug + Send + Sync {
    /// Asks for one event at the next completion. What completed before makes none, so poll after it.
    ///
    /// # Errors
    /// [`VerbsError::Arm`].
    fn arm(&self) -> Result<(), VerbsError>;

    /// Takes the events that came.
    ///
    /// # Errors
    /// [`VerbsError::Event`].
    fn take_events(&self) -> Result<(), VerbsError>;

    /// Appends what has completed.
    ///
    /// # Errors
    /// [`VerbsError::Poll`].
    fn poll(&self, completions: &mut Vec<Completion>) -> Result<(), VerbsError>;

    /// What becomes readable with an event.
    fn event_descriptor(&self) -> BorrowedFd<'_>;
}
