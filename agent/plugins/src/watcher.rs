//! Finding plugins: every socket in the registration directory is asked who it is, handed to whoever takes its kind, and told
//! whether it was taken. A socket that goes takes its plugin with it; one that was not taken is asked again, less and less often.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use oarlock_proto::pluginregistration as wire;
use oarlock_proto::pluginregistration::registration_client::RegistrationClient;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::socket;

const CALL: Duration = Duration::from_secs(10);
/// Taking a plugin may need the API and the plugin itself.
const TAKE: Duration = Duration::from_secs(120);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// While the directory cannot be watched, it is looked at this often.
const UNWATCHED: Duration = Duration::from_secs(10);
/// Directories are searched this deep.
const DEPTH: usize = 4;

/// A plugin that wants to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    pub name: String,
    /// Where the plugin itself listens.
    pub endpoint: PathBuf,
    pub versions: Vec<String>,
}

/// Takes plugins of one kind.
#[async_trait]
pub trait Taker: Send + Sync {
    /// Err is told to the plugin.
    async fn take(&self, plugin: &Plugin) -> Result<(), String>;
    /// The plugin's socket is gone.
    async fn dismiss(&self, plugin: &Plugin);
}

/// Takers by the kind that plugins name, `CSIPlugin` and so on.
pub type Takers = BTreeMap<&'static str, Arc<dyn Taker>>;

/// A socket that was asked, and its plugin with the kind it names.
type Asked = (PathBuf, Stamp, Result<(String, Plugin), String>);

/// One version of a socket: a plugin that starts again makes a new one.
type Stamp = (u64, i64, i64);

#[derive(Clone)]
struct Known {
    stamp: Stamp,
    /// Taken, by the kind and as.
    taken: Option<(String, Plugin)>,
    failures: u32,
    retry_at: Option<Instant>,
}

