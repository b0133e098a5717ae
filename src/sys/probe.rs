//! Whether the kernel offers what a part of the program stands on, asked without changing anything.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `USERFAULTFD_IOC_NEW`, `_IO(0xAA, 0x00)` in `linux/userfaultfd.h`: makes a userfaultfd out of `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
/// `UFFDIO_API`, `_IOWR(0xAA, 0x3F, struct uffdio_api)`: the handshake that asks for features.
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
/// `UFFD_API`, the only version that there is.
const UFFD_API: u64 = 0xAA;
/// Write protection of memory that shmem or hugetlbfs backs.
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Write protection of pages that are not populated yet.
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel lifts the write protection by itself and marks the page as written (Linux 6.7).
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Whether written pages can be found by `PAGEMAP_SCAN`: a userfaultfd opens and agrees to asynchronous write protection
/// of anonymous and memfd memory.
///
/// # Errors
/// What the kernel answers: `PermissionDenied` or `NotFound` from opening `/dev/userfaultfd` and from `userfaultfd(2)`,
/// `InvalidInput` where the kernel lacks the feature (before Linux 6.7).
pub fn asynchronous_write_protection() -> io::Result<()> {
    let fd = userfaultfd()?;
    let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    let mut handshake = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `struct uffdio_api`, which outlives the call.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut handshake) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A new userfaultfd: by the device, whose file permissions say who may, else by the system call, which wants
/// `CAP_SYS_PTRACE` or the sysctl `vm.unprivileged_userfaultfd`.
fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    let answer = match &device {
        // SAFETY: this ioctl takes its flags by value and touches no memory of ours.
        Ok(device) => i64::from(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }),
        // SAFETY: the system call takes its flags by value and touches no memory of ours.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) },
    };
    let Ok(fd @ 0..) = i32::try_from(answer) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
