//! Memory that a guest may write at any moment: mapped here, copied volatile, never referenced.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::huge::{self, Advised, HUGE_PAGE};
use crate::units::PAGE_SIZE;

/// What the pages of a mapping are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// 4 KiB pages.
    #[default]
    No,
    /// Transparent huge pages where the kernel has them to give: for all of private memory (`MADV_HUGEPAGE`), and of a file's
    /// for what arrives in one piece.
    Transparent,
    /// Pages of 2 MiB from the hugetlb pool; creating the mapping fails when the pool is too small.
    Hugetlb,
}

/// A range of this process's address space that holds guest RAM.
///
/// All access is by bounds-checked volatile copies or by system calls that take addresses.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    /// The file behind the mapping and the offset of its first byte in it.
    file: Option<(Arc<OwnedFd>, u64)>,
    huge: HugePages,
    /// The same memory once more, by which huge pages are asked for; made at its first use.
    pub(super) advised: OnceLock<Option<Advised>>,
    owner: Owner,
}

enum Owner {
    /// Mapped here; unmapped on drop.
    Us,
    /// Mapped by the embedder, who keeps it mapped while this value lives.
    Other(#[expect(dead_code, reason = "held, never read")] Arc<dyn Any + Send + Sync>),
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Us => "Us",
            Self::Other(_) => "Other",
        })
    }
}

