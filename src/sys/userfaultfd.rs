//! Write protection of guest RAM by userfaultfd: the kernel says which pages a guest is about to change, or notes it.
//!
//! Source: the kernel's `Documentation/admin-guide/mm/userfaultfd.rst`, `include/uapi/linux/userfaultfd.h`, and
//! `ioctl_userfaultfd(2)`. Structures and numbers are ours, because libc has none of them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::mapping::Mapping;
use super::scatter::MemorySlice;

/// What a userfaultfd must be able to do. A bit set of `UFFD_FEATURE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// Faults on protected pages are told apart from others (`UFFD_FEATURE_PAGEFAULT_FLAG_WP`, Linux 5.7).
    pub const WRITE_PROTECT: Self = Self(1 << 0);
    /// Shared memory and hugetlb can be protected (`UFFD_FEATURE_WP_HUGETLBFS_SHMEM`, Linux 5.19).
    pub const SHARED_AND_HUGETLB: Self = Self(1 << 12);
    /// A page that is not there yet can be protected (`UFFD_FEATURE_WP_UNPOPULATED`, Linux 6.4).
    pub const UNPOPULATED: Self = Self(1 << 13);
    /// The kernel lifts the protection by itself and remembers that it did (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7).
    pub const ASYNC: Self = Self(1 << 15);

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The names of the features, each with the first Linux that has it.
    fn names(self) -> String {
        [
            (Self::WRITE_PROTECT, "PAGEFAULT_FLAG_WP (Linux 5.7)"),
            (Self::SHARED_AND_HUGETLB, "WP_HUGETLBFS_SHMEM (Linux 5.19)"),
            (Self::UNPOPULATED, "WP_UNPOPULATED (Linux 6.4)"),
            (Self::ASYNC, "WP_ASYNC (Linux 6.7)"),
        ]
        .iter()
        .filter(|(feature, _)| self.0 & feature.0 != 0)
        .map(|(_, name)| *name)
        .collect::<Vec<_>>()
        .join(", ")
    }
}

/// Whose writes a protected page may hold up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stops {
    /// Nobody's, or only user space's: no privilege needed. Right for [`Features::ASYNC`], where nobody ever waits.
    UserSpace,
    /// The kernel's too: KVM on behalf of a vCPU, or a system call that writes into guest RAM.
    Everyone,
}

