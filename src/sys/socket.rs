//! What the kernel tells of sockets and interfaces only through calls that take raw structures.

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

/// How many bytes were written to a TCP socket that the peer's kernel has not acknowledged yet (`SIOCOUTQ`, `tcp(7)`).
///
/// # Errors
/// What `ioctl(2)` answers.
pub fn unacknowledged_bytes(socket: impl AsFd) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, of which SIOCOUTQ is another name, writes one int through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(bytes).unwrap_or(0))
}

/// Wakes readers of a socket only when so many bytes have come, or the peer has closed (`SO_RCVLOWAT`, `socket(7)`); 1 is the
/// default. The kernel bounds it to half of the largest receive buffer.
///
/// # Errors
/// What `setsockopt(2)` answers.
pub fn set_receive_low_water(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the option is one int, which the pointer points to and which outlives the call.
    let result = unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const bytes).cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has a connection that is not made yet send and receive no TCP segment of more bytes (`TCP_MAXSEG`, `tcp(7)`).
///
/// # Errors
/// What `setsockopt(2)` answers.
pub fn set_largest_segment(socket: impl AsFd, bytes: u16) -> io::Result<()> {
    let bytes = libc::c_int::from(bytes);
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the option is one int, which the pointer points to and which outlives the call.
    let result = unsafe {
        libc::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG, (&raw const bytes).cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has a socket send and receive by this interface only (`SO_BINDTODEVICE`, `socket(7)`).
///
/// # Errors
/// What `setsockopt(2)` answers, with the interface's name.
pub fn bind_to_interface(socket: impl AsFd, interface: &str) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    let length = interface.len() as libc::socklen_t;
    // SAFETY: the option is a string of the length given, which outlives the call; the kernel copies it and needs no zero byte.
    let result = unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, interface.as_ptr().cast(), length)
    };
    if result == 0 {
        return Ok(());
    }
    let cause = io::Error::last_os_error();
    Err(io::Error::new(cause.kind(), format!("the interface {interface} cannot be used: {cause}")))
}

/// The name of the interface that has an address, if any has (`getifaddrs(3)`).
///
/// # Errors
/// What `getifaddrs(3)` answers.
pub fn interface_with(address: IpAddr) -> io::Result<Option<String>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: writes the head of a list that it allocates through the pointer, which outlives the call.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = None;
    let mut entry = list;
    while !entry.is_null() && found.is_none() {
        // SAFETY: an entry of the list, which is freed only below; nothing else has a reference to it.
        let this = unsafe { &*entry };
        // SAFETY: the address pointer is null or points to a socket address of the family that it names.
        if unsafe { ip_of(this.ifa_addr) } == Some(address) {
            // SAFETY: the name is a C string that lives as long as the list.
            found = Some(unsafe { CStr::from_ptr(this.ifa_name) }.to_string_lossy().into_owned());
        }
        entry = this.ifa_next;
    }
    // SAFETY: the list that getifaddrs made; no reference into it is left.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// # Safety
/// `address` is null or points to a socket address as long as its family says.
unsafe fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: not null, so by the caller's promise it points to at least the family.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: the family says that it is an IPv4 socket address.
            let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(v4.sin_addr.s_addr))))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that it is an IPv6 socket address.
            let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::V6(Ipv6Addr::from(v6.sin6_addr.s6_addr)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn loopback_has_its_interface_and_a_foreign_address_none() {
        assert_eq!(interface_with(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap().as_deref(), Some("lo"));
        assert_eq!(interface_with("192.0.2.77".parse().unwrap()).unwrap(), None);
    }

    #[test]
    fn a_backlog_grows_while_the_peer_does_not_read_and_goes_when_it_does() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        assert_eq!(unacknowledged_bytes(&sender).unwrap(), 0);
        sender.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(bytes) = sender.write(&[1; 65536]) {
            sent += bytes;
        }
        assert!(unacknowledged_bytes(&sender).unwrap() > 0);
        receiver.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        receiver.read_exact(&mut vec![0; sent]).unwrap();
        let emptied = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            unacknowledged_bytes(&sender).unwrap() == 0
        });
        assert!(emptied);
    }
}
