//! Which namespaces a sandbox makes and which ones its containers join.

use std::path::PathBuf;

use oarlock_proto::cri::{self, NamespaceMode};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};

use super::SpecError;

/// The modes of a sandbox, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SandboxModes {
    pub host_network: bool,
    pub host_ipc: bool,
    /// All containers share one PID namespace, with the shim's reaper as its first process.
    pub shared_pid: bool,
    pub host_pid: bool,
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
    refuse_user_namespace(options)?;
    let pid = mode(options.pid, &field("pid"))?;
    Ok(SandboxModes {
        host_network: shared_or_host(options.network, "network")?,
        host_ipc: shared_or_host(options.ipc, "ipc")?,
        shared_pid: pid == NamespaceMode::Pod,
        host_pid: pid == NamespaceMode::Node,
    })
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
    refuse_user_namespace(options)?;
    let field = "linux.security_context.namespace_options.pid";
    match mode(options.pid, field)? {
        NamespaceMode::Container => Ok(PidMode::Own),
        NamespaceMode::Node => Ok(PidMode::Host),
        NamespaceMode::Pod if sandbox.shared_pid => Ok(PidMode::Shared),
        NamespaceMode::Pod => Err(SpecError::invalid(field, "the sandbox has no shared PID namespace")),
        NamespaceMode::Target if options.target_id.is_empty() => {
            Err(SpecError::invalid(field, "TARGET needs a target_id"))
        }
        NamespaceMode::Target => Ok(PidMode::Target(options.target_id.clone())),
    }
}

fn refuse_user_namespace(options: &cri::NamespaceOption) -> Result<(), SpecError> {
    let field = "linux.security_context.namespace_options.userns_options";
    match options.userns_options.as_ref().map(|user| mode(user.mode, field)).transpose()? {
        None | Some(NamespaceMode::Node) => Ok(()),
        Some(_) => Err(SpecError::unsupported(field, "this runtime has no user namespaces")),
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
        assert_eq!(modes, SandboxModes { host_network: false, host_ipc: false, shared_pid: false, host_pid: false });
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

    #[test]
    fn a_user_namespace_is_refused_and_the_hosts_is_not() {
        let mut with = options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
        with.userns_options =
            Some(cri::UserNamespace { mode: NamespaceMode::Node as i32, ..cri::UserNamespace::default() });
        assert!(sandbox_modes(Some(&with)).is_ok());
        with.userns_options =
            Some(cri::UserNamespace { mode: NamespaceMode::Pod as i32, ..cri::UserNamespace::default() });
        assert!(matches!(sandbox_modes(Some(&with)), Err(SpecError::Unsupported { .. })));
    }

    #[test]
    fn host_namespaces_are_not_listed() {
        let listed = for_container(&Pinned::default(), None, false, false);
        assert_eq!(listed.len(), 1);
        let own = for_container(&Pinned { net: Some("/n".into()), ..Pinned::default() }, None, true, true);
        assert_eq!(own.len(), 4);
    }
}
