//! RDMA devices: which there are, what they can do, and what happens to them.

use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use super::abi;
use super::error::{VerbsError, check};
use super::library::Library;

/// What the library hands out as one list and takes back as one.
struct DeviceList {
    library: &'static Library,
    first: NonNull<*mut abi::Device>,
}

// SAFETY: the list is read only, and libibverbs may be called from any thread.
unsafe impl Send for DeviceList {}
// SAFETY: as above.
unsafe impl Sync for DeviceList {}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: it came from `ibv_get_device_list`, and no device of it is used any more: each holds the list.
        unsafe { (self.library.free_device_list)(self.first.as_ptr()) }
    }
}

/// A device that is not open.
#[derive(Clone)]
pub struct Device {
    list: Arc<DeviceList>,
    raw: NonNull<abi::Device>,
}

// SAFETY: the device belongs to the list that is held, and is read only.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// By what means a device reaches others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// InfiniBand's, which RoCE uses too.
    InfiniBand,
    /// iWARP, over TCP.
    Iwarp,
    /// Another one.
    Other,
}

/// The RDMA devices of this host: ibv_get_device_list(3). None is an empty list.
///
/// # Errors
/// [`VerbsError::NoLibrary`], [`VerbsError::TooOld`], [`VerbsError::NoUverbs`] or [`VerbsError::List`]: why this host has no RDMA.
pub fn devices() -> Result<Vec<Device>, VerbsError> {
    let library = Library::get()?;
    let mut count: c_int = 0;
    // SAFETY: it writes one number.
    let first = unsafe { (library.get_device_list)(&raw mut count) };
    let Some(first) = NonNull::new(first) else {
        let cause = io::Error::last_os_error();
        return Err(match cause.raw_os_error() {
            Some(libc::ENOSYS) => VerbsError::NoUverbs(cause),
            _ => VerbsError::List(cause),
        });
    };
    let list = Arc::new(DeviceList { library, first });
    let pointers = (0..usize::try_from(count).unwrap_or(0)).map(|index| {
        // SAFETY: the list has `count` entries.
        unsafe { *first.as_ptr().add(index) }
    });
    Ok(pointers.filter_map(NonNull::new).map(|raw| Device { list: Arc::clone(&list), raw }).collect())
}

impl Device {
    fn raw(&self) -> &abi::Device {
        // SAFETY: the list that is held keeps the device, and nobody writes to it.
        unsafe { self.raw.as_ref() }
    }

    /// Its name, such as `mlx5_0`.
    #[must_use]
    pub fn name(&self) -> String {
        text(&self.raw().name)
    }

    /// The name of its node in `/dev/infiniband`, such as `uverbs0`.
    #[must_use]
    pub fn node(&self) -> String {
        text(&self.raw().dev_name)
    }

    /// Its transport.
    #[must_use]
    pub fn transport(&self) -> Transport {
        match u32::try_from(self.raw().transport_type) {
            Ok(abi::IBV_TRANSPORT_IB) => Transport::InfiniBand,
            Ok(abi::IBV_TRANSPORT_IWARP) => Transport::Iwarp,
            _ => Transport::Other,
        }
    }

    /// Opens it: ibv_open_device(3).
    ///
    /// # Errors
    /// [`VerbsError::Open`].
    pub fn open(&self) -> Result<Arc<Context>, VerbsError> {
        let library = self.list.library;
        // SAFETY: the device is in the list that is held.
        let raw = NonNull::new(unsafe { (library.open_device)(self.raw.as_ptr()) }).ok_or_else(|| {
            let source = io::Error::last_os_error();
            VerbsError::Open { device: self.name(), node: self.node(), source }
        })?;
        let context = Context { library, raw, name: self.name() };
        // An event is asked for where one may wait for others too.
        set_nonblocking(context.as_fd()).map_err(VerbsError::Event)?;
        Ok(Arc::new(context))
    }
}

