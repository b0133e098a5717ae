//! Questions to the kernel about links, addresses and routes (`rtnetlink(7)`).

use std::io;
use std::net::IpAddr;

use futures_util::stream::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{LinkExtentMask, LinkMessage};
use rtnetlink::packet_route::route::{RouteFlags, RouteType};
use rtnetlink::{Error, Handle, RouteMessageBuilder};

use super::NetworkError;

/// A connection to the kernel, closed when it is dropped.
pub(super) struct Netlink(Handle);

impl Netlink {
    /// Opens one, in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Open)?;
        // Ends with the last handle.
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Every interface.
    pub(super) async fn links(&self) -> Result<Vec<LinkMessage>, NetworkError> {
        let unread = vec![LinkExtentMask::SkipStats];
        let request = self.0.link().get().set_filter_mask(AddressFamily::Unspec, unread);
        request.execute().try_collect().await.map_err(|cause| answer("interfaces", cause))
    }

    /// Every address.
    pub(super) async fn addresses(&self) -> Result<Vec<AddressMessage>, NetworkError> {
        self.0.address().get().execute().try_collect().await.map_err(|cause| answer("addresses", cause))
    }

    /// Whether a socket that is bound to this address and this interface has a route there.
    ///
    /// A match in the table is asked for: without one the kernel would send by a bound interface all the same, as if the
    /// destination were its neighbour.
    pub(super) async fn has_route(&self, from: IpAddr, interface: u32, to: IpAddr) -> bool {
        let mut message = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(to, 32)
                .source_prefix(from, 32)
                .output_interface(interface)
                .build(),
            (IpAddr::V6(from), IpAddr::V6(to)) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(to, 128)
                .source_prefix(from, 128)
                .output_interface(interface)
                .build(),
            _ => return false,
        };
        message.header.flags = RouteFlags::FibMatch;
        let mut answers = Box::pin(self.0.route().get(message).execute());
        // An error is the kernel's word for "no route" (ENETUNREACH, EHOSTUNREACH, EINVAL for an address that went away).
        matches!(answers.try_next().await, Ok(Some(route)) if route.header.kind == RouteType::Unicast)
    }
}

fn answer(what: &'static str, cause: Error) -> NetworkError {
    let cause = match cause {
        Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    };
    NetworkError::Ask { what, cause }
}
