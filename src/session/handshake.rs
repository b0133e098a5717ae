//! The first exchange on a connection, and the connections that end with the second: queries.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
#[cfg(feature = "tls")]
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::SessionError;
use super::path::{InterfaceName, Path};
use super::stream::Stream;
use super::trust::{PeerTrust, Trust};
use crate::channel::tcp::connect;
use crate::wire::link::{LINK_HEADER_BYTES, LinkHeader, LinkKind};
use crate::wire::preamble::{
    Answer, MigrationId, PREAMBLE_BYTES, Preamble, Purpose, REPLY_BYTES, Reply, ReplyHeader, Secret,
};

/// The longest question or answer of a query, in bytes.
pub const MAX_QUERY_BYTES: usize = 64 << 10;

/// Connects and says what for; answers the connection and how many control messages the other side has received.
///
/// # Errors
/// [`SessionError::Connect`], [`SessionError::Handshake`], [`SessionError::Preamble`] or [`SessionError::Refused`].
pub(super) fn dial(
    path: &Path,
    preamble: &Preamble,
    trust: &PeerTrust,
    timeout: Duration,
) -> Result<(Stream, u64), SessionError> {
    let deadline = Instant::now() + timeout;
    let remote = path.destination;
    let socket = connect(path.source, remote, path.interface.as_ref().map(InterfaceName::as_str), timeout)
        .map_err(|cause| SessionError::Connect { path: path.to_string(), cause })?;
    let stream = secure(socket, remote, trust, deadline)?;
    let received = introduce(&stream, preamble, remote, deadline)?;
    Ok((stream, received))
}

/// Connects a data channel in plain: it may carry guest RAM that no buffer of this program should hold.
pub(super) fn dial_plain(
    path: &Path,
    preamble: &Preamble,
    timeout: Duration,
) -> Result<TcpStream, SessionError> {
    dial(path, preamble, &PeerTrust::default(), timeout)?.0.into_plain().map_err(|_| SessionError::Ended)
}

#[cfg(feature = "tls")]
fn secure(
    socket: TcpStream,
    remote: SocketAddr,
    trust: &PeerTrust,
    deadline: Instant,
) -> Result<Stream, SessionError> {
    use super::stream::tls::TlsStream;
    let Trust::Tls(identity) = &trust.trust else { return Ok(Stream::Plain(socket)) };
    let untrusted = |why: String| SessionError::Untrusted { remote, why };
    let name = trust
        .name
        .clone()
        .ok_or_else(|| untrusted("it is not known by what name its certificate goes".into()))?;
    let name = rustls::pki_types::ServerName::try_from(name)
        .map_err(|error| untrusted(format!("the name to look for in its certificate is none: {error}")))?;
    TlsStream::connect(socket, identity.client_config(), name, deadline)
        .map(|stream| Stream::Tls(Arc::new(stream)))
        .map_err(|error| untrusted(explain(&error)))
}

#[cfg(not(feature = "tls"))]
fn secure(socket: TcpStream, _: SocketAddr, trust: &PeerTrust, _: Instant) -> Result<Stream, SessionError> {
    match trust.trust {
        Trust::Insecure => Ok(Stream::Plain(socket)),
    }
}

/// What kept TLS from coming about, in words.
#[cfg(feature = "tls")]
pub(super) fn explain(error: &io::Error) -> String {
    match error.get_ref().and_then(|inside| inside.downcast_ref::<rustls::Error>()) {
        Some(tls) => super::trust::explain(tls),
        None if error.kind() == io::ErrorKind::UnexpectedEof || error.kind() == io::ErrorKind::ConnectionReset => {
            "it closed the connection when it was to prove which host it is; does that host have certificates?".into()
        }
        None => format!("no proof of which host it is: {error}"),
    }
}

