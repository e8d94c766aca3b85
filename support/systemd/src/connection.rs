//! One connection to a D-Bus peer: a bus, or a daemon itself. Calls one after the other, signals between them kept.
#![allow(unsafe_code, reason = "takes over the descriptors that come with a message")]

use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

use crate::Error;
use crate::wire::{Decoder, Encoder, FIXED_BYTES, Kind, Message};

/// How long one call may take.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(20);
/// The bus itself.
const BUS: &str = "org.freedesktop.DBus";
/// A peer's line while both get to know each other.
const LINE_BYTES_MAX: usize = 512;
/// Signals that came while an answer was waited for.
const SIGNALS_MAX: usize = 256;
const DESCRIPTORS_MAX: usize = 16;

/// Whom a call is for and what it asks; the peer's bus name is empty where there is no bus.
pub(crate) struct Call<'a> {
    pub(crate) destination: &'a str,
    pub(crate) path: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) method: &'static str,
    pub(crate) signature: &'a str,
    pub(crate) body: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    serial: u32,
    /// The signals that are of interest by name; others are dropped.
    wanted: &'static str,
    signals: VecDeque<Message>,
    descriptors: Vec<OwnedFd>,
}

impl Connection {
    /// To the socket at `path`, as the user this process runs as. Only signals of the name `wanted` are kept.
    pub(crate) fn open(path: &Path, wanted: &'static str) -> Result<Connection, Error> {
        let failed = |source: io::Error| Error::Connect { path: path.into(), source };
        let stream = dial(path).map_err(failed)?;
        let mut connection =
            Connection { stream, serial: 0, wanted, signals: VecDeque::new(), descriptors: Vec::new() };
        connection.introduce()?;
        Ok(connection)
    }

    /// The user id in decimal digits, each written as its code in hexadecimal.
    ///
    /// All lines go at once, and nothing before they are answered: systemd forgets a message that it has read together with
    /// the last line, until there is another one.
    fn introduce(&mut self) -> Result<(), Error> {
        let limit = Instant::now() + CALL_LIMIT;
        let user: String = nix::unistd::geteuid().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
        self.send(format!("\0AUTH EXTERNAL {user}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").as_bytes())?;
        let answer = self.line(limit)?;
        if !answer.starts_with("OK") {
            return Err(Error::Refused { answer });
        }
        // One who passes no descriptors says so here, and it shows when one is needed.
        self.line(limit).map(drop)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.stream.write_all(bytes).map_err(|source| Error::Io { operation: "send", source })
    }

    /// The peer says nothing after a line until it is answered, so byte by byte is exact, and seldom.
    fn line(&mut self, limit: Instant) -> Result<String, Error> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.receive_into(&mut byte, Some(limit), "answer to the greeting")?;
            line.extend(byte);
            if line.len() > LINE_BYTES_MAX {
                return Err(Error::Malformed("a greeting without end"));
            }
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Asks, and waits for the answer; one that is an error is an error here.
    pub(crate) fn call(&mut self, call: Call<'_>) -> Result<Message, Error> {
        let limit = Instant::now() + CALL_LIMIT;
        self.serial += 1;
        let mut message = Message::new(Kind::Call);
        message.serial = self.serial;
        message.destination = call.destination.to_owned();
        message.path = call.path.to_owned();
        message.interface = call.interface.to_owned();
        message.member = call.method.to_owned();
        message.signature = call.signature.to_owned();
        message.body = call.body;
        self.send(&message.encode())?;
        self.descriptors.clear();
        loop {
            let message = self.receive(Some(limit), call.method)?;
            match message.kind {
                Kind::Signal => self.keep(message),
                Kind::Return if message.reply_to == self.serial => return Ok(message),
                Kind::Error if message.reply_to == self.serial => return Err(answer(call.method, message)),
                _ => {}
            }
        }
    }

    /// Gets a name on the bus, and the signals `member` that the owner of `name` sends.
    pub(crate) fn join_bus(&mut self, name: &str, interface: &str, member: &str) -> Result<(), Error> {
        self.ask_bus("Hello", "", Vec::new())?;
        let mut body = Encoder::default();
        body.text(&format!("type='signal',sender='{name}',interface='{interface}',member='{member}'"));
        self.ask_bus("AddMatch", "s", body.finish())
    }

    fn ask_bus(&mut self, method: &'static str, signature: &str, body: Vec<u8>) -> Result<(), Error> {
        let path = "/org/freedesktop/DBus";
        self.call(Call { destination: BUS, path, interface: BUS, method, signature, body }).map(drop)
    }

    fn keep(&mut self, message: Message) {
        if message.member == self.wanted {
            if self.signals.len() == SIGNALS_MAX {
                self.signals.pop_front();
            }
            self.signals.push_back(message);
        }
    }

    /// The next signal of interest; without a limit it is waited for as long as it takes.
    pub(crate) fn signal(&mut self, limit: Option<Instant>) -> Result<Message, Error> {
        if let Some(message) = self.signals.pop_front() {
            return Ok(message);
        }
        loop {
            let message = self.receive(limit, self.wanted)?;
            if message.kind == Kind::Signal && message.member == self.wanted {
                return Ok(message);
            }
        }
    }

    /// Its socket once more.
    pub(crate) fn duplicate(&self) -> Result<UnixStream, Error> {
        self.stream.try_clone().map_err(|source| Error::Io { operation: "duplicate the socket", source })
    }

    /// The descriptor that came with the last answer.
    pub(crate) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop()
    }

    fn receive(&mut self, limit: Option<Instant>, what: &'static str) -> Result<Message, Error> {
        let mut fixed = [0; FIXED_BYTES];
        self.receive_into(&mut fixed, limit, what)?;
        let mut bytes = vec![0; Message::length(&fixed)?];
        bytes[..FIXED_BYTES].copy_from_slice(&fixed);
        // What has begun to come comes soon.
        let limit = limit.unwrap_or_else(|| Instant::now() + CALL_LIMIT);
        self.receive_into(&mut bytes[FIXED_BYTES..], Some(limit), what)?;
        Message::decode(&bytes)
    }

    fn receive_into(
        &mut self,
        buffer: &mut [u8],
        limit: Option<Instant>,
        operation: &'static str,
    ) -> Result<(), Error> {
        let timed_out = || Error::TimedOut { operation };
        let mut filled = 0;
        while filled < buffer.len() {
            let left = limit.map(|limit| limit.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(timed_out());
            }
            self.stream.set_read_timeout(left).map_err(|source| Error::Io { operation: "wait", source })?;
            match self.read(&mut buffer[filled..]) {
                Ok(0) => {
                    let source = io::ErrorKind::UnexpectedEof.into();
                    return Err(Error::Io { operation: "receive", source });
                }
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(timed_out()),
                Err(source) => return Err(Error::Io { operation: "receive", source }),
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut control = nix::cmsg_space!([i32; DESCRIPTORS_MAX]);
        let mut slices = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
        for item in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = item {
                // SAFETY: the kernel has just made these descriptors for this process.
                self.descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        Ok(message.bytes)
    }
}

fn answer(method: &'static str, message: Message) -> Error {
    let text = match message.signature.starts_with('s') {
        true => Decoder::new(&message.body).text().unwrap_or_default().to_owned(),
        false => String::new(),
    };
    Error::Answer { method, name: message.error_name, message: text }
}

/// Connecting waits where a peer has too many callers, and sending where it does not read: not for longer than the limit.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::new(CALL_LIMIT.as_secs() as _, 0);
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    connect(socket.as_fd().as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(socket))
}
