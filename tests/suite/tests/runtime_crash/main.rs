//! The runtime daemon killed with SIGKILL between any two things that it does, one after another, and started again. Needs
//! root.
//!
//! A pod is taken from its image to its removal by a client that repeats a call whose daemon died. The daemon is this
//! program once more (`--daemon`), told at which step to die. The steps are gone through by number until the whole life
//! passes without a death; after each life nothing of the pod may be left. A pull is killed in the middle of a transfer beside
//! that. Prints what `cargo test` prints.

mod daemon;
mod life;
mod pull;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use daemon::Daemon;
use oarlock_testkit::in_fresh_namespaces;

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
#[path = "../runtime_daemon/mod.rs"]
mod runtime_daemon;

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
#[path = "../image_files/mod.rs"]
mod image_files;

const CASES: [(&str, fn()); 2] = [
    ("a_daemon_killed_at_any_step_is_started_again_and_nothing_is_lost_or_left", every_step),
    ("a_pull_whose_daemon_is_killed_goes_on_with_what_came", killed_pull),
];
/// There are far fewer; a life that never passes is a mistake of the test.
const STEPS_MAX: u64 = 1000;
/// Some that nothing runs beside, so that their numbers are sure to come up.
const MUST_DIE_AT: [&str; 6] = [
    "a layer is unpacked",
    "a record is written",
    "the root file system is mounted",
    "the engine has made the container",
    "limits are written",
    "the container's bundle is gone",
];
/// Of those that run side by side each life meets some.
const KINDS_MIN: usize = 25;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, directory, cgroup_root] = arguments.as_slice()
        && flag == "--daemon"
    {
        return daemon::serve(directory.as_ref(), cgroup_root);
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let wanted: Vec<_> = CASES.iter().filter(|(name, _)| filters.iter().all(|filter| name.contains(*filter))).collect();
    let start = Instant::now();
    println!("\nrunning {} tests", wanted.len());
    let mut failed = 0;
    for (name, case) in &wanted {
        let passed = catch_unwind(AssertUnwindSafe(|| in_fresh_namespaces(*case))).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += usize::from(!passed);
    }
    let (verdict, passed) = (if failed > 0 { "FAILED" } else { "ok" }, wanted.len() - failed);
    let (filtered, seconds) = (CASES.len() - wanted.len(), start.elapsed().as_secs_f64());
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {filtered} filtered out; finished in {seconds:.2}s\n",
    );
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn killed_pull() {
    oarlock_netns::bring_loopback_up().expect("loopback");
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("an event loop");
    let _context = threads.enter();
    let mut daemon = Daemon::new();
    threads.block_on(pull::goes_on(&mut daemon));
    daemon.finish();
}

fn every_step() {
    oarlock_netns::bring_loopback_up().expect("loopback");
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("an event loop");
    let _context = threads.enter();
    let mut daemon = Daemon::new();
    let mut died_at = BTreeSet::new();
    let mut number = 0;
    threads.block_on(async {
        // The first life makes what outlives pods: the bridge, the plugins' table, the cgroup of shims.
        daemon.start(None).await;
        life::live(&mut daemon, "first").await;
        daemon.stop();
        let before = daemon.traces();
        loop {
            number += 1;
            assert!(number < STEPS_MAX, "there is no end to the steps");
            daemon.start(Some(number)).await;
            life::live(&mut daemon, &format!("at-{number}")).await;
            let Some(step) = daemon.death() else { break };
            let left = daemon.traces().difference(&before).cloned().collect::<Vec<_>>();
            assert!(left.is_empty(), "left by a daemon that died when \"{step}\" ({number}):\n{}", left.join("\n"));
            died_at.insert(step);
            daemon.stop();
        }
        daemon.finish();
    });
    println!("died {} times, at {} kinds of steps", number - 1, died_at.len());
    assert!(died_at.len() >= KINDS_MIN, "only at {died_at:#?}");
    for step in MUST_DIE_AT {
        assert!(died_at.contains(step), "never died when {step:?}; only at {died_at:#?}");
    }
}