/// Watches `directory` until `shutdown`.
pub async fn watch(directory: PathBuf, takers: Takers, shutdown: CancellationToken) {
    let takers = Arc::new(takers);
    let mut known: HashMap<PathBuf, Known> = HashMap::new();
    let mut asking: JoinSet<Asked> = JoinSet::new();
    let mut under_way: BTreeSet<PathBuf> = BTreeSet::new();
    let mut events = None;
    loop {
        // Watched before it is searched, so that nothing is missed in between.
        let dir = directory.clone();
        let searched = tokio::task::spawn_blocking(move || (listen_to(&dir), sockets(&dir))).await;
        let Ok((fresh, found)) = searched else { return };
        events = fresh.or(events);
        dismiss_gone(&mut known, &found, &takers).await;
        let now = Instant::now();
        for (path, stamp) in found {
            let entry =
                known.entry(path.clone()).or_insert(Known { stamp, taken: None, failures: 0, retry_at: Some(now) });
            let due = entry.retry_at.is_some_and(|at| at <= now);
            if due && under_way.insert(path.clone()) {
                let takers = takers.clone();
                asking.spawn(async move {
                    let answer = tokio::time::timeout(TAKE, register(&path, &takers)).await;
                    let answer = answer.unwrap_or_else(|_| Err("the plugin did not answer in time".to_owned()));
                    (path, stamp, answer)
                });
            }
        }
        let waiting = known.iter().filter(|(path, _)| !under_way.contains(*path));
        let retry = waiting.filter_map(|(_, known)| known.retry_at).min();
        let unwatched = events.is_none().then(|| now + UNWATCHED);
        let wake = [retry, unwatched].into_iter().flatten().min();
        tokio::select! {
            () = shutdown.cancelled() => return,
            happened = next(&mut events) => if !happened { events = None },
            () = sleep_until(wake) => {}
            Some(answered) = asking.join_next(), if !asking.is_empty() => {
                let Ok((path, stamp, answer)) = answered else { continue };
                under_way.remove(&path);
                if let Some((kind, plugin)) = note(&mut known, path, stamp, answer) {
                    dismiss(&kind, &plugin, &takers).await;
                }
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Takes in what came of asking a socket; gives the plugin back if its socket went meanwhile.
fn note(
    known: &mut HashMap<PathBuf, Known>,
    path: PathBuf,
    stamp: Stamp,
    answer: Result<(String, Plugin), String>,
) -> Option<(String, Plugin)> {
    let Some(entry) = known.get_mut(&path) else { return answer.ok() };
    if entry.stamp != stamp {
        entry.retry_at = Some(Instant::now());
        return None;
    }
    match answer {
        Ok(taken) => {
            tracing::info!(plugin = taken.1.name, kind = taken.0, "plugin registered");
            *entry = Known { stamp, taken: Some(taken), failures: 0, retry_at: None };
        }
        Err(error) => {
            if entry.failures == 0 {
                tracing::warn!(socket = %path.display(), error, "a plugin was not registered; it is asked again");
            }
            let pause = FIRST_RETRY.saturating_mul(1 << entry.failures.min(8)).min(LAST_RETRY);
            entry.failures += 1;
            entry.retry_at = Some(Instant::now() + pause);
        }
    }
    None
}

async fn dismiss(kind: &str, plugin: &Plugin, takers: &Takers) {
    tracing::info!(plugin = plugin.name, kind, "plugin is gone");
    if let Some(taker) = takers.get(kind) {
        taker.dismiss(plugin).await;
    }
}

/// Lets go of plugins whose socket went; one that was made anew is asked again, and is as it was until it has answered.
async fn dismiss_gone(known: &mut HashMap<PathBuf, Known>, found: &BTreeMap<PathBuf, Stamp>, takers: &Takers) {
    for (path, entry) in known.iter_mut() {
        if let Some(stamp) = found.get(path).filter(|stamp| **stamp != entry.stamp) {
            *entry = Known { stamp: *stamp, failures: 0, retry_at: Some(Instant::now()), ..entry.clone() };
        }
    }
    let gone: Vec<PathBuf> = known.keys().filter(|path| !found.contains_key(*path)).cloned().collect();
    for path in gone {
        if let Some((kind, plugin)) = known.remove(&path).and_then(|entry| entry.taken) {
            dismiss(&kind, &plugin, takers).await;
        }
    }
}

/// Asks one socket who it is, has it taken, and tells it so.
async fn register(path: &Path, takers: &Takers) -> Result<(String, Plugin), String> {
    let mut client = RegistrationClient::new(socket::channel(path));
    let info = tokio::time::timeout(CALL, client.get_info(wire::InfoRequest {})).await;
    let info = info.map_err(|_| "GetInfo timed out".to_owned())?.map_err(|status| socket::shown(&status))?.into_inner();
    let endpoint = if info.endpoint.is_empty() { path.to_owned() } else { PathBuf::from(&info.endpoint) };
    let plugin = Plugin { name: info.name, endpoint, versions: info.supported_versions };
    let taken = match takers.get(info.r#type.as_str()) {
        Some(taker) if !plugin.name.is_empty() => taker.take(&plugin).await,
        Some(_) => Err("the plugin has no name".to_owned()),
        None => Err(format!("no handler registered for plugin type: {} at socket {}", info.r#type, path.display())),
    };
    let status = wire::RegistrationStatus {
        plugin_registered: taken.is_ok(),
        error: taken.as_ref().err().cloned().unwrap_or_default(),
    };
    // The plugin works whether or not it hears of it.
    let _ = tokio::time::timeout(CALL, client.notify_registration_status(status)).await;
    taken.map(|()| (info.r#type, plugin))
}

/// Every socket below the directory. Hidden ones are none of ours.
fn sockets(directory: &Path) -> BTreeMap<PathBuf, Stamp> {
    let mut found = BTreeMap::new();
    search(directory, DEPTH, &mut |path, meta| {
        if meta.file_type().is_socket() {
            found.insert(path.to_owned(), (meta.ino(), meta.mtime(), meta.mtime_nsec()));
        }
    });
    found
}

fn search(directory: &Path, depth: usize, look: &mut impl FnMut(&Path, &std::fs::Metadata)) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let Some(meta) = entry.metadata().ok().filter(|_| !hidden) else { continue };
        look(&entry.path(), &meta);
        if meta.is_dir() && depth > 1 {
            search(&entry.path(), depth - 1, look);
        }
    }
}

type Events = inotify::EventStream<[u8; 4096]>;

/// What happens in the directory and those in it; None when it cannot be watched.
fn listen_to(directory: &Path) -> Option<Events> {
    use inotify::WatchMask;
    std::fs::create_dir_all(directory).ok()?;
    let inotify = inotify::Inotify::init().ok()?;
    let mask =
        WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVED_FROM | WatchMask::MOVED_TO | WatchMask::DELETE_SELF;
    inotify.watches().add(directory, mask).ok()?;
    search(directory, DEPTH - 1, &mut |path, meta| {
        if meta.is_dir() {
            let _ = inotify.watches().add(path, mask);
        }
    });
    inotify.into_event_stream([0; 4096]).ok()
}

/// Waits for something to happen; false when the directory can no longer be watched.
async fn next(events: &mut Option<Events>) -> bool {
    let Some(events) = events else { return std::future::pending().await };
    matches!(events.next().await, Some(Ok(_)))
}

#[cfg(test)]
#[path = "watcher_tests.rs"]
mod tests;
