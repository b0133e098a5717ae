//! Completion queues: what became of the work that was posted.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use super::abi;
use super::device::{Context, set_nonblocking};
use super::error::{VerbsError, check};

/// A completion queue with a channel of its own, whose descriptor becomes readable when an event was asked for and came.
pub struct CompletionQueue {
    context: Arc<Context>,
    channel: NonNull<abi::CompChannel>,
    pub(super) raw: NonNull<abi::Cq>,
}

// SAFETY: libibverbs may be called from any thread, and locks where it has to.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl std::fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "completion queue of {:?}", self.context)
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: the queue pairs held it and are gone, and every event that was taken is acknowledged, for which the
        // library would wait. The channel goes after its queue.
        unsafe {
            (self.context.library.destroy_cq)(self.raw.as_ptr());
            (self.context.library.destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}

/// How work ended: `enum ibv_wc_status`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(u32);

impl Status {
    /// It was done.
    pub const SUCCESS: Self = Self(abi::IBV_WC_SUCCESS);
    /// The device has lost track of the queue pair.
    pub const LOCAL_FAULT: Self = Self(abi::IBV_WC_LOC_QP_OP_ERR);
    /// The queue pair failed before its turn came.
    pub const FLUSHED: Self = Self(abi::IBV_WC_WR_FLUSH_ERR);
    /// The peer's memory does not allow it.
    pub const REMOTE_ACCESS: Self = Self(abi::IBV_WC_REM_ACCESS_ERR);
    /// The peer did not answer.
    pub const NO_ANSWER: Self = Self(abi::IBV_WC_RETRY_EXC_ERR);
    /// The peer had no buffer to receive into.
    pub const NOT_READY: Self = Self(abi::IBV_WC_RNR_RETRY_EXC_ERR);

    /// The number in `enum ibv_wc_status`.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }

    /// What it means, as ibv_poll_cq(3) has it.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self.0 {
            0 => "success",
            1 => "local length error",
            2 => "local queue pair error",
            4 => "local protection error: the memory is not registered",
            5 => "flushed, because the queue pair had failed before",
            6 => "memory window error",
            7 => "the peer's answer was wrong",
            8 => "local access error",
            9 => "the peer says that the request is wrong",
            10 => "the peer's memory does not allow it",
            11 => "the peer could not do it",
            12 => "the peer did not answer",
            13 => "the peer had no buffer to receive into",
            _ => "an error of the device",
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (status {})", self.words(), self.0)
    }
}

impl std::fmt::Debug for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// What kind of work it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A message that was sent.
    Send,
    /// A write to the peer's memory.
    Write,
    /// A message that came.
    Receive,
    /// A write of the peer to this memory that announced itself.
    ReceiveWrite,
    /// Something else, by its number in `enum ibv_wc_opcode`.
    Other(u32),
}

/// Work that ended. Of one that failed only the number, the status and the queue pair are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The number that it was posted with.
    pub id: u64,
    /// How it ended.
    pub status: Status,
    /// The queue pair.
    pub queue_pair: u32,
    /// What it was.
    pub work: Work,
    /// Bytes that came.
    pub bytes: u32,
    /// The number that came with it.
    pub immediate: Option<u32>,
}

impl From<&abi::Wc> for Completion {
    fn from(raw: &abi::Wc) -> Self {
        Self {
            id: raw.wr_id,
            status: Status(raw.status),
            queue_pair: raw.qp_num,
            work: match raw.opcode {
                abi::IBV_WC_SEND => Work::Send,
                abi::IBV_WC_RDMA_WRITE => Work::Write,
                abi::IBV_WC_RECV => Work::Receive,
                abi::IBV_WC_RECV_RDMA_WITH_IMM => Work::ReceiveWrite,
                other => Work::Other(other),
            },
            bytes: raw.byte_len,
            immediate: (raw.wc_flags & abi::IBV_WC_WITH_IMM != 0).then(|| u32::from_be(raw.imm_data)),
        }
    }
}

/// How many completions are taken by one call.
const AT_ONCE: usize = 32;

