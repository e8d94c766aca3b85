//! What the nix crate does not know of netlink sockets: options and one ioctl.
#![allow(
    unsafe_code,
    reason = "options at level SOL_NETLINK, the number of a namespace and SIOCGIFNAME have no safe wrapper"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Errors come without a copy of the refused message, and with the kernel's explanation.
pub(crate) fn short_explained_errors(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::NETLINK_CAP_ACK)?;
    set(socket, libc::NETLINK_EXT_ACK)
}

fn set(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is borrowed for the call, and the value is a c_int of exactly the length given.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The number of the socket's network namespace, which no other has until the machine starts again (Linux 5.14).
pub(crate) fn namespace_number(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut number: u64 = 0;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is borrowed for the call, and the value is a u64 of exactly the length given.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut number).cast(),
            &raw mut length,
        )
    };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(number) }
}

/// Whether the socket's network namespace has a link of an index. Asked by SIOCGIFNAME, which, unlike questions by netlink,
/// does not wait for whoever is changing links.
pub(crate) fn has_link(socket: BorrowedFd<'_>, index: u32) -> io::Result<bool> {
    // SAFETY: an all-zero ifreq is a valid value of a plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let Ok(index) = index.try_into() else { return Ok(false) };
    request.ifr_ifru.ifru_ifindex = index;
    // SAFETY: the descriptor is borrowed for the call, and the kernel reads and writes one ifreq, which outlives it.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFNAME as _, &mut request) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        error => Err(error),
    }
}
