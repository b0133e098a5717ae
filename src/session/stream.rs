//! A connection between hosts, in plain or under TLS: bytes in both directions, read and written by different threads.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use crate::channel::sealed::SealedStream;

/// A connection.
#[derive(Debug)]
pub(super) enum Stream {
    /// As it is.
    Plain(TcpStream),
    /// Under TLS, its handshake done.
    #[cfg(feature = "tls")]
    Tls(Arc<tls::TlsStream>),
}

impl Stream {
    /// The socket below: for its options, addresses and end, not for bytes.
    pub(super) fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            #[cfg(feature = "tls")]
            Self::Tls(stream) => stream.socket(),
        }
    }

    /// Whether nobody on the way can read what goes over it.
    pub(super) fn is_encrypted(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            #[cfg(feature = "tls")]
            Self::Tls(_) => true,
        }
    }

    /// The same connection, for one more that writes to it.
    pub(super) fn share(&self) -> io::Result<Self> {
        match self {
            Self::Plain(socket) => socket.try_clone().map(Self::Plain),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => Ok(Self::Tls(Arc::clone(stream))),
        }
    }

    /// The connection itself, where there is no TLS above it.
    pub(super) fn into_plain(self) -> Result<TcpStream, Self> {
        match self {
            Self::Plain(socket) => Ok(socket),
            #[cfg(feature = "tls")]
            Self::Tls(_) => Err(self),
        }
    }

    /// The connection for pages that are encrypted; the one below where it is plain.
    pub(super) fn into_sealed(self) -> Result<Arc<dyn SealedStream>, TcpStream> {
        match self {
            Self::Plain(socket) => Err(socket),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => {
                stream.carries_much();
                Ok(stream)
            }
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match *self {
            Stream::Plain(socket) => (&mut &*socket).read(into),
            #[cfg(feature = "tls")]
            Stream::Tls(stream) => stream.read(into),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match *self {
            Stream::Plain(socket) => (&mut &*socket).write(from),
            #[cfg(feature = "tls")]
            Stream::Tls(stream) => stream.write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "tls")]
pub(super) mod tls {
    //! rustls' connection between two threads: it is locked for computing only, never while the socket is waited for.

    use std::fmt;
    use std::io::{self, Read, Write};
    use std::net::TcpStream;
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
    use std::time::Instant;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

    use crate::channel::sealed::SealedStream;
    use crate::session::handshake::time_left;

    /// Raw bytes taken from the socket at once: as many as rustls takes in one call at most.
    const RAW: usize = 4 << 10;
    /// The same where pages come: a system call for each 4 KiB would cost more than taking them apart.
    const MUCH_RAW: usize = 64 << 10;
    /// Bytes of a write that are encrypted at once: what rustls holds at most.
    const CHUNK: usize = 64 << 10;

    /// A connection under TLS.
    pub(in crate::session) struct TlsStream {
        socket: TcpStream,
        tls: Mutex<Connection>,
        /// Whoever holds it writes to the socket: records must leave in the order in which they were encrypted.
        out: Mutex<Vec<u8>>,
        raw: Mutex<Raw>,
    }

    /// Bytes from the socket, of which rustls has not taken all yet: it takes no more than fit a record, and none while it holds 16
    /// KiB of plaintext.
    struct Raw {
        bytes: Vec<u8>,
        taken: usize,
        got: usize,
    }

    impl Raw {
        fn new() -> Self {
            Self { bytes: vec![0; RAW], taken: 0, got: 0 }
        }

        fn is_empty(&self) -> bool {
            self.taken == self.got
        }

        /// Waits for bytes; answers how many came, 0 at the end.
        fn fill(&mut self, mut socket: &TcpStream) -> io::Result<usize> {
            self.got = 0;
            self.taken = 0;
            self.got = socket.read(&mut self.bytes)?;
            Ok(self.got)
        }

        /// Gives rustls what it takes at once, and has it look at that.
        fn feed(&mut self, tls: &mut Connection) -> io::Result<()> {
            let mut rest = &self.bytes[self.taken..self.got];
            self.taken += tls.read_tls(&mut rest)?;
            tls.process_new_packets().map(drop).map_err(tls_error)
        }
    }

    impl fmt::Debug for TlsStream {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("TlsStream").field("socket", &self.socket).finish_non_exhaustive()
        }
    }

    fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        // A connection that a panic left half way fails its next record.
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tls_error(error: rustls::Error) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    impl TlsStream {
        /// The dialling side's handshake.
        pub(in crate::session) fn connect(
            socket: TcpStream,
            config: Arc<ClientConfig>,
            name: ServerName<'static>,
            deadline: Instant,
        ) -> io::Result<Self> {
            let tls = ClientConnection::new(config, name).map_err(tls_error)?;
            Self::shake_hands(socket, tls.into(), deadline)
        }

        /// The listening side's handshake: it is done when the other side has proved which host it is.
        pub(in crate::session) fn accept(
            socket: TcpStream,
            config: Arc<ServerConfig>,
            deadline: Instant,
        ) -> io::Result<Self> {
            let tls = ServerConnection::new(config).map_err(tls_error)?;
            Self::shake_hands(socket, tls.into(), deadline)
        }

        fn shake_hands(socket: TcpStream, mut tls: Connection, deadline: Instant) -> io::Result<Self> {
            let mut raw = Raw::new();
            while tls.is_handshaking() {
                let mut out = Vec::new();
                while tls.wants_write() {
                    tls.write_tls(&mut out)?;
                }
                socket.set_write_timeout(Some(time_left(deadline)?))?;
                (&socket).write_all(&out)?;
                if !tls.is_handshaking() {
                    break;
                }
                if raw.is_empty() {
                    socket.set_read_timeout(Some(time_left(deadline)?))?;
                    match raw.fill(&socket) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            return Err(io::ErrorKind::TimedOut.into());
                        }
                        Err(error) => return Err(error),
                    }
                }
                if let Err(error) = raw.feed(&mut tls) {
                    // What is wrong is told to the other side; it may have gone.
                    let mut alert = Vec::new();
                    while tls.wants_write() && tls.write_tls(&mut alert).is_ok() {}
                    let _ = (&socket).write_all(&alert);
                    return Err(error);
                }
            }
            let stream = Self { socket, tls: Mutex::new(tls), out: Mutex::default(), raw: Mutex::new(raw) };
            stream.send_pending()?;
            Ok(stream)
        }

        /// Takes more from the socket at once from now on.
        pub(super) fn carries_much(&self) {
            lock(&self.raw).bytes.resize(MUCH_RAW, 0);
        }

        /// The socket below.
        pub(in crate::session) fn socket(&self) -> &TcpStream {
            &self.socket
        }

        /// The name in the other side's certificate.
        pub(in crate::session) fn peer_name(&self) -> Option<String> {
            let tls = lock(&self.tls);
            crate::session::trust::peer_host_name(tls.peer_certificates().unwrap_or_default())
        }

        pub(super) fn read(&self, into: &mut [u8]) -> io::Result<usize> {
            // One reader at a time, and the only one who waits for the socket.
            let mut raw = lock(&self.raw);
            loop {
                match lock(&self.tls).reader().read(into) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // Cut off without TLS' own goodbye: the link above has a goodbye of its own.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                    done => return done,
                }
                // Its plaintext has been read, so rustls takes something.
                let fed = if raw.is_empty() && raw.fill(&self.socket)? == 0 {
                    lock(&self.tls).read_tls(&mut io::empty()).map(drop)
                } else {
                    raw.feed(&mut lock(&self.tls))
                };
                self.send_if_free();
                fed?;
            }
        }

        pub(super) fn write(&self, from: &[u8]) -> io::Result<usize> {
            let mut out = lock(&self.out);
            let taken = {
                let mut tls = lock(&self.tls);
                let taken = tls.writer().write(&from[..from.len().min(CHUNK)])?;
                take_pending(&mut tls, &mut out)?;
                taken
            };
            self.send(&mut out)?;
            Ok(taken)
        }

        fn send_pending(&self) -> io::Result<()> {
            let mut out = lock(&self.out);
            take_pending(&mut lock(&self.tls), &mut out)?;
            self.send(&mut out)
        }

        /// What TLS itself has to say. A writer that is at it takes it along: waiting for it here could wait for a peer whose
        /// reader waits in the same way.
        fn send_if_free(&self) {
            if let Ok(mut out) = self.out.try_lock() {
                // An error comes back at the next write.
                let _ = take_pending(&mut lock(&self.tls), &mut out).and_then(|()| self.send(&mut out));
            }
        }

        fn send(&self, out: &mut Vec<u8>) -> io::Result<()> {
            let sent = (&self.socket).write_all(out);
            out.clear();
            sent
        }
    }

    impl SealedStream for TlsStream {
        fn socket(&self) -> &TcpStream {
            &self.socket
        }

        fn read(&self, into: &mut [u8]) -> io::Result<usize> {
            Self::read(self, into)
        }

        fn write(&self, from: &[u8]) -> io::Result<usize> {
            Self::write(self, from)
        }
    }

    fn take_pending(tls: &mut Connection, out: &mut Vec<u8>) -> io::Result<()> {
        while tls.wants_write() {
            tls.write_tls(out)?;
        }
        Ok(())
    }
}
