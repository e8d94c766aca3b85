//! The configuration file changes while the cluster runs.

use oarlock_testkit::wait_for;

use super::Case;
use super::cluster::{Cluster, PATIENCE};

pub(crate) const CASES: &[Case] = &[("the_configuration_changes_while_the_cluster_runs", changes)];

fn changes(cluster: &Cluster) {
    const ADDRESS: &str = "get service -n demo live -o jsonpath={.status.loadBalancer.ingress[*].ip}";
    const TOLD: &str = "get configmap -n kube-system oarlock-node-configuration -o jsonpath={.data}";
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
    cluster.kubectl("delete service -n demo live --timeout=60s");
}
