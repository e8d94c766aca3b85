//! Packet sockets: frames of one kind on one link.
#![allow(unsafe_code, reason = "packet sockets and their filters have no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recv, send};
use tokio::io::unix::AsyncFd;

/// What is listened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Arp,
    /// Neighbour solicitations only.
    Solicitations,
}

/// A socket of one kind of frames on one link.
#[derive(Debug)]
pub struct PacketSocket {
    file: AsyncFd<OwnedFd>,
}

const LOAD_BYTE: u16 = 0x30;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Neighbour solicitations without extension headers, as all are; the rest of IPv6 would be every packet of the link.
fn solicitations() -> [libc::sock_filter; 6] {
    const NEXT_HEADER: u32 = 14 + 6;
    const ICMP_TYPE: u32 = 14 + 40;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    [
        step(LOAD_BYTE, 0, 0, NEXT_HEADER),
        step(JUMP_IF_EQUAL, 0, 3, 58),
        step(LOAD_BYTE, 0, 0, ICMP_TYPE),
        step(JUMP_IF_EQUAL, 0, 1, 135),
        step(RETURN, 0, 0, 256),
        step(RETURN, 0, 0, 0),
    ]
}

fn checked(status: libc::c_int) -> io::Result<libc::c_int> {
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(status) }
}

impl PacketSocket {
    /// Opens a socket on the link of an index; to be called in a runtime.
    pub fn open(kind: Kind, link: u32) -> io::Result<PacketSocket> {
        // SAFETY: plain call; the result is checked before use.
        let number = checked(unsafe {
            // Without a protocol nothing arrives before the filter is in place.
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
        })?;
        // SAFETY: the number is that of a socket just made, which nobody else has.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        if kind == Kind::Solicitations {
            let mut steps = solicitations();
            let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
            set(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;
        }
        set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1_i32)?;
        let protocol = if kind == Kind::Arp { libc::ETH_P_ARP } else { libc::ETH_P_IPV6 };
        // SAFETY: all fields of the structure may be zero.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (protocol as u16).to_be();
        address.sll_ifindex = link.cast_signed();
        // SAFETY: the address lives through the call, and its length is the structure's.
        checked(unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        })?;
        // SAFETY: the descriptor is owned by the registration, and so is open as long as it.
        let file = unsafe { AsyncFd::register(socket) }?;
        Ok(PacketSocket { file })
    }

    /// The next frame. Cancel safe: a frame that was read is returned.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file
            .async_io(tokio::io::Interest::READABLE, |socket| {
                recv(socket.as_raw_fd(), buffer, MsgFlags::empty()).map_err(io::Error::from)
            })
            .await
    }

    /// Sends a whole frame; one that the link cannot take now is lost, as on any wire.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(self.file.get_ref().as_raw_fd(), frame, MsgFlags::MSG_NOSIGNAL).map(drop).map_err(io::Error::from)
    }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value lives through the call, and its length is its type's.
    checked(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
    .map(drop)
}
