//! The configuration while a daemon runs: read again when its files change.
//!
//! A file that is wrong changes nothing: the daemon goes on with what it has, and the log says what is wrong, once. So does one
//! that is gone or empty, which at a start would mean that all is as by default: nobody takes a running cluster's settings back
//! by moving a file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigError, ConfigFlags, DEFAULT_FILE, Settings};

/// After a change, until nothing more changes, at most so often: who writes a file may write it in parts.
const SETTLE: Duration = Duration::from_millis(100);
const SETTLE_TIMES: usize = 20;
/// For what no event tells of, such as a directory that is there only now.
const REREAD: Duration = Duration::from_secs(60);

/// What `part` makes of the settings, now and after each change of it, until `shutdown`.
pub(crate) fn follow<T, F>(
    flags: ConfigFlags,
    settings: &Settings,
    part: F,
    shutdown: CancellationToken,
) -> watch::Receiver<T>
where
    T: PartialEq + Send + Sync + 'static,
    F: Fn(&Settings) -> T + Send + Sync + Clone + 'static,
{
    let (told, receiver) = watch::channel(part(settings));
    let file = flags.config.clone().unwrap_or_else(|| DEFAULT_FILE.into());
    let files: [PathBuf; 2] = [file, settings.layout.joined_file()];
    let task = async move {
        let mut last_problem = String::new();
        let mut known: Option<Contents> = None;
        loop {
            // Watched before it is read, so that nothing is missed in between.
            let mut events = watch_around(&files);
            let (flags, part) = (flags.clone(), part.clone());
            let (paths, before) = (files.clone(), known.clone());
            let read = move || read_whole(&paths, before.as_ref(), || Settings::load(&flags).map(|all| part(&all)));
            match tokio::task::spawn_blocking(read).await {
                Ok(Ok(None)) => {
                    // It is being written.
                    sleep(SETTLE).await;
                    continue;
                }
                Ok(Ok(Some((now, contents)))) => {
                    last_problem.clear();
                    known = Some(contents);
                    told.send_if_modified(|known| {
                        let changed = *known != now;
                        *known = now;
                        changed
                    });
                }
                Ok(Err(error)) => {
                    let text = format!("{error:#}");
                    if text != last_problem {
                        tracing::error!(problem = text, "the changed configuration is not used");
                        last_problem = text;
                    }
                }
                Err(_) => return,
            }
            tokio::select! {
                () = settled_change(&mut events) => {}
                () = sleep(REREAD) => {}
            }
        }
    };
    tokio::spawn(async move {
        tokio::select! {
            () = task => {}
            () = shutdown.cancelled() => {}
        }
    });
    receiver
}

/// What is in each of the files; nothing of one that is not there.
type Contents = [Option<String>; 2];

fn contents(files: &[PathBuf; 2]) -> Contents {
    files.each_ref().map(|file| std::fs::read_to_string(file).ok())
}

/// What `load` makes of the files, with what was in them; None where they changed meanwhile. One that had something in it
/// `before` and has nothing now is an error.
fn read_whole<T>(
    files: &[PathBuf; 2],
    before: Option<&Contents>,
    load: impl FnOnce() -> Result<T, ConfigError>,
) -> anyhow::Result<Option<(T, Contents)>> {
    let is_blank = |text: &Option<String>| text.as_ref().is_none_or(|text| text.trim().is_empty());
    let now = contents(files);
    for (index, file) in files.iter().enumerate() {
        let had = before.is_some_and(|before| !is_blank(&before[index]));
        anyhow::ensure!(!had || !is_blank(&now[index]), "{} is gone or empty", file.display());
    }
    let loaded = load();
    if contents(files) != now {
        return Ok(None);
    }
    Ok(Some((loaded?, now)))
}

/// Events of the files' directories: a file that is replaced, or reached by a link, has none of its own.
struct Events {
    names: Vec<PathBuf>,
    stream: inotify::EventStream<[u8; 4096]>,
}

fn watch_around(files: &[PathBuf]) -> Option<Events> {
    use inotify::WatchMask;
    let inotify = inotify::Inotify::init().ok()?;
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_FROM
        | WatchMask::MOVED_TO
        | WatchMask::ONLYDIR;
    let parent = |file: &Path| match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let mut watched = 0;
    for file in files {
        watched += usize::from(inotify.watches().add(parent(file), mask).is_ok());
    }
    let names = files.iter().filter_map(|file| file.file_name()).map(PathBuf::from).collect();
    let stream = inotify.into_event_stream([0; 4096]).ok()?;
    (watched > 0).then_some(Events { names, stream })
}

