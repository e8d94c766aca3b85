//! NetworkPolicies as a user applies them, between pods of the cluster.

use oarlock_testkit::wait_for;

use super::Case;
use super::cluster::{Cluster, PATIENCE, in_url};
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[("a_network_policy_shuts_and_opens_pods", policy)];

fn policy(cluster: &Cluster) {
    for (name, command) in
        [("guarded", &["/bin/http", "8080"][..]), ("friend", &["/bin/sleep"]), ("stranger", &["/bin/sleep"])]
    {
        cluster.apply(&pod(name, command));
    }
    cluster.kubectl("wait --for=condition=Ready pod/guarded pod/friend pod/stranger --timeout=180s");
    let words = |line: &str| cluster.kubectl(line).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let addresses = words("get pod guarded -o jsonpath={.status.podIPs[*].ip}");
    assert_eq!(addresses.len(), cluster.mode.addresses().len(), "{addresses:?}");
    // Every address is asked, and they have to agree.
    let fetches = |from: &str| -> Vec<bool> {
        let fetch = |address: &String| {
            let line = format!("exec {from} -- /bin/fetch {}:8080/hostname 1", in_url(address));
            cluster.try_kubectl(&line).status.success()
        };
        addresses.iter().map(fetch).collect()
    };
    let until = |from: &str, wanted: bool| {
        wait_for(&format!("{from}: {wanted}"), PATIENCE, || {
            fetches(from).iter().all(|one| *one == wanted).then_some(())
        });
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
    assert!(fetches("stranger").iter().all(|fetched| !fetched), "only the friend is let in");
    let strangers = words("get pod stranger -o jsonpath={.status.podIPs[*].ip}");
    let blocks: Vec<String> = strangers
        .iter()
        .map(|one| format!("{{ipBlock: {{cidr: \"{one}/{}\"}}}}", if one.contains(':') { 128 } else { 32 }))
        .collect();
    cluster.apply(&format!("{manifest}  ingress:\n  - from: [{}]\n", blocks.join(", ")));
    until("stranger", true);
    until("friend", false);
    cluster.kubectl("delete networkpolicy guard");
    until("friend", true);
    cluster.kubectl("delete pod guarded friend stranger --timeout=180s");
}
