//! Where the content of a mapping lives, as far as it decides how to find out which pages hold any.
//!
//! Sources: `proc_pid_maps(5)`, `proc_pid_map_files(5)`, `lseek(2)` for `SEEK_DATA`.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{SeekFrom, fstatfs, seek};

use super::Mapping;
use crate::units::PAGE_SIZE;

const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A piece of a mapping that is of one thing throughout.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Where it starts in the mapping, in bytes.
    pub(crate) offset: u64,
    /// How long it is, in bytes.
    pub(crate) bytes: u64,
    /// What it is of.
    pub(crate) origin: Origin,
}

/// Where the content of memory lives.
#[derive(Debug)]
pub(crate) enum Origin {
    /// Nothing but swap: what was written is in this process's page tables.
    Private,
    /// A file that every other process sees the same content of.
    Shared(SharedFile),
    /// Something that does not tell which of its pages hold anything.
    Opaque,
}

impl Origin {
    /// Whether the kernel may take a page that was written out of this process's page tables at any time, because the
    /// content is safe in the file or in swap; it then forgets whether the page was write-protected.
    pub(crate) fn is_evictable(&self) -> bool {
        match self {
            Self::Private | Self::Shared(SharedFile { kind: FileKind::Hugetlbfs, .. }) => false,
            Self::Shared(SharedFile { kind: FileKind::Tmpfs, .. }) => rustix::system::sysinfo().totalswap > 0,
            Self::Shared(SharedFile { kind: FileKind::Other, .. }) | Self::Opaque => true,
        }
    }
}

/// A file with guest RAM in it.
#[derive(Debug)]
pub(crate) struct SharedFile {
    file: File,
    /// Where in the file the piece starts.
    start: u64,
    kind: FileKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileKind {
    Tmpfs,
    Hugetlbfs,
    Other,
}

/// The pieces of a mapping, in rising order and without gaps.
///
/// # Errors
/// What reading `/proc/self/maps` or the file's type answers.
pub(crate) fn pieces(mapping: &Mapping) -> io::Result<Vec<Piece>> {
    if let Some((file, start)) = mapping.file() {
        // A description of our own, because SEEK_DATA moves the position; where that is not allowed, the shared one.
        let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .or_else(|_| file.try_clone_to_owned().map(File::from))?;
        let origin = Origin::Shared(SharedFile::new(own, start)?);
        return Ok(vec![Piece { offset: 0, bytes: mapping.bytes(), origin }]);
    }
    from_maps(mapping, &fs::read_to_string("/proc/self/maps")?)
}

/// For memory that somebody else mapped.
fn from_maps(mapping: &Mapping, maps: &str) -> io::Result<Vec<Piece>> {
    let (start, end) = (mapping.address(), mapping.address() + mapping.bytes());
    let mut pieces = Vec::new();
    let mut at = start;
    for area in maps.lines().filter_map(Area::parse).filter(|area| area.end > start && area.start < end) {
        if area.start > at {
            break;
        }
        let to = area.end.min(end);
        pieces.push(Piece { offset: at - start, bytes: to - at, origin: area.origin(at)? });
        at = to;
    }
    if at == end {
        return Ok(pieces);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("guest RAM at {start:#x}-{end:#x} is not mapped from {at:#x} on; its owner has unmapped it"),
    ))
}

/// A line of `/proc/self/maps`.
#[derive(Debug, PartialEq, Eq)]
struct Area<'a> {
    start: u64,
    end: u64,
    shared: bool,
    file_offset: u64,
    inode: u64,
    name: &'a str,
}

