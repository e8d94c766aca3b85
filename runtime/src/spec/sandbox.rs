//! Decides on a sandbox: whether its configuration can be carried out, its namespaces, sysctls, name resolution file,
//! control group and what CNI is told.

use oarlock_cgroup::{expand_slice, slice_name};
use oarlock_proto::cri;

use super::namespace::{self, SandboxModes};
use super::{HostFacts, SpecError, container, resources};

/// Longest hostname the kernel takes.
const HOSTNAME_MAX: usize = 64;

/// A sandbox configuration that can be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    pub modes: SandboxModes,
    /// The name containers see; the host's for a sandbox in the host's network.
    pub hostname: String,
    pub sysctls: Vec<(String, String)>,
    /// None: containers get a copy of the host's file.
    pub resolv_conf: Option<String>,
    /// The group containers are put under, without a leading slash.
    pub cgroup_parent: String,
    /// The parent was not named and is ours to remove.
    pub owns_cgroup_parent: bool,
    pub port_mappings: Vec<PortMapping>,
}

/// One published port, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortMapping {
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: &'static str,
    pub host_ip: Option<std::net::IpAddr>,
}

/// Decides for the sandbox that is to be called `id`; `cgroup_root` holds the groups of sandboxes that name no parent.
pub(crate) fn decide(
    config: &cri::PodSandboxConfig,
    id: &str,
    cgroup_root: &str,
    host: &HostFacts,
) -> Result<Decision, SpecError> {
    let metadata = config.metadata.as_ref().ok_or_else(|| SpecError::invalid("config.metadata", "is required"))?;
    for (field, value) in [("name", &metadata.name), ("namespace", &metadata.namespace), ("uid", &metadata.uid)] {
        // They become CNI arguments, which are separated by semicolons.
        if value.is_empty() || value.contains([';', '=', '\0', '\n']) {
            return Err(SpecError::invalid(
                format!("config.metadata.{field}"),
                format!("{value:?} is not a usable name"),
            ));
        }
    }
    if config.windows.is_some() {
        return Err(SpecError::unsupported("config.windows", "this is Linux"));
    }
    let none = cri::LinuxPodSandboxConfig::default();
    let linux = config.linux.as_ref().unwrap_or(&none);
    let context = linux.security_context.clone().unwrap_or_default();
    check_security(&context, host)?;
    let modes = namespace::sandbox_modes(context.namespace_options.as_ref())?;
    if let (Some(_), Some(reason)) = (modes.user, &host.no_user_namespaces) {
        let field = "config.linux.security_context.namespace_options.userns_options";
        return Err(SpecError::unsupported(field, reason));
    }
    for (name, part) in [("overhead", &linux.overhead), ("resources", &linux.resources)] {
        if let Some(part) = part {
            resources::check(part, host).map_err(|error| in_field(error, name))?;
        }
    }
    let hostname = hostname(config, modes, host)?;
    let (cgroup_parent, owns_cgroup_parent) =
        cgroup_parent(&linux.cgroup_parent, id, cgroup_root, host.systemd_cgroups)?;
    Ok(Decision {
        modes,
        hostname,
        sysctls: sysctls(linux, modes)?,
        resolv_conf: config.dns_config.as_ref().and_then(resolv_conf),
        cgroup_parent,
        owns_cgroup_parent,
        port_mappings: port_mappings(config, modes)?,
    })
}

#[allow(deprecated, reason = "older clients set seccomp_profile_path; a sandbox without processes has no use for it")]
fn check_security(context: &cri::LinuxSandboxSecurityContext, host: &HostFacts) -> Result<(), SpecError> {
    let field = "config.linux.security_context.selinux_options";
    container::check_selinux(field, context.selinux_options.as_ref(), host)
}

fn in_field(error: SpecError, name: &str) -> SpecError {
    let prefix = |field: String| field.replace("linux.resources", &format!("config.linux.{name}"));
    match error {
        SpecError::Invalid { field, problem } => SpecError::Invalid { field: prefix(field), problem },
        SpecError::Unsupported { field, reason } => SpecError::Unsupported { field: prefix(field), reason },
    }
}

fn hostname(config: &cri::PodSandboxConfig, modes: SandboxModes, host: &HostFacts) -> Result<String, SpecError> {
    let name = if config.hostname.is_empty() && modes.host_network { &host.hostname } else { &config.hostname };
    if name.len() > HOSTNAME_MAX || name.contains(['\0', '/', '\n']) {
        return Err(SpecError::invalid("config.hostname", format!("{name:?} is not a hostname the kernel takes")));
    }
    Ok(name.clone())
}

