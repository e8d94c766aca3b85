//! System packages from the distribution (Debian, Ubuntu): which are missing, and installing them.

use std::process::Command;

use anyhow::Context;

use crate::step;

/// What the build needs.
pub(crate) const BUILD: &[&str] = &["gcc", "libc6-dev", "libseccomp-dev", "pkg-config"];
/// What a running node needs.
pub(crate) const RUN: &[&str] = &["nftables", "iproute2"];
/// What the tests need beside these.
pub(crate) const TEST: &[&str] = &["conntrack"];

/// Installs those of `packages` that are missing, saying which.
pub(crate) fn ensure(packages: &[&str]) -> anyhow::Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        println!("==> system packages: all there ({})", packages.join(", "));
        return Ok(());
    }
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "these packages are missing and only root can install them: {}",
        missing.join(" ")
    );
    println!("==> installing {}", missing.join(", "));
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "Dpkg::Use-Pty=0"]);
        command
    };
    step::run("package lists", apt().args(["update", "-q"])).context("is this Debian or Ubuntu?")?;
    step::run("packages", apt().args(["install", "-y", "-q", "--no-install-recommends"]).args(missing))
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .output()
        .is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}
