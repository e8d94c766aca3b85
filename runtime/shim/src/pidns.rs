//! The first process of a PID namespace that all containers of a pod share: it adopts and reaps, nothing else.
//!
//! The namespace is pinned by a bind mount, so that containers can join it by path. When its first process ends, the
//! kernel ends every process in it.
#![allow(unsafe_code, reason = "cloning into a namespace")]

use std::fs;
use std::io;
use std::path::Path;

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, pipe};

/// Makes the namespace, belonging to the user namespace at `user` if there is one, and pins it at `path`.
pub(crate) fn create(path: &Path, user: Option<&Path>) -> io::Result<Pid> {
    fs::File::create(path)?;
    let user = user.map(fs::File::open).transpose()?;
    let init = spawn_init(user.as_ref())?;
    let source = format!("/proc/{init}/ns/pid");
    if let Err(errno) = mount(Some(source.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>) {
        let _ = kill(init, Signal::SIGKILL);
        let _ = waitpid(init, None);
        let _ = fs::remove_file(path);
        return Err(errno.into());
    }
    Ok(init)
}

/// Ends the namespace's processes and removes the pin. The first process is reaped by the shim's loop.
pub(crate) fn remove(path: &Path, init: Pid) {
    let _ = kill(init, Signal::SIGKILL);
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}

/// Forks twice: the process between enters the new namespace for its children, which the shim itself never does.
fn spawn_init(user: Option<&fs::File>) -> io::Result<Pid> {
    let (reader, writer) = pipe()?;
    // SAFETY: one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(writer);
            let mut number = [0; 4];
            let got = io::Read::read_exact(&mut fs::File::from(reader), &mut number);
            waitpid(child, None)?;
            got.map_err(|_| io::Error::other("cannot make a PID namespace"))?;
            Ok(Pid::from_raw(i32::from_ne_bytes(number)))
        }
        ForkResult::Child => {
            drop(reader);
            if become_root_of(user).and_then(|()| unshare(CloneFlags::CLONE_NEWPID)).is_ok() {
                // SAFETY: one thread.
                match unsafe { fork() } {
                    Ok(ForkResult::Parent { child }) => {
                        let _ = io::Write::write_all(&mut fs::File::from(writer), &child.as_raw().to_ne_bytes());
                    }
                    Ok(ForkResult::Child) => reap_for_ever(),
                    Err(_) => {}
                }
            }
            // SAFETY: ends this process only.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Enters a user namespace as its root, so that what is made next belongs to it.
fn become_root_of(user: Option<&fs::File>) -> nix::Result<()> {
    let Some(namespace) = user else { return Ok(()) };
    setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    nix::unistd::setgroups(&[])?;
    nix::unistd::setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
    nix::unistd::setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))
}

fn reap_for_ever() -> ! {
    // SAFETY: plain system calls without memory of ours; every descriptor goes, none is used again.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"oarlock-pause".as_ptr());
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        loop {
            // Without children the call fails at once: sleep until one is adopted and ends.
            if libc::waitpid(-1, std::ptr::null_mut(), 0) < 0 {
                wait_for_child_signal();
            }
        }
    }
}

fn wait_for_child_signal() {
    // SAFETY: the set and the result live over the calls. SIGCHLD is blocked, so none is lost between wait and here.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        let limit = libc::timespec { tv_sec: 3600, tv_nsec: 0 };
        libc::sigtimedwait(&set, std::ptr::null_mut(), &limit);
    }
}
