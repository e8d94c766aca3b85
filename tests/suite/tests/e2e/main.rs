//! End-to-end tests: the release binaries, a whole cluster in fresh namespaces, and kubectl.
//!
//! One cluster is started, the cases run against it one after another, and at the end `oarlock reset` must leave nothing. Prints
//! what `cargo test` prints, so that results are counted alike. Arguments filter cases by name.

mod agent_claims;
mod agent_isolation;
mod agent_pods;
mod bad_input;
mod cluster;
mod crash;
mod kubectl;
mod limits;
mod net_policy;
mod network;
mod registry;
mod small_disk;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use cluster::Cluster;
use oarlock_testkit::become_node;

/// A named case that runs against the one cluster.
type Case = (&'static str, fn(&Cluster));
/// A named case that starts what it needs itself, after the one cluster is gone.
type LoneCase = (&'static str, fn());

fn main() -> ExitCode {
    let filters: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let cases: Vec<Case> = [
        kubectl::CASES,
        network::CASES,
        net_policy::CASES,
        limits::CASES,
        agent_claims::CASES,
        agent_isolation::CASES,
        agent_pods::CASES,
        registry::CASES,
        bad_input::CASES,
        crash::CASES,
    ]
    .concat()
    .into_iter()
    .filter(|(name, _)| wanted(name))
    .collect();
    let oldest = std::env::var_os("KUBECTL_OLDEST");
    let again: Vec<Case> =
        kubectl::CASES.iter().copied().filter(|(name, _)| oldest.is_some() && wanted(name)).collect();
    let lone: Vec<LoneCase> =
        [bad_input::LONE_CASES, small_disk::LONE_CASES].concat().into_iter().filter(|(name, _)| wanted(name)).collect();
    println!("\nrunning {} tests", cases.len() + again.len() + lone.len() + 2);
    become_node();
    let mut tally = Tally::default();
    let Some(cluster) = tally.run("up_shows_the_demo_through_both_services", Cluster::start) else {
        return tally.finish();
    };
    let mut run = |name: &str, case: fn(&Cluster)| {
        if tally.run(name, || case(&cluster)).is_none() {
            cluster.show_state();
        }
    };
    for (name, case) in cases {
        run(name, case);
    }
    if let Some(program) = oldest {
        cluster.use_kubectl(program);
        for (name, case) in again {
            run(&format!("with_the_oldest_kubectl::{name}"), case);
        }
    }
    tally.run("reset_leaves_nothing_behind", || cluster.reset_and_check());
    for (name, case) in lone {
        tally.run(name, case);
    }
    tally.finish()
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
}

impl Tally {
    /// Runs one case; its panic is its failure.
    fn run<T>(&mut self, name: &str, case: impl FnOnce() -> T) -> Option<T> {
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
                self.failed.push(name.to_owned());
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
