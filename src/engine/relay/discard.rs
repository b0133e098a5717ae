//! Content of QEMU's connections that nobody wants: the pages of packets whose place in the guest's memory is known.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// What the pipe takes at once: the content of two ordinary packets.
const PIPE_BYTES: usize = 1 << 20;

/// Takes bytes out of a connection and drops them where they are, in the kernel, which costs less than reading them.
#[derive(Debug)]
pub(super) struct Discard {
    read: OwnedFd,
    write: OwnedFd,
    nothing: File,
}

impl Discard {
    pub(super) fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // Refused when this user's pipes are large enough together already (pipe(7)); a small one works too.
        let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
        Ok(Self { read, write, nothing: File::options().write(true).open("/dev/null")? })
    }

    /// Skips so many bytes of a connection, and waits for them.
    pub(super) fn skip(&self, connection: &UnixStream, mut bytes: usize) -> io::Result<()> {
        while bytes > 0 {
            let mut held = moved(|| splice(connection, None, &self.write, None, bytes, SpliceFlags::MOVE))?;
            bytes -= held;
            while held > 0 {
                held -= moved(|| splice(&self.read, None, &self.nothing, None, held, SpliceFlags::MOVE))?;
            }
        }
        Ok(())
    }
}

/// How many bytes a call moved, which is at least one.
fn moved(call: impl Fn() -> Result<usize, Errno>) -> io::Result<usize> {
    loop {
        match call() {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::INTR) => {}
            moved => return Ok(moved?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn what_is_skipped_is_gone_and_what_follows_is_not() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            for _ in 0..40 {
                there.write_all(&[7; 128 << 10]).unwrap();
                there.write_all(b"next").unwrap();
            }
            there.write_all(&[7; 1000]).unwrap();
        });
        let discard = Discard::new().unwrap();
        for _ in 0..40 {
            discard.skip(&here, 128 << 10).unwrap();
            let mut follows = [0; 4];
            here.read_exact(&mut follows).unwrap();
            assert_eq!(&follows, b"next");
        }
        assert_eq!(discard.skip(&here, 1001).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        writer.join().unwrap();
    }
}
