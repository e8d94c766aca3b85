//! Graceful node shutdown by login1: a lock holds the machine's stop up, and is let go once the pods have ended.
//!
//! login1 waits for as long as its configuration allows; where that is shorter than what pods are given, a file is laid over
//! it. Without login1 pods are ended when the agent is stopped (see [`crate::shutdown`]), as long as its service may take.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use oarlock_systemd::{Lock, Login, Systemd};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::error::chain;
use crate::pods::News;
use crate::shared::Shared;
use crate::shutdown;

const WHO: &str = "kubelet";
const WHY: &str = "Kubelet needs time to handle node shutdown";
/// The file of the node's in login1's directory of such.
const DROP_IN: &str = "99-kubelet.conf";
/// While it is written.
const PARTIAL: &str = "partial";
const HEADER: &str = "# Written by Oarlock's agent, for pods to end before the machine stops.";
/// How long login1 may take to read its configuration again.
const RELOAD_LIMIT: Duration = Duration::from_secs(5);
const RELOAD_PAUSE: Duration = Duration::from_millis(20);
/// Between attempts to reach login1.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Words of the machine's stop that nobody has taken yet.
const WORDS: usize = 8;

/// Where login1 is, and how it is told.
#[derive(Debug, Clone)]
pub struct LoginConfig {
    /// The socket of the bus that it is on.
    pub bus: PathBuf,
    /// Where files are laid over its configuration.
    pub drop_in_dir: PathBuf,
    /// Has it read its configuration again. Blocks.
    pub reload: fn() -> Result<(), oarlock_systemd::Error>,
}

impl Default for LoginConfig {
    fn default() -> Self {
        Self {
            bus: oarlock_systemd::BUS_SOCKET.into(),
            drop_in_dir: "/etc/systemd/logind.conf.d".into(),
            reload: || Systemd::connect()?.signal("systemd-logind.service", nix::libc::SIGHUP as u32),
        }
    }
}

impl LoginConfig {
    fn drop_in(&self) -> PathBuf {
        self.drop_in_dir.join(DROP_IN)
    }

    /// Takes away what an agent has laid over login1's configuration. One of another kubelet stays.
    pub fn give_back(&self) -> Result<(), HoldError> {
        let path = self.drop_in();
        // What an agent that died while it wrote has left; login1 does not read it.
        let _ = fs::remove_file(path.with_extension(PARTIAL));
        match fs::read_to_string(&path) {
            Ok(text) if text.starts_with(HEADER) => {}
            _ => return Ok(()),
        }
        fs::remove_file(&path).map_err(|source| HoldError::Remove { path, source })?;
        Ok((self.reload)()?)
    }
}

/// Why the machine's stop cannot be held up, or login1 not be left as it was.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    #[error(transparent)]
    Login(#[from] oarlock_systemd::Error),
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot remove {}", path.display())]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("login1 waits for no longer than {got:?}, and pods are given {wanted:?}")]
    TooShort { wanted: Duration, got: Duration },
    #[error("a thread of the agent died")]
    Thread,
}

