//! One entry point for every chore: build, up, test, tidy, bench. Run as `cargo xtask <chore>`.

mod bench;
mod build;
mod fuzz;
mod lab;
mod lab_cluster;
mod packages;
mod step;
mod test;
mod tidy;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "Oarlock's chores")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build the release binaries and the demo image into target/oarlock
    Build,
    /// Install what is missing, build, start a cluster on this machine and show the demo
    Up(up::UpFlags),
    /// Install what is missing and run every check and test
    Test(test::TestFlags),
    /// Check the dependency law, names and licences
    Tidy,
    /// Virtual machines with cgroup version 2: tests in one, a cluster of three
    Lab(lab::LabFlags),
    /// Look for image layers that break out or crash the unpacking
    Fuzz(fuzz::FuzzFlags),
    /// Measure, and print tables and JSON
    Bench(bench::BenchFlags),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    match Arguments::parse().chore {
        Chore::Build => build::run().map(|_| ()),
        Chore::Up(flags) => up::run(&flags),
        Chore::Test(flags) => test::run(&flags),
        Chore::Tidy => tidy::run(),
        Chore::Lab(flags) => lab::run(&flags),
        Chore::Fuzz(flags) => fuzz::run(&flags),
        Chore::Bench(flags) => bench::run(&flags),
    }
}

/// The workspace's root directory.
fn root() -> PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is one level below the root").to_owned()
}

/// The target directory: `CARGO_TARGET_DIR`, or `target` in the root.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Where built programs are collected.
fn bin_dir() -> PathBuf {
    target_dir().join("oarlock")
}
