//! NetworkPolicies with real packets: pods on one bridge, a neighbour outside, the real proxy and a fake API.

#[macro_use]
mod netproxy_world;

use std::io::ErrorKind;
use std::net::IpAddr;
use std::process::Command;

use netproxy_world::{Family, TIMEOUT, World, ask, port};
use oarlock_testkit::wait_for;
use serde_json::{Value, json};

in_each_mode! {
    a_policy_shuts_and_opens_pods_of_one_bridge
    labels_decide_as_they_change
    egress_to_a_service_goes_by_its_endpoints
    a_pod_that_is_not_known_yet_is_cut_off
    policies_come_back_after_an_outside_flush_and_go_with_the_last_one
}

const PODS: [(&str, u16); 3] = [("a", 11), ("b", 12), ("client", 13)];

/// Makes the namespace and its pods in the API, unless an earlier round has.
fn populate(world: &World) {
    if world.api.get("namespaces", "", "default").is_some() {
        return;
    }
    world.api.create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}));
    for (name, last) in PODS {
        let ips: Vec<Value> = world.families.iter().map(|family| json!({"ip": family.pod(last).to_string()})).collect();
        world.api.create(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
            "spec": {"nodeName": "node-1", "containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips},
        }));
    }
}

fn policy(world: &World, name: &str, spec: Value) {
    if world.api.get("networkpolicies", "default", name).is_some() {
        world.api.edit("networkpolicies", "default", name, |object| object["spec"] = spec);
    } else {
        world.api.create(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "default"}, "spec": spec,
        }));
    }
}

fn no_policy(world: &World, name: &str) {
    world.api.delete("networkpolicies", "default", name, json!({}));
}

fn select(app: &str) -> Value {
    json!({"matchLabels": {"app": app}})
}

fn until_open(place: Option<&str>, to: (IpAddr, u16)) {
    wait_for(&format!("{place:?} to reach {to:?}"), TIMEOUT, || ask(place, to).ok());
}

fn until_shut(place: Option<&str>, to: (IpAddr, u16)) {
    wait_for(&format!("{place:?} not to reach {to:?}"), TIMEOUT, || {
        ask(place, to).is_err_and(|error| error.kind() == ErrorKind::TimedOut).then_some(())
    });
}

fn a_policy_shuts_and_opens_pods_of_one_bridge(world: &mut World, family: Family) {
    populate(world);
    let (a, b) = ((family.pod(11), 8080), (family.pod(12), 8080));
    until_open(Some("client"), a);
    until_open(Some("outside"), a);
    policy(world, "deny", json!({"podSelector": select("a"), "policyTypes": ["Ingress"]}));
    until_shut(Some("client"), a);
    assert!(ask(Some("outside"), a).is_err(), "nor from outside");
    assert!(ask(None, a).is_ok(), "the node itself always reaches its pods");
    assert!(ask(Some("client"), b).is_ok(), "other pods stay open");
    assert!(ask(Some("a"), b).is_ok(), "what the pod sends is another direction");
    let from_client = json!([{"from": [{"podSelector": select("client")}], "ports": [{"port": "http"}]}]);
    policy(world, "allow", json!({"podSelector": {}, "ingress": from_client}));
    until_open(Some("client"), a);
    assert!(ask(Some("b"), a).is_err(), "only the client is let in");
    let block = if family == Family::V4 { "192.168.7.0/24" } else { "fd07::/64" };
    policy(
        world,
        "allow",
        json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": block}}], "ports": [{"port": 8000, "endPort": 8100}]}]}),
    );
    until_open(Some("outside"), a);
    until_shut(Some("client"), a);
    no_policy(world, "allow");
    no_policy(world, "deny");
    until_open(Some("client"), a);
}

fn labels_decide_as_they_change(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    let friends = json!([{"from": [{"podSelector": {"matchLabels": {"friend": "yes"}}}]}]);
    policy(world, "friends", json!({"podSelector": select("a"), "ingress": friends}));
    until_shut(Some("client"), a);
    world.api.edit("pods", "default", "client", |pod| pod["metadata"]["labels"]["friend"] = json!("yes"));
    until_open(Some("client"), a);
    world.api.edit("pods", "default", "client", |pod| pod["metadata"]["labels"]["friend"] = json!("no"));
    until_shut(Some("client"), a);
    no_policy(world, "friends");
}

fn egress_to_a_service_goes_by_its_endpoints(world: &mut World, family: Family) {
    populate(world);
    let name = format!("web-{}", family.table());
    world.slice(&name, "TCP", &[family.pod(11)]);
    let service = (family.service(50), 80);
    world.service(&name, json!({"clusterIP": service.0.to_string(), "ports": port("TCP", None)}));
    until_open(Some("client"), service);
    let to = |app: &str| {
        json!({
            "podSelector": select("client"), "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": select(app)}], "ports": [{"port": 8080}]}],
        })
    };
    policy(world, "egress", to("b"));
    until_shut(Some("client"), service);
    assert!(ask(Some("client"), (family.pod(12), 8080)).is_ok());
    policy(world, "egress", to("a"));
    until_open(Some("client"), service);
    assert!(ask(Some("client"), (family.pod(12), 8080)).is_err());
    no_policy(world, "egress");
}

fn a_pod_that_is_not_known_yet_is_cut_off(world: &mut World, family: Family) {
    populate(world);
    let (a, b) = ((family.pod(11), 8080), (family.pod(12), 8080));
    policy(world, "any", json!({"podSelector": select("nobody")}));
    let object = world.api.get("pods", "default", "b").unwrap();
    world.api.delete("pods", "default", "b", json!({"gracePeriodSeconds": 0}));
    until_shut(Some("client"), b);
    assert!(ask(Some("b"), a).is_err(), "nor does it reach anybody");
    assert!(ask(Some("client"), a).is_ok());
    let mut again = object;
    for field in ["uid", "resourceVersion", "creationTimestamp", "deletionTimestamp"] {
        again["metadata"].as_object_mut().unwrap().remove(field);
    }
    world.api.create(again);
    until_open(Some("client"), b);
    no_policy(world, "any");
}

fn policies_come_back_after_an_outside_flush_and_go_with_the_last_one(world: &mut World, family: Family) {
    populate(world);
    let a = (family.pod(11), 8080);
    let spec = json!({"podSelector": select("a"), "ingress": [{"from": [{"podSelector": select("b")}], "ports": [{"port": 8000, "endPort": 9000}]}]});
    policy(world, "some", spec);
    until_shut(Some("client"), a);
    let listed = Command::new("nft").args(["list", "table", family.table(), "oarlock-policy"]).output().unwrap();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.status.success() && text.contains("8000-9000") && text.contains("default/some"), "{text}");
    assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
    until_shut(Some("client"), a);
    assert!(ask(Some("b"), a).is_ok());
    no_policy(world, "some");
    until_open(Some("client"), a);
    let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&tables.stdout).contains("oarlock-policy"));
}
