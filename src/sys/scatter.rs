//! System calls that take guest RAM by address: gather out of it, scatter into it, without a copy in between.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::mapping::Mapping;

/// The most pieces that one call takes (`UIO_MAXIOV`, see `readv(2)`).
pub const MAX_PIECES: usize = 1024;

/// A checked range of a mapping, to be handed to the kernel.
#[derive(Clone, Copy, Debug)]
pub struct MemorySlice<'a> {
    mapping: &'a Mapping,
    offset: u64,
    bytes: u64,
}

impl<'a> MemorySlice<'a> {
    /// A range of a mapping.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    #[must_use]
    pub fn new(mapping: &'a Mapping, offset: u64, bytes: u64) -> Self {
        mapping.range(offset, bytes);
        Self { mapping, offset, bytes }
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The rest of the range after its first `bytes`.
    ///
    /// # Panics
    /// If the range is shorter.
    #[must_use]
    pub fn skip(self, bytes: u64) -> Self {
        assert!(bytes <= self.bytes, "skipping past a slice");
        Self { mapping: self.mapping, offset: self.offset + bytes, bytes: self.bytes - bytes }
    }

    /// The address of the first byte in this process.
    pub(super) fn address(&self) -> u64 {
        self.mapping.address() + self.offset
    }

    fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.mapping.range(self.offset, self.bytes).cast(),
            iov_len: self.bytes as usize,
        }
    }
}

/// Drops the first `bytes` of a list of slices: what a short read or write has done.
pub fn advance(slices: &mut Vec<MemorySlice<'_>>, mut bytes: u64) {
    let mut done = 0;
    for slice in slices.iter_mut() {
        if slice.bytes > bytes {
            *slice = slice.skip(bytes);
            break;
        }
        bytes -= slice.bytes;
        done += 1;
    }
    slices.drain(..done);
}

fn iovecs(slices: &[MemorySlice<'_>]) -> Vec<libc::iovec> {
    slices.iter().take(MAX_PIECES).map(MemorySlice::iovec).collect()
}

fn answered(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads from a descriptor straight into guest RAM; at most [`MAX_PIECES`] slices. Answers how many bytes came.
///
/// # Errors
/// What `readv(2)` answers.
pub fn readv(from: impl AsFd, into: &[MemorySlice<'_>]) -> io::Result<usize> {
    let pieces = iovecs(into);
    // SAFETY: each piece was checked against a mapping that the slices borrow; the kernel is done when it returns.
    answered(unsafe { libc::readv(from.as_fd().as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) })
}

/// Receives from a socket straight into guest RAM what has come, at most [`MAX_PIECES`] slices, and does not wait. Answers how many
/// bytes came; none when the peer has closed.
///
/// # Errors
/// What `recvmsg(2)` answers: `WouldBlock` when nothing has come.
pub fn receive(from: impl AsFd, into: &[MemorySlice<'_>]) -> io::Result<usize> {
    let mut pieces = iovecs(into);
    // SAFETY: a message header of zeros has no name, no control data and no pieces.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    // SAFETY: as in `readv`; the header and the pieces outlive the call.
    answered(unsafe { libc::recvmsg(from.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// Writes guest RAM to a descriptor, copying; at most [`MAX_PIECES`] slices. Answers how many bytes went.
///
/// # Errors
/// What `writev(2)` answers.
pub fn writev(to: impl AsFd, from: &[MemorySlice<'_>]) -> io::Result<usize> {
    let pieces = iovecs(from);
    // SAFETY: as in `readv`.
    answered(unsafe { libc::writev(to.as_fd().as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) })
}

/// Puts references to guest RAM into a pipe, without copying; answers how many bytes went.
///
/// The pages stay referenced until the pipe's reader (a socket, by `splice`) is done with them, and what is read is what
/// they hold *then*. That is what pre-copy wants: a page changed since is dirty and comes again.
///
/// # Errors
/// What `vmsplice(2)` answers.
pub fn vmsplice(pipe: impl AsFd, from: &[MemorySlice<'_>]) -> io::Result<usize> {
    let pieces = iovecs(from);
    // SAFETY: as in `readv`; the kernel takes its own references to the pages, and without SPLICE_F_GIFT they stay ours.
    answered(unsafe { libc::vmsplice(pipe.as_fd().as_raw_fd(), pieces.as_ptr(), pieces.len(), 0) })
}
