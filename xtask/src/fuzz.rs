//! `cargo xtask fuzz`: libFuzzer, coverage-guided, with the stable compiler, on what others send: image layers, messages to
//! cluster DNS, answers of the kernel, CNI configurations.
//!
//! The crate in `fuzz/` is no member of the workspace: all of it is built with instrumented code, and libFuzzer itself is C++.

use std::fs;

use crate::{packages, root, step, target_dir};

/// What instruments code for libFuzzer; what cargo-fuzz passes too.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
const TARGETS: [&str; 4] = ["unpack_layer", "dns_message", "netlink_answers", "cni_config"];

#[derive(clap::Args)]
pub(crate) struct FuzzFlags {
    /// How long, each
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What to look at; everything by default
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
}

pub(crate) fn run(flags: &FuzzFlags) -> anyhow::Result<()> {
    packages::ensure(packages::BUILD)?;
    packages::ensure(packages::FUZZ)?;
    let machine = if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };
    let target = target_dir().join("fuzz");
    step::run(
        "build the fuzzer",
        step::cargo()
            .args(["build", "--release", "--locked", "--manifest-path"])
            .arg(root().join("fuzz/Cargo.toml"))
            // With it, programs that run while building are not instrumented.
            .args(["--target", machine, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", FLAGS),
    )?;
    let chosen = |name: &&&str| flags.targets.is_empty() || flags.targets.iter().any(|chosen| chosen == **name);
    for name in TARGETS.iter().filter(chosen) {
        let corpus = target.join("corpus").join(name);
        fs::create_dir_all(&corpus)?;
        // What it finds lies in the working directory.
        let mut fuzzer = std::process::Command::new(target.join(machine).join("release").join(name));
        step::run(
            &format!("fuzz {name}"),
            fuzzer.current_dir(&target).arg(&corpus).arg(format!("-max_total_time={}", flags.seconds)).args([
                "-max_len=4096",
                "-timeout=20",
                "-print_final_stats=1",
            ]),
        )?;
    }
    Ok(())
}
