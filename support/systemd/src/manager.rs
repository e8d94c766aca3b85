//! The service manager: transient scopes and slices, from their start to their end.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::connection::{Call, Connection};
use crate::login::BUS_SOCKET;
use crate::properties::Property;
use crate::wire::{Decoder, Encoder};
use crate::{Error, Value};

/// The manager's own socket, for root: no bus has to run.
const PRIVATE_SOCKET: &str = "/run/systemd/private";
const NAME: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const JOB_ENDED: &str = "JobRemoved";
/// How long a job may take. Units are stopped empty, or their processes have been killed.
const JOB_LIMIT: Duration = Duration::from_secs(30);
const JOIN_LIMIT: Duration = Duration::from_secs(5);
const JOIN_PAUSE: Duration = Duration::from_millis(5);
/// In place of what is in the way.
const MODE: &str = "replace";

/// Whether systemd is this machine's service manager.
pub fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// A transient scope to start.
#[derive(Debug, Clone)]
pub struct Scope<'a> {
    /// With its suffix, as all names of units here.
    pub name: &'a str,
    pub slice: &'a str,
    pub description: &'a str,
    /// It ends with the last of them, and of those they leave in it.
    pub pids: Vec<u32>,
    pub properties: Vec<Property>,
}

impl Scope<'_> {
    fn all_properties(&self) -> Vec<Property> {
        let mut properties = vec![
            ("Description", Value::Text(self.description.to_owned())),
            ("Slice", Value::Text(self.slice.to_owned())),
            ("PIDs", Value::Numbers(self.pids.clone())),
            ("Delegate", Value::Bool(true)),
            // It is gone when it has ended, whatever of.
            ("CollectMode", Value::Text("inactive-or-failed".to_owned())),
        ];
        properties.extend(common());
        properties.extend(self.properties.iter().cloned());
        properties
    }
}

/// A connection to the service manager.
#[derive(Debug)]
pub struct Systemd {
    connection: Connection,
    /// Empty without a bus between.
    destination: &'static str,
}

impl Systemd {
    /// By its own socket, or else by the system bus.
    pub fn connect() -> Result<Systemd, Error> {
        Systemd::by(&[(PRIVATE_SOCKET.into(), ""), (BUS_SOCKET.into(), NAME)])
    }