impl<'a> Area<'a> {
    /// Reads `start-end rwxs offset major:minor inode name`.
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let shared = words.next()?.ends_with('s');
        let file_offset = words.next()?;
        words.next()?;
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            shared,
            file_offset: u64::from_str_radix(file_offset, 16).ok()?,
            inode: words.next()?.parse().ok()?,
            name: words.next().unwrap_or("").trim_start(),
        })
    }

    /// What is behind the area from address `at` on.
    fn origin(&self, at: u64) -> io::Result<Origin> {
        // Private huge pages have an inode of the kernel's own, and no file that anyone else could write to.
        if self.inode == 0 || (!self.shared && self.name.starts_with("/anon_hugepage")) {
            return Ok(Origin::Private);
        }
        if !self.shared {
            return Ok(Origin::Opaque);
        }
        let path = format!("/proc/self/map_files/{:x}-{:x}", self.start, self.end);
        // Only CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN may open it.
        let Ok(file) = File::open(path) else { return Ok(Origin::Opaque) };
        SharedFile::new(file, self.file_offset + (at - self.start)).map(Origin::Shared)
    }
}

impl SharedFile {
    fn new(file: File, start: u64) -> io::Result<Self> {
        let kind = match fstatfs(&file)?.f_type {
            TMPFS_MAGIC => FileKind::Tmpfs,
            HUGETLBFS_MAGIC => FileKind::Hugetlbfs,
            _ => FileKind::Other,
        };
        Ok(Self { file, start, kind })
    }

    /// Whether [`SharedFile::data`] knows nothing: hugetlbfs has no `SEEK_DATA`.
    pub(crate) fn is_hugetlb(&self) -> bool {
        self.kind == FileKind::Hugetlbfs
    }

    /// How much memory the file holds, in bytes.
    pub(crate) fn allocated_bytes(&self) -> io::Result<u64> {
        // st_blocks counts 512 bytes each, whatever the file system (inode(7)).
        Ok(rustix::fs::fstat(&self.file)?.st_blocks as u64 * 512)
    }

    /// Hands over every range of the piece's first `bytes` that holds data: offset in the piece, and length.
    ///
    /// # Errors
    /// What `lseek(2)` answers.
    pub(crate) fn data(&self, bytes: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let end = self.start + bytes;
        let mut at = self.start;
        while at < end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Err(rustix::io::Errno::NXIO) => break,
                answer => answer?.max(at),
            };
            if data >= end {
                break;
            }
            // The end of the file is a hole. Data that is punched out between the two calls leaves an empty range: step on.
            let hole = match seek(&self.file, SeekFrom::Hole(data)) {
                Err(rustix::io::Errno::NXIO) => break,
                answer => answer?.min(end),
            };
            if hole > data {
                found(data - self.start, hole - data);
            }
            at = hole.max(at + PAGE_SIZE);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HugePages;

    #[test]
    fn a_line_of_maps_is_read() {
        let line = "7f12a000-7f12b000 rw-s 00002000 00:01 1034                      /memfd:ram (deleted)";
        assert_eq!(
            Area::parse(line),
            Some(Area {
                start: 0x7f12_a000,
                end: 0x7f12_b000,
                shared: true,
                file_offset: 0x2000,
                inode: 1034,
                name: "/memfd:ram (deleted)"
            })
        );
        assert!(!Area::parse("7f12a000-7f12b000 rw-p 00000000 00:00 0 ").unwrap().shared);
        assert_eq!(Area::parse("nonsense"), None);
    }

    #[test]
    fn memory_is_recognised() {
        let private = Mapping::anonymous(1 << 16, HugePages::No).unwrap();
        let pieces = pieces(&private).unwrap();
        assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<u64>(), 1 << 16);
        assert!(pieces.iter().all(|piece| matches!(piece.origin, Origin::Private)));
        let file = Mapping::memfd("test", 1 << 16, HugePages::No).unwrap();
        file.store(4096, 1);
        let pieces = super::pieces(&file).unwrap();
        let Origin::Shared(file) = &pieces[0].origin else { panic!("{pieces:?}") };
        let mut data = Vec::new();
        file.data(1 << 16, |offset, bytes| data.push((offset, bytes))).unwrap();
        assert_eq!(data, [(4096, 4096)]);
        assert_eq!(file.allocated_bytes().unwrap(), 4096);
    }
}
