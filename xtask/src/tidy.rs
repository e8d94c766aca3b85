//! `cargo xtask tidy`: rules over the source tree and `cargo metadata` that no compiler checks.
//!
//! The dependency law of ARCHITECTURE.md, names that hide what a module is for, file heads, sources and licences of
//! dependencies, and crates that must not be there twice.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

use crate::{root, step};

/// Names that say nothing about their contents.
const BANNED_NAMES: &[&str] = &["common", "util", "utils", "helper", "helpers", "misc", "base"];

/// Licences that a dependency may have, by SPDX identifier. A file-level copyleft (MPL) is fine; any GPL is not.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that state their licence in a file only, with what the file says.
const LICENCE_FILES: &[(&str, &str)] = &[("rust-criu", "MIT")];

/// Dependencies of the program that are refused, with the reason.
const BANNED_CRATES: &[(&str, &str)] = &[
    ("openssl", "TLS is rustls with ring, so that binaries need no system library"),
    ("openssl-sys", "TLS is rustls with ring, so that binaries need no system library"),
    ("rustables", "its licence is the GPL"),
    ("async-std", "one async runtime: tokio"),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
}

pub(crate) fn run() -> anyhow::Result<()> {
    println!("==> tidy");
    let text = step::output(step::cargo().args(["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("cargo metadata")?;
    // No member of the workspace, so nobody else notices when its Cargo.lock does not know a new dependency.
    let fuzz = ["metadata", "--format-version", "1", "--locked", "--manifest-path", "fuzz/Cargo.toml"];
    step::output(step::cargo().args(fuzz))?;
    let mut problems = Vec::new();
    dependency_law(&metadata, &mut problems);
    dependencies(&metadata, &mut problems);
    sources(&root(), &mut problems)?;
    for problem in &problems {
        println!("    {problem}");
    }
    anyhow::ensure!(problems.is_empty(), "tidy found {} problems", problems.len());
    Ok(())
}

/// Part of the tree a crate belongs to, and the parts it may depend on (beside its own).
fn allowed(area: &str) -> &'static [&'static str] {
    match area {
        "proto" => &[],
        "support" => &[],
        "runtime" => &["proto", "support"],
        "cni-plugins" | "netproxy" | "control-plane" => &["support"],
        "agent" => &["proto", "support"],
        "cli" => &["proto", "support", "runtime", "netproxy", "agent", "control-plane"],
        "tests" | "xtask" => {
            &["proto", "support", "runtime", "netproxy", "agent", "control-plane", "cli", "cni-plugins", "tests"]
        }
        _ => &[],
    }
}

/// The top directory that a workspace crate is in.
fn area(package: &Package) -> String {
    package
        .manifest_path
        .strip_prefix(root())
        .ok()
        .and_then(|path| path.components().next())
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn dependency_law(metadata: &Metadata, problems: &mut Vec<String>) {
    let members: BTreeSet<&str> = metadata.workspace_members.iter().map(String::as_str).collect();
    let own: BTreeMap<&str, &Package> = metadata
        .packages
        .iter()
        .filter(|package| members.contains(package.id.as_str()))
        .map(|package| (package.name.as_str(), package))
        .collect();
    for package in own.values() {
        let area = self::area(package);
        for dependency in &package.dependencies {
            let dev = dependency.kind.as_deref() == Some("dev");
            if let Some(other) = own.get(dependency.name.as_str()) {
                let other_area = self::area(other);
                if !dev && other_area != area && !allowed(&area).contains(&other_area.as_str()) {
                    problems
                        .push(format!("{} ({area}) must not depend on {} ({other_area})", package.name, other.name));
                }
            }
            if dependency.name == "libcontainer" && package.name != "oarlock-shim" {
                problems.push(format!("{} names libcontainer; only oarlock-shim may", package.name));
            }
            let kubernetes = matches!(dependency.name.as_str(), "kube" | "k8s-openapi");
            if kubernetes && !dev && matches!(area.as_str(), "support" | "runtime" | "cni-plugins" | "proto") {
                problems.push(format!("{} ({area}) must not know Kubernetes types", package.name));
            }
        }
    }
}

fn dependencies(metadata: &Metadata, problems: &mut Vec<String>) {
    for package in metadata.packages.iter().filter(|package| package.source.is_some()) {
        let name = format!("{} {}", package.name, package.version);
        if !package.source.as_deref().is_some_and(|source| source.starts_with("registry+")) {
            problems.push(format!("{name} does not come from the registry"));
        }
        match &package.license {
            None if LICENCE_FILES.iter().any(|(known, _)| *known == package.name) => {}
            None => problems.push(format!("{name} states no licence")),
            Some(licence) if !licence_allowed(licence) => problems.push(format!("{name} has the licence {licence}")),
            Some(_) => {}
        }
        if let Some((_, reason)) = BANNED_CRATES.iter().find(|(banned, _)| *banned == package.name) {
            problems.push(format!("{name} is refused: {reason}"));
        }
    }
}

/// Whether an SPDX expression can be met with the licences that we take: every AND part needs one allowed OR choice.
fn licence_allowed(expression: &str) -> bool {
    let plain = expression.replace('/', " OR ").replace(['(', ')'], " ");
    plain.split(" AND ").all(|part| part.split(" OR ").any(|licence| LICENCES.contains(&licence.trim())))
}

/// Rules on our own files.
fn sources(root: &Path, problems: &mut Vec<String>) -> anyhow::Result<()> {
    let listed = step::output(std::process::Command::new("git").current_dir(root).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    for name in listed.lines() {
        let path = Path::new(name);
        let banned = path.components().any(|part| {
            let part = part.as_os_str().to_string_lossy();
            BANNED_NAMES.contains(&part.trim_end_matches(".rs"))
        });
        if banned {
            problems.push(format!("{name}: the name hides what it is for"));
        }
        if path.extension().is_none_or(|extension| extension != "rs") || !root.join(path).exists() {
            continue;
        }
        let text = fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {name}"))?;
        if !text.starts_with("//!") {
            problems.push(format!("{name}: does not open with //! (what it owns and what it does not)"));
        }
        if text.lines().any(|line| line.trim_start().starts_with("#[ignore")) {
            problems.push(format!("{name}: holds an ignored test"));
        }
        let unsafe_blocks = text.lines().filter(|line| opens_unsafe_block(line)).count();
        if text.matches("// SAFETY:").count() < unsafe_blocks {
            problems.push(format!("{name}: an unsafe block has no SAFETY comment"));
        }
    }
    Ok(())
}

/// Whether a line of code, not of text or comment, opens an unsafe block.
fn opens_unsafe_block(line: &str) -> bool {
    let code = line.trim_start();
    !code.starts_with("//") && code.contains("unsafe {") && !code.contains('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_read_as_expressions() {
        assert!(licence_allowed("MIT OR Apache-2.0"));
        assert!(licence_allowed("MIT/Apache-2.0"));
        assert!(licence_allowed("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(licence_allowed("GPL-2.0 OR MIT"));
        assert!(!licence_allowed("GPL-3.0-only"));
        assert!(!licence_allowed("MIT AND GPL-3.0-only"));
    }

    #[test]
    fn the_agent_may_not_link_the_runtime() {
        assert!(!allowed("agent").contains(&"runtime"));
        assert!(!allowed("support").contains(&"runtime"));
    }
}
