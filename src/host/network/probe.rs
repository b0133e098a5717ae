//! Whether a path carries anything, and packets of which size: asked of the path itself, by datagrams.
//!
//! The destination answers for some seconds ([`EchoService`]), the source asks ([`probe`]). A datagram begins with a token
//! that both know from the daemons' own connection, and a number; the answer repeats both and says how long the datagram
//! was. It is never longer than the question, and strangers get none.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::future::join_all;
use rustix::net::sockopt;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::Offer;
use crate::host::api::check::PathInfo;

/// What a question must begin with to be answered.
pub type ProbeToken = [u8; 16];

/// For how long a host answers.
pub const ECHO_LIFETIME: Duration = Duration::from_secs(10);
/// After how long no further size is tried, so that the last one still finds the other host answering.
const SEARCH_LIMIT: Duration = Duration::from_secs(7);

/// Token, number and, in the answer, the length that came.
const MESSAGE_BYTES: usize = 24;
/// The largest datagram of UDP, and no interface carries a larger one (65,535 bytes of IPv6's payload).
const MOST_BYTES: usize = 65_535;
/// How long the first question's tries wait for their answer: far hosts, and hosts that have to find each other's hardware
/// addresses first, get more than one chance.
const FIRST_WAITS: [Duration; 3] =
    [Duration::from_millis(150), Duration::from_millis(300), Duration::from_millis(600)];
/// How long later ones wait at least; four times as long as the first answer took, when that is more.
const LEAST_WAIT: Duration = Duration::from_millis(100);
/// How many sizes are tried after the whole one did not pass.
const MOST_SIZES: u32 = 12;
/// The MTUs that networks have, the larger first: most searches end at one of them.
const COMMON_MTUS: [u32; 6] = [8950, 1500, 1492, 1450, 1400, 1280];

/// What a path was seen to carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// The other host answers.
    Reachable {
        /// How long a small datagram and its answer took.
        rtt: Duration,
        /// Whether IP packets as large as the path's MTU arrive.
        mtu_ok: bool,
        /// The largest IP packet that was seen to arrive, in bytes.
        largest: u32,
    },
    /// Nothing came back.
    Silent {
        /// What the kernel had to say about it.
        why: Option<String>,
    },
}

/// Answers probes at this host's addresses until [`ECHO_LIFETIME`] is over or it is dropped.
#[derive(Debug)]
pub struct EchoService {
    ports: Vec<(IpAddr, u16)>,
    problems: Vec<String>,
    tasks: JoinSet<()>,
}

