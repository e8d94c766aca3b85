//! End-to-end tests: the release binaries, a whole cluster in fresh namespaces, and kubectl.
//!
//! One cluster is started, the cases run against it one after another, and at the end `oarlock reset` must leave nothing; then
//! those about networks on a cluster of IPv4 and IPv6 and on one of IPv6 alone; then some of all once more on a node whose
//! runtime is containerd, or all of them with OARLOCK_E2E_RUNTIME=containerd. Prints what
//! `cargo test` prints, so that results are counted alike. Arguments filter cases by name.

mod agent_claims;
mod agent_hooks;
mod agent_isolation;
mod agent_pods;
mod bad_input;
mod cluster;
mod containerd;
mod crash;
mod kubectl;
mod limits;
mod net_policy;
mod network;
mod registry;
mod settings;
mod small_disk;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use cluster::{Cluster, Mode};
use oarlock_testkit::become_node;

/// A named case that runs against the one cluster.
type Case = (&'static str, fn(&Cluster));
/// A named case that starts what it needs itself, after the one cluster is gone.
type LoneCase = (&'static str, fn());

/// Which runtime the nodes' pods run in: `own`, `containerd`, or both with only some of the cases over containerd.
const RUNTIME: &str = "OARLOCK_E2E_RUNTIME";
/// What the names of cases over containerd begin with.
const OVER_CONTAINERD: &str = "over_containerd::";

/// What the names of cases in other address families begin with.
const IN_FAMILIES: [(&str, Mode); 2] = [("dual_stack::", Mode::Dual), ("ipv6::", Mode::Ipv6)];

fn all_cases() -> Vec<Case> {
    [
        kubectl::CASES,
        network::CASES,
        settings::CASES,
        net_policy::CASES,
        limits::CASES,
        agent_claims::CASES,
        agent_hooks::CASES,
        agent_isolation::CASES,
        agent_pods::CASES,
        registry::CASES,
        bad_input::CASES,
        crash::CASES,
    ]
    .concat()
}

fn main() -> ExitCode {
    let filters: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let chosen = std::env::var(RUNTIME).unwrap_or_default();
    // Filters are for our runtime unless they name the other.
    let named = |filter: &String| filter.contains(OVER_CONTAINERD.trim_end_matches(':'));
    let (over_own, over_containerd) = match chosen.as_str() {
        "own" => (true, false),
        "containerd" => (false, true),
        _ => (filters.is_empty() || !filters.iter().all(named), filters.iter().all(named)),
    };
    become_node();
    let mut tally = Tally::default();
    if over_own {
        run_over_own(&mut tally, &filters);
        IN_FAMILIES.iter().for_each(|(prefix, mode)| run_in_families(&mut tally, &filters, prefix, *mode));
    }
    if over_containerd {
        run_over_containerd(&mut tally, &filters, chosen == "containerd");
    }
    tally.finish()
}

fn is_wanted(name: &str, filters: &[String]) -> bool {
    filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
}

fn run_over_own(tally: &mut Tally, filters: &[String]) {
    let wanted = |name: &str| is_wanted(name, filters);
    let cases: Vec<Case> = all_cases().into_iter().filter(|(name, _)| wanted(name)).collect();
    let oldest = std::env::var_os("KUBECTL_OLDEST");
    let again: Vec<Case> =
        kubectl::CASES.iter().copied().filter(|(name, _)| oldest.is_some() && wanted(name)).collect();
    let lone: Vec<LoneCase> =
        [bad_input::LONE_CASES, small_disk::LONE_CASES].concat().into_iter().filter(|(name, _)| wanted(name)).collect();
    let of_families = |filter: &String| IN_FAMILIES.iter().any(|(prefix, _)| filter.starts_with(prefix));
    if !filters.is_empty() && filters.iter().all(of_families) {
        return;
    }
    println!("\nrunning {} tests", cases.len() + again.len() + lone.len() + 2);
    let Some(cluster) = tally.run("up_shows_the_demo_through_both_services", Cluster::start) else { return };
    tally.run_cases(&cluster, "", &cases);
    if let Some(program) = oldest {
        cluster.use_kubectl(program);
        tally.run_cases(&cluster, "with_the_oldest_kubectl::", &again);
    }
    tally.run("reset_leaves_nothing_behind", || cluster.reset_and_check());
    for (name, case) in lone {
        tally.run(name, case);
    }
}

/// Runs the cases about networks on a cluster of other address families.
fn run_in_families(tally: &mut Tally, filters: &[String], prefix: &str, mode: Mode) {
    let named = |name: &str| format!("{prefix}{name}");
    let cases: Vec<Case> = [network::CASES, net_policy::CASES].concat();
    let cases: Vec<Case> = cases.into_iter().filter(|(name, _)| is_wanted(&named(name), filters)).collect();
    if cases.is_empty() {
        return;
    }
    println!("\nrunning {} tests", cases.len() + 2);
    let begin = named("up_shows_the_demo_through_both_services");
    let Some(cluster) = tally.run(&begin, || Cluster::start_in(mode)) else { return };
    tally.run_cases(&cluster, prefix, &cases);
    tally.run(&named("reset_leaves_nothing_behind"), || cluster.reset_and_check());
}

/// Runs the cases, all of them or those of every run, with the node's pods in containerd.
fn run_over_containerd(tally: &mut Tally, filters: &[String], all: bool) {
    let named = |name: &str| format!("{OVER_CONTAINERD}{name}");
    let impossible = |name: &str| containerd::NOT_RUN.iter().find(|(known, _)| *known == name);
    let chosen = |name: &str| all || !filters.is_empty() || containerd::BRIEF.contains(&name);
    let cases: Vec<Case> =
        all_cases().into_iter().filter(|(name, _)| is_wanted(&named(name), filters) && chosen(name)).collect();
    println!("\nrunning {} tests", cases.len() + 2);
    let begin = named("up_shows_the_demo_through_both_services");
    let Some(cluster) = tally.run(&begin, Cluster::start_over_containerd) else { return };
    let (not_run, cases): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(|(name, _)| impossible(name).is_some());
    tally.run_cases(&cluster, OVER_CONTAINERD, &cases);
    for (name, reason) in not_run.iter().filter_map(|(name, _)| impossible(name)) {
        tally.not_run(&named(name), reason);
    }
    tally.run(&named("reset_leaves_nothing_behind"), || cluster.reset_and_check());
}

#[derive(Default)]
struct Tally {
    passed: usize,
    not_run: usize,
    failed: Vec<String>,
}

impl Tally {
    /// Runs cases against a cluster, and shows what there is to see of it when one fails.
    fn run_cases(&mut self, cluster: &Cluster, prefix: &str, cases: &[Case]) {
        for (name, case) in cases {
            if self.run(&format!("{prefix}{name}"), || case(cluster)).is_none() {
                cluster.show_state();
            }
        }
    }

    /// Says that a case cannot be run here, and why.
    fn not_run(&mut self, name: &str, reason: &str) {
        println!("test {name} ... ignored, {reason}");
        self.not_run += 1;
    }

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
            "\ntest result: {verdict}. {} passed; {} failed; {} ignored; 0 measured; 0 filtered out\n",
            self.passed,
            self.failed.len(),
            self.not_run
        );
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