impl Events {
    /// Waits for something that can be a change of the files.
    async fn next(&mut self) -> Option<()> {
        loop {
            let event = self.stream.next().await?.ok()?;
            let is_hidden = |name: &OsStr| name.as_bytes().starts_with(b"..");
            match &event.name {
                // The files of a mounted ConfigMap change by a link beside them, of such a name.
                Some(name) if !is_hidden(name) && !self.names.iter().any(|file| file == Path::new(name)) => {}
                _ => return Some(()),
            }
        }
    }
}

/// Waits for a change and for it to be over; for ever where nothing can be watched.
async fn settled_change(events: &mut Option<Events>) {
    let Some(watched) = events else { return std::future::pending().await };
    let mut happened = watched.next().await;
    for _ in 0..SETTLE_TIMES {
        if happened.is_none() {
            // What was watched is gone; the next look is that of the interval.
            return std::future::pending().await;
        }
        match timeout_at(Instant::now() + SETTLE, watched.next()).await {
            Ok(more) => happened = more,
            Err(_elapsed) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    async fn until(receiver: &mut watch::Receiver<u32>, wanted: u32) {
        let waited = tokio::time::timeout(Duration::from_secs(20), receiver.wait_for(|pods| *pods == wanted));
        waited.await.expect("the change to be told in time").expect("the follower to be there");
    }

    #[test]
    fn what_is_gone_empty_or_half_written_is_not_gone_by() {
        let directory = tempfile::tempdir().expect("tempdir");
        let files = [directory.path().join("config.yaml"), directory.path().join("joined.yaml")];
        let write = |text: &str| fs::write(&files[0], text).expect("write");
        let read = |before: Option<&Contents>| read_whole(&files, before, || Ok(7));
        assert_eq!(read(None).expect("no file is fine").map(|(loaded, _)| loaded), Some(7));
        write("maxPods: 7\n");
        let (_, known) = read(None).expect("readable").expect("whole");
        write("# nothing\nmaxPods: 8\n");
        assert!(read(Some(&known)).expect("readable").is_some());
        write(" \n");
        let problem = read(Some(&known)).expect_err("it had something in it").to_string();
        assert!(problem.contains("config.yaml is gone or empty"), "{problem}");
        fs::remove_file(&files[0]).expect("remove");
        read(Some(&known)).expect_err("it was there");
        write("maxPods: 9\n");
        let while_written = || {
            write("maxPods: 90\n");
            Ok(7)
        };
        assert!(read_whole(&files, Some(&known), while_written).expect("readable").is_none());
    }

    #[tokio::test]
    async fn a_daemon_hears_of_changes_and_goes_on_when_the_file_is_wrong() {
        let directory = tempfile::tempdir().expect("tempdir");
        let (file, data) = (directory.path().join("config.yaml"), directory.path().join("data"));
        fs::create_dir(&data).expect("directory");
        let flags = ConfigFlags { config: Some(file.clone()), data_dir: Some(data.clone()), ..ConfigFlags::default() };
        fs::write(&file, "maxPods: 7\n").expect("write");
        let settings = Settings::load(&flags).expect("valid");
        let shutdown = CancellationToken::new();
        let mut pods = follow(flags, &settings, |settings| settings.max_pods, shutdown.clone());
        assert_eq!(*pods.borrow_and_update(), 7);
        fs::write(&file, "maxPods: 8\n").expect("write");
        until(&mut pods, 8).await;
        // As editors and configuration management do it.
        fs::write(directory.path().join("new"), "maxPods: many\n").expect("write");
        fs::rename(directory.path().join("new"), &file).expect("rename");
        fs::write(directory.path().join("new"), "maxPods: 9\n").expect("write");
        fs::rename(directory.path().join("new"), &file).expect("rename");
        until(&mut pods, 9).await;
        fs::write(&file, "nonsense: 9\n").expect("write");
        fs::write(data.join("other"), "").expect("write");
        fs::write(&file, "maxPods: 10\n").expect("write");
        until(&mut pods, 10).await;
        shutdown.cancel();
        assert!(pods.changed().await.is_err(), "nobody follows after the end");
    }
}