/// Says what a connection is for, and hears whether it is taken.
fn introduce(
    stream: &Stream,
    preamble: &Preamble,
    remote: SocketAddr,
    deadline: Instant,
) -> Result<u64, SessionError> {
    let broken = |cause: io::Error| {
        // With TLS 1.3 the listening side's verdict on this side's certificate comes after the handshake.
        #[cfg(feature = "tls")]
        if cause.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>) {
            return SessionError::Untrusted { remote, why: explain(&cause) };
        }
        SessionError::Handshake { remote, cause }
    };
    write_by(stream, &preamble.encode(), deadline).map_err(broken)?;
    let mut head = [0; REPLY_BYTES];
    read_by(stream, &mut head, deadline).map_err(broken)?;
    let misfit = |cause| SessionError::Preamble { remote, cause };
    let header = ReplyHeader::decode(&head).map_err(misfit)?;
    let mut text = vec![0; header.text_bytes()];
    read_by(stream, &mut text, deadline).map_err(broken)?;
    match header.with_text(&text).map_err(misfit)?.answer {
        Answer::Accepted { received } => Ok(received),
        Answer::Refused { code, text } => Err(SessionError::Refused { remote, code, text }),
    }
}

/// Reads the first bytes of the dialling side.
pub(super) fn read_preamble(stream: &Stream, deadline: Instant) -> Result<[u8; PREAMBLE_BYTES], io::Error> {
    let mut bytes = [0; PREAMBLE_BYTES];
    read_by(stream, &mut bytes, deadline)?;
    Ok(bytes)
}

/// Answers the dialling side.
pub(super) fn write_reply(stream: &Stream, reply: &Reply, deadline: Instant) -> io::Result<()> {
    write_by(stream, &reply.encode(), deadline)
}

/// Fills `into` before the deadline, however slowly the bytes trickle in.
fn read_by(mut stream: &Stream, mut into: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !into.is_empty() {
        stream.socket().set_read_timeout(Some(time_left(deadline)?))?;
        match stream.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => into = &mut into[bytes..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_by(mut stream: &Stream, bytes: &[u8], deadline: Instant) -> io::Result<()> {
    stream.socket().set_write_timeout(Some(time_left(deadline)?))?;
    stream.write_all(bytes)
}

pub(super) fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Reads one message of a query.
pub(super) fn read_message(stream: &Stream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut head = [0; LINK_HEADER_BYTES];
    read_by(stream, &mut head, deadline)?;
    let header = LinkHeader::decode(&head).map_err(io::Error::other)?;
    if header.kind != LinkKind::Message || header.bytes as usize > MAX_QUERY_BYTES {
        return Err(io::Error::other(format!("a query's message has at most {MAX_QUERY_BYTES} bytes")));
    }
    let mut message = vec![0; header.bytes as usize];
    read_by(stream, &mut message, deadline)?;
    Ok(message)
}

/// Writes one message of a query.
pub(super) fn write_message(stream: &Stream, message: &[u8], deadline: Instant) -> io::Result<()> {
    if message.len() > MAX_QUERY_BYTES {
        let text = format!("a query's message of {} bytes; {MAX_QUERY_BYTES} is the limit", message.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let header = LinkHeader { kind: LinkKind::Message, bytes: message.len() as u32, number: 0 };
    let mut bytes = header.encode().to_vec();
    bytes.extend(message);
    write_by(stream, &bytes, deadline)
}

/// Asks the host at the other end of the paths, one after the other, a question about a migration. `timeout` is for each.
///
/// # Errors
/// Why the last path gave no answer.
pub fn query(
    paths: &[Path],
    migration: MigrationId,
    request: &[u8],
    trust: &PeerTrust,
    timeout: Duration,
) -> Result<Vec<u8>, SessionError> {
    let mut answer = Err(SessionError::NoPath);
    for path in paths {
        answer = query_one(path, migration, request, trust, timeout);
        if answer.is_ok() {
            break;
        }
    }
    answer
}

fn query_one(
    path: &Path,
    migration: MigrationId,
    request: &[u8],
    trust: &PeerTrust,
    timeout: Duration,
) -> Result<Vec<u8>, SessionError> {
    let preamble = Preamble::new(Purpose::Query, migration, Secret::NONE);
    let deadline = Instant::now() + timeout;
    let (stream, _) = dial(path, &preamble, trust, timeout)?;
    let failed = |remote: SocketAddr| move |cause| SessionError::Query { remote, cause };
    write_message(&stream, request, deadline).map_err(failed(path.destination))?;
    read_message(&stream, deadline).map_err(failed(path.destination))
}