/// Without a parent the group is our own. A parent is a slice where systemd makes groups, and a path elsewhere.
fn cgroup_parent(parent: &str, id: &str, cgroup_root: &str, by_systemd: bool) -> Result<(String, bool), SpecError> {
    let field = "config.linux.cgroup_parent";
    let invalid = |problem: &str| Err(SpecError::invalid(field, format!("{parent:?} {problem}")));
    let parts: Vec<&str> = parent.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") || parent.contains(['\0', '\n']) {
        return invalid("is not a plain path");
    }
    let root: Vec<&str> = cgroup_root.trim_matches('/').split('/').collect();
    match (parts.last(), by_systemd) {
        (None, false) => Ok((format!("{}/{id}", root.join("/")), true)),
        (None, true) => {
            let ours = slice_name(&[root.as_slice(), &[id]].concat());
            let path =
                expand_slice(&ours).ok_or_else(|| SpecError::invalid(field, format!("{ours:?} is not a slice")))?;
            Ok((path, true))
        }
        (Some(last), false) if last.ends_with(".slice") => {
            invalid("is a systemd slice, and the cgroup driver is cgroupfs")
        }
        (Some(_), false) => Ok((parts.join("/"), false)),
        // The name alone says where a slice is; a path has to say the same.
        (Some(last), true) => match expand_slice(last).filter(|path| !path.is_empty()) {
            None => invalid("is not a systemd slice, and the cgroup driver is systemd"),
            Some(path) if parts.len() > 1 && parts.join("/") != path => {
                invalid(&format!("is not where systemd has the slice, which is {path:?}"))
            }
            Some(path) => Ok((path, false)),
        },
    }
}

/// What a pod may change besides what it asked for: unprivileged ports and pings need no capability inside a network
/// namespace of one's own.
fn sysctls(linux: &cri::LinuxPodSandboxConfig, modes: SandboxModes) -> Result<Vec<(String, String)>, SpecError> {
    let mut wanted: Vec<(String, String)> = Vec::new();
    if !modes.host_network {
        wanted.push(("net.ipv4.ip_unprivileged_port_start".into(), "0".into()));
        // Only groups that exist in the user namespace can be named.
        let last = modes.user.map_or(2_147_483_647, |user| (user.gid.length - 1).min(2_147_483_647));
        wanted.push(("net.ipv4.ping_group_range".into(), format!("0 {last}")));
    }
    let mut named: Vec<_> = linux.sysctls.iter().map(|(name, value)| (name.replace('/', "."), value.clone())).collect();
    named.sort();
    for (name, value) in named {
        let field = format!("config.linux.sysctls[{name}]");
        let ipc = ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|prefix| name.starts_with(prefix))
            || name == "kernel.sem";
        let shared = match (name.starts_with("net."), ipc) {
            (true, _) => modes.host_network,
            (_, true) => modes.host_ipc,
            _ => return Err(SpecError::invalid(field, "is not in a separate kernel namespace")),
        };
        if shared {
            return Err(SpecError::invalid(field, "belongs to a namespace that the sandbox shares with the host"));
        }
        wanted.retain(|(known, _)| *known != name);
        wanted.push((name, value));
    }
    Ok(wanted)
}

/// The contents of resolv.conf; None for a configuration that says nothing.
pub(crate) fn resolv_conf(dns: &cri::DnsConfig) -> Option<String> {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    (!text.is_empty()).then_some(text)
}

