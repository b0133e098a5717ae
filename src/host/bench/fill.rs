//! What the memory holds that is sent.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::BenchError;
use super::options::Fill;
use crate::layout::RamLayout;
use crate::memory::{Backing, GuestMemory, HugePages};
use crate::units::{PAGE_SIZE, Run};

/// How much is written at a time: 64 KiB, which is also the piece that sparse memory is in use by.
const CHUNK_PAGES: u64 = 16;
/// Without a flag and without a file.
const DEFAULT_BYTES: u64 = 1 << 30;

/// How much memory there is to be, and how much of it in use at most.
pub(super) fn sizes(fill: &Fill, wanted: Option<u64>) -> Result<(u64, u64), BenchError> {
    let memory = match (fill, wanted) {
        (_, Some(wanted)) => wanted,
        (Fill::File(path), None) => {
            let failed = |cause| BenchError::Image { path: path.clone(), cause };
            let bytes = std::fs::metadata(path).map_err(failed)?.len();
            bytes.next_multiple_of(PAGE_SIZE).max(PAGE_SIZE)
        }
        (_, None) => DEFAULT_BYTES,
    };
    let in_use = match fill {
        Fill::Sparse(share) | Fill::First(share) => {
            let chunk = CHUNK_PAGES * PAGE_SIZE;
            ((memory as f64 * share) as u64).next_multiple_of(chunk).min(memory)
        }
        Fill::Scattered => (memory / PAGE_SIZE).div_ceil(2) * PAGE_SIZE,
        _ => memory,
    };
    Ok((memory, in_use))
}

/// Fresh memory with this content.
///
/// # Errors
/// [`BenchError::Memory`] when there is no room to map it, [`BenchError::Image`] when the file cannot be read.
pub(super) fn memory(fill: &Fill, bytes: u64) -> Result<GuestMemory, BenchError> {
    let layout = RamLayout::flat(bytes).map_err(|error| BenchError::Memory {
        bytes,
        cause: io::Error::new(io::ErrorKind::InvalidInput, error),
    })?;
    let memory = GuestMemory::allocate(layout, Backing::Memfd, HugePages::Transparent)
        .map_err(|cause| BenchError::Memory { bytes, cause })?;
    let mut random = Random::new(1);
    match fill {
        Fill::Random => write_all(&memory, |_, chunk| random.fill(chunk)),
        Fill::Zero => memory.zero_run(Run::new(0, memory.layout().total_pages())),
        Fill::Text => write_all(&memory, |_, chunk| text(&mut random, chunk)),
        Fill::Sparse(share) => write_sparse(&memory, *share, &mut random),
        Fill::Scattered => write_scattered(&memory, &mut random),
        Fill::First(_) => write_first(&memory, sizes(fill, Some(bytes))?.1, &mut random),
        Fill::File(path) => {
            let failed = |cause| BenchError::Image { path: path.clone(), cause };
            read_file(&memory, path).map_err(failed)?;
        }
    }
    Ok(memory)
}

/// The pieces of 64 KiB, the last one shorter where the memory ends.
fn chunks(memory: &GuestMemory) -> impl Iterator<Item = Run> {
    let pages = memory.layout().total_pages();
    (0..pages).step_by(CHUNK_PAGES as usize).map(move |first| Run::new(first, CHUNK_PAGES.min(pages - first)))
}

fn write_all(memory: &GuestMemory, mut make: impl FnMut(u64, &mut [u8])) {
    let mut chunk = vec![0; (CHUNK_PAGES * PAGE_SIZE) as usize];
    for (index, run) in chunks(memory).enumerate() {
        let chunk = &mut chunk[..run.bytes() as usize];
        make(index as u64, chunk);
        memory.write_run(run, chunk);
    }
}

/// Every so many pieces one, evenly over the memory.
fn write_sparse(memory: &GuestMemory, share: f64, random: &mut Random) {
    let mut chunk = vec![0; (CHUNK_PAGES * PAGE_SIZE) as usize];
    for (index, run) in chunks(memory).enumerate() {
        let up_to = |index: usize| (index as f64 * share).ceil() as u64;
        if up_to(index + 1) > up_to(index) {
            let chunk = &mut chunk[..run.bytes() as usize];
            random.fill(chunk);
            memory.write_run(run, chunk);
        }
    }
}

/// Every other page: no two that are in use lie side by side, which is the worst for whatever sends runs.
fn write_scattered(memory: &GuestMemory, random: &mut Random) {
    let mut page = vec![0; PAGE_SIZE as usize];
    for first in (0..memory.layout().total_pages()).step_by(2) {
        random.fill(&mut page);
        memory.write_run(Run::new(first, 1), &page);
    }
}

/// So many bytes from the beginning on, whole pieces.
fn write_first(memory: &GuestMemory, bytes: u64, random: &mut Random) {
    let mut chunk = vec![0; (CHUNK_PAGES * PAGE_SIZE) as usize];
    for run in chunks(memory).take_while(|run| run.end() * PAGE_SIZE <= bytes) {
        let chunk = &mut chunk[..run.bytes() as usize];
        random.fill(chunk);
        memory.write_run(run, chunk);
    }
}

