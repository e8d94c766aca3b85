//! A service manager and a login1 of a few lines on a socket of their own, for tests: they keep what they are told, and
//! answer as the real ones do.

use std::collections::BTreeMap;
use std::fs;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::Value;
use crate::wire::{Decoder, Encoder, FIXED_BYTES, Kind, Message};

/// What it was told.
#[derive(Debug, Default)]
pub struct World {
    pub units: BTreeMap<String, BTreeMap<String, Value>>,
    /// Methods in the order of their calls, with their first argument.
    pub calls: Vec<String>,
    /// How the next jobs end; "done" otherwise.
    pub results: Vec<&'static str>,
    pub inhibit_delay_usec: u64,
    pub is_stopping: bool,
    /// A file that says otherwise, as the real one's configuration does.
    pub configuration: Option<PathBuf>,
    /// The other ends of locks.
    pub locks: Vec<OwnedFd>,
    /// Who is told of the machine's stop.
    followers: Vec<UnixStream>,
    jobs: u32,
}

impl World {
    fn configured_delay(&self) -> Option<u64> {
        let text = fs::read_to_string(self.configuration.as_ref()?).ok()?;
        let seconds: u64 = text.lines().find_map(|line| line.strip_prefix("InhibitDelayMaxSec=")?.parse().ok())?;
        Some(seconds * 1_000_000)
    }
}

/// A fake that listens until the test's process ends.
pub struct Fake {
    pub socket: PathBuf,
    world: Arc<Mutex<World>>,
}

impl Fake {
    pub fn start(directory: &Path) -> Fake {
        let socket = directory.join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let world = Arc::new(Mutex::new(World::default()));
        let shared = world.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, world) = (stream.unwrap(), shared.clone());
                thread::spawn(move || serve(stream, &world));
            }
        });
        Fake { socket, world }
    }

    /// Tells all followers that the machine is about to stop, or that this is called off.
    pub fn prepare_for_shutdown(&self, begins: bool) {
        self.world().is_stopping = begins;
        self.say_shutdown(begins);
    }

    /// The same words by somebody who is not login1.
    pub fn say_shutdown(&self, begins: bool) {
        let bytes = signal("PrepareForShutdown", |body| body.bool(begins)).encode();
        self.world().followers.retain_mut(|stream| stream.write_all(&bytes).is_ok());
    }

    /// How many locks are held: login1 sees the end of one by the end of its pipe.
    pub fn locks_held(&self) -> usize {
        let held = |lock: &&OwnedFd| {
            let mut looked = [PollFd::new(lock.as_fd(), PollFlags::POLLOUT)];
            poll(&mut looked, PollTimeout::ZERO).unwrap();
            !looked[0].revents().unwrap().contains(PollFlags::POLLERR)
        };
        self.world().locks.iter().filter(held).count()
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }
}

fn serve(mut stream: UnixStream, world: &Mutex<World>) {
    // As systemd does: what comes with the last line is not looked at.
    let mut greeting = [0; 256];
    let count = stream.read(&mut greeting).unwrap();
    let expected = format!("\0AUTH EXTERNAL {}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n", own_id());
    assert_eq!(String::from_utf8_lossy(&greeting[..count]), expected);
    stream.write_all(b"OK 0123456789abcdef\r\nAGREE_UNIX_FD\r\n").unwrap();
    let mut fixed = [0; FIXED_BYTES];
    while stream.read_exact(&mut fixed).is_ok() {
        let mut bytes = fixed.to_vec();
        bytes.resize(Message::length(&fixed).unwrap(), 0);
        stream.read_exact(&mut bytes[FIXED_BYTES..]).unwrap();
        let call = Message::decode(&bytes).unwrap();
        answer(&mut stream, world, &call);
    }
}

fn own_id() -> String {
    nix::unistd::geteuid().to_string().bytes().map(|digit| format!("{digit:02x}")).collect()
}

