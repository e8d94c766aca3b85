//! Container logs that grow too large are renamed, written anew, and the oldest parts removed.

mod fakes;

use std::path::{Path, PathBuf};
use std::time::Duration;

use fakes::node::{Node, POD, plain, ready};
use serde_json::json;

/// The parts of the log that were put aside, oldest first, by what is in them.
fn parts(log: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(log.parent().expect("a directory")).expect("the directory").flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path != log).collect();
    paths.sort();
    paths.iter().filter_map(|path| std::fs::read_to_string(path).ok()).collect()
}

async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let reached = tokio::time::timeout(Duration::from_secs(30), async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(reached.await.is_ok(), "never: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_too_large_is_put_aside_and_the_oldest_parts_go() {
    let node = Node::start_with(&["app:1"], |config| {
        config.container_log_max_bytes = 10;
        config.container_log_max_files = 3;
        config.container_log_period = Duration::from_millis(20);
    })
    .await;
    let mut pod = plain();
    pod["spec"]["containers"] = json!([{"name": "app", "image": "app:1"}, {"name": "small", "image": "app:1"}]);
    node.create(pod);
    node.api.wait(POD, "Ready", ready).await;
    let small = node.dir.path().join("logs/pods/default_web_pod-uid-1/small/0.log");
    std::fs::write(&small, "short\n").expect("the neighbour's log");
    let log = node.dir.path().join("logs/pods/default_web_pod-uid-1/app/0.log");
    let reopened = || node.runtime.calls().iter().filter(|call| *call == "reopen").count();
    let mut written = Vec::new();
    for round in 0..4 {
        let text = format!("line {round}, longer than ten bytes\n");
        std::fs::write(&log, &text).expect("the log");
        written.push(text);
        eventually("the log is put aside", || reopened() == round + 1).await;
        // A second part of the same second would take the name of the first.
        let expected = written[written.len().saturating_sub(2)..].to_vec();
        eventually("the newest two parts are left", || parts(&log) == expected).await;
        assert_eq!(std::fs::read_to_string(&log).expect("a new log"), "", "written anew");
        let second = jiff::Timestamp::now().as_second();
        eventually("the next second", || jiff::Timestamp::now().as_second() > second).await;
    }
    // That of its neighbour was looked at as often, and is small enough.
    assert_eq!(std::fs::read_to_string(&small).expect("the neighbour's log"), "short\n");
    assert_eq!(parts(&small), [""; 0]);
}
