//! The content of a pod's /etc/hosts, and its host name. Pure.

use k8s_openapi::api::core::v1::Pod;

/// The host name and the DNS domain of the pod; the domain is empty without a subdomain.
pub(crate) fn host_name(pod: &Pod, cluster_domain: &str) -> (String, String) {
    let spec = pod.spec.clone().unwrap_or_default();
    if let Some(forced) = spec.hostname_override.filter(|name| !name.is_empty()) {
        return (forced, String::new());
    }
    let mut name = spec.hostname.filter(|name| !name.is_empty()).unwrap_or_else(|| super::pod_name(pod).to_owned());
    if name.len() > 63 {
        name.truncate(63);
        name.truncate(name.trim_end_matches(['-', '.']).len());
    }
    let domain = match spec.subdomain.filter(|subdomain| !subdomain.is_empty()) {
        Some(subdomain) => format!("{subdomain}.{}.svc.{cluster_domain}", super::pod_namespace(pod)),
        None => String::new(),
    };
    (name, domain)
}

/// The hosts file. `node_hosts` is the node's own file, which pods on the host network see.
pub(crate) fn hosts_file(pod: &Pod, ips: &[String], cluster_domain: &str, node_hosts: &str) -> String {
    let mut text = if super::host_network(pod) {
        let mut text = String::from("# Kubernetes-managed hosts file (host network).\n");
        text.push_str(node_hosts);
        text
    } else {
        let (name, domain) = host_name(pod, cluster_domain);
        let mut text = String::from(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        for ip in ips {
            if domain.is_empty() {
                text.push_str(&format!("{ip}\t{name}\n"));
            } else {
                text.push_str(&format!("{ip}\t{name}.{domain}\t{name}\n"));
            }
        }
        text
    };
    let aliases = pod.spec.as_ref().and_then(|spec| spec.host_aliases.clone()).unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            text.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.unwrap_or_default().join("\t")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subdomain_makes_a_full_name() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "ns"},
            "spec": {"containers": [], "hostname": "h", "subdomain": "s",
                     "hostAliases": [{"ip": "192.0.2.9", "hostnames": ["a", "b"]}]},
        }))
        .expect("a pod");
        let text = hosts_file(&pod, &["10.42.0.3".to_owned()], "cluster.local", "");
        assert!(text.contains("10.42.0.3\th.s.ns.svc.cluster.local\th\n"), "{text}");
        assert!(text.contains("192.0.2.9\ta\tb\n"), "{text}");
    }

    #[test]
    fn a_long_pod_name_is_cut_to_a_valid_host_name() {
        let name = format!("{}-tail", "x".repeat(62));
        let pod: Pod =
            serde_json::from_value(serde_json::json!({"metadata": {"name": name}, "spec": {"containers": []}}))
                .expect("a pod");
        assert_eq!(host_name(&pod, "d").0, "x".repeat(62));
    }
}
