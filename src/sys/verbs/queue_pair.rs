//! Queue pairs: reliable connections between two devices.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use super::abi;
use super::completion::CompletionQueue;
use super::error::{VerbsError, check};
use super::memory::ProtectionDomain;
use super::work::{ReceiveBatch, SendBatch};

/// How much work a queue pair holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Requests in the send queue.
    pub send: u32,
    /// Buffers in the receive queue.
    pub receive: u32,
    /// Segments of a request.
    pub segments: u32,
}

/// The state of a queue pair: `enum ibv_qp_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueuePairState {
    /// New.
    Reset,
    /// It has a port, and takes receive buffers.
    Initialised,
    /// It receives.
    ReadyToReceive,
    /// It sends.
    ReadyToSend,
    /// It failed, or was made to: all its work is flushed.
    Error,
    /// Another one, by its number.
    Other(i32),
}

/// The other end, and the way there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Its queue pair.
    pub queue_pair: u32,
    /// The number of its first packet; 24 bits.
    pub packet: u32,
    /// Its address.
    pub gid: [u8; 16],
    /// The place of our own address in the port's table.
    pub local_gid_index: u8,
    /// Payload bytes of one packet: 256, 512, 1024, 2048 or 4096, and not more than either port's active MTU.
    pub mtu: u32,
    /// The traffic class of its packets, whose upper six bits are the DSCP.
    pub traffic_class: u8,
}

/// When the other end counts as lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retries {
    /// How long an answer may take: 4.096 us times two to the power of it; 0 is for ever.
    pub timeout: u8,
    /// How often it is asked again, at most 7.
    pub retries: u8,
    /// How often a peer without a receive buffer is asked again; 7 is for ever.
    pub not_ready_retries: u8,
    /// How long to wait before that, by its number in ibv_modify_qp(3); 12 is 0.64 ms.
    pub not_ready_timer: u8,
}

/// How many routers a packet may pass.
const HOP_LIMIT: u8 = 64;

/// A reliable connection (RC).
pub struct QueuePair {
    domain: Arc<ProtectionDomain>,
    // Held so that they outlive it.
    _queues: [Arc<CompletionQueue>; 2],
    raw: NonNull<abi::Qp>,
}

// SAFETY: libibverbs may be called from any thread, and locks where it has to.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl std::fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "queue pair {} of {:?}", self.number(), self.domain.context)
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: it exists, and this is the only time that it is destroyed.
        unsafe { (self.domain.context.library.destroy_qp)(self.raw.as_ptr()) };
    }
}

