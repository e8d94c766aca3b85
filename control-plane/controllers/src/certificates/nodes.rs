//! What nodes get certificates for without anybody looking: who asks for whom, and under which names a node serves. Pure.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use oarlock_pki::Asked;

const NODE: &str = "system:node:";
const PROXY_USER: &str = "system:kube-proxy";

/// A right by which a request is approved, and what its condition says then.
#[derive(Clone, Copy)]
pub(super) struct Way {
    pub subresource: &'static str,
    pub message: &'static str,
}

pub(super) const CLIENT: Way =
    Way { subresource: "nodeclient", message: "Auto approving kubelet client certificate after SubjectAccessReview." };
pub(super) const SELF_CLIENT: Way = Way {
    subresource: "selfnodeclient",
    message: "Auto approving self kubelet client certificate after SubjectAccessReview.",
};
pub(super) const SELF_SERVER: Way = Way {
    subresource: "selfnodeserver",
    message: "Auto approving self kubelet serving certificate after SubjectAccessReview.",
};
pub(super) const PROXY: Way = Way {
    subresource: "nodeproxyclient",
    message: "Auto approving the client certificate of a node's service proxy after SubjectAccessReview.",
};

/// Whether a node asks for the certificate of the service proxy that it runs, and for nothing more.
pub(super) fn is_proxy_of_node(user: &str, asked: &Asked) -> bool {
    let is_node = user.strip_prefix(NODE).is_some_and(|name| !name.is_empty());
    is_node && *asked == Asked { common_name: PROXY_USER.to_owned(), ..Asked::default() }
}

fn addresses(node: &Node) -> impl Iterator<Item = IpAddr> {
    let all = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    all.filter_map(|address| address.address.parse().ok()).map(|address: IpAddr| address.to_canonical())
}

/// Whether a request by somebody who is no node yet is for the name of a node that is there: it would make the holder of a
/// token that node, with all that its pods may read.
pub(super) fn takes_a_nodes_name(user: &str, asked: &Asked, nodes: &[Arc<Node>]) -> bool {
    user != asked.common_name
        && asked.common_name.strip_prefix(NODE).is_some_and(|name| nodes.iter().any(|node| node.name_any() == name))
}

/// Whether a name of a certificate, which may begin with `*.`, stands for `name`.
fn stands_for(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix("*."), name.split_once('.')) {
        (Some(domain), Some((_, rest))) => rest.eq_ignore_ascii_case(domain),
        _ => pattern.eq_ignore_ascii_case(name),
    }
}

