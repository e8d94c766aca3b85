//! Processes that end, wait, log, or use memory and CPU in a given way.
#![allow(unsafe_code, reason = "signal handlers and terminal ioctls of a small test program")]

use std::io::{self, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::number;

extern "C" fn leave(_: libc::c_int) {
    // SAFETY: _exit is async-signal-safe.
    unsafe { libc::_exit(0) }
}

/// Ends the process with code 0 on SIGTERM or SIGINT; as process 1 of a pod it would ignore them otherwise.
pub(crate) fn exit_on_sigterm() -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(leave), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler only calls _exit.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// `sleep [SECONDS]`: waits, by default for ever; leaves with 0 on SIGTERM.
pub(crate) fn sleep(arguments: &[String]) -> io::Result<u8> {
    exit_on_sigterm()?;
    let seconds: f64 = number(arguments, 0, f64::MAX)?;
    let end = Instant::now();
    loop {
        let left = seconds - end.elapsed().as_secs_f64();
        if left <= 0.0 {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_secs_f64(left.min(3600.0)));
    }
}

/// `exit [CODE] [AFTER_SECONDS]`.
pub(crate) fn exit(arguments: &[String]) -> io::Result<u8> {
    std::thread::sleep(Duration::from_secs_f64(number(arguments, 1, 0.0)?));
    number(arguments, 0, 0)
}

/// `signal NUMBER`: ends itself by a signal, with its default action. `signal ignore`: ignores SIGTERM and waits.
pub(crate) fn signal(arguments: &[String]) -> io::Result<u8> {
    if arguments.first().map(String::as_str) == Some("ignore") {
        let action = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
        // SAFETY: SIG_IGN runs no code.
        unsafe { sigaction(Signal::SIGTERM, &action) }?;
        println!("ignoring SIGTERM");
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }
    let signal = Signal::try_from(number::<i32>(arguments, 0, libc::SIGKILL)?)?;
    nix::sys::signal::raise(signal)?;
    Ok(1)
}

/// `oom`: takes memory and touches it until something ends the process.
pub(crate) fn oom(arguments: &[String]) -> io::Result<u8> {
    let limit: usize = number(arguments, 0, usize::MAX)?;
    let mut held: Vec<Vec<u8>> = Vec::new();
    while held.len() < limit {
        let mut block = vec![0u8; 1 << 20];
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        held.push(block);
    }
    println!("holding {} MiB", held.len());
    sleep(&[])
}

/// `stress [SECONDS]`: one busy core.
pub(crate) fn stress(arguments: &[String]) -> io::Result<u8> {
    exit_on_sigterm()?;
    let seconds: f64 = number(arguments, 0, f64::MAX)?;
    let start = Instant::now();
    let mut value = 1u64;
    while start.elapsed().as_secs_f64() < seconds {
        for _ in 0..100_000 {
            value = std::hint::black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
    }
    Ok(0)
}

/// `log LINES [BYTES_A_LINE] [INTERVAL_MS]`: numbered lines on standard output, every tenth on standard error, then waits if
/// the interval is given, else ends.
pub(crate) fn log(arguments: &[String]) -> io::Result<u8> {
    exit_on_sigterm()?;
    let lines: u64 = number(arguments, 0, 10)?;
    let width: usize = number(arguments, 1, 16)?;
    let interval: u64 = number(arguments, 2, 0)?;
    let mut out = io::stdout().lock();
    for line in 0..lines {
        let text = format!("{line:010} {}", "x".repeat(width.saturating_sub(11)));
        if line % 10 == 9 {
            eprintln!("{text}");
        } else {
            writeln!(out, "{text}")?;
            out.flush()?;
        }
        if interval > 0 {
            std::thread::sleep(Duration::from_millis(interval));
        }
    }
    if interval > 0 { sleep(&[]) } else { Ok(0) }
}

/// `env [NAME]`: all variables, or one.
pub(crate) fn env(arguments: &[String]) -> io::Result<u8> {
    let Some(name) = arguments.first() else {
        for (name, value) in std::env::vars() {
            println!("{name}={value}");
        }
        return Ok(0);
    };
    Ok(std::env::var(name).map_or(1, |value| {
        println!("{value}");
        0
    }))
}

/// `id`: numeric user, group, groups, and the fields of /proc/self/status that a sandbox sets.
pub(crate) fn id() -> io::Result<u8> {
    let groups = nix::unistd::getgroups()?.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    println!("uid={} gid={} groups={groups}", nix::unistd::geteuid(), nix::unistd::getegid());
    for line in std::fs::read_to_string("/proc/self/status")?.lines() {
        if ["Cap", "NoNewPrivs", "Seccomp:"].iter().any(|prefix| line.starts_with(prefix)) {
            println!("{line}");
        }
    }
    Ok(0)
}

/// `tty-size`: rows and columns of the terminal on standard input.
pub(crate) fn tty_size() -> io::Result<u8> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ fills the winsize it is given.
    let answer = unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &raw mut size) };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    println!("{} {}", size.ws_row, size.ws_col);
    Ok(0)
}

/// The kernel's host name.
pub(crate) fn host_name() -> Result<String, std::env::VarError> {
    nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .map_err(|_| std::env::VarError::NotPresent)
}

/// `hostname`.
pub(crate) fn hostname() -> io::Result<u8> {
    println!("{}", host_name().unwrap_or_default());
    Ok(0)
}