// SAFETY: a Mapping is an address range; all access through it is volatile or atomic or by the kernel, and nothing in it
// depends on the thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent volatile access is what the type is for (a torn page is sent again by the dirty log).
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private anonymous memory.
    ///
    /// # Errors
    /// What `mmap(2)` answers; `EINVAL` for a length that is 0 or no multiple of the page size.
    pub fn anonymous(bytes: u64, huge: HugePages) -> io::Result<Self> {
        let length = checked_length(bytes)?;
        let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        if huge == HugePages::Hugetlb {
            flags |= MapFlags::HUGETLB;
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        Self::adopt(start, length, None, huge)
    }

    /// Shared memory over a new memfd called `name` (seen in `/proc`), or over a file without a name that can have huge pages
    /// where those are wanted and this process may mount.
    ///
    /// # Errors
    /// What `memfd_create(2)`, `ftruncate(2)` or `mmap(2)` answers.
    pub fn memfd(name: &str, bytes: u64, huge: HugePages) -> io::Result<Self> {
        checked_length(bytes)?;
        let mut flags = MemfdFlags::CLOEXEC;
        if huge == HugePages::Hugetlb {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let of_huge_pages = (huge == HugePages::Transparent && bytes >= HUGE_PAGE).then(huge::file);
        let file = match of_huge_pages {
            Some(Ok(file)) => file,
            Some(Err(_)) | None => memfd_create(name, flags)?,
        };
        ftruncate(&file, bytes)?;
        Self::map(Arc::new(file), 0, bytes, huge)
    }

    /// Shared memory over a file that someone else may map too. Gets huge pages where its file system has them
    /// ([`HugePages::Transparent`]).
    ///
    /// # Errors
    /// What `mmap(2)` answers, or `EINVAL` when the file ends before the range does: access past the end would kill us.
    pub fn shared_file(file: OwnedFd, offset: u64, bytes: u64) -> io::Result<Self> {
        let size = rustix::fs::fstat(&file)?.st_size as u64;
        if offset.checked_add(bytes).is_none_or(|end| end > size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the memory file has {size} bytes, less than offset {offset} + {bytes} bytes"),
            ));
        }
        Self::map(Arc::new(file), offset, bytes, HugePages::Transparent)
    }

    /// Memory that the embedder has mapped: `owner` is kept until the mapping is dropped, and keeps it mapped.
    ///
    /// # Safety
    /// `start .. start + bytes` is mapped readable and writable, page aligned, for as long as `owner` lives, and no Rust
    /// reference to any byte of it exists while this value does.
    ///
    /// # Errors
    /// `EINVAL` for a null or unaligned start or a length that is 0 or no multiple of the page size.
    pub unsafe fn from_raw(
        start: *mut u8,
        bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> io::Result<Self> {
        let length = checked_length(bytes)?;
        let start = NonNull::new(start)
            .filter(|start| (start.as_ptr() as u64).is_multiple_of(PAGE_SIZE))
            .ok_or(rustix::io::Errno::INVAL)?;
        Ok(Self {
            start,
            bytes: length,
            file: None,
            huge: HugePages::No,
            advised: OnceLock::new(),
            owner: Owner::Other(owner),
        })
    }

    fn map(file: Arc<OwnedFd>, offset: u64, bytes: u64, huge: HugePages) -> io::Result<Self> {
        let length = checked_length(bytes)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        if huge == HugePages::Hugetlb || bytes < HUGE_PAGE {
            // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
            let start = unsafe { mmap(std::ptr::null_mut(), length, protection, flags, &file, offset) }?;
            return Self::adopt(start, length, Some((file, offset)), huge);
        }
        let start = map_aligned(file.as_fd(), offset, length)?;
        Self::adopt(start, length, Some((file, offset)), huge)
    }

    fn adopt(
        start: *mut std::ffi::c_void,
        bytes: usize,
        file: Option<(Arc<OwnedFd>, u64)>,
        huge: HugePages,
    ) -> io::Result<Self> {
        let start = NonNull::new(start.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)?;
        let mapping = Self { start, bytes, file, huge, advised: OnceLock::new(), owner: Owner::Us };
        // Of a file each fault would then make a huge page, however little is written: see `make_huge`.
        if huge == HugePages::Transparent && mapping.file.is_none() {
            // A kernel without THP refuses; the memory is as good without.
            let _ = mapping.advise(Advice::LinuxHugepage);
        }
        Ok(mapping)
    }

    fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: the range is ours, and the advice that this module gives drops no content.
        Ok(unsafe { madvise(self.start.as_ptr().cast(), self.bytes, advice) }?)
    }

    /// The same memory as somebody else's, who keeps it mapped.
    #[cfg(test)]
    pub(crate) fn lent(owner: Arc<Self>) -> Self {
        let (start, bytes) = (owner.start.as_ptr(), owner.bytes());
        // SAFETY: `owner` is a mapping of that range, and is kept.
        unsafe { Self::from_raw(start, bytes, owner) }.expect("the range of a mapping")
    }

    /// Has the kernel write the content out and take it out of this process's page tables, as it does when it needs memory.
    #[cfg(test)]
    pub(crate) fn page_out(&self) -> io::Result<()> {
        self.advise(Advice::LinuxPageOut)
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The address of the first byte in this process, as KVM and userfaultfd want it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// The file behind the memory and the offset of the first byte in it, where there is one.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.file.as_ref().map(|(file, offset)| (file.as_fd(), *offset))
    }

    /// What pages it is wanted to be made of.
    #[must_use]
    pub fn huge_pages(&self) -> HugePages {
        self.huge
    }

    /// The address of a range of the mapping.
    ///
    /// # Panics
    /// If the range is not inside: callers check a peer's numbers against the layout first.
    pub(super) fn range(&self, offset: u64, bytes: u64) -> *mut u8 {
        let end = offset.checked_add(bytes).expect("a range of a mapping does not wrap");
        assert!(
            end <= self.bytes as u64,
            "range {offset:#x}+{bytes:#x} is outside a mapping of {:#x}",
            self.bytes
        );
        // SAFETY: checked just above to lie inside the mapping.
        unsafe { self.start.as_ptr().add(offset as usize) }
    }

    /// Copies out of the memory.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let from = self.range(offset, into.len() as u64);
        copy_volatile(from, into.as_mut_ptr(), into.len());
    }

    /// Copies into the memory.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.range(offset, bytes.len() as u64);
        copy_volatile(bytes.as_ptr(), to, bytes.len());
    }

    /// Whether a page is missing that its file could be given whole ([`Mapping::fill`]).
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn is_missing(&self, offset: u64) -> bool {
        self.file.is_some() && !self.is_resident(offset, PAGE_SIZE).unwrap_or(true)
    }

    /// Copies bytes in, which are whole pages. Those that are missing come to be without being zeroed first, and not by a
    /// fault each: half the cost. For those that are there it costs twice as much as [`Mapping::write`].
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        let _ = self.range(offset, bytes.len() as u64);
        let mut written = 0;
        if let Some((file, beginning)) = &self.file {
            while written < bytes.len() {
                // hugetlbfs takes none, and neither does a sealed file; their mappings do.
                match pwrite(file, &bytes[written..], beginning + offset + written as u64) {
                    Ok(more) if more > 0 => written += more,
                    Ok(_) | Err(_) => break,
                }
            }
        }
        self.write(offset + written as u64, &bytes[written..]);
    }

    /// Overwrites a range with zero bytes. Offset and length are multiples of 8.
    ///
    /// # Panics
    /// If the range is outside the mapping or not so aligned.
    pub fn zero(&self, offset: u64, bytes: u64) {
        let to = self.words(offset, bytes);
        for index in 0..(bytes / 8) as usize {
            // SAFETY: `words` checked range and alignment.
            unsafe { to.add(index).write_volatile(0) };
        }
    }

    /// Whether a range holds only zero bytes. Stops at the first cache line that does not. Multiples of 64.
    ///
    /// # Panics
    /// If the range is outside the mapping or not so aligned.
    #[must_use]
    pub fn is_zero(&self, offset: u64, bytes: u64) -> bool {
        assert!(bytes.is_multiple_of(64), "{bytes} bytes are not whole cache lines");
        let from = self.words(offset, bytes);
        (0..(bytes / 64) as usize).all(|line| {
            // SAFETY: `words` checked range and alignment.
            (0..8).fold(0, |seen, word| seen | unsafe { from.add(line * 8 + word).read_volatile() }) == 0
        })
    }

    /// The byte that a range repeats, if it holds only one. Stops at the first cache line that has another. Multiples of 64.
    ///
    /// # Panics
    /// If the range is empty, outside the mapping or not so aligned.
    #[must_use]
    pub fn repeated_byte(&self, offset: u64, bytes: u64) -> Option<u8> {
        assert!(bytes > 0 && bytes.is_multiple_of(64), "{bytes} bytes are not whole cache lines");
        let from = self.words(offset, bytes);
        // SAFETY: `words` checked range and alignment.
        let first = unsafe { from.read_volatile() };
        let byte = first.to_le_bytes()[0];
        let repeats = (0..(bytes / 64) as usize).all(|line| {
            // SAFETY: as above.
            (0..8).fold(0, |seen, word| seen | unsafe { from.add(line * 8 + word).read_volatile() } ^ first)
                == 0
        });
        (repeats && first == u64::from_le_bytes([byte; 8])).then_some(byte)
    }

    /// Asks the processor to bring the first cache line of a range closer. Changes nothing, and nothing waits for it.
    ///
    /// # Panics
    /// If the offset is outside the mapping.
    pub fn prefetch(&self, offset: u64) {
        let at = self.range(offset, 1);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch never faults and is no access; SSE is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }

    /// Reads one aligned word.
    ///
    /// # Panics
    /// If it is outside the mapping or not aligned.
    #[must_use]
    pub fn load(&self, offset: u64) -> u64 {
        // SAFETY: `words` checked range and alignment.
        unsafe { self.words(offset, 8).read_volatile() }
    }

    /// Writes one aligned word.
    ///
    /// # Panics
    /// If it is outside the mapping or not aligned.
    pub fn store(&self, offset: u64, value: u64) {
        // SAFETY: `words` checked range and alignment.
        unsafe { self.words(offset, 8).write_volatile(value) };
    }

    fn words(&self, offset: u64, bytes: u64) -> *mut u64 {
        assert!(offset.is_multiple_of(8) && bytes.is_multiple_of(8), "words are aligned to 8 bytes");
        self.range(offset, bytes).cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Us) {
            // SAFETY: mapped by us, and every user of the address holds this value or an Arc of it.
            let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
            debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
        }
    }
}

