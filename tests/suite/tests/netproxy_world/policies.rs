//! Pods and NetworkPolicies as the API has them, and waiting for what they mean.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use oarlock_testkit::wait_for;
use serde_json::{Value, json};

use super::{TIMEOUT, World, ask, at};

const PODS: [(&str, u16); 3] = [("a", 11), ("b", 12), ("client", 13)];

/// Makes the namespace and its pods in the API, unless an earlier round has.
pub fn populate(world: &World) {
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

pub fn policy(world: &World, name: &str, spec: Value) {
    if world.api.get("networkpolicies", "default", name).is_some() {
        world.api.edit("networkpolicies", "default", name, |object| object["spec"] = spec);
    } else {
        world.api.create(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "default"}, "spec": spec,
        }));
    }
}

pub fn no_policy(world: &World, name: &str) {
    world.api.delete("networkpolicies", "default", name, json!({}));
}

pub fn select(app: &str) -> Value {
    json!({"matchLabels": {"app": app}})
}

pub fn until_open(place: Option<&str>, to: (IpAddr, u16)) {
    wait_for(&format!("{place:?} to reach {to:?}"), TIMEOUT, || ask(place, to).ok());
}

/// Whether a connection gets no answer, neither yes nor no. An answer takes a thousandth of the time that is waited.
pub fn is_shut(place: Option<&str>, to: (IpAddr, u16)) -> bool {
    const PATIENCE: Duration = Duration::from_millis(300);
    let outcome = at(place, || TcpStream::connect_timeout(&to.into(), PATIENCE));
    outcome.is_err_and(|error| error.kind() == ErrorKind::TimedOut)
}

pub fn until_shut(place: Option<&str>, to: (IpAddr, u16)) {
    wait_for(&format!("{place:?} not to reach {to:?}"), TIMEOUT, || is_shut(place, to).then_some(()));
}
