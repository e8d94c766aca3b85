//! Which namespaces a sandbox makes and which ones its containers join.

use std::path::PathBuf;

use oarlock_proto::cri::{self, NamespaceMode};
use oci_spec::runtime::{
    LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
};
use serde::{Deserialize, Serialize};

use super::SpecError;

/// A range of identities: from `inside` on in a container, from `outside` on on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Range {
    pub inside: u32,
    pub outside: u32,
    pub length: u32,
}

/// Who is who in a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UserMapping {
    pub uid: Range,
    pub gid: Range,
}

/// The modes of a sandbox, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SandboxModes {
    pub host_network: bool,
    pub host_ipc: bool,
    /// All containers share one PID namespace, with the shim's reaper as its first process.
    pub shared_pid: bool,
    pub host_pid: bool,
    /// The sandbox has a user namespace of its own.
    pub user: Option<UserMapping>,
}

/// Where a container's PID namespace comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PidMode {
    Own,
    Host,
    Shared,
    /// That of another container, by id.
    Target(String),
}

/// The paths of a sandbox's pinned namespaces; None is the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pinned {
    pub user: Option<PathBuf>,
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
}

fn mode(value: i32, field: &str) -> Result<NamespaceMode, SpecError> {
    NamespaceMode::try_from(value).map_err(|_| SpecError::invalid(field, format!("unknown namespace mode {value}")))
}

/// The modes that a sandbox asks for.
pub(crate) fn sandbox_modes(options: Option<&cri::NamespaceOption>) -> Result<SandboxModes, SpecError> {
    let none = cri::NamespaceOption::default();
    let options = options.unwrap_or(&none);
    let field = |name: &str| format!("linux.security_context.namespace_options.{name}");
    let shared_or_host = |value, name: &str| match mode(value, &field(name))? {
        NamespaceMode::Pod => Ok(false),
        NamespaceMode::Node => Ok(true),
        other => Err(SpecError::invalid(field(name), format!("{} is not a mode for it", other.as_str_name()))),
    };
    let user = user_mapping(options)?;
    let pid = mode(options.pid, &field("pid"))?;
    let modes = SandboxModes {
        host_network: shared_or_host(options.network, "network")?,
        host_ipc: shared_or_host(options.ipc, "ipc")?,
        shared_pid: pid == NamespaceMode::Pod,
        host_pid: pid == NamespaceMode::Node,
        user,
    };
    if modes.user.is_some() && (modes.host_network || modes.host_ipc || modes.host_pid) {
        let reason = "a user namespace cannot be had together with the host's network, IPC or PID namespace";
        return Err(SpecError::unsupported(field("userns_options"), reason));
    }
    Ok(modes)
}

/// A container's own word on PIDs; network and IPC are always the sandbox's.
pub(crate) fn container_pid(
    options: Option<&cri::NamespaceOption>,
    sandbox: SandboxModes,
) -> Result<PidMode, SpecError> {
    let Some(options) = options else {
        return Ok(match sandbox {
            SandboxModes { host_pid: true, .. } => PidMode::Host,
            SandboxModes { shared_pid: true, .. } => PidMode::Shared,
            _ => PidMode::Own,
        });
    };
    // Absent, the sandbox's word holds.
    if options.userns_options.is_some() && user_mapping(options)? != sandbox.user {
        let problem = "differs from the sandbox's";
        return Err(SpecError::invalid("linux.security_context.namespace_options.userns_options", problem));
    }
    let field = "linux.security_context.namespace_options.pid";
    match mode(options.pid, field)? {
        NamespaceMode::Container => Ok(PidMode::Own),
        NamespaceMode::Node if sandbox.user.is_some() => {
            Err(SpecError::unsupported(field, "the host's PID namespace cannot be had with a user namespace"))
        }
        NamespaceMode::Node => Ok(PidMode::Host),
        NamespaceMode::Pod if sandbox.shared_pid => Ok(PidMode::Shared),
        NamespaceMode::Pod => Err(SpecError::invalid(field, "the sandbox has no shared PID namespace")),
        NamespaceMode::Target if options.target_id.is_empty() => {
            Err(SpecError::invalid(field, "TARGET needs a target_id"))
        }
        NamespaceMode::Target => Ok(PidMode::Target(options.target_id.clone())),
    }
}

