//! `oarlock stop`: ends the cluster that `oarlock up` keeps running.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::config::Settings;

#[derive(clap::Args)]
pub(crate) struct StopFlags {
    /// Leave the pods running; the next `up` takes them over
    #[arg(long)]
    keep_pods: bool,
    /// How long to wait for pods and daemons to end
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

pub(crate) fn run(settings: &Settings, flags: StopFlags) -> anyhow::Result<ExitCode> {
    let Some(supervisor) = running(settings)? else {
        println!("oarlock is not running");
        return Ok(ExitCode::SUCCESS);
    };
    stop(settings, supervisor, flags.keep_pods, Duration::from_secs(flags.timeout))?;
    println!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// Asks the supervisor to end and waits until it has.
pub(crate) fn stop(
    settings: &Settings,
    supervisor: Supervisor,
    keep_pods: bool,
    timeout: Duration,
) -> anyhow::Result<()> {
    let marker = settings.layout.keep_pods_marker();
    if keep_pods {
        fs::write(&marker, b"").with_context(|| format!("cannot write {}", marker.display()))?;
    } else {
        let _ = fs::remove_file(&marker);
    }
    kill(supervisor.pid, Signal::SIGTERM).context("cannot signal oarlock up")?;
    let deadline = Instant::now() + timeout;
    while supervisor.is_alive() {
        anyhow::ensure!(
            Instant::now() < deadline,
            "oarlock up (pid {}) has not ended within {} s",
            supervisor.pid,
            timeout.as_secs()
        );
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(())
}

/// A running `oarlock up`, told apart from a recycled pid by its start time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Supervisor {
    pub(crate) pid: Pid,
    start_time: u64,
}

impl Supervisor {
    /// This process.
    pub(crate) fn this() -> anyhow::Result<Self> {
        let own = procfs::process::Process::myself().context("cannot read /proc/self")?;
        Ok(Self { pid: Pid::this(), start_time: own.stat().context("cannot read /proc/self/stat")?.starttime })
    }

    /// Writes itself into the pid file.
    pub(crate) fn record(&self, settings: &Settings) -> anyhow::Result<()> {
        let path = settings.layout.up_pid_file();
        fs::write(&path, format!("{} {}\n", self.pid, self.start_time))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn is_alive(self) -> bool {
        procfs::process::Process::new(self.pid.as_raw())
            .and_then(|process| process.stat())
            .is_ok_and(|stat| stat.starttime == self.start_time && stat.state != 'Z')
    }
}

/// The running supervisor of this installation, if there is one.
pub(crate) fn running(settings: &Settings) -> anyhow::Result<Option<Supervisor>> {
    let path = settings.layout.up_pid_file();
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut words = text.split_whitespace();
    let (Some(Ok(pid)), Some(Ok(start_time))) = (words.next().map(str::parse), words.next().map(str::parse)) else {
        return Ok(None);
    };
    let supervisor = Supervisor { pid: Pid::from_raw(pid), start_time };
    Ok(supervisor.is_alive().then_some(supervisor))
}