/// The text before the first zero byte.
fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| byte.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// An open device.
pub struct Context {
    pub(super) library: &'static Library,
    pub(super) raw: NonNull<abi::Context>,
    name: String,
}

// SAFETY: libibverbs may be called from any thread, and locks where it has to.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RDMA device {}", self.name)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whatever was made from it held it, and is gone.
        unsafe { (self.library.close_device)(self.raw.as_ptr()) };
    }
}

/// What a device can do at most: ibv_query_device(3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// The version of its firmware; empty for software.
    pub firmware: String,
    /// Ports, which are numbered from 1.
    pub ports: u8,
    /// Bytes in one memory region.
    pub memory_region_bytes: u64,
    /// Memory regions.
    pub memory_regions: u32,
    /// Queue pairs.
    pub queue_pairs: u32,
    /// Work requests that a queue pair holds.
    pub work_requests: u32,
    /// Segments of a work request.
    pub segments: u32,
    /// Completion queues.
    pub completion_queues: u32,
    /// Entries of a completion queue.
    pub completions: u32,
    /// Whether memory need not be resident to be sent from and written to over a reliable connection.
    pub on_demand_paging: bool,
}

/// Whether a port can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// Its cable is out or its interface is down.
    Down,
    /// It is coming up.
    Starting,
    /// It works.
    Active,
    /// A state that this program does not know.
    Other(i32),
}

/// What a port speaks below RDMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RoCE, or iWARP.
    Ethernet,
    /// Not said.
    Unknown,
}

/// A port as it is now: ibv_query_port(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAttributes {
    /// Whether it works.
    pub state: PortState,
    /// What it speaks.
    pub link_layer: LinkLayer,
    /// Payload bytes of one packet, as the interface's MTU allows now.
    pub active_mtu: u32,
    /// The most that the port could.
    pub max_mtu: u32,
    /// Bytes of one message.
    pub message_bytes: u32,
    /// Bits a second of all lanes, as the port negotiated them; `None` for a speed that this program does not know.
    pub bits_per_second: Option<u64>,
}

/// What a GID is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand.
    InfiniBand,
    /// RoCE v1, which routers do not forward.
    RoceV1,
    /// RoCE v2, over UDP.
    RoceV2,
    /// Another one.
    Other(u32),
}

/// An address of a port: ibv_query_gid_table(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GidEntry {
    /// The port, from 1.
    pub port: u8,
    /// Its place in the port's table, by which a queue pair names it.
    pub index: u32,
    /// The address, an IPv6 one, or an IPv4 one mapped into it.
    pub gid: [u8; 16],
    /// What it is for.
    pub kind: GidKind,
    /// The number of the network interface that has the address, where it is one's.
    pub interface: Option<u32>,
}

/// What happened to a device on its own account: ibv_get_async_event(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsyncEvent {
    /// A port works again.
    PortActive(u8),
    /// A port does not work any more.
    PortError(u8),
    /// The addresses of a port changed.
    GidChange(u8),
    /// A queue pair is of no use any more.
    QueuePairFailed(u32),
    /// The device is of no use any more.
    DeviceFatal,
    /// Something that needs no answer, by its number in `enum ibv_event_type`.
    Other(i32),
}

/// A number that the library has as a C int and that cannot be negative.
fn count(value: c_int) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

/// Bytes of `enum ibv_mtu`; 0 for an unknown one.
fn mtu_bytes(code: c_int) -> u32 {
    let known = abi::IBV_MTU_256 as c_int..=abi::IBV_MTU_4096 as c_int;
    if known.contains(&code) { 128 << code } else { 0 }
}

/// Lanes times the speed of one (InfiniBand architecture specification, `PortInfo`; ibv_query_port(3)).
fn bits_per_second(width: u8, speed: u8) -> Option<u64> {
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => return None,
    };
    let megabits = match speed {
        1 => 2_500,
        2 => 5_000,
        4 | 8 => 10_000,
        16 => 14_000,
        32 => 25_000,
        64 => 50_000,
        128 => 100_000,
        _ => return None,
    };
    Some(lanes * megabits * 1_000_000)
}

