//! Reads what decisions need to know about the host ([`HostFacts`]). Decides nothing; what must be in the kernel for one of
//! the facts to be true is put there.

use std::fs;
use std::path::Path;

use oarlock_cgroup::Layout;

use crate::apparmor;
use crate::error::Error;
use crate::idmap;
use crate::spec::{HostFacts, capability};

/// CAP_SYS_RESOURCE in the mask of `/proc/self/status`.
const SYS_RESOURCE: u64 = 1 << 24;

/// Looks the host over once. Layers of images lie below `images`. Who makes control groups is for the configuration to say.
pub(crate) fn facts(images: &Path) -> Result<HostFacts, Error> {
    let layout = Layout::host().map_err(|source| Error::Cgroup { operation: "find", group: "/".to_owned(), source })?;
    let mask = effective_capabilities();
    // Without the capability a process may only give scores that are no lower than its own.
    let floor = if mask & SYS_RESOURCE == 0 { own_oom_score_adj() } else { None };
    Ok(HostFacts {
        cgroup_v2: layout.is_v2(),
        cgroup_v1_hierarchies: version_1_hierarchies(layout),
        swap_accounting: swap_accounting(layout),
        hugetlb: layout.controller("hugetlb").is_some(),
        capabilities: capability::of_mask(mask),
        oom_score_adj_floor: floor,
        no_user_namespaces: idmap::obstacle(images),
        apparmor: apparmor::is_enabled(),
        apparmor_default: apparmor::load_default(),
        systemd_cgroups: false,
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        hostname: nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
    })
}

/// Which boot of the machine this is.
pub(crate) fn boot_id() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).map_err(Error::io("read", path))?.trim().to_owned())
}

fn version_1_hierarchies(layout: &Layout) -> Vec<std::path::PathBuf> {
    if layout.is_v2() {
        return Vec::new();
    }
    // The unified hierarchy of a hybrid host has nothing a container could read there.
    let unified = |path: &Path| path.join("cgroup.controllers").exists();
    layout.hierarchies().iter().filter(|path| !unified(path)).cloned().collect()
}

fn swap_accounting(layout: &Layout) -> bool {
    match (layout.controller("memory"), layout.is_v2()) {
        (Some(memory), false) => memory.join("memory.memsw.limit_in_bytes").exists(),
        // Only groups below the root have the file; the root tells of swap in its statistics.
        (Some(_), true) => fs::read_to_string("/proc/swaps").is_ok(),
        (None, _) => false,
    }
}

fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn own_oom_score_adj() -> Option<i32> {
    fs::read_to_string("/proc/self/oom_score_adj").ok()?.trim().parse().ok()
}