impl EchoService {
    /// Opens a socket at each of these addresses, by its interface and at the first port of the range (ends included) that
    /// is free: the ports that a firewall lets migrations through. The range 0 to 0 is any port.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn start(offers: &[Offer], port_range: (u16, u16), token: ProbeToken) -> Self {
        let mut service = Self { ports: Vec::new(), problems: Vec::new(), tasks: JoinSet::new() };
        let end = Instant::now() + ECHO_LIFETIME;
        for offer in offers {
            match echo_socket(offer, port_range) {
                Ok((socket, port)) => {
                    service.ports.push((offer.address, port));
                    service.tasks.spawn(echo(socket, token, end));
                }
                Err(cause) => service.problems.push(format!(
                    "probes cannot be answered at {} on {} (UDP port {} to {}): {cause}",
                    offer.address, offer.interface, port_range.0, port_range.1
                )),
            }
        }
        service
    }

    /// Where it answers.
    #[must_use]
    pub fn ports(&self) -> &[(IpAddr, u16)] {
        &self.ports
    }

    /// The addresses at which it does not, each with the reason as a sentence.
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Waits until its time is over.
    pub async fn finished(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

fn echo_socket(offer: &Offer, (first, last): (u16, u16)) -> io::Result<(UdpSocket, u16)> {
    let mut failed = io::Error::from(io::ErrorKind::AddrInUse);
    for port in first..=last {
        match std::net::UdpSocket::bind((offer.address, port)) {
            Ok(socket) => {
                socket.set_nonblocking(true)?;
                let socket = UdpSocket::from_std(socket)?;
                socket.bind_device(Some(offer.interface.as_bytes()))?;
                let port = socket.local_addr()?.port();
                return Ok((socket, port));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => failed = error,
            Err(error) => return Err(error),
        }
    }
    Err(failed)
}

async fn echo(socket: UdpSocket, token: ProbeToken, end: Instant) {
    let mut buffer = vec![0; MOST_BYTES];
    while let Ok(received) = timeout_at(end, socket.recv_from(&mut buffer)).await {
        // An error is that of an earlier answer, which the asker no longer waited for.
        let Ok((length, from)) = received else { continue };
        if length < MESSAGE_BYTES || buffer[..token.len()] != token {
            continue;
        }
        let mut answer = [0; MESSAGE_BYTES];
        answer.copy_from_slice(&buffer[..MESSAGE_BYTES]);
        answer[20..].copy_from_slice(&(length as u32).to_le_bytes());
        // What does not go out is asked again.
        let _ = socket.send_to(&answer, from).await;
    }
}

/// Tries every path at the same time. `ports` is where the other host answers ([`EchoService::ports`]).
pub async fn probe(paths: &[PathInfo], ports: &[(IpAddr, u16)], token: ProbeToken) -> Vec<ProbeResult> {
    join_all(paths.iter().map(|path| async move {
        let Some((_, port)) = ports.iter().find(|(address, _)| *address == path.destination) else {
            return silent(&"the destination does not answer probes at this address");
        };
        match Asker::open(path, *port, token).await {
            Ok(asker) => asker.probe(path.mtu).await,
            Err(cause) => silent(&cause),
        }
    }))
    .await
}

fn silent(why: &impl ToString) -> ProbeResult {
    ProbeResult::Silent { why: Some(why.to_string()) }
}

/// A socket on one path.
struct Asker {
    socket: UdpSocket,
    token: ProbeToken,
    /// The headers of IP (RFC 791, RFC 8200) and UDP (RFC 768).
    header_bytes: u32,
    /// The largest packet that the family has.
    most_packet_bytes: u32,
    next_number: u32,
    /// How long each try waits.
    waits: [Duration; 3],
    why: Option<String>,
}

impl Asker {
    async fn open(path: &PathInfo, port: u16, token: ProbeToken) -> io::Result<Self> {
        let socket = UdpSocket::bind((path.source, 0)).await?;
        socket.bind_device(Some(path.interface.as_bytes()))?;
        // No fragments, whatever the kernel has learnt of the path before.
        if path.source.is_ipv4() {
            sockopt::set_ip_mtu_discover(&socket, sockopt::Ipv4PathMtuDiscovery::PROBE)?;
        } else {
            sockopt::set_ipv6_mtu_discover(&socket, sockopt::Ipv6PathMtuDiscovery::PROBE)?;
        }
        socket.connect(SocketAddr::new(path.destination, port)).await?;
        let (header_bytes, most_packet_bytes) =
            if path.source.is_ipv4() { (20 + 8, 65_535) } else { (40 + 8, 40 + 65_535) };
        Ok(Self {
            socket,
            token,
            header_bytes,
            most_packet_bytes,
            next_number: 0,
            waits: FIRST_WAITS,
            why: None,
        })
    }

    async fn probe(mut self, mtu: u32) -> ProbeResult {
        let end = Instant::now() + SEARCH_LIMIT;
        let smallest = self.header_bytes + MESSAGE_BYTES as u32;
        let Some(rtt) = self.passes(smallest).await else { return ProbeResult::Silent { why: self.why } };
        self.waits = [LEAST_WAIT.max(rtt * 4); 3];
        let whole = mtu.min(self.most_packet_bytes);
        if self.passes(whole).await.is_some() {
            return ProbeResult::Reachable { rtt, mtu_ok: true, largest: mtu };
        }
        let (mut passing, mut failing) = (smallest, whole);
        for _ in 0..MOST_SIZES {
            let Some(size) = next_size(passing, failing).filter(|_| Instant::now() < end) else { break };
            match self.passes(size).await {
                Some(_) => passing = size,
                None => failing = size,
            }
        }
        ProbeResult::Reachable { rtt, mtu_ok: false, largest: passing }
    }

    /// Whether an IP packet of so many bytes arrives, and how long its answer took.
    async fn passes(&mut self, packet_bytes: u32) -> Option<Duration> {
        let length = packet_bytes.saturating_sub(self.header_bytes).max(MESSAGE_BYTES as u32);
        let mut question = vec![0; length as usize];
        question[..16].copy_from_slice(&self.token);
        for wait in self.waits {
            let number = self.next_number.to_le_bytes();
            self.next_number = self.next_number.wrapping_add(1);
            question[16..20].copy_from_slice(&number);
            let asked = Instant::now();
            if let Err(error) = self.socket.send(&question).await {
                let too_large = error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error());
                if too_large {
                    return None;
                }
                self.why = Some(error.to_string());
            }
            if self.answered(number, length, asked + wait).await {
                return Some(asked.elapsed());
            }
        }
        None
    }

    /// Waits for the answer to a question.
    async fn answered(&mut self, number: [u8; 4], length: u32, end: Instant) -> bool {
        // One byte more than an answer has, so that a longer one is none.
        let mut answer = [0; MESSAGE_BYTES + 1];
        loop {
            match timeout_at(end, self.socket.recv(&mut answer)).await {
                Err(_) => return false,
                // What the network says to a question: no such port, no way to that host.
                Ok(Err(error)) => self.why = Some(error.to_string()),
                Ok(Ok(received)) => {
                    let whole = received == MESSAGE_BYTES && answer[..16] == self.token;
                    if whole && answer[16..20] == number && answer[20..24] == length.to_le_bytes() {
                        return true;
                    }
                }
            }
        }
    }
}

/// Which packet to try next, where one of `passing` bytes arrives and one of `failing` bytes does not: the common sizes
/// first, then one byte more than the common one that arrived, then the middle.
fn next_size(passing: u32, failing: u32) -> Option<u32> {
    if failing <= passing + 1 {
        return None;
    }
    if COMMON_MTUS.contains(&passing) {
        return Some(passing + 1);
    }
    let common = COMMON_MTUS.into_iter().find(|mtu| (passing + 1..failing).contains(mtu));
    Some(common.unwrap_or_else(|| passing.midpoint(failing)))
}

#[cfg(test)]
mod tests;
