//! Which kernel parameters pods may set: those that are theirs alone, and what the node's owner allows beside them. Pure.
//!
//! A parameter without a namespace would be the node's. One with a namespace can still take memory or time from other pods
//! where it is not among the safe ones, which are upstream's.

use k8s_openapi::api::core::v1::Pod;

use crate::spec;

/// In force only in the pod that sets them.
const SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];
const IPC: [&str; 4] = ["kernel.sem", "kernel.shm", "kernel.msg", "fs.mqueue."];
const NET: [&str; 1] = ["net."];

/// A pattern that cannot be allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is no kernel parameter, or pattern ending in *, of a namespace that pods have")]
pub struct PatternError {
    pattern: String,
}

/// What is allowed beside the safe ones: names, and patterns as `net.core.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedSysctls {
    patterns: Vec<String>,
}

impl AllowedSysctls {
    /// # Errors
    /// A pattern that is none, or would let pods set parameters of the node.
    pub fn new(patterns: &[String]) -> Result<AllowedSysctls, PatternError> {
        let dotted = |pattern: &String| {
            let pattern = with_dots(pattern);
            let name = pattern.strip_suffix('*').unwrap_or(&pattern);
            let is_name = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte));
            // A part of a group's name is in no namespace, so no pattern reaches beyond a group.
            if is_name(name) && namespace(name).is_some() { Ok(pattern) } else { Err(PatternError { pattern }) }
        };
        Ok(AllowedSysctls { patterns: patterns.iter().map(dotted).collect::<Result<_, _>>()? })
    }

    pub(crate) fn patterns(&self) -> &[String] {
        &self.patterns
    }

    fn allows(&self, name: &str) -> bool {
        let fits = |pattern: &String| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => name == pattern,
        };
        SAFE.contains(&name) || self.patterns.iter().any(fits)
    }

    /// Why a pod may not set what it asks for, in upstream's words.
    pub(crate) fn refusal(&self, pod: &Pod) -> Option<String> {
        let pod_spec = pod.spec.as_ref()?;
        let asked = pod_spec.security_context.as_ref()?.sysctls.as_ref()?;
        let (host_net, host_ipc) = (spec::host_network(pod), pod_spec.host_ipc == Some(true));
        asked.iter().map(|sysctl| with_dots(&sysctl.name)).find_map(|name| {
            let of_host = match namespace(&name) {
                Some(Namespace::Net) if host_net => Some("Net"),
                Some(Namespace::Ipc) if host_ipc => Some("IPC"),
                _ => None,
            };
            if !self.allows(&name) {
                return Some(format!("forbidden sysctl: {name:?} not allowlisted"));
            }
            of_host.map(|host| format!("forbidden sysctl: {name:?} not allowed with host {host} enabled"))
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Namespace {
    Ipc,
    Net,
}

/// The namespace that a parameter belongs to; None for the node's.
fn namespace(name: &str) -> Option<Namespace> {
    if IPC.iter().any(|group| name.starts_with(group)) {
        Some(Namespace::Ipc)
    } else if NET.iter().any(|group| name.starts_with(group)) {
        Some(Namespace::Net)
    } else {
        None
    }
}

/// The name with dots for slashes. Where slashes come first, dots belong to names, as of links.
pub(crate) fn with_dots(name: &str) -> String {
    let first = name.find(['.', '/']).map(|at| name.as_bytes()[at]);
    if first != Some(b'/') {
        return name.to_owned();
    }
    name.chars()
        .map(|letter| match letter {
            '/' => '.',
            '.' => '/',
            other => other,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(patterns: &[&str]) -> Result<AllowedSysctls, PatternError> {
        AllowedSysctls::new(&patterns.iter().map(|pattern| (*pattern).to_owned()).collect::<Vec<_>>())
    }

    fn refused(allowed: &AllowedSysctls, name: &str, host: bool) -> Option<String> {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": {
            "hostNetwork": host, "hostIPC": host, "containers": [],
            "securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "0"}, {"name": name, "value": "1"}]}}}))
        .expect("a pod");
        allowed.refusal(&pod)
    }

    #[test]
    fn only_safe_ones_and_allowed_ones_may_be_set() {
        let none = AllowedSysctls::default();
        assert_eq!(refused(&none, "net.ipv4.tcp_rmem", false), None);
        assert_eq!(refused(&none, "net/ipv4/tcp_rmem", false), None);
        let text = |name: &str| Some(format!("forbidden sysctl: {name:?} not allowlisted"));
        assert_eq!(refused(&none, "kernel.msgmax", false), text("kernel.msgmax"));
        assert_eq!(refused(&none, "kernel/msgmax", false), text("kernel.msgmax"));
        assert_eq!(refused(&none, "kernel.panic", false), text("kernel.panic"));
        let some = allowed(&["kernel.msg*", "net.core.somaxconn"]).unwrap();
        assert_eq!(refused(&some, "kernel.msgmax", false), None);
        assert_eq!(refused(&some, "net.core.somaxconn", false), None);
        assert_eq!(refused(&some, "net.core.somaxconn2", false), text("net.core.somaxconn2"));
    }

    #[test]
    fn nobody_sets_the_host_s_own() {
        let some = allowed(&["net.*"]).unwrap();
        let text = refused(&some, "net.core.somaxconn", true).unwrap();
        assert_eq!(text, "forbidden sysctl: \"kernel.shm_rmid_forced\" not allowed with host IPC enabled");
        for node_s in ["kernel.panic", "*", "ke*", "ne*", "vm.swappiness", "net.ipv4.*x", "net;"] {
            assert!(allowed(&[node_s]).is_err(), "{node_s}");
        }
        assert!(allowed(&["net/ipv4/*", "fs.mqueue.*", "kernel.sem"]).is_ok());
    }
}
