//! Work requests, gathered until they are posted together.

use super::abi;

/// A range of registered memory, as the device names it ([`super::MemoryRegion::segment`]). A device refuses a key that it did
/// not give, and what is outside the memory that the key is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: u64,
    /// How long it is.
    pub bytes: u32,
    /// The local key of its memory.
    pub key: u32,
}

impl From<Segment> for abi::Sge {
    fn from(segment: Segment) -> Self {
        Self { addr: segment.address, length: segment.bytes, lkey: segment.key }
    }
}

/// What is done with the segments of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOperation {
    /// They are written to the peer's memory, one behind the other.
    Write {
        /// Where to, as the peer addresses it.
        address: u64,
        /// The key that the peer gave.
        key: u32,
        /// With this, the peer is told by a receive that completes, and gets the number.
        immediate: Option<u32>,
    },
    /// They are sent as a message.
    Send {
        /// A number that goes with it.
        immediate: Option<u32>,
    },
}

/// Requests for a send queue: ibv_post_send(3). It keeps its room when it is cleared, so reuse it.
#[derive(Default)]
pub struct SendBatch {
    requests: Vec<abi::SendWr>,
    segments: Vec<abi::Sge>,
}

// SAFETY: its pointers are set when it is posted, by who has it mutably, and not used afterwards.
unsafe impl Send for SendBatch {}
// SAFETY: as above.
unsafe impl Sync for SendBatch {}

impl SendBatch {
    /// Nothing to do yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a request. Of one that is not `signalled` only a failure is completed; every queue needs a signalled one now and
    /// then, or it fills up.
    pub fn push(&mut self, id: u64, operation: SendOperation, segments: &[Segment], signalled: bool) {
        self.segments.extend(segments.iter().copied().map(abi::Sge::from));
        let (opcode, immediate, address, key) = match operation {
            SendOperation::Write { address, key, immediate: None } => {
                (abi::IBV_WR_RDMA_WRITE, 0, address, key)
            }
            SendOperation::Write { address, key, immediate: Some(number) } => {
                (abi::IBV_WR_RDMA_WRITE_WITH_IMM, number, address, key)
            }
            SendOperation::Send { immediate: None } => (abi::IBV_WR_SEND, 0, 0, 0),
            SendOperation::Send { immediate: Some(number) } => (abi::IBV_WR_SEND_WITH_IMM, number, 0, 0),
        };
        self.requests.push(abi::SendWr {
            wr_id: id,
            next: std::ptr::null_mut(),
            sg_list: std::ptr::null_mut(),
            num_sge: segments.len() as i32,
            opcode: opcode as i32,
            send_flags: if signalled { abi::IBV_SEND_SIGNALED } else { 0 },
            imm_data: immediate.to_be(),
            remote_addr: address,
            rkey: key,
            rest: [0; 9],
        });
    }

    /// How many requests it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Forgets all requests.
    pub fn clear(&mut self) {
        self.requests.clear();
        self.segments.clear();
    }

    /// The requests as the list that the library wants, valid until the batch is used again.
    pub(super) fn linked(&mut self) -> Option<*mut abi::SendWr> {
        let first = self.requests.as_mut_ptr();
        let mut segment = self.segments.as_mut_ptr();
        let count = self.requests.len();
        for (index, request) in self.requests.iter_mut().enumerate() {
            request.sg_list = segment;
            segment = segment.wrapping_add(request.num_sge as usize);
            request.next =
                if index + 1 < count { first.wrapping_add(index + 1) } else { std::ptr::null_mut() };
        }
        (count > 0).then_some(first)
    }
}

/// Buffers for a receive queue: ibv_post_recv(3).
#[derive(Default)]
pub struct ReceiveBatch {
    requests: Vec<abi::RecvWr>,
    segments: Vec<abi::Sge>,
}

// SAFETY: as for a SendBatch.
unsafe impl Send for ReceiveBatch {}
// SAFETY: as above.
unsafe impl Sync for ReceiveBatch {}

impl ReceiveBatch {
    /// No buffer yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a buffer, or without a segment a place for a write that announces itself.
    pub fn push(&mut self, id: u64, segment: Option<Segment>) {
        self.segments.extend(segment.map(abi::Sge::from));
        self.requests.push(abi::RecvWr {
            wr_id: id,
            next: std::ptr::null_mut(),
            sg_list: std::ptr::null_mut(),
            num_sge: i32::from(segment.is_some()),
        });
    }

    /// How many buffers it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Forgets all buffers.
    pub fn clear(&mut self) {
        self.requests.clear();
        self.segments.clear();
    }

    /// As [`SendBatch::linked`].
    pub(super) fn linked(&mut self) -> Option<*mut abi::RecvWr> {
        let first = self.requests.as_mut_ptr();
        let mut segment = self.segments.as_mut_ptr();
        let count = self.requests.len();
        for (index, request) in self.requests.iter_mut().enumerate() {
            request.sg_list = segment;
            segment = segment.wrapping_add(request.num_sge as usize);
            request.next =
                if index + 1 < count { first.wrapping_add(index + 1) } else { std::ptr::null_mut() };
        }
        (count > 0).then_some(first)
    }
}