/// Ends pods before the machine stops, until `rest`.
pub(crate) async fn hold(shared: Arc<Shared>, news: mpsc::Sender<News>, rest: CancellationToken) {
    let (mut pause, mut told) = (PAUSE_MIN, false);
    let told_of_stop = AtomicBool::new(false);
    while !shared.config.shutdown.groups.is_empty() {
        let start = Instant::now();
        let ended = tokio::select! {
            ended = follow(&shared, &news, &told_of_stop) => ended,
            () = rest.cancelled() => return,
        };
        if start.elapsed() > PAUSE_MAX {
            (pause, told) = (PAUSE_MIN, false);
        }
        if let Err(error) = ended {
            let error = chain(&error);
            // That login1 goes is how a machine stops.
            if told || shared.shutting_down.load(Ordering::Relaxed) {
                tracing::debug!(error, "login1 cannot be followed yet");
            } else {
                tracing::warn!(error, "login1 cannot be followed; until it can pods end when the agent is stopped");
            }
            told = true;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = rest.cancelled() => return,
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
    rest.cancelled().await;
}

/// Holds the lock and does as login1 says, until the connection breaks.
async fn follow(shared: &Arc<Shared>, news: &mpsc::Sender<News>, told_of_stop: &AtomicBool) -> Result<(), HoldError> {
    let config = shared.config.shutdown.clone();
    let wanted: Duration = config.groups.iter().map(|(_, period)| *period).sum();
    let login = config.login.clone();
    let (mut heard, lock, _hang_up) = blocking(move || listen(&login, wanted)).await?;
    tracing::info!(?wanted, "the machine waits for pods to end before it stops");
    // A stop that was begun and called off while nobody listened: login1 gives no lock while it goes on.
    if told_of_stop.swap(false, Ordering::Relaxed) {
        called_off(shared);
    }
    let mut held = Some(lock);
    while let Some(word) = heard.recv().await {
        if word? {
            tracing::info!("the machine is about to stop");
            told_of_stop.store(true, Ordering::Relaxed);
            shutdown::end_all(shared, news).await;
            held = None;
        } else {
            told_of_stop.store(false, Ordering::Relaxed);
            called_off(shared);
            let bus = config.login.bus.clone();
            held = Some(blocking(move || Ok(Login::at(&bus)?.delay_shutdown(WHO, WHY)?)).await?);
        }
    }
    drop(held);
    Err(HoldError::Thread)
}

fn called_off(shared: &Shared) {
    tracing::info!("the machine's stop is called off");
    shared.shutting_down.store(false, Ordering::Relaxed);
    shared.node_changed.notify_one();
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HoldError> + Send + 'static,
) -> Result<T, HoldError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| HoldError::Thread)?
}

type Heard = mpsc::Receiver<Result<bool, oarlock_systemd::Error>>;

/// Takes the lock, and hears of the machine's stop in a thread that ends with the last of what is returned.
fn listen(config: &LoginConfig, wanted: Duration) -> Result<(Heard, Lock, oarlock_systemd::HangUp), HoldError> {
    let mut login = Login::at(&config.bus)?;
    allow(&mut login, config, wanted)?;
    let lock = login.delay_shutdown(WHO, WHY)?;
    let hang_up = login.hang_up()?;
    let (words, heard) = mpsc::channel(WORDS);
    let hear = move || {
        loop {
            let word = login.next_shutdown();
            let broken = word.is_err();
            if words.blocking_send(word).is_err() || broken {
                return;
            }
        }
    };
    thread::Builder::new().name("login1".to_owned()).spawn(hear).map_err(|_| HoldError::Thread)?;
    Ok((heard, lock, hang_up))
}

/// Sees to it that login1 waits for as long as pods may take.
fn allow(login: &mut Login, config: &LoginConfig, wanted: Duration) -> Result<(), HoldError> {
    if login.longest_delay()? >= wanted {
        return Ok(());
    }
    let path = config.drop_in();
    write(&path, wanted).map_err(|source| HoldError::Write { path, source })?;
    (config.reload)()?;
    let limit = Instant::now() + RELOAD_LIMIT;
    loop {
        let got = login.longest_delay()?;
        if got >= wanted {
            return Ok(());
        }
        if Instant::now() > limit {
            return Err(HoldError::TooShort { wanted, got });
        }
        // Nothing tells that it has read it.
        thread::sleep(RELOAD_PAUSE);
    }
}

/// Whole or not at all: login1 reads it at every start of the machine.
fn write(path: &Path, delay: Duration) -> io::Result<()> {
    let seconds = delay.as_millis().div_ceil(1000);
    let text = format!(
        "{HEADER}
[Login]
InhibitDelayMaxSec={seconds}
"
    );
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let partial = path.with_extension(PARTIAL);
    fs::write(&partial, text)?;
    fs::rename(&partial, path)
}
