//! `cargo xtask test`: every check and test, with counts at the end.
//!
//! Order: formatting, lints, tidy, unit and crate tests, then the release build, the privileged and
//! end-to-end tests on it, and some of them again in a virtual machine with cgroup version 2.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context;

use crate::{bin_dir, build, lab, packages, root, step, target_dir, tidy};

#[derive(clap::Args)]
pub(crate) struct TestFlags {
    /// Only the checks and tests that need neither root nor a release build
    #[arg(long)]
    unit: bool,
}

/// Test programs whose tests have nothing in common but the kernel: each makes network namespaces of its own, and waits for
/// clocks and time limits most of the time. Several run at once.
pub(crate) const APART: &[&str] = &[
    "balancer",
    "cluster_dns",
    "cluster_dns_upstream",
    "cni",
    "cni_bridge",
    "cni_flows",
    "cni_options",
    "cni_restore",
    "netpolicy",
    "netpolicy_nodes",
    "netpolicy_ways",
    "netproxy",
    "netproxy_live",
    "netproxy_random",
    "nft",
    "node_routes",
    "sctp",
];
pub(crate) const APART_AT_ONCE: usize = 4;

/// What the tests of one or several programs came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) not_run: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.not_run += other.not_run;
    }

    /// Reads `ok. 3 passed; 0 failed; 0 ignored; …`.
    pub(crate) fn parse(result: &str) -> Self {
        let number = |label: &str| {
            result
                .split(['.', ';'])
                .find_map(|part| part.trim().strip_suffix(label).and_then(|number| number.trim().parse().ok()))
                .unwrap_or(0)
        };
        Self { passed: number("passed"), failed: number("failed"), not_run: number("ignored") }
    }
}

pub(crate) fn run(flags: &TestFlags) -> anyhow::Result<()> {
    let start = Instant::now();
    packages::ensure(&[packages::BUILD, packages::RUN, packages::TEST].concat())?;
    step::run("formatting", step::cargo().args(["fmt", "--all", "--check"]))?;
    step::run(
        "lints",
        step::cargo().args(["clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"]),
    )?;
    tidy::run()?;
    let mut total = Counts::default();
    let mut problems = Vec::new();
    let mut level = |name: &str, command: &mut Command| -> anyhow::Result<()> {
        let (counts, succeeded) = count(name, command)?;
        total.add(counts);
        if !succeeded {
            problems.push(name.to_owned());
        }
        Ok(())
    };
    level(
        "unit and crate tests",
        step::cargo().args([
            "test",
            "--workspace",
            "--exclude",
            "oarlock-tests",
            "--lib",
            "--bins",
            "--tests",
            "--locked",
            "--no-fail-fast",
        ]),
    )?;
    if !flags.unit {
        let bin = build::run()?;
        let (apart, others) = test_programs()?;
        for (name, programs, threads) in [
            ("privileged tests, each in namespaces of its own", apart, APART_AT_ONCE),
            ("other privileged and end-to-end tests", others, 1),
        ] {
            let mut command = step::cargo();
            command.args(["test", "--package", "oarlock-tests", "--locked", "--no-fail-fast"]);
            command.args(programs.iter().flat_map(|program| ["--test", program]));
            command.args(["--", &format!("--test-threads={threads}")]).env("OARLOCK_BIN_DIR", &bin);
            for kubectl in [packages::KUBECTL, packages::KUBECTL_OLDEST] {
                command.env(kubectl.variable, kubectl.program()?);
            }
            level(name, &mut command)?;
        }
        if lab::CAN_RUN {
            let (counts, succeeded) = lab::test(&bin, lab::DEFAULT_TESTS, false)?;
            total.add(counts);
            if !succeeded {
                problems.push("tests in a virtual machine".to_owned());
            }
        } else {
            println!("==> not run: tests in a virtual machine, whose system is for x86_64 hosts");
        }
    }
    println!(
        "==> {:.0} s in all; programs in {}, target in {}",
        start.elapsed().as_secs_f64(),
        bin_dir().display(),
        target_dir().display()
    );
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.not_run);
    anyhow::ensure!(problems.is_empty() && total.failed == 0, "failed: {}", problems.join(", "));
    anyhow::ensure!(total.passed > 0, "no test ran in {}", root().display());
    Ok(())
}

/// The programs of the test suite: those of [`APART`], and all others.
fn test_programs() -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let directory = root().join("tests/suite/tests");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        let is_program = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").exists();
        names.extend(path.file_stem().filter(|_| is_program).map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    let (apart, others): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| APART.contains(&name.as_str()));
    anyhow::ensure!(apart.len() == APART.len(), "not all of these are test programs: {}", APART.join(" "));
    Ok((apart, others))
}

/// Runs a `cargo test`, shows its output, and adds up its result lines.
fn count(name: &str, command: &mut Command) -> anyhow::Result<(Counts, bool)> {
    println!("==> {name}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {command:?}"))?;
    let output = child.stdout.take().context("the test run has no output")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot read the test run's output")?;
        println!("{line}");
        if let Some(result) = line.strip_prefix("test result: ") {
            counts.add(Counts::parse(result));
        }
    }
    let succeeded = child.wait()?.success();
    println!("    {name}: {} passed, {} failed, {} not run", counts.passed, counts.failed, counts.not_run);
    Ok((counts, succeeded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_added_up() {
        let counts =
            Counts::parse("FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s");
        assert_eq!((counts.passed, counts.failed, counts.not_run), (12, 3, 1));
    }
}
