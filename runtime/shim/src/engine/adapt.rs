//! Rewrites a specification so that the engine does what the specification meant. Pure: one spec in, one spec out.
//!
//! What is mended (each a gap of the engine, see the tests):
//! - `noNewPrivileges: false` beside a seccomp filter makes the filter fail to load: dropped, which means the same;
//! - cgroup paths of the systemd form are taken literally: translated, and the scope made by the shim's helper;
//! - version 1 cgroup mounts come out writable: replaced by a tmpfs with read-only binds;
//! - an oom score the kernel refuses would be fatal: set before, by the helper, and taken out;
//! - `root.path` is relative to the bundle, which the engine is not given: made absolute.

use std::path::Path;

use oarlock_cgroup::{Layout, Unit};
use oci_spec::runtime::{LinuxNamespaceType, Mount, MountBuilder, Spec};

/// Where a container's processes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Relative cgroup path.
    pub(super) cgroup: String,
    /// As the specification had it, where that names a systemd scope.
    pub(super) scope: Option<String>,
}

/// The parts of a specification the shim needs itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) place: Place,
    pub(super) private_pid_namespace: bool,
    pub(super) start_hooks: bool,
    /// What `process.oomScoreAdj` asked for.
    pub(super) oom_score: Option<i32>,
    pub(super) terminal: bool,
}

/// Why a specification cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum AdaptError {
    #[error("the specification has no {0}")]
    Missing(&'static str),
    #[error(transparent)]
    Cgroup(#[from] oarlock_cgroup::CgroupError),
    #[error("mount {destination}: {source}")]
    Mount { destination: String, source: oci_spec::OciSpecError },
}

/// Makes the root absolute and the cgroup path one that every runtime reads alike; returns the latter.
pub(super) fn locate(spec: &mut Spec, bundle: &Path, container_id: &str) -> Result<Place, AdaptError> {
    let mut root = spec.root().clone().ok_or(AdaptError::Missing("root"))?;
    if root.path().is_relative() {
        root.set_path(bundle.join(root.path()));
    }
    spec.set_root(Some(root));
    let mut linux = spec.linux().clone().ok_or(AdaptError::Missing("linux section"))?;
    let wanted = linux.cgroups_path().as_ref().map(|path| path.to_string_lossy().into_owned());
    let wanted = wanted.filter(|path| !path.is_empty()).unwrap_or_else(|| format!("oarlock/{container_id}"));
    let cgroup = oarlock_cgroup::translate(&wanted)?;
    linux.set_cgroups_path(Some(format!("/{cgroup}").into()));
    spec.set_linux(Some(linux));
    let scope = Some(wanted).filter(|_| Unit::at(&cgroup).is_some());
    Ok(Place { cgroup, scope })
}

/// Whether the container has a PID namespace that dies with its first process.
pub(super) fn has_private_pids(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none())
}

/// Rewrites in place.
pub(super) fn adapt(spec: &mut Spec, bundle: &Path, container_id: &str, layout: &Layout) -> Result<Facts, AdaptError> {
    let place = locate(spec, bundle, container_id)?;
    let linux = spec.linux().as_ref().ok_or(AdaptError::Missing("linux section"))?;
    let private_pid_namespace = has_private_pids(spec);
    let has_seccomp = linux.seccomp().is_some();

    let mut process = spec.process().clone().ok_or(AdaptError::Missing("process"))?;
    if has_seccomp && process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    let oom_score = process.oom_score_adj();
    process.set_oom_score_adj(None);
    let terminal = process.terminal().unwrap_or(false);
    spec.set_process(Some(process));

    if !layout.is_v2() {
        replace_cgroup_mounts(spec, layout, &place.cgroup)?;
    }
    let hooks = spec.hooks().as_ref();
    let some =
        |hooks: &Option<Vec<_>>| hooks.as_ref().is_some_and(|hooks: &Vec<oci_spec::runtime::Hook>| !hooks.is_empty());
    let start_hooks = hooks.is_some_and(|hooks| some(hooks.poststart()));
    Ok(Facts { place, private_pid_namespace, start_hooks, oom_score, terminal })
}