fn answer(stream: &mut UnixStream, world: &Mutex<World>, call: &Message) {
    let mut world = world.lock().unwrap();
    let mut arguments = Decoder::new(&call.body);
    let first = if call.signature.starts_with('s') { arguments.text().unwrap() } else { "" };
    world.calls.push(format!("{} {first}", call.member).trim_end().to_owned());
    let mut reply = Message::new(Kind::Return);
    reply.serial = 1;
    reply.reply_to = call.serial;
    let known = world.units.contains_key(first);
    match call.member.as_str() {
        "StartTransientUnit" if known => refuse(&mut reply, "UnitExists"),
        "StartTransientUnit" => {
            arguments.text().unwrap();
            world.units.insert(first.to_owned(), properties(&mut arguments));
            return job(stream, &mut world, reply, first);
        }
        "StopUnit" if known => {
            world.units.remove(first);
            return job(stream, &mut world, reply, first);
        }
        "SetUnitProperties" if known => {
            assert!(arguments.bool().unwrap(), "for as long as the machine runs");
            let changed = properties(&mut arguments);
            world.units.get_mut(first).unwrap().extend(changed);
        }
        "StopUnit" | "ResetFailedUnit" | "SetUnitProperties" => refuse(&mut reply, "NoSuchUnit"),
        "AttachProcessesToUnit" if !known => refuse(&mut reply, "NoSuchUnit"),
        "Get" => {
            let value = match arguments.text().unwrap() {
                "Version" => Value::Text("257".into()),
                "PreparingForShutdown" => Value::Bool(world.is_stopping),
                _ => Value::U64(world.configured_delay().unwrap_or(world.inhibit_delay_usec)),
            };
            let mut body = Encoder::default();
            body.variant(&value);
            (reply.signature, reply.body) = ("v".into(), body.finish());
        }
        "AddMatch" if first.contains("PrepareForShutdown") => world.followers.push(stream.try_clone().unwrap()),
        "Inhibit" => return inhibit(stream, &mut world, reply),
        _ => {}
    }
    stream.write_all(&reply.encode()).unwrap();
}

fn refuse(reply: &mut Message, name: &str) {
    let mut body = Encoder::default();
    body.text("Refused.");
    reply.kind = Kind::Error;
    reply.error_name = format!("org.freedesktop.systemd1.{name}");
    (reply.signature, reply.body) = ("s".into(), body.finish());
}

fn properties(arguments: &mut Decoder<'_>) -> BTreeMap<String, Value> {
    let mut array = arguments.array(8).unwrap();
    let mut properties = BTreeMap::new();
    while !array.is_at_end() {
        array.align(8);
        properties.insert(array.text().unwrap().to_owned(), array.variant().unwrap());
    }
    properties
}

/// The answer, somebody else's job, and the end of this one.
fn job(stream: &mut UnixStream, world: &mut World, mut reply: Message, unit: &str) {
    world.jobs += 1;
    let path = format!("/org/freedesktop/systemd1/job/{}", world.jobs);
    let mut body = Encoder::default();
    body.text(&path);
    (reply.signature, reply.body) = ("o".into(), body.finish());
    let result = if world.results.is_empty() { "done" } else { world.results.remove(0) };
    // The signal may come before the answer.
    let other = signal("JobRemoved", |body| job_end(body, "/other", "other.service", "failed"));
    let ended = signal("JobRemoved", |body| job_end(body, &path, unit, result));
    let (first, last) = if world.jobs.is_multiple_of(2) { (ended, reply) } else { (reply, ended) };
    for message in [other, signal("UnitNew", |_| {}), first, last] {
        stream.write_all(&message.encode()).unwrap();
    }
}

fn job_end(body: &mut Encoder, path: &str, unit: &str, result: &str) {
    body.u32(1);
    for text in [path, unit, result] {
        body.text(text);
    }
}

fn signal(member: &str, arguments: impl FnOnce(&mut Encoder)) -> Message {
    let mut body = Encoder::default();
    arguments(&mut body);
    let mut message = Message::new(Kind::Signal);
    message.serial = 2;
    message.member = member.to_owned();
    message.body = body.finish();
    message
}

fn inhibit(stream: &mut UnixStream, world: &mut World, mut reply: Message) {
    let (held, ours) = nix::unistd::pipe().unwrap();
    world.locks.push(ours);
    let mut body = Encoder::default();
    body.u32(0);
    (reply.signature, reply.body) = ("h".into(), body.finish());
    let bytes = reply.encode();
    let fds = [held.as_raw_fd()];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}
