//! The configuration file changes while the cluster runs.

use std::time::Duration;

use oarlock_testkit::{NODE_ADDRESS, wait_for};

use super::Case;
use super::cluster::{Cluster, PATIENCE, text};
use super::kubectl::pod;

const TOLD: &str = "get configmap -n kube-system oarlock-node-configuration -o jsonpath={.data}";
/// How long the server may take to see and answer what somebody did, on a slow machine.
const AT_ONCE: Duration = Duration::from_secs(30);

pub(crate) const CASES: &[Case] = &[
    ("the_configuration_changes_while_the_cluster_runs", changes),
    ("what_nodes_are_told_is_put_right_at_once", put_right),
    ("a_flush_of_all_rules_takes_nothing_away_for_long", flush),
];

/// As when Debian's nftables.service is restarted. Nobody calls CNI plugins for pods that run.
fn flush(cluster: &Cluster) {
    let ports = "ports: [{containerPort: 8080, hostPort: 8088}], command";
    cluster.apply(&pod("moored", &["/bin/http", "8080"]).replace("command", ports));
    cluster.kubectl("wait --for=condition=Ready pod/moored --timeout=180s");
    let answers = || {
        let url = format!("http://{NODE_ADDRESS}:8088/hostname");
        let page = std::process::Command::new("curl").args(["-sS", "-m", "3", &url]).output().expect("curl");
        (text(&page.stdout).trim() == "moored").then_some(())
    };
    wait_for("the host port", PATIENCE, answers);
    let nft = |arguments: &[&str]| std::process::Command::new("nft").args(arguments).output().expect("nft");
    let masquerading = || text(&nft(&["list", "table", "ip", "oarlock-cni"]).stdout);
    let before = masquerading();
    assert!(before.contains("masquerade"), "{before}");
    // The plugins' table may be back before anybody can look; a table of ours stays away.
    let marker = ["table", "ip", "marker"];
    assert!(nft(&[&["add"], &marker[..]].concat()).status.success());
    assert!(nft(&["flush", "ruleset"]).status.success());
    assert!(!nft(&[&["list"], &marker[..]].concat()).status.success(), "the flush takes everything");
    wait_for("the host port again", PATIENCE, answers);
    wait_for("all rules of the plugins", PATIENCE, || (masquerading() == before).then_some(()));
    cluster.kubectl("delete pod moored --timeout=180s");
}

/// Somebody edits and deletes it, several times, so that no look once in a while would be in time.
fn put_right(cluster: &Cluster) {
    let told = || {
        let output = cluster.try_kubectl(TOLD);
        output.status.success().then(|| text(&output.stdout))
    };
    // The case before may have changed the settings just now.
    let before = wait_for("nodes to be told", AT_ONCE, || told().filter(|now| now.contains("192.0.2.128/29")));
    for _ in 0..3 {
        for line in [
            r#"patch configmap -n kube-system oarlock-node-configuration -p {"data":{"config.yaml":"nonsense"}}"#,
            "delete configmap -n kube-system oarlock-node-configuration",
        ] {
            cluster.kubectl(line);
            wait_for("nodes to be told as before", AT_ONCE, || told().filter(|now| *now == before));
        }
    }
}

fn changes(cluster: &Cluster) {
    const ADDRESS: &str = "get service -n demo live -o jsonpath={.status.loadBalancer.ingress[*].ip}";
    cluster.kubectl("expose -n demo deployment page --name=live --type=LoadBalancer --port=80 --target-port=8080");
    cluster.wait_for_output(ADDRESS, "an address of the pool", |text| text.starts_with("192.0.2."));
    let changed = cluster.configure(|text| text.replace("192.0.2.128/29", "198.51.100.16/30"));
    let address =
        cluster.wait_for_output(ADDRESS, "an address of the new pool", |text| text.starts_with("198.51.100."));
    wait_for("the page at the new address", PATIENCE, || {
        let page = std::process::Command::new("curl").args(["-sS", "-m", "3", &format!("http://{address}/")]).output();
        String::from_utf8_lossy(&page.ok()?.stdout).contains("Oarlock rows").then_some(())
    });
    cluster.wait_for_output(TOLD, "nodes to be told", |text| text.contains("198.51.100.16/30"));
    // A file that is wrong changes nothing.
    let wrong = cluster.configure(|text| text.replace("198.51.100.16/30", "nonsense"));
    let log = cluster.data_dir().join("log/server.log");
    wait_for("the log to name what is wrong", PATIENCE, || {
        std::fs::read_to_string(&log).ok()?.contains("is neither a network nor a range").then_some(())
    });
    assert_eq!(cluster.kubectl(ADDRESS), address);
    drop(wrong);
    drop(changed);
    cluster.wait_for_output(ADDRESS, "an address of the first pool again", |text| text.starts_with("192.0.2."));
    cluster.kubectl("delete service -n demo live --timeout=180s");
}