impl CompletionQueue {
    /// A queue of at least so many entries: ibv_create_cq(3). It must hold all that its queue pairs may have under way,
    /// or it overflows and they fail.
    ///
    /// # Errors
    /// [`VerbsError::CompletionQueue`].
    pub fn new(context: &Arc<Context>, entries: u32) -> Result<Arc<Self>, VerbsError> {
        let failed = |source| VerbsError::CompletionQueue { entries, source };
        let size = i32::try_from(entries).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let library = context.library;
        // SAFETY: the context is open.
        let channel = NonNull::new(unsafe { (library.create_comp_channel)(context.raw.as_ptr()) })
            .ok_or_else(|| failed(io::Error::last_os_error()))?;
        // SAFETY: the context is open and the channel is its own; the pointer between is only handed back.
        let raw = unsafe {
            (library.create_cq)(context.raw.as_ptr(), size, std::ptr::null_mut(), channel.as_ptr(), 0)
        };
        let Some(raw) = NonNull::new(raw) else {
            let cause = io::Error::last_os_error();
            // SAFETY: nothing uses the channel.
            unsafe { (library.destroy_comp_channel)(channel.as_ptr()) };
            return Err(failed(cause));
        };
        let queue = Self { context: Arc::clone(context), channel, raw };
        set_nonblocking(queue.as_fd()).map_err(failed)?;
        Ok(Arc::new(queue))
    }

    /// Asks for one event at the next completion: ibv_req_notify_cq(3). What completed before makes none, so poll after it.
    ///
    /// # Errors
    /// [`VerbsError::Arm`].
    pub fn arm(&self) -> Result<(), VerbsError> {
        // SAFETY: the library keeps the queue and its context until they are destroyed.
        let call = unsafe { (*(*self.raw.as_ptr()).context).ops.req_notify_cq };
        let call = call.ok_or_else(|| VerbsError::Arm(io::ErrorKind::Unsupported.into()))?;
        // SAFETY: the queue exists.
        check(unsafe { call(self.raw.as_ptr(), 0) }).map_err(VerbsError::Arm)
    }

    /// Takes an event, if one came: ibv_get_cq_event(3).
    ///
    /// # Errors
    /// [`VerbsError::Event`].
    pub fn take_event(&self) -> Result<bool, VerbsError> {
        let library = self.context.library;
        let (mut queue, mut tag) = (std::ptr::null_mut::<abi::Cq>(), std::ptr::null_mut::<c_void>());
        // SAFETY: the channel exists; the library writes two pointers.
        if unsafe { (library.get_cq_event)(self.channel.as_ptr(), &raw mut queue, &raw mut tag) } != 0 {
            let cause = io::Error::last_os_error();
            return match cause.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(VerbsError::Event(cause)),
            };
        }
        // SAFETY: the event is of the channel's only queue, and is acknowledged once.
        unsafe { (library.ack_cq_events)(queue, 1) };
        Ok(true)
    }

    /// Appends up to `at_most` completions, and says how many: ibv_poll_cq(3). Never waits.
    ///
    /// # Errors
    /// [`VerbsError::Poll`].
    pub fn poll(&self, at_most: usize, completions: &mut Vec<Completion>) -> Result<usize, VerbsError> {
        // SAFETY: the library keeps the queue and its context until they are destroyed.
        let call = unsafe { (*(*self.raw.as_ptr()).context).ops.poll_cq };
        let call = call.ok_or_else(|| VerbsError::Poll(io::ErrorKind::Unsupported.into()))?;
        let mut raw = [abi::Wc::default(); AT_ONCE];
        let mut taken = 0;
        while taken < at_most {
            let room = (at_most - taken).min(AT_ONCE);
            // SAFETY: the queue exists; the driver writes at most as many entries as there is room for.
            let found = unsafe { call(self.raw.as_ptr(), room as i32, raw.as_mut_ptr()) };
            let found = usize::try_from(found).map_err(|_| {
                VerbsError::Poll(io::Error::from_raw_os_error(found.saturating_neg().max(libc::EIO)))
            })?;
            completions.extend(raw[..found.min(room)].iter().map(Completion::from));
            taken += found;
            if found < room {
                break;
            }
        }
        Ok(taken)
    }

    /// How many entries it has.
    #[must_use]
    pub fn entries(&self) -> u32 {
        // SAFETY: the library keeps the queue until it is destroyed.
        u32::try_from(unsafe { (*self.raw.as_ptr()).cqe }).unwrap_or(0)
    }
}

impl AsFd for CompletionQueue {
    /// What becomes readable when [`CompletionQueue::take_event`] has something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the channel's, which the borrow keeps.
        unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd) }
    }
}
