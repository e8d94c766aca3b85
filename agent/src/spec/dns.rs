//! A pod's resolver configuration by its DNS policy. Pure: the node's own configuration comes in parsed.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use oarlock_proto::cri;

/// The resolver may have at most this many name servers, and this many search paths in that many characters, each no longer
/// than a name may be.
const MAX_SERVERS: usize = 3;
const MAX_NAME_CHARS: usize = 253;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;

/// What the cluster gives pods.
pub(crate) struct ClusterDns<'a> {
    pub servers: &'a [IpAddr],
    pub domain: &'a str,
}

/// Reads a resolv.conf.
pub(crate) fn parse_resolv_conf(text: &str) -> cri::DnsConfig {
    let mut config = cri::DnsConfig::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                let names = words.filter(|word| *word != ".");
                config.searches = names.map(|name| name.strip_suffix('.').unwrap_or(name).to_owned()).collect();
            }
            Some("options") => config.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    config
}

/// A pod's resolver configuration.
pub(crate) struct Formed {
    pub config: cri::DnsConfig,
    /// What had to be left out of it, in words for an event.
    pub omitted: Vec<String>,
}

/// The resolver configuration for a pod.
pub(crate) fn dns_config(pod: &Pod, node: &cri::DnsConfig, cluster: &ClusterDns<'_>) -> Formed {
    let spec = pod.spec.clone().unwrap_or_default();
    let host_network = spec.host_network.unwrap_or(false);
    let mut config = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "None" => cri::DnsConfig::default(),
        "Default" => node.clone(),
        "ClusterFirst" if host_network => node.clone(),
        _ if cluster.servers.is_empty() => node.clone(),
        _ => cluster_config(super::pod_namespace(pod), node, cluster),
    };
    if let Some(own) = spec.dns_config {
        append_new(&mut config.servers, own.nameservers.unwrap_or_default());
        append_new(&mut config.searches, own.searches.unwrap_or_default());
        for option in own.options.unwrap_or_default() {
            let Some(name) = option.name else { continue };
            config.options.retain(|known| known.split(':').next() != Some(name.as_str()));
            config.options.push(option.value.map_or(name.clone(), |value| format!("{name}:{value}")));
        }
    }
    within_limits(config)
}

fn within_limits(mut config: cri::DnsConfig) -> Formed {
    let mut omitted = Vec::new();
    if config.servers.len() > MAX_SERVERS {
        config.servers.truncate(MAX_SERVERS);
        omitted.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
            config.servers.join(" ")
        ));
    }
    let wanted = config.searches.len();
    config.searches.truncate(MAX_SEARCHES);
    config.searches.retain(|search| search.len() <= MAX_NAME_CHARS);
    while config.searches.iter().map(|search| search.len() + 1).sum::<usize>() > MAX_SEARCH_CHARS + 1 {
        config.searches.pop();
    }
    if config.searches.len() < wanted {
        omitted.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
            config.searches.join(" ")
        ));
    }
    Formed { config, omitted }
}

fn cluster_config(namespace: &str, node: &cri::DnsConfig, cluster: &ClusterDns<'_>) -> cri::DnsConfig {
    let domain = cluster.domain;
    let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
    append_new(&mut searches, node.searches.clone());
    cri::DnsConfig {
        servers: cluster.servers.iter().map(ToString::to_string).collect(),
        searches,
        options: vec!["ndots:5".to_owned()],
    }
}

fn append_new(list: &mut Vec<String>, more: Vec<String>) {
    for item in more {
        if !list.contains(&item) {
            list.push(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(spec: serde_json::Value) -> cri::DnsConfig {
        let mut spec = spec;
        spec["containers"] = serde_json::json!([]);
        let pod: Pod =
            serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": spec}))
                .expect("a pod");
        let node = parse_resolv_conf("# x\nnameserver 192.0.2.1\nsearch example.org .\noptions timeout:1\n");
        let servers = ["10.43.0.10".parse().unwrap()];
        let formed = dns_config(&pod, &node, &ClusterDns { servers: &servers, domain: "cluster.local" });
        assert_eq!(formed.omitted, [""; 0]);
        formed.config
    }

    #[test]
    fn what_the_resolver_cannot_take_is_left_out_and_told() {
        let config = |servers: usize, searches: Vec<String>| cri::DnsConfig {
            servers: (1..=servers).map(|last| format!("192.0.2.{last}")).collect(),
            searches,
            options: Vec::new(),
        };
        let numbered = |count: usize, length: usize| (0..count).map(|at| format!("{at:0length$}")).collect::<Vec<_>>();
        let fits = within_limits(config(3, numbered(32, 63)));
        assert_eq!((fits.config.servers.len(), fits.config.searches.len(), fits.omitted.len()), (3, 32, 0));

        let many = within_limits(config(4, Vec::new()));
        assert_eq!(
            many.omitted,
            ["Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: \
              192.0.2.1 192.0.2.2 192.0.2.3"]
        );
        // Too many of them, too long together, and one too long by itself.
        assert_eq!(within_limits(config(1, numbered(33, 2))).config.searches, numbered(32, 2));
        assert_eq!(within_limits(config(1, numbered(9, 250))).config.searches, numbered(8, 250));
        let long = within_limits(config(1, vec!["a".repeat(254), "b.c".to_owned()]));
        assert_eq!(
            long.omitted,
            ["Search Line limits were exceeded, some search paths have been omitted, the applied search line is: b.c"]
        );
    }

    #[test]
    fn a_final_dot_makes_no_other_name() {
        assert_eq!(parse_resolv_conf("search example.org. . a.b\n").searches, ["example.org", "a.b"]);
    }

    #[test]
    fn cluster_first_searches_the_cluster_then_the_node() {
        let config = config(serde_json::json!({}));
        assert_eq!(config.servers, ["10.43.0.10"]);
        assert_eq!(config.searches, ["ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.org"]);
        assert_eq!(config.options, ["ndots:5"]);
    }

    #[test]
    fn host_network_inherits_unless_told_otherwise() {
        assert_eq!(config(serde_json::json!({"hostNetwork": true})).servers, ["192.0.2.1"]);
        let with_host_net = serde_json::json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"});
        assert_eq!(config(with_host_net).servers, ["10.43.0.10"]);
    }

    #[test]
    fn none_takes_only_the_pods_own() {
        let config = config(serde_json::json!({"dnsPolicy": "None", "dnsConfig": {
            "nameservers": ["192.0.2.7"], "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}}));
        assert_eq!(config.servers, ["192.0.2.7"]);
        assert_eq!(config.options, ["ndots:2", "edns0"]);
    }
}
