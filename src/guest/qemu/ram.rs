//! Which RAM blocks a QEMU has, and what backs each: memory that this process can map as well, or memory of QEMU alone.
//!
//! QEMU tells the blocks and where it has them mapped; which file that is, is asked from the kernel
//! (`/proc/PID/maps`), not from the path that QEMU was started with: a path may lead to another file by now, and pages in the
//! wrong file would be a destroyed guest.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};
use crate::sys::mapping::Mapping;
use crate::units::PAGE_SIZE;

/// A RAM block.
#[derive(Debug)]
pub struct RamBlock {
    /// As QEMU names it in its stream.
    pub name: String,
    /// How much of it is in use.
    pub bytes: u64,
    /// The memory backend (`-object memory-backend-...`) that it is; other blocks are small: ROMs, video memory.
    pub backend: bool,
    /// What backs it.
    pub backing: Backing,
}

/// What backs a RAM block.
#[derive(Debug)]
pub enum Backing {
    /// A file or memfd, and where in it the block begins.
    Shared(OwnedFd, u64),
    /// Memory that only QEMU has; with the reason, as the rest of a sentence about the block.
    Private(String),
}

impl RamBlock {
    /// The block mapped in this process as well, where it is shared.
    ///
    /// # Errors
    /// What `mmap(2)` answers.
    pub fn map(&self) -> io::Result<Option<Mapping>> {
        match &self.backing {
            Backing::Shared(file, offset) => {
                Mapping::shared_file(file.try_clone()?, *offset, self.bytes).map(Some)
            }
            Backing::Private(_) => Ok(None),
        }
    }

    /// Why it cannot be mapped here, where it cannot.
    #[must_use]
    pub fn private_because(&self) -> Option<&str> {
        match &self.backing {
            Backing::Shared(..) => None,
            Backing::Private(why) => Some(why),
        }
    }
}

/// A line of `x-query-ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    used: u64,
    host: u64,
    writable: bool,
}

/// The RAM blocks of a QEMU.
///
/// # Errors
/// [`QmpError`]. A block whose backing cannot be found out counts as private, and says why.
pub fn blocks(qmp: &mut Qmp) -> Result<Vec<RamBlock>, QmpError> {
    let answer = qmp.execute("x-query-ramblock", &json!({}))?;
    let text = answer["human-readable-text"].as_str().unwrap_or_default();
    let listed = listed(text);
    if listed.is_empty() {
        return Err(QmpError::Incomplete { command: "x-query-ramblock".into(), what: "RAM block" });
    }
    let backends = qmp.execute("query-memdev", &json!({}))?;
    let backends = backends.as_array().map(Vec::as_slice).unwrap_or_default();
    let process = qmp.process();
    Ok(listed.into_iter().map(|listed| block(listed, backends, process)).collect())
}

fn block(listed: Listed, backends: &[Value], process: Option<u32>) -> RamBlock {
    // A device in front of the backend puts its own path before the name.
    let is_it = |backend: &&Value| {
        backend["id"].as_str().is_some_and(|id| {
            let before = listed.name.strip_suffix(id);
            before.is_some_and(|before| before.is_empty() || before.ends_with('/'))
        })
    };
    let backend = backends.iter().find(is_it);
    let backing = match backend {
        None => Backing::Private("is QEMU's own".into()),
        Some(backend) if backend["share"].as_bool() != Some(true) => {
            Backing::Private("is private: give QEMU a memory-backend-memfd or -file with share=on".into())
        }
        Some(_) if !listed.writable => Backing::Private("is read-only".into()),
        Some(_) if !listed.used.is_multiple_of(PAGE_SIZE) => {
            Backing::Private("is no whole number of 4 KiB pages".into())
        }
        Some(_) => {
            let file = process.ok_or_else(|| "belongs to a QEMU whose process is not known".to_owned());
            match file.and_then(|process| shared_file(process, listed.host, listed.used)) {
                Ok((file, offset)) => Backing::Shared(file, offset),
                Err(why) => Backing::Private(why),
            }
        }
    };
    RamBlock { name: listed.name, bytes: listed.used, backend: backend.is_some(), backing }
}

/// Reads the table: a name, then the page size, offset, used, total, address and rights.
fn listed(text: &str) -> Vec<Listed> {
    text.lines().filter_map(listed_line).collect()
}

fn listed_line(line: &str) -> Option<Listed> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let first = words.iter().position(|word| word.starts_with("0x"))?;
    let number = |at: usize| u64::from_str_radix(words.get(first + at)?.strip_prefix("0x")?, 16).ok();
    // The page size before the numbers has two words, and a name may have spaces.
    let name = words.get(..first.checked_sub(2)?)?.join(" ");
    (!name.is_empty()).then_some(Listed {
        name,
        used: number(1)?,
        host: number(3)?,
        writable: words.get(first + 4).is_none_or(|rights| *rights == "rw"),
    })
}

/// A line of `/proc/PID/maps` (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapped {
    start: u64,
    end: u64,
    shared: bool,
    offset: u64,
    device: (u32, u32),
    inode: u64,
}

