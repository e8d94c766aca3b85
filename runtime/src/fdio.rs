//! A pipe, terminal or socket end from a shim as an asynchronous stream.
#![allow(unsafe_code, reason = "registering a descriptor with the reactor is unsafe in tokio's interface")]

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// An end of a stream. The end of a terminal whose other side is gone reads as end of file.
#[derive(Debug)]
pub(crate) struct FdStream {
    fd: AsyncFd<OwnedFd>,
}

impl FdStream {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<FdStream> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: an OwnedFd always gives the one descriptor it owns, which stays open until the AsyncFd is dropped.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(FdStream { fd })
    }

    /// A second handle, for the other direction of a terminal.
    pub(crate) fn second(&self) -> io::Result<FdStream> {
        FdStream::new(self.fd.get_ref().try_clone()?)
    }
}

impl AsyncRead for FdStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(context))?;
            let space = buffer.initialize_unfilled();
            let result = guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), space)?));
            match result {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_not_ready) => {}
            }
        }
    }
}

impl AsyncWrite for FdStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(context))?;
            let result = guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), bytes)?));
            match result {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_not_ready) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Dropping it is what ends the other side's input.
        Poll::Ready(Ok(()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = buffers.iter().find(|buffer| !buffer.is_empty()).map_or(&[][..], |buffer| buffer);
        self.poll_write(context, first)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read_and_a_dropped_end_is_the_end() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (mut reader, mut writer) = (FdStream::new(reader).unwrap(), FdStream::new(writer).unwrap());
        let write = async {
            writer.write_all(&vec![7; 200_000]).await.unwrap();
            drop(writer);
        };
        let mut read = Vec::new();
        let (_, count) = tokio::join!(write, reader.read_to_end(&mut read));
        assert_eq!(count.unwrap(), 200_000);
    }
}
