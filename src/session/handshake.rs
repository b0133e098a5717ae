//! The first exchange on a connection, and the connections that end with the second: queries.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::error::SessionError;
use super::path::Path;
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
    timeout: Duration,
) -> Result<(TcpStream, u64), SessionError> {
    let deadline = Instant::now() + timeout;
    let remote = path.destination;
    let stream = connect(path.source, remote, timeout)
        .map_err(|cause| SessionError::Connect { path: path.to_string(), cause })?;
    let broken = |cause| SessionError::Handshake { remote, cause };
    write_by(&stream, &preamble.encode(), deadline).map_err(broken)?;
    let mut head = [0; REPLY_BYTES];
    read_by(&stream, &mut head, deadline).map_err(broken)?;
    let misfit = |cause| SessionError::Preamble { remote, cause };
    let header = ReplyHeader::decode(&head).map_err(misfit)?;
    let mut text = vec![0; header.text_bytes()];
    read_by(&stream, &mut text, deadline).map_err(broken)?;
    match header.with_text(&text).map_err(misfit)?.answer {
        Answer::Accepted { received } => Ok((stream, received)),
        Answer::Refused { code, text } => Err(SessionError::Refused { remote, code, text }),
    }
}

/// Reads the first bytes of the dialling side.
pub(super) fn read_preamble(
    stream: &TcpStream,
    deadline: Instant,
) -> Result<[u8; PREAMBLE_BYTES], io::Error> {
    let mut bytes = [0; PREAMBLE_BYTES];
    read_by(stream, &mut bytes, deadline)?;
    Ok(bytes)
}

/// Answers the dialling side.
pub(super) fn write_reply(stream: &TcpStream, reply: &Reply, deadline: Instant) -> io::Result<()> {
    write_by(stream, &reply.encode(), deadline)
}

/// Fills `into` before the deadline, however slowly the bytes trickle in.
fn read_by(mut stream: &TcpStream, mut into: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !into.is_empty() {
        stream.set_read_timeout(Some(time_left(deadline)?))?;
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

fn write_by(mut stream: &TcpStream, bytes: &[u8], deadline: Instant) -> io::Result<()> {
    stream.set_write_timeout(Some(time_left(deadline)?))?;
    stream.write_all(bytes)
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Reads one message of a query.
pub(super) fn read_message(stream: &TcpStream, deadline: Instant) -> io::Result<Vec<u8>> {
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
pub(super) fn write_message(stream: &TcpStream, message: &[u8], deadline: Instant) -> io::Result<()> {
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
    timeout: Duration,
) -> Result<Vec<u8>, SessionError> {
    let mut answer = Err(SessionError::NoPath);
    for path in paths {
        answer = query_one(path, migration, request, timeout);
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
    timeout: Duration,
) -> Result<Vec<u8>, SessionError> {
    let preamble = Preamble::new(Purpose::Query, migration, Secret::NONE);
    let deadline = Instant::now() + timeout;
    let (stream, _) = dial(path, &preamble, timeout)?;
    let failed = |remote: SocketAddr| move |cause| SessionError::Query { remote, cause };
    write_message(&stream, request, deadline).map_err(failed(path.destination))?;
    read_message(&stream, deadline).map_err(failed(path.destination))
}
