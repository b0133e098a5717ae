//! The machine's memory: images to send, and memory that is at hand alike for everyone.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use pageferry::layout::RamLayout;
use pageferry::memory::huge::HugeFiller;
use pageferry::memory::{Backing, GuestMemory, HugePages};
use pageferry::units::{PAGE_SIZE, Run};

/// Writes a file of random bytes.
pub(crate) fn random_image(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut state = 0x853c_49e6_748f_ea9b_u64;
    for _ in 0..bytes / 8 {
        // xorshift64 (Marsaglia 2003): no compressor and no deduplication finds anything in it.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes())?;
    }
    Ok(out.flush()?)
}

/// What this process does when it is called with `touch`: takes memory from the machine and gives it back.
pub(crate) fn touch(bytes: u64) -> anyhow::Result<()> {
    let memory = GuestMemory::allocate(RamLayout::flat(bytes)?, Backing::Memfd, HugePages::Transparent)?;
    let all = Run::new(0, bytes / PAGE_SIZE);
    HugeFiller::default().prepare(&memory, &[all], |_| true);
    memory.zero_run(all);
    Ok(())
}

/// Has the machine hold that much free memory that it used a moment ago. On virtual machines memory that was free for some
/// seconds may be taken away and be slow to come back, which would meet whoever runs first or waits longest.
pub(crate) fn at_hand(bytes: u64) -> anyhow::Result<()> {
    let bytes = bytes.next_multiple_of(PAGE_SIZE);
    let status =
        std::process::Command::new(std::env::current_exe()?).args(["touch", &bytes.to_string()]).status()?;
    anyhow::ensure!(status.success(), "cannot take {bytes} bytes of memory: {status}");
    Ok(())
}

/// Reads of each page of a file. On virtual machines the first to read a page that was left alone for seconds may wait for half a
/// microsecond, and that would be whoever sends the file next.
pub(crate) fn look_at(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut byte = [0];
    for offset in (0..file.metadata()?.len()).step_by(PAGE_SIZE as usize) {
        file.read_at(&mut byte, offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_image_has_its_size_and_no_zeros() {
        let path = std::env::temp_dir().join(format!("pageferry-perf-test-{}", std::process::id()));
        random_image(&path, 1 << 16).unwrap();
        let image = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(image.len(), 1 << 16);
        assert!(image.chunks(64).all(|line| line.iter().any(|byte| *byte != 0)));
    }
}