/// Why write protection by userfaultfd does not work here.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultfdError {
    /// No userfaultfd.
    #[error(
        "cannot open a userfaultfd: the kernel needs CONFIG_USERFAULTFD, and a seccomp filter must allow it; to hold up KVM's \
         writes, open /dev/userfaultfd to this user, or give it CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
    )]
    Open(#[source] io::Error),
    /// The kernel is too old, or built without.
    #[error(
        "the kernel's userfaultfd lacks {0}; run a kernel that has it, built with CONFIG_PTE_MARKER_UFFD_WP"
    )]
    Missing(String),
    /// The handshake with the kernel failed for another reason.
    #[error("the kernel refused the userfaultfd API")]
    Api(#[source] io::Error),
    /// The memory already belongs to another userfaultfd.
    #[error(
        "guest RAM at {0:#x} is watched by another userfaultfd: a memory can have only one, so dirty tracking by pagemap, a \
         snapshot, and a hypervisor's own postcopy exclude each other; stop the other first"
    )]
    Taken(u64),
    /// The memory cannot be watched.
    #[error("cannot watch {bytes} bytes of guest RAM at {address:#x} for writes")]
    Register {
        /// Where, in this process.
        address: u64,
        /// How much.
        bytes: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The memory cannot be let go.
    #[error("cannot stop watching guest RAM at {0:#x}")]
    Unregister(u64, #[source] io::Error),
    /// Protection could not be put on or taken off.
    #[error("cannot change the write protection of {bytes} bytes of guest RAM at {address:#x}")]
    Protect {
        /// Where, in this process.
        address: u64,
        /// How much.
        bytes: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Faults could not be read.
    #[error("cannot read faults from the userfaultfd")]
    Read(#[source] io::Error),
}

impl From<UserfaultfdError> for io::Error {
    fn from(error: UserfaultfdError) -> Self {
        use UserfaultfdError::{Api, Missing, Open, Protect, Read, Register, Taken, Unregister};
        let kind = match &error {
            Missing(_) => io::ErrorKind::Unsupported,
            Taken(_) => io::ErrorKind::ResourceBusy,
            Open(cause) | Api(cause) | Unregister(_, cause) | Read(cause) => cause.kind(),
            Register { source, .. } | Protect { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

/// `UFFD_USER_MODE_ONLY` (Linux 5.11).
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);
const UFFD_API: u64 = 0xAA;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `struct uffd_msg`, whose union is read as that of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

const USERFAULTFD_IOC_NEW: libc::Ioctl = libc::_IO(0xAA, 0x00);
const UFFDIO_API: libc::Ioctl = libc::_IOWR::<UffdioApi>(0xAA, 0x3F);
const UFFDIO_REGISTER: libc::Ioctl = libc::_IOWR::<UffdioRegister>(0xAA, 0x00);
const UFFDIO_UNREGISTER: libc::Ioctl = libc::_IOR::<UffdioRange>(0xAA, 0x01);
const UFFDIO_WRITEPROTECT: libc::Ioctl = libc::_IOWR::<UffdioWriteprotect>(0xAA, 0x06);

/// How many faults are read at once.
const FAULTS: usize = 32;

/// A userfaultfd. Dropping it lets go of all memory: protection ends, and whoever waits on a page goes on.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Opens a userfaultfd that has the given features. Its reads do not block.
    ///
    /// # Errors
    /// [`UserfaultfdError::Open`] or [`UserfaultfdError::Missing`], naming what the kernel or this user lacks.
    pub fn open(stops: Stops, features: Features) -> Result<Self, UserfaultfdError> {
        let uffd = Self::new(stops)?;
        // A userfaultfd shakes hands once, and asking for too much fails without saying for what: ask a second one.
        let Err(cause) = uffd.handshake(features.0) else { return Ok(uffd) };
        let offered = Self::new(stops)?.handshake(0).map_err(UserfaultfdError::Api)?;
        match Features(features.0 & !offered) {
            Features(0) => Err(UserfaultfdError::Api(cause)),
            missing => Err(UserfaultfdError::Missing(missing.names())),
        }
    }

    fn new(stops: Stops) -> Result<Self, UserfaultfdError> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        let fd = match stops {
            // SAFETY: a new descriptor that is not registered over any memory changes nothing.
            Stops::UserSpace => unsafe { userfaultfd(flags | USER_MODE_ONLY) }
                .map_err(|errno| UserfaultfdError::Open(errno.into()))?,
            Stops::Everyone => Self::from_device(flags).or_else(|_| {
                // SAFETY: as above.
                unsafe { userfaultfd(flags) }.map_err(|errno| UserfaultfdError::Open(errno.into()))
            })?,
        };
        Ok(Self { fd })
    }

    /// Through the device (Linux 6.1), whose file mode says who may.
    fn from_device(flags: UserfaultfdFlags) -> io::Result<OwnedFd> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
        // SAFETY: the request takes flags by value.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags.bits()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel has just made for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Asks for features and answers which the kernel has.
    fn handshake(&self, features: u64) -> io::Result<u64> {
        let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
        self.ioctl(UFFDIO_API, &mut api)?;
        Ok(api.features)
    }

    /// Every request here takes one structure that holds no pointers; addresses in it come from a [`Mapping`].
    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: the request's number carries the size of `T`, which is its structure; the kernel keeps no pointer to it.
        // Registering or protecting a range changes when a write to it goes on, never what the memory holds.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(argument)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Watches a mapping for writes to protected pages. Nothing is protected yet.
    ///
    /// # Errors
    /// [`UserfaultfdError::Taken`] when another userfaultfd has it, [`UserfaultfdError::Register`] otherwise.
    pub fn register(&self, mapping: &Mapping) -> Result<(), UserfaultfdError> {
        let range = UffdioRange { start: mapping.address(), len: mapping.bytes() };
        let mut argument = UffdioRegister { range, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut argument).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => UserfaultfdError::Taken(range.start),
            _ => UserfaultfdError::Register { address: range.start, bytes: range.len, source },
        })
    }

    /// Stops watching a mapping, takes all protection off it and lets go on whoever waits.
    ///
    /// # Errors
    /// [`UserfaultfdError::Unregister`].
    pub fn unregister(&self, mapping: &Mapping) -> Result<(), UserfaultfdError> {
        let mut range = UffdioRange { start: mapping.address(), len: mapping.bytes() };
        self.ioctl(UFFDIO_UNREGISTER, &mut range)
            .map_err(|cause| UserfaultfdError::Unregister(range.start, cause))
    }

    /// Write-protects a range of a registered mapping. Multiples of its page size.
    ///
    /// Over shared memory, also where nothing is populated, which takes page tables; over private memory, populated pages
    /// only, unless [`Features::UNPOPULATED`] was asked for.
    ///
    /// # Errors
    /// [`UserfaultfdError::Protect`].
    pub fn protect(&self, slice: MemorySlice<'_>) -> Result<(), UserfaultfdError> {
        self.set_protection(slice, UFFDIO_WRITEPROTECT_MODE_WP)
    }

    /// Takes the protection off a range and lets go on whoever waits there.
    ///
    /// # Errors
    /// [`UserfaultfdError::Protect`].
    pub fn unprotect(&self, slice: MemorySlice<'_>) -> Result<(), UserfaultfdError> {
        self.set_protection(slice, 0)
    }

    fn set_protection(&self, slice: MemorySlice<'_>, mode: u64) -> Result<(), UserfaultfdError> {
        let range = UffdioRange { start: slice.address(), len: slice.bytes() };
        let mut argument = UffdioWriteprotect { range, mode };
        // EAGAIN is for those who asked for events of fork and the like, which we never do.
        self.ioctl(UFFDIO_WRITEPROTECT, &mut argument).map_err(|source| UserfaultfdError::Protect {
            address: range.start,
            bytes: range.len,
            source,
        })
    }

    /// Appends the addresses (in this process) of writes that wait for their page; nothing when none does.
    ///
    /// # Errors
    /// [`UserfaultfdError::Read`].
    pub fn read_faults(&self, addresses: &mut Vec<u64>) -> Result<(), UserfaultfdError> {
        let mut messages = [UffdMsg::default(); FAULTS];
        // SAFETY: the kernel writes whole messages, at most as many as fit; any bytes are a valid message.
        let read =
            unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        let Ok(bytes) = usize::try_from(read) else {
            let cause = io::Error::last_os_error();
            return match cause.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(UserfaultfdError::Read(cause)),
            };
        };
        addresses.extend(
            messages[..bytes / size_of::<UffdMsg>()]
                .iter()
                .filter(|message| message.event == UFFD_EVENT_PAGEFAULT)
                .map(|message| message.address),
        );
        Ok(())
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::HugePages;
    use crate::testing::{Need, require};

    #[test]
    fn a_second_watcher_is_told_of_the_first() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let mapping = Mapping::anonymous(1 << 16, HugePages::No).unwrap();
        let features = Features::ASYNC.and(Features::UNPOPULATED);
        let first = Userfaultfd::open(Stops::UserSpace, features).unwrap();
        let second = Userfaultfd::open(Stops::UserSpace, Features::WRITE_PROTECT).unwrap();
        first.register(&mapping).unwrap();
        let error = second.register(&mapping).unwrap_err();
        assert!(matches!(error, UserfaultfdError::Taken(_)), "{error}");
        first.unregister(&mapping).unwrap();
        second.register(&mapping).unwrap();
    }

    #[test]
    fn a_missing_feature_is_named() {
        if !require(&[Need::Uffd]) {
            return;
        }
        // No kernel has this feature yet; it stands for one that is too old for the ones that are asked for.
        let error = Userfaultfd::open(Stops::UserSpace, Features(1 << 60)).unwrap_err();
        assert!(matches!(error, UserfaultfdError::Missing(_)), "{error}");
        assert_eq!(Features::ASYNC.names(), "WP_ASYNC (Linux 6.7)");
    }

    #[test]
    fn a_write_to_a_protected_page_waits() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let mapping = Mapping::memfd("uffd", 1 << 16, HugePages::No).unwrap();
        let uffd =
            Userfaultfd::open(Stops::Everyone, Features::WRITE_PROTECT.and(Features::SHARED_AND_HUGETLB))
                .unwrap();
        uffd.register(&mapping).unwrap();
        mapping.store(8192, 1);
        uffd.protect(MemorySlice::new(&mapping, 8192, 4096)).unwrap();
        let mut faults = Vec::new();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| mapping.store(8192, 2));
            for _ in 0..5000 {
                uffd.read_faults(&mut faults).unwrap();
                if !faults.is_empty() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            assert_eq!(mapping.load(8192), 1);
            uffd.unprotect(MemorySlice::new(&mapping, 8192, 4096)).unwrap();
            writer.join().unwrap();
        });
        assert_eq!(faults, [mapping.address() + 8192]);
        assert_eq!(mapping.load(8192), 2);
    }
}
