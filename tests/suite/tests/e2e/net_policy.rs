//! NetworkPolicies as a user applies them, between pods of the cluster.

use oarlock_testkit::wait_for;

use super::Case;
use super::cluster::{Cluster, PATIENCE};
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[("a_network_policy_shuts_and_opens_pods", policy)];

fn policy(cluster: &Cluster) {
    for (name, command) in
        [("guarded", &["/bin/http", "8080"][..]), ("friend", &["/bin/sleep"]), ("stranger", &["/bin/sleep"])]
    {
        cluster.apply(&pod(name, command));
    }
    cluster.kubectl("wait --for=condition=Ready pod/guarded pod/friend pod/stranger --timeout=60s");
    let address = cluster.kubectl("get pod guarded -o jsonpath={.status.podIP}");
    let fetches = |from: &str| {
        let output = cluster.try_kubectl(&format!("exec {from} -- /bin/fetch {address}:8080/hostname 1"));
        output.status.success()
    };
    let until = |from: &str, wanted: bool| {
        wait_for(&format!("{from}: {wanted}"), PATIENCE, || (fetches(from) == wanted).then_some(()));
    };
    until("friend", true);
    until("stranger", true);
    let manifest = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: guard}\nspec:\n  podSelector: {matchLabels: {app: guarded}}\n";
    cluster.apply(manifest);
    until("friend", false);
    until("stranger", false);
    let described = cluster.kubectl("describe networkpolicy guard");
    assert!(described.contains("app=guarded") && described.contains("Policy Types: Ingress"), "{described}");
    let allow = "  ingress:\n  - from: [{podSelector: {matchLabels: {app: friend}}}]\n    ports: [{port: 8080}]\n";
    cluster.apply(&format!("{manifest}{allow}"));
    until("friend", true);
    assert!(!fetches("stranger"), "only the friend is let in");
    cluster.kubectl("delete networkpolicy guard");
    until("stranger", true);
    cluster.kubectl("delete pod guarded friend stranger --timeout=60s");
}
