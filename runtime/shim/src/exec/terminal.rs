//! A terminal made inside a container for an exec.
#![allow(unsafe_code, reason = "terminal ioctls")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::libc;
use nix::sys::stat::{fstat, major, minor};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Gid, Uid, fchown};

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;
const PTMX: (u64, u64) = (5, 2);

/// Both ends of a new terminal.
pub(super) struct Terminal {
    pub(super) master: OwnedFd,
    pub(super) slave: OwnedFd,
}

/// Opens a terminal of the mount namespace this process is in. The image chooses what `/dev` holds, so the device is
/// checked to be a real one on a real devpts.
pub(super) fn open(user: (u32, u32)) -> io::Result<Terminal> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the path is a C string.
    let master = own(unsafe { libc::open(c"/dev/pts/ptmx".as_ptr(), flags | libc::O_NOFOLLOW) })?;
    let status = fstat(&master)?;
    let on_devpts = fstatfs(&master)?.filesystem_type().0 == DEVPTS_SUPER_MAGIC;
    if !on_devpts || (major(status.st_rdev), minor(status.st_rdev)) != PTMX {
        return Err(io::Error::other("/dev/pts/ptmx is not a terminal multiplexer"));
    }
    let unlock: libc::c_int = 0;
    // SAFETY: the kernel reads one int.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes flags and returns a new descriptor, without any path of the container.
    let slave = own(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    let _ = fchown(&slave, Some(Uid::from_raw(user.0)), Some(Gid::from_raw(user.1)));
    Ok(Terminal { master, slave })
}

/// Makes the terminal this session's controlling one.
pub(super) fn take_control(slave: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes a number only.
    if unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets a terminal's size in characters.
pub(crate) fn resize(master: &OwnedFd, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn own(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor just made for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