fn port_mappings(config: &cri::PodSandboxConfig, modes: SandboxModes) -> Result<Vec<PortMapping>, SpecError> {
    let mut mappings = Vec::new();
    // A host port of 0 publishes nothing; in the host's network every port is published already.
    for mapping in config.port_mappings.iter().filter(|mapping| mapping.host_port != 0 && !modes.host_network) {
        let field = format!("config.port_mappings[{}]", mapping.host_port);
        let port = |port: i32| {
            let port = u16::try_from(port).ok().filter(|port| *port != 0);
            port.ok_or_else(|| SpecError::invalid(&field, "ports lie between 1 and 65535"))
        };
        let protocol = match cri::Protocol::try_from(mapping.protocol) {
            Ok(cri::Protocol::Tcp) => "tcp",
            Ok(cri::Protocol::Udp) => "udp",
            Ok(cri::Protocol::Sctp) => "sctp",
            Err(_) => return Err(SpecError::invalid(&field, format!("unknown protocol {}", mapping.protocol))),
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| SpecError::invalid(&field, format!("{text:?} is not an address")))?),
        };
        mappings.push(PortMapping {
            host_port: port(mapping.host_port)?,
            container_port: port(mapping.container_port)?,
            protocol,
            host_ip,
        });
    }
    Ok(mappings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "p".into(),
                uid: "u".into(),
                namespace: "n".into(),
                attempt: 0,
            }),
            hostname: "p".into(),
            ..cri::PodSandboxConfig::default()
        }
    }

    fn decided(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Result<Decision, SpecError> {
        let mut config = config();
        change(&mut config);
        decide(&config, "id1", "oarlock", &HostFacts { hostname: "node".into(), ..HostFacts::default() })
    }

    fn linux(change: impl FnOnce(&mut cri::LinuxPodSandboxConfig)) -> Option<cri::LinuxPodSandboxConfig> {
        let mut linux = cri::LinuxPodSandboxConfig::default();
        change(&mut linux);
        Some(linux)
    }

    fn host_network() -> Option<cri::LinuxSandboxSecurityContext> {
        let options =
            cri::NamespaceOption { network: cri::NamespaceMode::Node as i32, ..cri::NamespaceOption::default() };
        Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..cri::LinuxSandboxSecurityContext::default()
        })
    }

    #[test]
    fn a_sandbox_without_a_parent_group_owns_one_of_ours() {
        let decision = decided(|_| {}).unwrap();
        assert_eq!((decision.cgroup_parent.as_str(), decision.owns_cgroup_parent), ("oarlock/id1", true));
        let named = decided(|c| c.linux = linux(|l| l.cgroup_parent = "/kubepods/pod1".into())).unwrap();
        assert_eq!((named.cgroup_parent.as_str(), named.owns_cgroup_parent), ("kubepods/pod1", false));
        assert!(decided(|c| c.linux = linux(|l| l.cgroup_parent = "/../x".into())).is_err());
    }

    #[test]
    fn a_parent_has_the_form_of_the_cgroup_driver() {
        let parent = |parent: &str, by_systemd| cgroup_parent(parent, "id1", "oarlock", by_systemd);
        let refused = |text: &str, by_systemd| parent(text, by_systemd).unwrap_err().to_string();
        let of_pod = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice";
        assert_eq!(parent(&format!("/{of_pod}"), true).unwrap(), (of_pod.to_owned(), false));
        assert_eq!(parent("kubepods-burstable-podu_1.slice", true).unwrap(), (of_pod.to_owned(), false));
        assert_eq!(parent("", true).unwrap(), ("oarlock.slice/oarlock-id1.slice".to_owned(), true));
        for path in ["/kubepods/pod1", "kubepods", "/a.slice/b", "-.slice", "a--b.slice"] {
            let problem = "is not a systemd slice, and the cgroup driver is systemd";
            assert_eq!(refused(path, true), format!("config.linux.cgroup_parent: {path:?} {problem}"));
        }
        assert!(refused("/x.slice/a-b.slice", true).ends_with("which is \"a.slice/a-b.slice\""));
        for slice in ["a-b.slice", &format!("/{of_pod}")] {
            let problem = "is a systemd slice, and the cgroup driver is cgroupfs";
            assert_eq!(refused(slice, false), format!("config.linux.cgroup_parent: {slice:?} {problem}"));
        }
    }

    #[test]
    fn sysctls_of_shared_namespaces_are_refused_and_named_ones_win() {
        let sysctl = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
        let own =
            decided(|c| c.linux = linux(|l| l.sysctls = sysctl("net.ipv4.ip_unprivileged_port_start", "80"))).unwrap();
        assert!(own.sysctls.contains(&("net.ipv4.ip_unprivileged_port_start".into(), "80".into())));
        assert_eq!(own.sysctls.len(), 2);
        assert!(decided(|c| c.linux = linux(|l| l.sysctls = sysctl("vm.swappiness", "1"))).is_err());
        let on_host = |l: &mut cri::LinuxPodSandboxConfig| {
            l.security_context = host_network();
            l.sysctls = sysctl("net.ipv4.ip_forward", "1");
        };
        assert!(decided(|c| c.linux = linux(on_host)).is_err());
    }

    #[test]
    fn a_pod_in_the_hosts_network_has_the_hosts_name_and_no_mappings() {
        let decision = decided(|c| {
            c.hostname.clear();
            c.linux = linux(|l| l.security_context = host_network());
            c.port_mappings =
                vec![cri::PortMapping { host_port: 80, container_port: 80, ..cri::PortMapping::default() }];
        })
        .unwrap();
        assert_eq!(decision.hostname, "node");
        assert!(decision.port_mappings.is_empty() && decision.sysctls.is_empty());
    }

    #[test]
    fn resolv_conf_has_the_three_kinds_of_lines() {
        let dns = cri::DnsConfig {
            servers: vec!["10.43.0.10".into()],
            searches: vec!["a.b".into(), "b".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(resolv_conf(&dns).unwrap(), "search a.b b\nnameserver 10.43.0.10\noptions ndots:5\n");
        assert_eq!(resolv_conf(&cri::DnsConfig::default()), None);
    }

    #[test]
    fn names_that_would_end_a_cni_argument_and_bad_ports_are_refused() {
        assert!(decided(|c| c.metadata.as_mut().unwrap().name = "a;b=c".into()).is_err());
        assert!(decided(|c| c.metadata = None).is_err());
        let bad = cri::PortMapping { host_port: 70000, container_port: 80, ..cri::PortMapping::default() };
        assert!(decided(|c| c.port_mappings = vec![bad]).is_err());
    }
}
