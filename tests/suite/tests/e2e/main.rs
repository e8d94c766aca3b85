//! End-to-end tests: the release binaries, a whole cluster in fresh namespaces, and kubectl.
//!
//! One cluster is started, the cases run against it one after another, and at the end `oarlock reset` must leave nothing. Prints
//! what `cargo test` prints, so that results are counted alike. An argument filters cases by name.

mod bad_input;
mod cluster;
mod crash;
mod kubectl;
mod network;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use cluster::Cluster;

/// A named case.
type Case = (&'static str, fn(&Cluster));

fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let cases: Vec<Case> = [kubectl::CASES, network::CASES, bad_input::CASES, crash::CASES]
        .concat()
        .into_iter()
        .filter(|(name, _)| filter.as_deref().is_none_or(|filter| name.contains(filter)))
        .collect();
    println!("\nrunning {} tests", cases.len() + 2);
    let mut tally = Tally::default();
    let cluster = tally.run("up_shows_the_demo_through_both_services", Cluster::start);
    let Some(cluster) = cluster else {
        return tally.finish();
    };
    for (name, case) in cases {
        if tally.run(name, || case(&cluster)).is_none() {
            cluster.show_state();
        }
    }
    tally.run("reset_leaves_nothing_behind", || cluster.reset_and_check());
    tally.finish()
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<&'static str>,
}

impl Tally {
    /// Runs one case; its panic is its failure.
    fn run<T>(&mut self, name: &'static str, case: impl FnOnce() -> T) -> Option<T> {
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(case));
        let verdict = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
        match outcome {
            Ok(value) => {
                self.passed += 1;
                Some(value)
            }
            Err(_) => {
                self.failed.push(name);
                None
            }
        }
    }

    fn finish(self) -> ExitCode {
        let verdict = if self.failed.is_empty() { "ok" } else { "FAILED" };
        if !self.failed.is_empty() {
            println!("\nfailures:\n    {}", self.failed.join("\n    "));
        }
        println!(
            "\ntest result: {verdict}. {} passed; {} failed; 0 ignored; 0 measured; 0 filtered out\n",
            self.passed,
            self.failed.len()
        );
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