impl Context {
    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the device can do.
    ///
    /// # Errors
    /// [`VerbsError::QueryDevice`].
    pub fn limits(&self) -> Result<DeviceLimits, VerbsError> {
        // SAFETY: numbers and bytes, of which any value is valid.
        let mut raw: abi::DeviceAttr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open; the library writes one structure.
        check(unsafe { (self.library.query_device)(self.raw.as_ptr(), &raw mut raw) })
            .map_err(VerbsError::QueryDevice)?;
        Ok(DeviceLimits {
            firmware: text(&raw.fw_ver),
            ports: raw.phys_port_cnt,
            memory_region_bytes: raw.max_mr_size,
            memory_regions: count(raw.max_mr),
            queue_pairs: count(raw.max_qp),
            work_requests: count(raw.max_qp_wr),
            segments: count(raw.max_sge),
            completion_queues: count(raw.max_cq),
            completions: count(raw.max_cqe),
            on_demand_paging: self.has_on_demand_paging(),
        })
    }

    /// What a port can do and whether it works.
    ///
    /// # Errors
    /// [`VerbsError::QueryPort`].
    pub fn port(&self, port: u8) -> Result<PortAttributes, VerbsError> {
        let raw = self.port_raw(port)?;
        Ok(PortAttributes {
            state: match u32::try_from(raw.state) {
                Ok(abi::IBV_PORT_DOWN) => PortState::Down,
                Ok(abi::IBV_PORT_INIT | abi::IBV_PORT_ARMED) => PortState::Starting,
                Ok(abi::IBV_PORT_ACTIVE) => PortState::Active,
                _ => PortState::Other(raw.state),
            },
            link_layer: match u32::from(raw.link_layer) {
                abi::IBV_LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
                abi::IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
                _ => LinkLayer::Unknown,
            },
            active_mtu: mtu_bytes(raw.active_mtu),
            max_mtu: mtu_bytes(raw.max_mtu),
            message_bytes: raw.max_msg_sz,
            bits_per_second: bits_per_second(raw.active_width, raw.active_speed),
        })
    }

    fn port_raw(&self, port: u8) -> Result<abi::PortAttr, VerbsError> {
        // SAFETY: numbers, of which any value is valid.
        let mut raw: abi::PortAttr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open. The exported function writes what the first ABI had, which is shorter than the structure.
        check(unsafe { (self.library.query_port)(self.raw.as_ptr(), port, &raw mut raw) })
            .map_err(|source| VerbsError::QueryPort { port, source })?;
        Ok(raw)
    }

    /// The addresses of all ports; entries of the tables that are not in use are left out.
    ///
    /// # Errors
    /// [`VerbsError::QueryGids`], or what [`Context::limits`] and [`Context::port`] answer.
    pub fn gids(&self) -> Result<Vec<GidEntry>, VerbsError> {
        let mut room = 0;
        for port in 1..=self.limits()?.ports {
            room += count(self.port_raw(port)?.gid_tbl_len) as usize;
        }
        let mut entries = vec![abi::GidEntry::default(); room];
        // SAFETY: the context is open; the library writes at most as many entries of the given size as there is room for.
        let found = unsafe {
            (self.library.query_gid_table)(
                self.raw.as_ptr(),
                entries.as_mut_ptr(),
                entries.len(),
                0,
                size_of::<abi::GidEntry>(),
            )
        };
        let found = usize::try_from(found).map_err(|_| {
            let errno = i32::try_from(-found).unwrap_or(libc::EIO);
            VerbsError::QueryGids(io::Error::from_raw_os_error(errno))
        })?;
        Ok(entries.iter().take(found).map(gid_entry).collect())
    }

