//! Bringing `lo` up with one ioctl, so that making a namespace needs no netlink socket.
#![allow(unsafe_code, reason = "SIOCGIFFLAGS and SIOCSIFFLAGS have no safe wrapper")]

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::{NetnsError, Result};

/// Brings `lo` of the calling thread's network namespace up. Its addresses follow by themselves.
pub fn bring_loopback_up() -> Result<()> {
    set_up().map_err(NetnsError::Loopback)
}

fn set_up() -> io::Result<()> {
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid value of a plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *slot = *byte as libc::c_char;
    }
    // SAFETY: the descriptor is open and the kernel reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFFLAGS filled the flags member of the union just now.
    unsafe { request.ifr_ifru.ifru_flags |= (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short };
    // SAFETY: as for the first ioctl; the kernel only reads.
    if unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