fn replace_cgroup_mounts(spec: &mut Spec, layout: &Layout, cgroup: &str) -> Result<(), AdaptError> {
    let Some(mounts) = spec.mounts() else { return Ok(()) };
    let is_cgroup = |mount: &Mount| matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"));
    if !mounts.iter().any(is_cgroup) {
        return Ok(());
    }
    let mut replaced = Vec::with_capacity(mounts.len() + layout.hierarchies().len());
    for mount in mounts.clone() {
        if is_cgroup(&mount) {
            replaced.extend(read_only_cgroups(&mount, layout, cgroup)?);
        } else {
            replaced.push(mount);
        }
    }
    spec.set_mounts(Some(replaced));
    Ok(())
}

fn read_only_cgroups(mount: &Mount, layout: &Layout, cgroup: &str) -> Result<Vec<Mount>, AdaptError> {
    let options = |list: &[&str]| list.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
    let failed = |source| AdaptError::Mount { destination: mount.destination().to_string_lossy().into_owned(), source };
    let tmpfs = MountBuilder::default()
        .destination(mount.destination())
        .typ("tmpfs")
        .source("tmpfs")
        .options(options(&["nosuid", "noexec", "nodev", "mode=755", "size=64k"]))
        .build()
        .map_err(failed)?;
    let mut mounts = vec![tmpfs];
    for hierarchy in layout.hierarchies() {
        let Some(name) = hierarchy.file_name() else { continue };
        let bind = MountBuilder::default()
            .destination(mount.destination().join(name))
            .typ("bind")
            .source(hierarchy.join(cgroup))
            .options(options(&["bind", "ro", "nosuid", "noexec", "nodev"]))
            .build();
        mounts.push(bind.map_err(failed)?);
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        let json = serde_json::json!({
            "ociVersion": "1.0.2", "root": {"path": "rootfs"},
            "process": {"user": {"uid": 5, "gid": 6}, "cwd": "/", "args": ["a"], "noNewPrivileges": false, "oomScoreAdj": -998},
            "mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}],
            "linux": {"cgroupsPath": "pods.slice:cri:c1", "namespaces": [{"type": "pid"}, {"type": "mount"}],
                      "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_specification_comes_out_as_the_engine_needs_it() {
        let Ok(layout) = Layout::host() else { panic!("no cgroups on this host") };
        let mut spec = spec();
        let facts = adapt(&mut spec, Path::new("/b"), "c1", layout).unwrap();
        assert_eq!(facts.place.cgroup, "pods.slice/cri-c1.scope");
        assert_eq!(facts.place.scope.as_deref(), Some("pods.slice:cri:c1"));
        assert!(facts.private_pid_namespace && !facts.start_hooks && !facts.terminal);
        assert_eq!(facts.oom_score, Some(-998));
        assert_eq!(spec.root().as_ref().unwrap().path(), Path::new("/b/rootfs"));
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.no_new_privileges(), process.oom_score_adj()), (None, None));
        let mounts = spec.mounts().as_ref().unwrap();
        if !layout.is_v2() {
            assert!(mounts.iter().all(|mount| mount.typ().as_deref() != Some("cgroup")));
            let binds = mounts.iter().filter(|mount| mount.typ().as_deref() == Some("bind"));
            assert!(binds.clone().count() > 0);
            assert!(binds.into_iter().all(|bind| bind.options().as_ref().unwrap().contains(&"ro".to_owned())));
        }
    }

    #[test]
    fn a_path_that_climbs_out_of_the_cgroup_tree_is_refused() {
        let Ok(layout) = Layout::host() else { panic!("no cgroups on this host") };
        let mut spec = spec();
        let mut linux = spec.linux().clone().unwrap();
        linux.set_cgroups_path(Some("../../escape".into()));
        spec.set_linux(Some(linux));
        assert!(adapt(&mut spec, Path::new("/b"), "c1", layout).is_err());
    }
}
