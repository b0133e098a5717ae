//! The TCP channel: what both of its ends share.
//!
//! The source sends guest RAM without copying it (`tcp_source`), the destination receives straight into guest RAM
//! (`tcp_destination`).

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::frames::{FrameLink, Receipts, fill, judge};
use super::tcp_destination::TcpReceiver;
use super::tcp_source::TcpSource;
use super::{AcceptedChannel, Carrier, ChannelError, ChannelLink, OpenChannel};
use crate::memory::GuestMemory;
use crate::sys::socket::{bind_to_interface, interface_with, set_largest_segment};

/// How a TCP channel behaves.
#[derive(Clone, Copy, Debug)]
pub struct TcpOptions {
    /// How long the peer may be silent when it owes something before the link counts as lost.
    pub link_timeout: Duration,
    /// Whether guest RAM is sent without copying it. Turned off where the kernel refuses.
    pub zero_copy: bool,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { link_timeout: Duration::from_secs(10), zero_copy: true }
    }
}

/// Connects, from an address of this host and by an interface if they are given, within `timeout`. The socket blocks afterwards.
///
/// # Errors
/// What the kernel answers; `TimedOut` when the peer does not answer in time.
pub fn connect(
    source: Option<IpAddr>,
    destination: SocketAddr,
    interface: Option<&str>,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let family = if destination.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    avoid_paced_congestion_control(&socket);
    if let Some(interface) = interface {
        bind_to_interface(&socket, interface)?;
    }
    if let Some(source) = source {
        rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
    }
    match rustix::net::connect(&socket, &destination) {
        Ok(()) => {}
        Err(rustix::io::Errno::INPROGRESS) => finish_connect(&socket, timeout)?,
        Err(errno) => return Err(errno.into()),
    }
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Turns a socket that would be paced by BBR into one that is not; before it connects, because a socket that was paced once
/// stays so.
///
/// BBR paces by a kernel timer for each burst, which costs the source more than the sending itself, see
/// `docs/decisions/0001-no-bbr-on-data-channels.md`. Every other choice of the host's administrator is kept.
fn avoid_paced_congestion_control(socket: &OwnedFd) {
    if !sockopt::tcp_congestion(socket).is_ok_and(|name| name.starts_with("bbr")) {
        return;
    }
    // A process without CAP_NET_ADMIN may only take what tcp_allowed_congestion_control names, and reno always.
    if ["cubic", "reno"].into_iter().all(|name| sockopt::set_tcp_congestion(socket, name).is_err()) {
        tracing::debug!("the kernel offers no congestion control but BBR");
    }
}

fn finish_connect(socket: &OwnedFd, timeout: Duration) -> io::Result<()> {
    if !wait_ready(socket, PollFlags::OUT, timeout)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(sockopt::socket_error(socket)??)
}

/// Waits until a descriptor is ready, or in error; `false` when the time is over.
fn wait_ready(descriptor: impl AsFd, what: PollFlags, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&descriptor, what)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Listens at an address, for what comes in by an interface if one is given. Accepting does not wait.
///
/// # Errors
/// What the kernel answers.
pub fn listen(address: SocketAddr, interface: Option<&str>) -> io::Result<std::net::TcpListener> {
    const BACKLOG: i32 = 128;
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if let Some(interface) = interface {
        bind_to_interface(&socket, interface)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// The name of the interface that has an address, if any has.
///
/// # Errors
/// What the kernel answers when it does not list interfaces.
pub fn interface_of(address: IpAddr) -> io::Result<Option<String>> {
    interface_with(address)
}

/// Has a connection that is not made yet go in packets that every network carries: 1280 bytes, the least that IPv6 demands.
///
/// # Errors
/// What `setsockopt(2)` answers.
pub fn keep_packets_small(socket: impl AsFd) -> io::Result<()> {
    const IPV6_AND_TCP_HEADERS: u16 = 40 + 20;
    set_largest_segment(socket, 1280 - IPV6_AND_TCP_HEADERS)
}

/// Makes a socket notice a peer that has vanished, and send what it is given at once.
///
/// While data is under way `TCP_USER_TIMEOUT` notices, else keepalive probes do: see `tcp(7)`.
///
/// # Errors
/// What `setsockopt(2)` answers.
pub fn tune(stream: &TcpStream, link_timeout: Duration) -> io::Result<()> {
    const PROBES: u32 = 3;
    let probe_every = (link_timeout / (PROBES + 1)).max(Duration::from_secs(1));
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(link_timeout))?;
    stream.set_write_timeout(Some(link_timeout))?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(link_timeout.as_millis()).unwrap_or(u32::MAX))?;
    sockopt::set_tcp_keepidle(stream, probe_every)?;
    sockopt::set_tcp_keepintvl(stream, probe_every)?;
    sockopt::set_tcp_keepcnt(stream, PROBES)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}

/// Makes a connection that the destination has accepted into a channel.
///
/// # Errors
/// [`ChannelError::SetUp`].
pub fn open(
    stream: TcpStream,
    memory: GuestMemory,
    options: TcpOptions,
) -> Result<OpenChannel, ChannelError> {
    let link = Arc::new(TcpLink::new(stream, options.link_timeout)?);
    let sent = Arc::new(AtomicU64::new(0));
    let source = TcpSource::new(link.clone(), memory, sent.clone(), options.zero_copy);
    let receipts = Receipts::new(link.clone(), sent);
    Ok(OpenChannel { source: Box::new(source), receipts: Box::new(receipts), link })
}

/// Makes a connection that was accepted at the destination into the receiving end of a channel.
///
/// # Errors
/// [`ChannelError::SetUp`].
pub fn receive(
    stream: TcpStream,
    memory: GuestMemory,
    options: TcpOptions,
) -> Result<AcceptedChannel, ChannelError> {
    let link = Arc::new(TcpLink::new(stream, options.link_timeout)?);
    Ok(AcceptedChannel { receiver: Box::new(TcpReceiver::new(link.clone(), memory)), link })
}

/// A connection, shared by everyone who has to do with the channel.
#[derive(Debug)]
pub(super) struct TcpLink {
    pub(super) stream: TcpStream,
    local: SocketAddr,
    remote: SocketAddr,
    timeout: Duration,
}

impl TcpLink {
    fn new(stream: TcpStream, timeout: Duration) -> Result<Self, ChannelError> {
        tune(&stream, timeout).map_err(ChannelError::SetUp)?;
        let local = stream.local_addr().map_err(ChannelError::SetUp)?;
        let remote = stream.peer_addr().map_err(ChannelError::SetUp)?;
        Ok(Self { stream, local, remote, timeout })
    }

    /// Waits until the socket's low water mark is reached, or the peer has closed.
    pub(super) fn wait_readable(&self, got: u64, expected: u64) -> Result<(), ChannelError> {
        match wait_ready(&self.stream, PollFlags::IN, self.timeout) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ChannelError::Stalled { got, expected, seconds: self.timeout.as_secs() }),
            Err(error) => Err(ChannelError::Receive(error)),
        }
    }

    /// Whether to try again after an error within a frame.
    pub(super) fn judge(&self, error: io::Error, got: u64, expected: u64) -> Result<(), ChannelError> {
        judge(error, got, expected, self.timeout)
    }
}

impl FrameLink for TcpLink {
    fn read(&self, into: &mut [u8], between_frames: bool) -> Result<(), ChannelError> {
        fill(|into| (&self.stream).read(into), into, between_frames, self.timeout)
    }
}

impl ChannelLink for TcpLink {
    fn local(&self) -> SocketAddr {
        self.local
    }

    fn remote(&self) -> SocketAddr {
        self.remote
    }

    fn carrier(&self) -> Carrier {
        Carrier::Tcp
    }

    fn shut(&self) {
        // Fails only when it is shut already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_does_not_use_bbr_and_keeps_other_choices() {
        let socket = || rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        let offered = |name| sockopt::set_tcp_congestion(socket(), name).is_ok();
        for (chosen, used) in [("bbr", &["cubic", "reno"][..]), ("reno", &["reno"]), ("cubic", &["cubic"])] {
            if offered(chosen) {
                let socket = socket();
                sockopt::set_tcp_congestion(&socket, chosen).unwrap();
                avoid_paced_congestion_control(&socket);
                let name = sockopt::tcp_congestion(&socket).unwrap();
                assert!(used.contains(&name.as_str()), "{name} instead of {chosen}");
            }
        }
    }
}