/// The user namespace that is asked for; None is the host's. One range each for users and groups, with root in it.
fn user_mapping(options: &cri::NamespaceOption) -> Result<Option<UserMapping>, SpecError> {
    let field = "linux.security_context.namespace_options.userns_options";
    let Some(user) = &options.userns_options else { return Ok(None) };
    match mode(user.mode, field)? {
        NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => Ok(None),
        NamespaceMode::Node => Err(SpecError::invalid(field, "mappings make no sense in the host's user namespace")),
        NamespaceMode::Pod => {
            let (uid, gid) = (range(&user.uids, "uids")?, range(&user.gids, "gids")?);
            Ok(Some(UserMapping { uid, gid }))
        }
        other => Err(SpecError::unsupported(field, format!("{} is not a mode for it", other.as_str_name()))),
    }
}

fn range(mappings: &[cri::IdMapping], name: &str) -> Result<Range, SpecError> {
    let field = format!("linux.security_context.namespace_options.userns_options.{name}");
    let [only] = mappings else {
        return Err(SpecError::unsupported(field, format!("{} mappings, where one is needed", mappings.len())));
    };
    let range = Range { inside: only.container_id, outside: only.host_id, length: only.length };
    if range.inside != 0 || range.length == 0 {
        return Err(SpecError::invalid(field, "container id 0 is not mapped"));
    }
    match range.outside.checked_add(range.length) {
        Some(_) => Ok(range),
        None => Err(SpecError::invalid(field, "the range leads beyond the largest id")),
    }
}

/// The mapping of a mount, if it has one; both or none of users and groups.
pub(crate) fn mount_mapping(mount: &cri::Mount) -> Result<Option<UserMapping>, SpecError> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(None);
    }
    let one = |mappings: &[cri::IdMapping], name: &str| match mappings {
        [only] if only.length > 0 => {
            Ok(Range { inside: only.container_id, outside: only.host_id, length: only.length })
        }
        _ => {
            let field = format!("mounts[{}].{name}", mount.container_path);
            Err(SpecError::unsupported(field, "exactly one mapping is needed, not empty"))
        }
    };
    let (uid, gid) = (one(&mount.uid_mappings, "uidMappings")?, one(&mount.gid_mappings, "gidMappings")?);
    Ok(Some(UserMapping { uid, gid }))
}

impl Range {
    /// As the OCI specification writes it.
    pub(crate) fn to_oci(self) -> LinuxIdMapping {
        LinuxIdMappingBuilder::default()
            .container_id(self.inside)
            .host_id(self.outside)
            .size(self.length)
            .build()
            .unwrap_or_default()
    }
}

/// The namespaces of a container: its own mount (and, on version 2, cgroup) namespace, the sandbox's others.
pub(crate) fn for_container(
    pinned: &Pinned,
    pid: Option<PathBuf>,
    own_pid: bool,
    own_cgroup: bool,
) -> Vec<LinuxNamespace> {
    let mut namespaces = vec![namespace(LinuxNamespaceType::Mount, None)];
    let joined = [
        // First: the others belong to it.
        (LinuxNamespaceType::User, &pinned.user),
        (LinuxNamespaceType::Network, &pinned.net),
        (LinuxNamespaceType::Ipc, &pinned.ipc),
        (LinuxNamespaceType::Uts, &pinned.uts),
    ];
    for (kind, path) in joined {
        if let Some(path) = path {
            namespaces.push(namespace(kind, Some(path.clone())));
        }
    }
    match pid {
        Some(path) => namespaces.push(namespace(LinuxNamespaceType::Pid, Some(path))),
        None if own_pid => namespaces.push(namespace(LinuxNamespaceType::Pid, None)),
        None => {}
    }
    if own_cgroup {
        namespaces.push(namespace(LinuxNamespaceType::Cgroup, None));
    }
    namespaces
}

