//! Reading real files: tails, following, rotation, links.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;

use super::super::file::open;
use super::*;

struct Bench {
    dir: tempfile::TempDir,
    running: watch::Sender<bool>,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("ns_pod_uid/c")).unwrap();
    Bench { dir, running: watch::Sender::new(true) }
}

impl Bench {
    fn path(&self) -> PathBuf {
        self.dir.path().join("ns_pod_uid/c/0.log")
    }

    fn log(&self) -> LogFile {
        LogFile { path: self.path(), running: self.running.subscribe() }
    }

    fn write(&self, content: &str) {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(self.path()).unwrap();
        writeln!(file, "2026-01-01T00:00:01Z stdout F {content}").unwrap();
    }

    async fn start(&self, options: LogOptions) -> mpsc::Receiver<io::Result<Bytes>> {
        let log = self.log();
        let reader = open(&log).await.unwrap();
        let (sender, receiver) = mpsc::channel(8);
        tokio::spawn(async move { copy(reader, log, options, &sender).await.unwrap() });
        receiver
    }

    async fn read(&self, options: LogOptions) -> String {
        rest(&mut self.start(options).await).await
    }
}

/// Everything up to the end.
async fn rest(receiver: &mut mpsc::Receiver<io::Result<Bytes>>) -> String {
    let mut text = Vec::new();
    let all = async {
        while let Some(piece) = receiver.recv().await {
            text.extend_from_slice(&piece.unwrap());
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all).await.expect("an end");
    String::from_utf8(text).unwrap()
}

/// Reads until `wanted` has come.
async fn until(receiver: &mut mpsc::Receiver<io::Result<Bytes>>, wanted: &str) {
    let mut text = Vec::new();
    while text.len() < wanted.len() {
        let piece = tokio::time::timeout(Duration::from_secs(10), receiver.recv()).await.expect("more output");
        text.extend_from_slice(&piece.expect("not the end").unwrap());
    }
    assert_eq!(String::from_utf8(text).unwrap(), wanted);
}

fn following() -> LogOptions {
    LogOptions { follow: true, ..Default::default() }
}

#[tokio::test]
async fn a_log_is_read_to_its_present_end() {
    let bench = bench();
    for number in 0..5 {
        bench.write(&number.to_string());
    }
    assert_eq!(bench.read(LogOptions::default()).await, "0\n1\n2\n3\n4\n");
    assert_eq!(bench.read(LogOptions { tail_lines: Some(2), ..Default::default() }).await, "3\n4\n");
    assert_eq!(bench.read(LogOptions { tail_lines: Some(0), ..Default::default() }).await, "");
    assert_eq!(bench.read(LogOptions { limit_bytes: Some(3), ..Default::default() }).await, "0\n1");
}

#[tokio::test]
async fn following_goes_on_until_the_container_has_ended() {
    let bench = bench();
    bench.write("before");
    let mut receiver = bench.start(LogOptions { tail_lines: Some(1), ..following() }).await;
    until(&mut receiver, "before\n").await;
    bench.write("one");
    until(&mut receiver, "one\n").await;
    bench.write("two");
    until(&mut receiver, "two\n").await;
    bench.write("last");
    bench.running.send_replace(false);
    assert_eq!(rest(&mut receiver).await, "last\n");
}

#[tokio::test]
async fn following_survives_rotations_without_losing_a_line() {
    let bench = bench();
    bench.write("start");
    let mut receiver = bench.start(following()).await;
    until(&mut receiver, "start\n").await;
    for round in 0..20 {
        bench.write(&format!("old {round}"));
        fs::rename(bench.path(), bench.path().with_extension(format!("log.{round}"))).unwrap();
        bench.write(&format!("new {round}"));
        until(&mut receiver, &format!("old {round}\nnew {round}\n")).await;
    }
    bench.running.send_replace(false);
    assert_eq!(rest(&mut receiver).await, "");
}

#[tokio::test]
async fn a_log_that_was_emptied_is_read_from_its_start() {
    let bench = bench();
    bench.write("a long first line");
    let mut receiver = bench.start(following()).await;
    until(&mut receiver, "a long first line\n").await;
    fs::File::create(bench.path()).unwrap();
    bench.write("x");
    until(&mut receiver, "x\n").await;
}

#[tokio::test]
async fn following_ends_with_the_agents_interest() {
    let mut bench = bench();
    bench.write("x");
    let mut receiver = bench.start(following()).await;
    until(&mut receiver, "x\n").await;
    bench.running = watch::Sender::new(false);
    assert_eq!(rest(&mut receiver).await, "");
}

#[tokio::test]
async fn links_and_other_files_are_not_read() {
    let bench = bench();
    let secret = bench.dir.path().join("secret");
    fs::write(&secret, "2026-01-01T00:00:01Z stdout F secret\n").unwrap();
    symlink(&secret, bench.path()).unwrap();
    assert!(open(&bench.log()).await.is_err());
    fs::remove_file(bench.path()).unwrap();
    nix::unistd::mkfifo(&bench.path(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(open(&bench.log()).await.is_err());
    fs::remove_dir_all(bench.dir.path().join("ns_pod_uid")).unwrap();
    symlink(bench.dir.path(), bench.dir.path().join("ns_pod_uid")).unwrap();
    assert!(open(&bench.log()).await.is_err());
}

#[tokio::test]
async fn a_link_planted_at_rotation_is_not_followed() {
    let bench = bench();
    let secret = bench.dir.path().join("secret");
    fs::write(&secret, "2026-01-01T00:00:01Z stdout F secret\n").unwrap();
    bench.write("x");
    let log = bench.log();
    let reader = open(&log).await.unwrap();
    let (sender, mut receiver) = mpsc::channel(8);
    let copying = tokio::spawn(async move { copy(reader, log, following(), &sender).await });
    until(&mut receiver, "x\n").await;
    fs::remove_file(bench.path()).unwrap();
    symlink(&secret, bench.path()).unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(10), copying).await.unwrap().unwrap().is_err());
    assert!(receiver.recv().await.is_none());
}