    /// The next thing that happened to the device, if there is one; the descriptor becomes readable when there is.
    ///
    /// # Errors
    /// [`VerbsError::Event`].
    pub fn next_event(&self) -> Result<Option<AsyncEvent>, VerbsError> {
        let mut raw = abi::AsyncEvent { element: abi::EventElement { port_num: 0 }, event_type: 0 };
        // SAFETY: the context is open; the library writes one structure.
        if unsafe { (self.library.get_async_event)(self.raw.as_ptr(), &raw mut raw) } != 0 {
            let cause = io::Error::last_os_error();
            return match cause.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(VerbsError::Event(cause)),
            };
        }
        // SAFETY: the union's member is the one of the event's type.
        let port = || u8::try_from(unsafe { raw.element.port_num }).unwrap_or(0);
        let event = match u32::try_from(raw.event_type) {
            Ok(abi::IBV_EVENT_PORT_ACTIVE) => AsyncEvent::PortActive(port()),
            Ok(abi::IBV_EVENT_PORT_ERR) => AsyncEvent::PortError(port()),
            Ok(abi::IBV_EVENT_GID_CHANGE) => AsyncEvent::GidChange(port()),
            Ok(abi::IBV_EVENT_DEVICE_FATAL) => AsyncEvent::DeviceFatal,
            Ok(abi::IBV_EVENT_QP_FATAL | abi::IBV_EVENT_QP_REQ_ERR | abi::IBV_EVENT_QP_ACCESS_ERR) => {
                // SAFETY: of these types the member is the queue pair, which cannot be destroyed before the event is
                // acknowledged below (ibv_get_async_event(3)).
                AsyncEvent::QueuePairFailed(unsafe { (*raw.element.qp).qp_num })
            }
            _ => AsyncEvent::Other(raw.event_type),
        };
        // SAFETY: the event was just got, and is acknowledged once.
        unsafe { (self.library.ack_async_event)(&raw mut raw) };
        Ok(Some(event))
    }
}

impl AsFd for Context {
    /// What becomes readable when [`Context::next_event`] has something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the open context's, which the borrow keeps.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).async_fd) }
    }
}

fn gid_entry(raw: &abi::GidEntry) -> GidEntry {
    GidEntry {
        port: u8::try_from(raw.port_num).unwrap_or(0),
        index: raw.gid_index,
        gid: raw.gid.raw,
        kind: match raw.gid_type {
            abi::IBV_GID_TYPE_IB => GidKind::InfiniBand,
            abi::IBV_GID_TYPE_ROCE_V1 => GidKind::RoceV1,
            abi::IBV_GID_TYPE_ROCE_V2 => GidKind::RoceV2,
            other => GidKind::Other(other),
        },
        interface: (raw.ndev_ifindex != 0).then_some(raw.ndev_ifindex),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_lanes_times_the_speed_of_one() {
        assert_eq!(bits_per_second(2, 32), Some(100_000_000_000), "4X EDR");
        assert_eq!(bits_per_second(1, 1), Some(2_500_000_000), "1X SDR");
        assert_eq!(bits_per_second(3, 1), None);
        assert_eq!(bits_per_second(1, 0), None);
    }

    #[test]
    fn mtus_are_powers_of_two_from_256_to_4096() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6, -1].map(mtu_bytes), [0, 256, 512, 1024, 2048, 4096, 0, 0]);
    }

    #[test]
    fn a_name_ends_at_its_zero_byte() {
        let raw = [b'r', b'x', b'e', b'0', 0, b'x'].map(u8::cast_signed);
        assert_eq!(text(&raw), "rxe0");
        assert_eq!(text(&raw[..3]), "", "a name without an end is none");
    }

    /// Whatever this machine has, the answer is in words.
    #[test]
    fn a_host_without_rdma_says_which_part_is_missing() {
        match devices() {
            Ok(devices) => assert!(devices.iter().all(|device| !device.name().is_empty())),
            Err(VerbsError::NoUverbs(_)) => {
                assert!(!std::path::Path::new("/sys/class/infiniband_verbs").exists());
            }
            Err(VerbsError::NoLibrary { .. }) => {}
            Err(other) => panic!("{other}: {:?}", std::error::Error::source(&other).map(ToString::to_string)),
        }
    }
}
