//! `cargo xtask bench`: builds the release binaries and runs the benchmark program in `tests/perf` on them.

use crate::{build, packages, step};

#[derive(clap::Args)]
pub(crate) struct BenchFlags {
    /// The benchmark and its flags: up, memory, pod, agent, runtime, pull, logs, netproxy, cni, dns, net
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    bench: Vec<String>,
}

pub(crate) fn run(flags: &BenchFlags) -> anyhow::Result<()> {
    packages::ensure(packages::RUN)?;
    if flags.bench.iter().any(|flag| flag == "--peers") {
        packages::ensure(packages::PEERS)?;
    }
    if flags.bench.first().is_some_and(|bench| bench == "pull") {
        packages::ensure(packages::REGISTRY)?;
    }
    let bin = build::run()?;
    step::run(
        "benchmark",
        step::cargo()
            .args(["run", "--release", "--locked", "--quiet", "--package", "oarlock-perf", "--"])
            .args(&flags.bench)
            .env("OARLOCK_BIN_DIR", bin),
    )
}
