//! Release binaries: `oarlock` linked as usual; the shim, the CNI plugins and the test image's program static.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use oarlock_testimage::{Image, pack};

use crate::{bin_dir, packages, step, target_dir};

/// Programs that run in other namespaces or outlive their starter: static and non-PIE, so that they need nothing from the
/// file system around them and share their pages. Each with its profile.
const STATIC: &[(&str, &str)] =
    &[("oarlock-shim", "release"), ("oarlock-testimage", "release"), ("oarlock-cni-plugins", "small")];

/// Builds everything and collects it in `target/oarlock`, which is returned.
pub(crate) fn run() -> anyhow::Result<PathBuf> {
    packages::ensure(packages::BUILD)?;
    let bin = bin_dir();
    fs::create_dir_all(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
    step::run("build oarlock", step::cargo().args(["build", "--release", "--locked", "--package", "oarlock"]))?;
    place(&target_dir().join("release/oarlock"), &bin.join("oarlock"))?;
    build_static(&bin)?;
    let archive = bin.join("testimage.tar");
    pack(&bin.join("oarlock-testimage"), &Image::default(), &archive)
        .with_context(|| format!("cannot pack {}", archive.display()))?;
    Ok(bin)
}

fn build_static(bin: &Path) -> anyhow::Result<()> {
    let target = step::output(std::process::Command::new("rustc").args(["--print", "host-tuple"]))?;
    let target = target.trim();
    let variable = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
    for profile in ["release", "small"] {
        let programs = || STATIC.iter().filter(|(_, of)| *of == profile).map(|(program, _)| *program);
        let mut command = step::cargo();
        command
            .args(["build", "--profile", profile, "--locked", "--target", target])
            .args(programs().flat_map(|program| ["--package", program]))
            .env(&variable, "-C target-feature=+crt-static -C relocation-model=static")
            .env("LIBSECCOMP_LINK_TYPE", "static")
            .env("LIBSECCOMP_LIB_PATH", library_directory(target));
        step::run(&format!("build static programs ({profile})"), &mut command)?;
        for program in programs() {
            place(&target_dir().join(target).join(profile).join(program), &bin.join(program))?;
        }
    }
    Ok(())
}

/// Debian's directory of libraries for a Rust target.
fn library_directory(target: &str) -> String {
    let architecture = target.split('-').next().unwrap_or("x86_64");
    format!("/usr/lib/{architecture}-linux-gnu")
}

/// Copies a program into place by rename, so that a running one is not disturbed. An unchanged one is left alone.
fn place(from: &Path, to: &Path) -> anyhow::Result<()> {
    let contents = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == contents) {
        return Ok(());
    }
    let temporary = to.with_extension("new");
    fs::copy(from, &temporary).with_context(|| format!("cannot copy to {}", temporary.display()))?;
    fs::rename(&temporary, to).with_context(|| format!("cannot place {}", to.display()))
}