impl QueuePair {
    /// A new queue pair whose requests complete in `sent` and whose receives in `received`: ibv_create_qp(3).
    ///
    /// # Errors
    /// [`VerbsError::QueuePair`], for depths that the device does not have too.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        sent: &Arc<CompletionQueue>,
        received: &Arc<CompletionQueue>,
        depths: Depths,
    ) -> Result<Self, VerbsError> {
        let mut wanted = abi::QpInitAttr {
            qp_context: std::ptr::null_mut(),
            send_cq: sent.raw.as_ptr(),
            recv_cq: received.raw.as_ptr(),
            srq: std::ptr::null_mut(),
            cap: abi::QpCap {
                max_send_wr: depths.send,
                max_recv_wr: depths.receive,
                max_send_sge: depths.segments,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: abi::IBV_QPT_RC as i32,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queues exist, and the queue pair holds them. Should they be of different devices, the kernel
        // does not find the queues and refuses.
        let raw = unsafe { (domain.context.library.create_qp)(domain.raw.as_ptr(), &raw mut wanted) };
        let raw = NonNull::new(raw).ok_or_else(|| VerbsError::QueuePair(io::Error::last_os_error()))?;
        Ok(Self { domain: Arc::clone(domain), _queues: [Arc::clone(sent), Arc::clone(received)], raw })
    }

    /// The number by which the peer names it.
    #[must_use]
    pub fn number(&self) -> u32 {
        // SAFETY: the library keeps the structure until the queue pair is destroyed.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    /// Gives a new queue pair its port, and says whether the peer may write to memory of the domain.
    ///
    /// # Errors
    /// [`VerbsError::Modify`].
    pub fn initialise(&self, port: u8, peer_writes: bool) -> Result<(), VerbsError> {
        let access = if peer_writes { abi::IBV_ACCESS_REMOTE_WRITE } else { 0 };
        let values = abi::QpAttr {
            qp_state: abi::IBV_QPS_INIT as i32,
            port_num: port,
            qp_access_flags: access,
            ..abi::QpAttr::default()
        };
        let mask = abi::IBV_QP_STATE | abi::IBV_QP_PKEY_INDEX | abi::IBV_QP_PORT | abi::IBV_QP_ACCESS_FLAGS;
        self.modify(values, mask, "initialised")
    }

    /// Names the other end to an initialised one, which receives from then on.
    ///
    /// # Errors
    /// [`VerbsError::Modify`].
    pub fn ready_to_receive(&self, port: u8, remote: &Remote, retries: &Retries) -> Result<(), VerbsError> {
        let to = "ready to receive";
        let mtu = match remote.mtu {
            256 | 512 | 1024 | 2048 | 4096 => remote.mtu.trailing_zeros() as i32 - 7,
            _ => return Err(VerbsError::Modify { to, source: io::ErrorKind::InvalidInput.into() }),
        };
        let route = abi::GlobalRoute {
            dgid: abi::Gid { raw: remote.gid },
            sgid_index: remote.local_gid_index,
            hop_limit: HOP_LIMIT,
            traffic_class: remote.traffic_class,
            ..abi::GlobalRoute::default()
        };
        let values = abi::QpAttr {
            qp_state: abi::IBV_QPS_RTR as i32,
            path_mtu: mtu,
            dest_qp_num: remote.queue_pair,
            rq_psn: remote.packet,
            min_rnr_timer: retries.not_ready_timer,
            ah_attr: abi::AhAttr { grh: route, is_global: 1, port_num: port, ..abi::AhAttr::default() },
            ..abi::QpAttr::default()
        };
        let mask = abi::IBV_QP_STATE
            | abi::IBV_QP_AV
            | abi::IBV_QP_PATH_MTU
            | abi::IBV_QP_DEST_QPN
            | abi::IBV_QP_RQ_PSN
            | abi::IBV_QP_MAX_DEST_RD_ATOMIC
            | abi::IBV_QP_MIN_RNR_TIMER;
        self.modify(values, mask, to)
    }

    /// Lets one that receives send too; `packet` is the number of its first packet, which the peer was told.
    ///
    /// # Errors
    /// [`VerbsError::Modify`].
    pub fn ready_to_send(&self, packet: u32, retries: &Retries) -> Result<(), VerbsError> {
        let values = abi::QpAttr {
            qp_state: abi::IBV_QPS_RTS as i32,
            sq_psn: packet,
            timeout: retries.timeout,
            retry_cnt: retries.retries,
            rnr_retry: retries.not_ready_retries,
            ..abi::QpAttr::default()
        };
        let mask = abi::IBV_QP_STATE
            | abi::IBV_QP_SQ_PSN
            | abi::IBV_QP_TIMEOUT
            | abi::IBV_QP_RETRY_CNT
            | abi::IBV_QP_RNR_RETRY
            | abi::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(values, mask, "ready to send")
    }

    /// Gives it up: all its work completes as flushed.
    ///
    /// # Errors
    /// [`VerbsError::Modify`].
    pub fn give_up(&self) -> Result<(), VerbsError> {
        let values = abi::QpAttr { qp_state: abi::IBV_QPS_ERR as i32, ..abi::QpAttr::default() };
        self.modify(values, abi::IBV_QP_STATE, "given up")
    }

    /// ibv_modify_qp(3).
    fn modify(&self, mut values: abi::QpAttr, mask: u32, to: &'static str) -> Result<(), VerbsError> {
        let library = self.domain.context.library;
        // SAFETY: the queue pair exists; the library reads one structure.
        check(unsafe { (library.modify_qp)(self.raw.as_ptr(), &raw mut values, mask as i32) })
            .map_err(|source| VerbsError::Modify { to, source })
    }

    /// Its state as the device has it: ibv_query_qp(3).
    ///
    /// # Errors
    /// [`VerbsError::QueryQueuePair`].
    pub fn state(&self) -> Result<QueuePairState, VerbsError> {
        let mut values = abi::QpAttr::default();
        // SAFETY: pointers and numbers, of which zero is valid.
        let mut made: abi::QpInitAttr = unsafe { std::mem::zeroed() };
        let library = self.domain.context.library;
        // SAFETY: the queue pair exists; the library writes two structures.
        let answer = unsafe {
            (library.query_qp)(self.raw.as_ptr(), &raw mut values, abi::IBV_QP_STATE as i32, &raw mut made)
        };
        check(answer).map_err(VerbsError::QueryQueuePair)?;
        Ok(match u32::try_from(values.qp_state) {
            Ok(abi::IBV_QPS_RESET) => QueuePairState::Reset,
            Ok(abi::IBV_QPS_INIT) => QueuePairState::Initialised,
            Ok(abi::IBV_QPS_RTR) => QueuePairState::ReadyToReceive,
            Ok(abi::IBV_QPS_RTS) => QueuePairState::ReadyToSend,
            Ok(abi::IBV_QPS_ERR) => QueuePairState::Error,
            _ => QueuePairState::Other(values.qp_state),
        })
    }

    /// Posts all requests of a batch, in order: ibv_post_send(3). The batch stays as it is.
    ///
    /// # Errors
    /// [`VerbsError::Post`], which says how many were taken.
    pub fn post_send(&self, batch: &mut SendBatch) -> Result<(), VerbsError> {
        let Some(first) = batch.linked() else { return Ok(()) };
        let mut bad = std::ptr::null_mut();
        // SAFETY: the library keeps the queue pair and its context until they are destroyed.
        let call = unsafe { (*(*self.raw.as_ptr()).context).ops.post_send };
        let call =
            call.ok_or_else(|| VerbsError::Post { posted: 0, source: io::ErrorKind::Unsupported.into() })?;
        // SAFETY: the list and its segments are in the batch, which is borrowed; the driver has copied them when it returns.
        // The segments lie in registered memory, or the device refuses their keys.
        check(unsafe { call(self.raw.as_ptr(), first, &raw mut bad) })
            .map_err(|source| VerbsError::Post { posted: position(first, bad), source })
    }

    /// Posts all buffers of a batch, in order: ibv_post_recv(3). The batch stays as it is.
    ///
    /// # Errors
    /// As [`QueuePair::post_send`].
    pub fn post_receive(&self, batch: &mut ReceiveBatch) -> Result<(), VerbsError> {
        let Some(first) = batch.linked() else { return Ok(()) };
        let mut bad = std::ptr::null_mut();
        // SAFETY: as in `post_send`.
        let call = unsafe { (*(*self.raw.as_ptr()).context).ops.post_recv };
        let call =
            call.ok_or_else(|| VerbsError::Post { posted: 0, source: io::ErrorKind::Unsupported.into() })?;
        // SAFETY: as in `post_send`.
        check(unsafe { call(self.raw.as_ptr(), first, &raw mut bad) })
            .map_err(|source| VerbsError::Post { posted: position(first, bad), source })
    }
}

/// How many requests stand before the one that was not taken; 0 when the driver does not name it.
fn position<T>(first: *mut T, bad: *mut T) -> usize {
    (bad as usize).checked_sub(first as usize).map_or(0, |bytes| bytes / size_of::<T>())
}
