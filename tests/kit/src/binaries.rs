//! Finds the programs that `cargo xtask build` made.

use std::path::{Path, PathBuf};

/// The directory with `oarlock`, `oarlock-shim`, `oarlock-cni-plugins`, `oarlock-testimage` and `testimage.tar`:
/// `OARLOCK_BIN_DIR`, or `oarlock` in the target directory.
pub fn bin_dir() -> PathBuf {
    if let Some(directory) = std::env::var_os("OARLOCK_BIN_DIR") {
        return directory.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("tests/kit is two levels deep");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    target.join("oarlock")
}

/// The path of a built program; a missing one fails the test with what to do.
pub fn binary(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(path.exists(), "{} is missing: run `cargo xtask build` first", path.display());
    path
}

/// Whether this is the guest of `cargo xtask lab`, whose kernel has everything: what another machine may lack, it may not.
pub fn is_lab() -> bool {
    std::env::var_os("OARLOCK_LAB").is_some()
}

/// Kubelet settings, in YAML's flow style without braces, of a node whose pods stay whatever else fills the machine's disk.
pub const ON_ANY_DISK: &str = "evictionHard: {memory.available: 50Mi}, imageGCHighThresholdPercent: 100";

/// The packed test image, an OCI layout archive with the reference `oarlock.local/testimage:1`.
pub fn image_archive() -> PathBuf {
    binary("testimage.tar")
}
