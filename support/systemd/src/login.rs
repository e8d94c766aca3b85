//! login1: being told that the machine is about to stop, and holding it up for a while.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::connection::{Call, Connection};
use crate::wire::{Decoder, Encoder};
use crate::{Error, Value};

/// The system bus.
pub const BUS_SOCKET: &str = "/run/dbus/system_bus_socket";
const NAME: &str = "org.freedesktop.login1";
const OBJECT: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const SHUTDOWN: &str = "PrepareForShutdown";

/// The machine's stop waits while this is held, for as long as login1 lets one wait.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held, and let go by its end")] OwnedFd);

/// Ends the waiting for signals by its own end, in whichever thread that is.
#[derive(Debug)]
pub struct HangUp(UnixStream);

impl Drop for HangUp {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A connection to login1, which hears of the machine's stop from when it was made.
#[derive(Debug)]
pub struct Login {
    connection: Connection,
    /// Whether the machine was about to stop when that was told last.
    stopping: bool,
}

impl Login {
    /// By the system bus.
    pub fn connect() -> Result<Login, Error> {
        Login::at(Path::new(BUS_SOCKET))
    }

    /// By a bus that listens elsewhere.
    pub fn at(path: &Path) -> Result<Login, Error> {
        let mut connection = Connection::open(path, SHUTDOWN)?;
        connection.join_bus(NAME, MANAGER, SHUTDOWN)?;
        Ok(Login { connection, stopping: false })
    }

    /// How long a stop may be held up.
    pub fn longest_delay(&mut self) -> Result<Duration, Error> {
        match self.property("InhibitDelayMaxUSec")? {
            Value::U64(micros) => Ok(Duration::from_micros(micros)),
            _ => Err(Error::Malformed("a delay that is not a number")),
        }
    }

    /// Whether the machine is about to stop.
    fn is_stopping(&mut self) -> Result<bool, Error> {
        match self.property("PreparingForShutdown")? {
            Value::Bool(stopping) => Ok(stopping),
            _ => Err(Error::Malformed("a state that is neither true nor false")),
        }
    }

    fn property(&mut self, name: &str) -> Result<Value, Error> {
        let mut body = Encoder::default();
        body.text(MANAGER);
        body.text(name);
        let call = Call {
            destination: NAME,
            path: OBJECT,
            interface: "org.freedesktop.DBus.Properties",
            method: "Get",
            signature: "ss",
            body: body.finish(),
        };
        Decoder::new(&self.connection.call(call)?.body).variant()
    }

    /// Has the machine's stop wait.
    pub fn delay_shutdown(&mut self, who: &str, why: &str) -> Result<Lock, Error> {
        let mut body = Encoder::default();
        for text in ["shutdown", who, why, "delay"] {
            body.text(text);
        }
        let call = Call {
            destination: NAME,
            path: OBJECT,
            interface: MANAGER,
            method: "Inhibit",
            signature: "ssss",
            body: body.finish(),
        };
        self.connection.call(call)?;
        self.connection.take_descriptor().map(Lock).ok_or(Error::Malformed("a lock without a descriptor"))
    }

    /// What breaks this connection at its end.
    pub fn hang_up(&self) -> Result<HangUp, Error> {
        self.connection.duplicate().map(HangUp)
    }

    /// Waits for word of the machine's stop: true when it begins, false when it is called off.
    ///
    /// Anybody on a bus may send a signal of that name to this connection, so it says no more than that login1 is to be asked.
    pub fn next_shutdown(&mut self) -> Result<bool, Error> {
        loop {
            self.connection.signal(None)?;
            let stopping = self.is_stopping()?;
            if stopping != self.stopping {
                self.stopping = stopping;
                return Ok(stopping);
            }
        }
    }
}
