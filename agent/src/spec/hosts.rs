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

/// The kernel takes no longer host name.
const MAX_HOST_NAME: usize = 64;

/// The host name that the pod's processes see, which on the host network is the node's own: nothing. Err is what the event
/// says.
pub(crate) fn seen_host_name(pod: &Pod, cluster_domain: &str) -> Result<String, String> {
    if super::host_network(pod) {
        return Ok(String::new());
    }
    let (name, domain) = host_name(pod, cluster_domain);
    let full = pod.spec.as_ref().and_then(|spec| spec.set_hostname_as_fqdn).unwrap_or(false);
    if !full || domain.is_empty() {
        return Ok(name);
    }
    let name = format!("{name}.{domain}");
    if name.len() > MAX_HOST_NAME {
        return Err(format!(
            "failed to construct FQDN from pod hostname and cluster domain, FQDN {name} is too long ({MAX_HOST_NAME} \
             characters is the max, {} characters requested)",
            name.len()
        ));
    }
    Ok(name)
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
    fn a_full_name_is_seen_where_it_is_wanted_and_fits() {
        let seen = |spec: serde_json::Value| {
            let mut spec = spec;
            spec["containers"] = serde_json::json!([]);
            let pod = serde_json::json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": spec});
            seen_host_name(&serde_json::from_value(pod).expect("a pod"), "cluster.local")
        };
        let full = |subdomain: &str| serde_json::json!({"setHostnameAsFQDN": true, "subdomain": subdomain});
        assert_eq!(seen(full("s")), Ok("p.s.ns.svc.cluster.local".to_owned()));
        assert_eq!(seen(serde_json::json!({"subdomain": "s"})), Ok("p".to_owned()));
        assert_eq!(seen(serde_json::json!({"setHostnameAsFQDN": true})), Ok("p".to_owned()), "it has no domain");
        let most = "s".repeat(64 - "p..ns.svc.cluster.local".len());
        assert_eq!(seen(full(&most)).map(|name| name.len()), Ok(64));
        let refusal = seen(full(&format!("{most}s"))).expect_err("too long");
        assert!(refusal.ends_with("is too long (64 characters is the max, 65 characters requested)"), "{refusal}");
        let mut on_host = full(&format!("{most}s"));
        on_host["hostNetwork"] = serde_json::json!(true);
        assert_eq!(seen(on_host), Ok(String::new()));
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
