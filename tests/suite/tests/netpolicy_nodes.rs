//! NetworkPolicies between pods of several nodes, with real packets: on one segment, and through VXLAN.

#[macro_use]
mod netproxy_nodes;
mod netproxy_world;

use netproxy_nodes::{NODES, cluster, pod, seen};
use netproxy_world::{Family, TIMEOUT};
use oarlock_netproxy::Tunnel;
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::{Value, json};

with_each_families! { peers_on_other_nodes_are_known_by_their_labels }

/// Pod `a` is on the segment of `c`; `b` is on another and sends through VXLAN.
fn peers_on_other_nodes_are_known_by_their_labels(families: &'static [Family]) {
    let (_router, api, _machines) = cluster(Tunnel::Vxlan, families);
    api.create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}));
    for (node, _) in NODES {
        let ips: Vec<Value> = families.iter().map(|family| json!({"ip": pod(*family, node, 2).to_string()})).collect();
        api.create(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("pod-{node}"), "namespace": "default", "labels": {"on": node}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
            "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips},
        }));
    }
    let policy = |name: &str, spec: Value| {
        let metadata = json!({"name": name, "namespace": "default"});
        api.create(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec,
        }));
    };
    let on = |node: &str| json!({"podSelector": {"matchLabels": {"on": node}}});
    let until = |from: &str, to: &str, wanted: bool| {
        for family in families {
            wait_for(&format!("{from} to {to} by {family:?}: {wanted}"), TIMEOUT, || {
                let found = seen(from, *family, to);
                assert!(found.is_none_or(|client| client == pod(*family, from, 2)), "{found:?}");
                (found.is_some() == wanted).then_some(())
            });
        }
    };
    for (from, to) in [("b", "a"), ("c", "a"), ("b", "c"), ("a", "b")] {
        until(from, to, true);
    }
    policy("from-b", json!({"podSelector": {"matchLabels": {"on": "a"}}, "ingress": [{"from": [on("b")]}]}));
    until("c", "a", false);
    until("b", "a", true);
    until("a", "b", true);
    api.edit("pods", "default", "pod-b", |pod| pod["metadata"]["labels"]["on"] = json!("elsewhere"));
    until("b", "a", false);
    api.edit("pods", "default", "pod-b", |pod| pod["metadata"]["labels"]["on"] = json!("b"));
    until("b", "a", true);
    // What a pod sends is for its own node to refuse.
    policy(
        "to-a",
        json!({"podSelector": {"matchLabels": {"on": "b"}}, "policyTypes": ["Egress"], "egress": [{"to": [on("a")]}]}),
    );
    until("b", "c", false);
    until("b", "a", true);
    until("c", "b", true);
}