/// Maps a range of a file at a multiple of a huge page's size: memory elsewhere cannot be mapped by huge pages.
pub(super) fn map_aligned(
    file: BorrowedFd<'_>,
    offset: u64,
    length: usize,
) -> io::Result<*mut std::ffi::c_void> {
    let place = aligned_place(length)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: the place is reserved by us for this, so that nothing else is replaced.
    let mapped = unsafe { mmap(place, length, protection, flags, file, offset) };
    Ok(mapped.inspect_err(|_| {
        // SAFETY: reserved just now and used by nobody. Where that fails too, address space is lost, no more.
        let _ = unsafe { munmap(place, length) };
    })?)
}

/// Reserves address space whose start is a multiple of a huge page's size.
fn aligned_place(bytes: usize) -> io::Result<*mut std::ffi::c_void> {
    let huge = HUGE_PAGE as usize;
    let all = bytes.checked_add(huge).ok_or(rustix::io::Errno::NOMEM)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), all, ProtFlags::empty(), flags) }?;
    let before = start.addr().next_multiple_of(huge) - start.addr();
    // SAFETY: both are inside what was reserved.
    let (place, behind) = unsafe { (start.byte_add(before), start.byte_add(before + bytes)) };
    for (rest, length) in [(start, before), (behind, all - before - bytes)] {
        // munmap takes whole pages; where it fails, address space is lost, no more.
        if length > 0 {
            // SAFETY: of what was reserved just now, and used by nobody.
            let _ = unsafe { munmap(rest, length) };
        }
    }
    Ok(place)
}

fn checked_length(bytes: u64) -> io::Result<usize> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(rustix::io::Errno::INVAL.into());
    }
    usize::try_from(bytes).map_err(|_| rustix::io::Errno::NOMEM.into())
}

/// What is copied at a time: as much as one instruction moves, where that is known.
#[cfg(target_arch = "x86_64")]
type Unit = std::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Unit = u64;

/// Copies volatile on both sides, as much at a time as the addresses are aligned for: one side is memory that the guest may
/// be writing.
fn copy_volatile(from: *const u8, to: *mut u8, bytes: usize) {
    let mut done = copy_units::<Unit>(from, to, 0, bytes);
    done = copy_units::<u64>(from, to, done, bytes);
    copy_units::<u8>(from, to, done, bytes);
}

/// Copies what comes after the first `done` bytes, as far as it is whole units; answers how much is done then.
fn copy_units<T>(from: *const u8, to: *mut u8, done: usize, bytes: usize) -> usize {
    let (from, to) = (from.wrapping_add(done).cast::<T>(), to.wrapping_add(done).cast::<T>());
    let units = if from.is_aligned() && to.is_aligned() { (bytes - done) / size_of::<T>() } else { 0 };
    for index in 0..units {
        // SAFETY: the callers pass ranges that they checked or that a slice vouches for; both are aligned, and a `T` is
        // nothing but bytes.
        let unit = unsafe { from.add(index).read_volatile() };
        // SAFETY: as above.
        unsafe { to.add(index).write_volatile(unit) };
    }
    done + units * size_of::<T>()
}

#[cfg(test)]
mod tests;
