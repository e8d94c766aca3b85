//! From the command line to a detached, listening shim.
#![allow(unsafe_code, reason = "fork, and descriptors by number")]

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{ForkResult, chdir, dup2_stderr, dup2_stdout, setsid};
use oarlock_cgroup::{Cgroup, Unit};
use oarlock_shim_api::{ShimRecord, process_start_time, shim_record_path, socket_path, write_atomically};
use oarlock_systemd::{Scope, Systemd};

use crate::forked::fork_in;
use crate::pidns;
use crate::server::Server;

pub(crate) const USAGE: &str = "usage: oarlock-shim --sandbox-id ID --state-dir DIR --container-root DIR \
[--mounts-below PATH] [--pid-namespace PATH] [--user-namespace PATH] [--cgroup PATH|SLICE:PREFIX:NAME]";

const LOG_BYTES_MAX: u64 = 1024 * 1024;
const OOM_SCORE: &str = "-998";

/// What the command line says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) sandbox_id: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) container_root: PathBuf,
    /// The mount point below which all pods' mounts lie, if there is one.
    pub(crate) mounts_below: Option<PathBuf>,
    pub(crate) pid_namespace: Option<PathBuf>,
    /// To which the PID namespace is to belong.
    pub(crate) user_namespace: Option<PathBuf>,
    pub(crate) cgroup: Option<String>,
}

impl Config {
    pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Config, String> {
        let mut config = Config::default();
        let mut arguments = arguments;
        while let Some(name) = arguments.next() {
            let name = name.to_string_lossy().into_owned();
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--sandbox-id" => config.sandbox_id = value.to_string_lossy().into_owned(),
                "--state-dir" => config.state_dir = value.into(),
                "--container-root" => config.container_root = value.into(),
                "--mounts-below" => config.mounts_below = Some(value.into()),
                "--pid-namespace" => config.pid_namespace = Some(value.into()),
                "--user-namespace" => config.user_namespace = Some(value.into()),
                "--cgroup" => config.cgroup = Some(value.to_string_lossy().into_owned()),
                other => return Err(format!("unknown option {other}")),
            }
        }
        if config.sandbox_id.is_empty() || !config.state_dir.is_absolute() || !config.container_root.is_absolute() {
            return Err("--sandbox-id, and absolute --state-dir and --container-root are required".into());
        }
        Ok(config)
    }
}

/// Detaches, sets up and serves. The first process returns at once; its child is the shim.
pub(crate) fn run(config: Config) -> ExitCode {
    close_inherited();
    let group = config.cgroup.as_deref().and_then(|path| {
        let group = Cgroup::new(path).ok()?;
        // A scope comes into being with its first process.
        if Unit::at(group.path()).is_none() {
            group.create().ok()?;
        }
        group.birthplace()
    });
    // SAFETY: no thread has been started.
    match unsafe { fork_in(group.as_ref().map(AsFd::as_fd)) } {
        Ok(ForkResult::Parent { .. }) => return ExitCode::SUCCESS,
        Ok(ForkResult::Child) => {}
        Err(errno) => {
            eprintln!("oarlock-shim: cannot fork: {errno}");
            return ExitCode::FAILURE;
        }
    }
    let ready = take_ready_pipe();
    let outcome = prepare(&config);
    let text = outcome.as_ref().map_or_else(|error| error.to_string(), |_| "ready".to_owned());
    let heard = ready.is_none_or(|ready| fs::File::from(ready).write_all(text.as_bytes()).is_ok());
    let served = outcome.and_then(|server| match heard {
        true => server.serve(),
        // The daemon died meanwhile, and its successor may have looked for this shim before there was a trace of it.
        false => {
            server.finish();
            Ok(())
        }
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("oarlock-shim {}: {error}", config.sandbox_id);
            ExitCode::FAILURE
        }
    }
}