/// Why it is not clear that a node serves under the names that it asks for; None where it is: its own name, and addresses
/// that it reports and that are neither the API server's nor those of a node that was there before.
pub(super) fn doubt_about_names(
    user: &str,
    asked: &Asked,
    nodes: &[Arc<Node>],
    server_names: &[String],
) -> Option<String> {
    let Some(name) = user.strip_prefix(NODE).filter(|_| asked.common_name == user) else {
        return Some("not asked for by the node itself".to_owned());
    };
    let Some(node) = nodes.iter().find(|node| node.name_any() == name) else {
        return Some("the node is not registered".to_owned());
    };
    if let Some(other) = asked.dns_names.iter().find(|asked| *asked != name) {
        return Some(format!("{other} is not the node's name"));
    }
    let mut wanted = asked.dns_names.iter().cloned().chain(asked.addresses.iter().map(ToString::to_string));
    if let Some(taken) = wanted.find(|name| server_names.iter().any(|known| stands_for(known, name))) {
        return Some(format!("{taken} is the API server's"));
    }
    let others = || nodes.iter().filter(|other| other.name_any() != name).flat_map(|other| addresses(other));
    asked.addresses.iter().find_map(|address| {
        // Other programs take an IPv4 address and the same one in IPv6's clothes for equal.
        if address.to_canonical() != *address {
            return Some(format!("{address} is an IPv4 address in disguise"));
        }
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Some(format!("{address} is no address of a node"));
        }
        if !addresses(node).any(|own| own == *address) {
            return Some(format!("the node does not report {address}"));
        }
        others().any(|other| other == *address).then(|| format!("another node reports {address}"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, address: &str) -> Arc<Node> {
        let addresses = json!([{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}]);
        let object = json!({"metadata": {"name": name}, "status": {"addresses": addresses}});
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn asked(name: &str, addresses: &[&str]) -> Asked {
        Asked {
            common_name: format!("system:node:{name}"),
            organizations: vec!["system:nodes".into()],
            dns_names: vec![name.into()],
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            other_names: 0,
        }
    }

    #[test]
    fn a_node_serves_under_its_own_names_only() {
        let nodes = [node("a", "192.0.2.1"), node("b", "192.0.2.2"), node("kubernetes", "192.0.2.3")];
        let server = ["kubernetes".to_owned(), "192.0.2.9".to_owned()];
        let doubt = |user: &str, asked: &Asked| doubt_about_names(user, asked, &nodes, &server);
        assert_eq!(doubt("system:node:a", &asked("a", &["192.0.2.1"])), None);
        let doubtful = [
            ("system:node:b", asked("a", &["192.0.2.1"]), "by the node itself"),
            ("system:node:c", asked("c", &["192.0.2.4"]), "not registered"),
            ("system:node:a", asked("a", &["192.0.2.4"]), "does not report 192.0.2.4"),
            ("system:node:a", asked("a", &["127.0.0.1"]), "no address of a node"),
            ("system:node:a", asked("a", &["::ffff:192.0.2.1"]), "in disguise"),
            ("system:node:a", asked("a", &["::ffff:127.0.0.1"]), "in disguise"),
            ("system:node:kubernetes", asked("kubernetes", &["192.0.2.3"]), "kubernetes is the API server's"),
            ("system:node:a", Asked { dns_names: vec!["b".into()], ..asked("a", &[]) }, "b is not the node's name"),
        ];
        for (user, asked, why) in doubtful {
            let said = doubt(user, &asked).unwrap_or_default();
            assert!(said.contains(why), "{why}: {said}");
        }
        let twins = [node("a", "192.0.2.1"), node("b", "192.0.2.1")];
        let said = doubt_about_names("system:node:b", &asked("b", &["192.0.2.1"]), &twins, &server);
        assert_eq!(said.as_deref(), Some("another node reports 192.0.2.1"));
        let lair = [node("a", "192.0.2.9")];
        let said = doubt_about_names("system:node:a", &asked("a", &["192.0.2.9"]), &lair, &server);
        assert_eq!(said.as_deref(), Some("192.0.2.9 is the API server's"));
    }

    #[test]
    fn a_wildcard_of_the_api_server_covers_what_it_stands_for() {
        let nodes = [node("api.example.com", "192.0.2.1")];
        let server = ["*.Example.com".to_owned()];
        let asked = asked("api.example.com", &["192.0.2.1"]);
        let said = doubt_about_names("system:node:api.example.com", &asked, &nodes, &server);
        assert_eq!(said.as_deref(), Some("api.example.com is the API server's"));
        assert!(!stands_for("*.example.com", "a.b.example.com") && !stands_for("*.example.com", "example.com"));
    }

    #[test]
    fn a_token_does_not_make_its_holder_a_node_that_is_there() {
        let nodes = [node("a", "192.0.2.1")];
        assert!(takes_a_nodes_name("system:bootstrap:abcdef", &asked("a", &[]), &nodes));
        assert!(!takes_a_nodes_name("system:bootstrap:abcdef", &asked("b", &[]), &nodes));
        assert!(!takes_a_nodes_name("system:node:a", &asked("a", &[]), &nodes));
    }

    #[test]
    fn a_proxy_is_asked_for_by_nodes_and_is_a_proxy_and_no_more() {
        let proxy = Asked { common_name: PROXY_USER.into(), ..Asked::default() };
        assert!(is_proxy_of_node("system:node:a", &proxy));
        assert!(!is_proxy_of_node("system:bootstrap:abcdef", &proxy));
        assert!(!is_proxy_of_node("alice", &proxy));
        let masters = Asked { organizations: vec!["system:masters".into()], ..proxy.clone() };
        assert!(!is_proxy_of_node("system:node:a", &masters));
        assert!(!is_proxy_of_node("system:node:a", &Asked { common_name: "admin".into(), ..proxy }));
    }
}
