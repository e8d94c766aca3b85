//! One message is one SEQPACKET packet: a JSON text, with descriptors beside it by SCM_RIGHTS.
//!
//! A message that is too large for a packet goes in a sealed memory file: the packet is then the single byte `M`
//! and the file is its first descriptor. So nothing is ever split, and nothing is left on a disk.
#![allow(unsafe_code, reason = "received descriptors arrive as raw numbers")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Larger messages go by memory file.
pub const PACKET_BYTES_MAX: usize = 16 * 1024;
/// No message is larger than this.
pub const MESSAGE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Descriptors beside one message, the memory file not counted.
pub const FDS_MAX: usize = 4;

const SPILLED: &[u8] = b"M";

/// A frame could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The socket would block; try again when it is ready.
    #[error("the socket is not ready")]
    WouldBlock,
    /// The peer is gone.
    #[error("the peer closed the connection")]
    Closed,
    /// A system call failed.
    #[error("cannot {operation}")]
    Io {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    /// The peer broke the protocol.
    #[error("the peer sent a malformed frame: {0}")]
    Malformed(&'static str),
    /// The message exceeds [`MESSAGE_BYTES_MAX`].
    #[error("message of {0} bytes is too large")]
    TooLarge(u64),
}

fn failed(operation: &'static str, errno: Errno) -> FrameError {
    match errno {
        Errno::EAGAIN => FrameError::WouldBlock,
        Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => FrameError::Closed,
        errno => FrameError::Io { operation, source: errno.into() },
    }
}

/// A received message.
#[derive(Debug)]
pub struct Frame {
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// Sends one message; never blocks on a non-blocking socket and never sends a part.
pub fn send(socket: BorrowedFd<'_>, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    if fds.len() > FDS_MAX {
        return Err(FrameError::Malformed("too many descriptors"));
    }
    if body.len() <= PACKET_BYTES_MAX {
        return send_packet(socket, body, fds.iter().map(AsRawFd::as_raw_fd).collect());
    }
    if body.len() as u64 > MESSAGE_BYTES_MAX {
        return Err(FrameError::TooLarge(body.len() as u64));
    }
    let memory = memfd_create(c"oarlock-message", MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| FrameError::Io { operation: "create a memory file", source: errno.into() })?;
    let mut memory = File::from(memory);
    memory.write_all(body).map_err(|source| FrameError::Io { operation: "write a memory file", source })?;
    let mut all = vec![memory.as_raw_fd()];
    all.extend(fds.iter().map(AsRawFd::as_raw_fd));
    send_packet(socket, SPILLED, all)
}

fn send_packet(socket: BorrowedFd<'_>, body: &[u8], fds: Vec<RawFd>) -> Result<(), FrameError> {
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(body)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed("send a frame", errno)),
        }
    }
}

/// Receives one message. `scratch` is reused between calls and needs [`PACKET_BYTES_MAX`] bytes.
pub fn receive(socket: BorrowedFd<'_>, scratch: &mut Vec<u8>) -> Result<Frame, FrameError> {
    scratch.resize(PACKET_BYTES_MAX, 0);
    let mut control = cmsg_space!([RawFd; FDS_MAX + 1]);
    let (bytes, truncated, mut fds) = loop {
        let mut iov = [IoSliceMut::new(scratch)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags) {
            Ok(message) => message,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(failed("receive a frame", errno)),
        };
        let mut fds = Vec::new();
        for item in message.cmsgs().map_err(|errno| failed("read descriptors", errno))? {
            if let ControlMessageOwned::ScmRights(raw) = item {
                // SAFETY: the kernel has just made these descriptors for this process; nothing else knows them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        break (message.bytes, message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC), fds);
    };
    if truncated {
        return Err(FrameError::Malformed("truncated packet"));
    }
    if bytes == 0 {
        return Err(FrameError::Closed);
    }
    if &scratch[..bytes] != SPILLED {
        return Ok(Frame { body: scratch[..bytes].to_vec(), fds });
    }
    if fds.is_empty() {
        return Err(FrameError::Malformed("no memory file"));
    }
    let body = read_memory(File::from(fds.remove(0)))?;
    Ok(Frame { body, fds })
}

fn read_memory(mut memory: File) -> Result<Vec<u8>, FrameError> {
    let io = |source| FrameError::Io { operation: "read a memory file", source };
    memory.rewind().map_err(io)?;
    let mut body = Vec::new();
    memory.take(MESSAGE_BYTES_MAX + 1).read_to_end(&mut body).map_err(io)?;
    if body.len() as u64 > MESSAGE_BYTES_MAX {
        return Err(FrameError::TooLarge(body.len() as u64));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn messages_of_any_size_arrive_whole_with_their_descriptors() {
        let (left, right) = pair();
        let mut scratch = Vec::new();
        for size in [1, PACKET_BYTES_MAX, PACKET_BYTES_MAX + 1, 300_000] {
            let body = vec![b'x'; size];
            let (reader, writer) = nix::unistd::pipe().unwrap();
            send(left.as_fd(), &body, &[writer.as_fd()]).unwrap();
            drop(writer);
            let frame = receive(right.as_fd(), &mut scratch).unwrap();
            assert_eq!(frame.body, body);
            assert_eq!(frame.fds.len(), 1);
            nix::unistd::write(&frame.fds[0], b"through").unwrap();
            let mut buffer = [0; 16];
            assert_eq!(nix::unistd::read(&reader, &mut buffer).unwrap(), 7);
        }
    }

    #[test]
    fn a_closed_peer_and_an_oversized_message_are_told_apart() {
        let (left, right) = pair();
        let huge = vec![0; MESSAGE_BYTES_MAX as usize + 1];
        assert!(matches!(send(left.as_fd(), &huge, &[]), Err(FrameError::TooLarge(_))));
        drop(left);
        assert!(matches!(receive(right.as_fd(), &mut Vec::new()), Err(FrameError::Closed)));
    }

    #[test]
    fn a_spill_marker_without_a_file_is_refused() {
        let (left, right) = pair();
        send(left.as_fd(), SPILLED, &[]).unwrap();
        assert!(matches!(receive(right.as_fd(), &mut Vec::new()), Err(FrameError::Malformed(_))));
    }
}