/// Whatever a daemon may have left open beyond the standard streams.
fn close_inherited() {
    // SAFETY: nothing in this process has opened a descriptor yet.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// The pipe over which the daemon waits, which is standard output until now; absent when started by hand.
fn take_ready_pipe() -> Option<OwnedFd> {
    let output = io::stdout();
    let is_pipe =
        fstat(&output).is_ok_and(|status| SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO);
    let pipe = output.as_fd().try_clone_to_owned().ok().filter(|_| is_pipe);
    let _ = OpenOptions::new().write(true).open("/dev/null").map(dup2_stdout);
    pipe
}

fn prepare(config: &Config) -> io::Result<Server> {
    setsid()?;
    chdir("/")?;
    // Specifications hold secrets. Containers and logs set the mode they need.
    nix::sys::stat::umask(Mode::from_bits_truncate(0o027));
    // The daemon has made the state directory. One that is gone again says that nobody wants this shim any more.
    fs::create_dir_all(&config.container_root)?;
    open_log(&config.state_dir.join("shim.log"))?;
    crate::memory::tune();
    // Not everyone may go below the score they have; the shim then is as likely a victim as others.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    if let Some(path) = &config.cgroup {
        join_group(path)?;
    }
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let listener = listen_in(&config.state_dir)?;
    let user = config.user_namespace.as_deref();
    let pid_namespace_init = config.pid_namespace.as_deref().map(|path| pidns::create(path, user)).transpose()?;
    let pid = std::process::id() as i32;
    let record = ShimRecord {
        sandbox_id: config.sandbox_id.clone(),
        pid,
        start_time: process_start_time(pid).ok_or_else(|| io::Error::other("cannot read own start time"))?,
        pid_namespace_init: pid_namespace_init.map(|pid| pid.as_raw()),
    };
    let content = serde_json::to_vec(&record)?;
    write_atomically(&shim_record_path(&config.state_dir), &content)
        .map_err(|error| io::Error::other(crate::engine::chain(&error)))?;
    Server::new(config.clone(), listener, pid_namespace_init)
}

/// The group that all shims share. A scope of which the last one has just ended ends with it, so it may be there and gone
/// again; in whichever there is at the end is this process.
fn join_group(path: &str) -> io::Result<()> {
    let failed = |error: &dyn std::error::Error| io::Error::other(crate::engine::chain(error));
    let group = Cgroup::new(path).map_err(|error| failed(&error))?;
    let Some(unit) = Unit::at(group.path()) else {
        return group.create().and_then(|()| group.join()).map_err(|error| failed(&error));
    };
    if group.exists() && group.join().is_ok() {
        return Ok(());
    }
    let scope = Scope {
        name: &unit.name,
        slice: &unit.slice,
        description: "shims of the Oarlock runtime",
        pids: vec![std::process::id()],
        properties: Vec::new(),
    };
    Systemd::connect().and_then(|mut systemd| systemd.join_scope(&scope)).map_err(|error| failed(&error))
}

/// Standard error goes to a file from now on; one that has grown over time starts anew.
fn open_log(path: &Path) -> io::Result<()> {
    let too_large = fs::metadata(path).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX);
    let file = OpenOptions::new().create(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)?;
    if too_large {
        file.set_len(0)?;
    }
    dup2_stderr(&file)?;
    Ok(())
}

/// A socket left by a shim that is gone is replaced. The directory's descriptor stands for a path that may be too long
/// for an address.
fn listen_in(state_dir: &Path) -> io::Result<OwnedFd> {
    match fs::remove_file(socket_path(state_dir)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(state_dir, flags, Mode::empty())?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/shim.sock", dir.as_raw_fd()));
    // Nobody but root may connect, from the first moment on.
    let before = nix::sys::stat::umask(Mode::from_bits_truncate(0o177));
    let bound = bind(listener.as_fd().as_raw_fd(), &UnixAddr::new(&path)?);
    nix::sys::stat::umask(before);
    bound?;
    listen(&listener, Backlog::new(16)?)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, String> {
        Config::parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn bad_command_lines_are_refused() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--sandbox-id"]).is_err());
        assert!(parse(&["--bogus", "x"]).is_err());
        assert!(parse(&["--sandbox-id", "s", "--state-dir", "relative", "--container-root", "/r"]).is_err());
        let config = parse(&["--sandbox-id", "s", "--state-dir", "/s", "--container-root", "/r"]);
        assert_eq!(config.unwrap().state_dir, Path::new("/s"));
    }
}