fn mapped_line(line: &str) -> Option<Mapped> {
    let mut words = line.split_whitespace();
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let shared = words.next()?.as_bytes().get(3) == Some(&b's');
    let offset = hexadecimal(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    Some(Mapped { start, end, shared, offset, device, inode: words.next()?.parse().ok()? })
}

/// The file that a process has mapped at an address, for that many bytes, and where in it that begins.
fn shared_file(process: u32, address: u64, bytes: u64) -> Result<(OwnedFd, u64), String> {
    let refused = |error: io::Error| {
        format!(
            "cannot be looked up in QEMU's process ({error}): run as root, or as the user that QEMU runs as"
        )
    };
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).map_err(refused)?;
    let (found, offset) = mapped_at(&maps, address, bytes)?;
    for entry in fs::read_dir(format!("/proc/{process}/fd")).map_err(refused)?.flatten() {
        let Ok(facts) = fs::metadata(entry.path()) else { continue };
        let device = (rustix::fs::major(facts.dev()), rustix::fs::minor(facts.dev()));
        if facts.ino() != found.inode || device != found.device {
            continue;
        }
        let file = fs::OpenOptions::new().read(true).write(true).open(entry.path()).map_err(refused)?;
        return Ok((file.into(), offset));
    }
    Err("is memory of a file that QEMU has closed".into())
}

/// The one file that is mapped, shared, over the whole range.
fn mapped_at(maps: &str, address: u64, bytes: u64) -> Result<(Mapped, u64), String> {
    let end = address.checked_add(bytes).ok_or("has an address that cannot be")?;
    let mut pieces = maps.lines().filter_map(mapped_line);
    let first = pieces.find(|piece| piece.start <= address && address < piece.end);
    let first = first.ok_or("is not where QEMU says: is the process behind the QMP socket QEMU itself?")?;
    let offset = first.offset + (address - first.start);
    let mut last = first.clone();
    while last.end < end {
        // The kernel splits a mapping where its parts are treated differently, by madvise for one.
        let next = pieces.next().filter(|next| next.start == last.end).ok_or("is mapped only in part")?;
        let follows = next.offset == last.offset + (last.end - last.start);
        if !follows || next.inode != last.inode || next.device != last.device || next.shared != last.shared {
            return Err("is made of more than one file".into());
        }
        last = next;
    }
    if !first.shared || first.inode == 0 {
        return Err("is private: give QEMU a memory-backend-memfd or -file with share=on".into());
    }
    Ok((first, offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HugePages;

    #[test]
    fn the_table_of_ram_blocks_is_read() {
        let text = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f211c1fe000  rw\n\
    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x00007f20d6800000  ro\n";
        let block = |name: &str, used, host, writable| Listed { name: name.into(), used, host, writable };
        assert_eq!(
            listed(text),
            [
                block("ram0", 0x400_0000, 0x7f21_1c1f_e000, true),
                block("/rom@etc/acpi/tables", 0x2_0000, 0x7f20_d680_0000, false),
            ]
        );
        assert_eq!(listed("no such command\n0x1 0x2\n"), []);
    }

    #[test]
    fn the_file_behind_a_mapping_is_found_and_is_the_same_memory() {
        let mapping = Mapping::memfd("a test's RAM", 1 << 20, HugePages::No).unwrap();
        let (file, offset) =
            shared_file(std::process::id(), mapping.address() + 8192, (1 << 20) - 8192).unwrap();
        let again = Mapping::shared_file(file, offset, 4096).unwrap();
        mapping.store(8192, 7);
        assert_eq!(again.load(0), 7);
    }

    #[test]
    fn what_is_not_shared_is_named() {
        let private = Mapping::anonymous(1 << 20, HugePages::No).unwrap();
        let why = |address, bytes| shared_file(std::process::id(), address, bytes).unwrap_err();
        assert!(why(private.address(), 1 << 20).contains("share=on"));
        assert!(why(8, 4096).contains("not where QEMU says"));
        assert!(why(u64::MAX, 4096).contains("cannot be"));
        let maps = "1000-2000 rw-s 00000000 00:01 7 /memfd:a (deleted)\n2000-3000 rw-s 00001000 00:01 7 /memfd:a (deleted)\n\
                    4000-5000 rw-s 00002000 00:01 7 /memfd:a\n5000-6000 rw-s 00000000 00:01 8 /memfd:b\n";
        assert_eq!(mapped_at(maps, 0x1800, 0x1000).unwrap().1, 0x800);
        assert!(mapped_at(maps, 0x2000, 0x2000).unwrap_err().contains("in part"));
        assert!(mapped_at(maps, 0x4000, 0x2000).unwrap_err().contains("more than one file"));
    }

    #[test]
    fn a_block_belongs_to_the_backend_of_its_name() {
        let backends = [json!({ "id": "ram0", "share": false }), json!({ "id": "mem1", "share": true })];
        let of = |name: &str| {
            let listed = Listed { name: name.into(), used: 4096, host: 8, writable: true };
            block(listed, &backends, None)
        };
        assert!(of("ram0").private_because().unwrap().contains("share=on"));
        assert!(of("0000:00:04.0/mem1").private_because().unwrap().contains("not known"));
        assert!(of("/objects/mem1").backend && !of("pc.bios").backend && !of("xram0").backend);
    }
}