fn namespace(kind: LinuxNamespaceType, path: Option<PathBuf>) -> LinuxNamespace {
    let mut builder = LinuxNamespaceBuilder::default().typ(kind);
    if let Some(path) = path {
        builder = builder.path(path);
    }
    builder.build().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> cri::NamespaceOption {
        cri::NamespaceOption {
            network: network as i32,
            pid: pid as i32,
            ipc: ipc as i32,
            ..cri::NamespaceOption::default()
        }
    }

    #[test]
    fn the_usual_pod_shares_network_and_ipc_but_not_pids() {
        let usual = options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
        let modes = sandbox_modes(Some(&usual)).unwrap();
        assert_eq!(
            modes,
            SandboxModes { host_network: false, host_ipc: false, shared_pid: false, host_pid: false, user: None }
        );
        assert_eq!(container_pid(Some(&usual), modes), Ok(PidMode::Own));
    }

    #[test]
    fn a_mode_that_makes_no_sense_is_refused() {
        assert!(
            sandbox_modes(Some(&options(NamespaceMode::Container, NamespaceMode::Pod, NamespaceMode::Pod))).is_err()
        );
        let modes =
            sandbox_modes(Some(&options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod))).unwrap();
        assert!(
            container_pid(Some(&options(NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Pod)), modes).is_err()
        );
        assert!(
            container_pid(Some(&options(NamespaceMode::Pod, NamespaceMode::Target, NamespaceMode::Pod)), modes)
                .is_err()
        );
    }

    fn mapping(inside: u32, outside: u32, length: u32) -> cri::IdMapping {
        cri::IdMapping { container_id: inside, host_id: outside, length }
    }

    fn with_user(mode: NamespaceMode, mappings: &[cri::IdMapping]) -> cri::NamespaceOption {
        let mut with = options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
        let (uids, gids) = (mappings.to_vec(), mappings.to_vec());
        with.userns_options = Some(cri::UserNamespace { mode: mode as i32, uids, gids });
        with
    }

    #[test]
    fn a_user_namespace_maps_one_range_with_root_in_it_and_never_goes_with_the_hosts_namespaces() {
        let good = with_user(NamespaceMode::Pod, &[mapping(0, 100_000, 65536)]);
        let range = Range { inside: 0, outside: 100_000, length: 65536 };
        let modes = sandbox_modes(Some(&good)).unwrap();
        assert_eq!(modes.user, Some(UserMapping { uid: range, gid: range }));
        assert_eq!(container_pid(Some(&good), modes), Ok(PidMode::Own));
        let other = with_user(NamespaceMode::Pod, &[mapping(0, 200_000, 65536)]);
        assert!(container_pid(Some(&other), modes).is_err());
        assert!(container_pid(Some(&with_user(NamespaceMode::Node, &[])), modes).is_err());

        assert_eq!(sandbox_modes(Some(&with_user(NamespaceMode::Node, &[]))).unwrap().user, None);
        for bad in [
            with_user(NamespaceMode::Pod, &[]),
            with_user(NamespaceMode::Pod, &[mapping(0, 1000, 10), mapping(10, 2000, 10)]),
            with_user(NamespaceMode::Pod, &[mapping(1, 1000, 10)]),
            with_user(NamespaceMode::Pod, &[mapping(0, 1000, 0)]),
            with_user(NamespaceMode::Pod, &[mapping(0, u32::MAX, 10)]),
            with_user(NamespaceMode::Node, &[mapping(0, 1000, 10)]),
            with_user(NamespaceMode::Container, &[mapping(0, 1000, 10)]),
            with_user(NamespaceMode::Target, &[mapping(0, 1000, 10)]),
            cri::NamespaceOption { network: NamespaceMode::Node as i32, ..good.clone() },
            cri::NamespaceOption { pid: NamespaceMode::Node as i32, ..good },
        ] {
            assert!(sandbox_modes(Some(&bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn host_namespaces_are_not_listed() {
        let listed = for_container(&Pinned::default(), None, false, false);
        assert_eq!(listed.len(), 1);
        let own = for_container(&Pinned { net: Some("/n".into()), ..Pinned::default() }, None, true, true);
        assert_eq!(own.len(), 4);
    }
}