/// The file from its beginning on, as far as it or the memory goes. Pages of zeros are left untouched, as they are in the
/// image of a guest that never used them.
fn read_file(memory: &GuestMemory, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut chunk = Vec::new();
    for run in chunks(memory) {
        chunk.clear();
        (&mut file).take(run.bytes()).read_to_end(&mut chunk)?;
        let whole = chunk.len() as u64 == run.bytes();
        chunk.resize(run.bytes() as usize, 0);
        for (index, page) in chunk.chunks_exact(PAGE_SIZE as usize).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                memory.write_run(Run::new(run.start.0 + index as u64, 1), page);
            }
        }
        if !whole {
            break;
        }
    }
    Ok(())
}

/// xorshift64 (Marsaglia 2003): no compressor finds anything in it.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(0x853c_49e6_748f_ea9b ^ seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

/// Words, short ones more often than long ones, as text in a guest's memory has them.
fn text(random: &mut Random, bytes: &mut [u8]) {
    const SYLLABLES: [&[u8]; 16] = [
        b"ka", b"lo", b"mi", b"ter", b"an", b"sol", b"re", b"vi", b"don", b"es", b"pa", b"lin", b"gor", b"u",
        b"the", b"ing",
    ];
    let mut at = 0;
    while at < bytes.len() {
        let drawn = random.next();
        // A product of two draws: small numbers, and so few words, come up most.
        let word = ((drawn & 0xff) * (drawn >> 8 & 0xff)) >> 5;
        for part in 0..=(word.min(2)) {
            let syllable = SYLLABLES[(word >> (part * 4) & 15) as usize];
            let room = syllable.len().min(bytes.len() - at);
            bytes[at..at + room].copy_from_slice(&syllable[..room]);
            at += room;
        }
        if at < bytes.len() {
            bytes[at] = b' ';
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Need, require};

    const PAGES: u64 = 256;

    fn filled(fill: &Fill) -> GuestMemory {
        let (bytes, in_use) = sizes(fill, Some(PAGES * PAGE_SIZE)).unwrap();
        assert!(in_use <= bytes);
        memory(fill, bytes).unwrap()
    }

    /// How many times smaller zstd makes it, batch by batch as a session does.
    fn shrinks(memory: &GuestMemory) -> f64 {
        let mut bytes = Vec::new();
        memory.read_run(Run::new(0, PAGES), &mut bytes);
        bytes.len() as f64 / zstd::bulk::compress(&bytes, 1).unwrap().len() as f64
    }

    #[test]
    fn each_fill_is_what_it_says() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let random = filled(&Fill::Random);
        assert_eq!(random.touched().unwrap().len(), PAGES);
        assert!(shrinks(&random) < 1.01);
        let zero = filled(&Fill::Zero);
        assert_eq!(zero.touched().unwrap().len(), PAGES);
        assert!(shrinks(&zero) > 1000.0);
        let text = shrinks(&filled(&Fill::Text));
        assert!((2.0..6.0).contains(&text), "text shrinks {text:.2} times");
    }

    #[test]
    fn sparse_memory_is_touched_in_its_share() {
        if !require(&[Need::Uffd]) {
            return;
        }
        for (share, chunks) in [(0.05, 1), (0.25, 4), (0.5, 8), (1.0, 16)] {
            let fill = Fill::Sparse(share);
            let touched = filled(&fill).touched().unwrap();
            assert_eq!(touched.len(), chunks * CHUNK_PAGES, "{fill}");
            let (_, in_use) = sizes(&fill, Some(PAGES * PAGE_SIZE)).unwrap();
            assert!(in_use >= touched.len() * PAGE_SIZE, "{fill}: {in_use}");
            let first = Fill::First(share);
            let touched: Vec<Run> = filled(&first).touched().unwrap().runs().collect();
            assert_eq!(touched, [Run::new(0, chunks * CHUNK_PAGES)], "{first}");
        }
    }

    #[test]
    fn a_file_is_read_whole_and_its_zeros_are_not_touched() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut image = vec![0; 40 * PAGE_SIZE as usize + 5];
        image[3 * PAGE_SIZE as usize] = 7;
        *image.last_mut().unwrap() = 9;
        std::fs::write(file.path(), &image).unwrap();
        let fill = Fill::File(file.path().into());
        let (bytes, in_use) = sizes(&fill, None).unwrap();
        assert_eq!((bytes, in_use), (41 * PAGE_SIZE, 41 * PAGE_SIZE));
        let memory = memory(&fill, bytes).unwrap();
        assert_eq!(memory.touched().unwrap().len(), 2);
        let mut back = Vec::new();
        memory.read_run(Run::new(0, 41), &mut back);
        assert!(back[..image.len()] == image[..]);
        let nowhere = Fill::File("/nowhere/image".into());
        let message = sizes(&nowhere, None).unwrap_err().to_string();
        assert!(message.contains("/nowhere/image"), "{message}");
    }
}