    /// By the first of these sockets where somebody answers.
    fn by(sockets: &[(PathBuf, &'static str)]) -> Result<Systemd, Error> {
        let mut failure = Error::Malformed("no socket");
        for (path, destination) in sockets {
            match Connection::open(path, JOB_ENDED) {
                Ok(connection) => {
                    let mut systemd = Systemd { connection, destination };
                    if !destination.is_empty() {
                        systemd.connection.join_bus(NAME, MANAGER, JOB_ENDED)?;
                        systemd.call("Subscribe", "", Vec::new())?;
                    }
                    return Ok(systemd);
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Result<Systemd, Error> {
        Systemd::by(&[(path.into(), "")])
    }

    /// The version that it says to have.
    pub fn version(&mut self) -> Result<String, Error> {
        let mut body = Encoder::default();
        body.text(MANAGER);
        body.text("Version");
        let call = Call {
            destination: self.destination,
            path: OBJECT,
            interface: "org.freedesktop.DBus.Properties",
            method: "Get",
            signature: "ss",
            body: body.finish(),
        };
        let answer = self.connection.call(call)?;
        match Decoder::new(&answer.body).variant()? {
            Value::Text(version) => Ok(version),
            _ => Err(Error::Malformed("a version that is not a text")),
        }
    }

    /// Starts a scope whose group is the caller's to divide, and returns once the processes are in it. One of that name which
    /// something has left behind is ended first.
    pub fn start_scope(&mut self, scope: &Scope<'_>) -> Result<(), Error> {
        let properties = scope.all_properties();
        match self.start(scope.name, &properties) {
            Err(error) if error.is_unit_exists() => {
                self.stop(scope.name)?;
                self.start(scope.name, &properties)
            }
            done => done,
        }
    }

    /// Puts processes into a scope that others share, or starts it with them. It may be just about to start, or to end: then
    /// neither works for a moment.
    pub fn join_scope(&mut self, scope: &Scope<'_>) -> Result<(), Error> {
        let limit = Instant::now() + JOIN_LIMIT;
        loop {
            let mut body = Encoder::default();
            body.text(scope.name);
            body.text("");
            body.array(4, |array| scope.pids.iter().for_each(|pid| array.u32(*pid)));
            match self.call("AttachProcessesToUnit", "ssau", body.finish()) {
                Err(Error::Answer { .. }) => {}
                done => return done.map(drop),
            }
            match self.start(scope.name, &scope.all_properties()) {
                Err(error) if error.is_unit_exists() && Instant::now() < limit => thread::sleep(JOIN_PAUSE),
                done => return done,
            }
        }
    }

    /// Starts a slice, or gives the one that is there these properties.
    pub fn start_slice(&mut self, name: &str, description: &str, properties: &[Property]) -> Result<(), Error> {
        let mut all = vec![("Description", Value::Text(description.to_owned()))];
        all.extend(common());
        all.extend(properties.iter().cloned());
        match self.start(name, &all) {
            Err(error) if error.is_unit_exists() => self.set_properties(name, properties),
            done => done,
        }
    }

    fn start(&mut self, name: &str, properties: &[Property]) -> Result<(), Error> {
        let mut body = Encoder::default();
        body.text(name);
        body.text(MODE);
        encode(&mut body, properties);
        // No units beside it.
        body.array(8, |_| {});
        self.run_job(name, "StartTransientUnit", "ssa(sv)a(sa(sv))", body.finish())
    }

    /// Changes a unit's properties until the machine stops.
    pub fn set_properties(&mut self, unit: &str, properties: &[Property]) -> Result<(), Error> {
        if properties.is_empty() {
            return Ok(());
        }
        let mut body = Encoder::default();
        body.text(unit);
        body.bool(true);
        encode(&mut body, properties);
        self.call("SetUnitProperties", "sba(sv)", body.finish()).map(drop)
    }

    /// Ends a unit, and has systemd forget how it ended. One that is gone is a success.
    pub fn stop(&mut self, unit: &str) -> Result<(), Error> {
        let mut body = Encoder::default();
        body.text(unit);
        body.text(MODE);
        match self.run_job(unit, "StopUnit", "ss", body.finish()) {
            Err(error) if error.is_no_such_unit() => return Ok(()),
            done => done?,
        }
        let mut body = Encoder::default();
        body.text(unit);
        match self.call("ResetFailedUnit", "s", body.finish()) {
            Err(error) if error.is_no_such_unit() => Ok(()),
            done => done.map(drop),
        }
    }

    /// Sends a signal to all processes of a unit.
    pub fn signal(&mut self, unit: &str, signal: u32) -> Result<(), Error> {
        let mut body = Encoder::default();
        body.text(unit);
        body.text("all");
        body.u32(signal);
        self.call("KillUnit", "ssi", body.finish()).map(drop)
    }

    /// A method that starts a job, and the job.
    fn run_job(&mut self, unit: &str, method: &'static str, signature: &str, body: Vec<u8>) -> Result<(), Error> {
        let limit = Instant::now() + JOB_LIMIT;
        let answer = self.call(method, signature, body)?;
        let job = Decoder::new(&answer).text()?.to_owned();
        loop {
            let signal = self.connection.signal(Some(limit))?;
            let mut values = Decoder::new(&signal.body);
            let (_id, ended, _unit, result) = (values.u32()?, values.text()?, values.text()?, values.text()?);
            if ended == job {
                return match result {
                    "done" => Ok(()),
                    result => Err(Error::Job { unit: unit.to_owned(), result: result.to_owned() }),
                };
            }
        }
    }

    fn call(&mut self, method: &'static str, signature: &str, body: Vec<u8>) -> Result<Vec<u8>, Error> {
        let call = Call { destination: self.destination, path: OBJECT, interface: MANAGER, method, signature, body };
        self.connection.call(call).map(|answer| answer.body)
    }
}

/// What all units of ours are: counted, and not ended before those who use them when the machine stops.
fn common() -> impl Iterator<Item = Property> {
    let counted = ["CPUAccounting", "MemoryAccounting", "TasksAccounting", "IOAccounting"];
    let counted = counted.into_iter().map(|name| (name, Value::Bool(true)));
    counted.chain([("DefaultDependencies", Value::Bool(false))])
}

fn encode(body: &mut Encoder, properties: &[Property]) {
    body.array(8, |array| {
        for (name, value) in properties {
            array.structure();
            array.text(name);
            array.variant(value);
        }
    });
}
