//! Wrong input gets a clear message where the user looks, and leaves nothing behind.

use std::net::TcpListener;
use std::process::Command;

use oarlock_testkit::{Snapshot, binary};

use super::cluster::{Cluster, oarlock, text};
use super::kubectl::pod;
use super::{Case, LoneCase};

pub(crate) const CASES: &[Case] = &[
    ("malformed_yaml_is_named", malformed),
    ("a_missing_image_is_an_event", missing_image),
    ("a_missing_command_is_an_event", missing_command),
    ("an_impossible_pod_says_why", impossible),
    ("wrong_configuration_exits_with_64", configuration),
    ("a_second_up_is_refused", second_up),
];

pub(crate) const LONE_CASES: &[LoneCase] = &[("a_port_in_use_is_named", ports_in_use)];

/// Whichever port is taken, `up` says which one, how to find who has it and how to choose another, and leaves nothing.
fn ports_in_use() {
    let ports = [(6443, "apiPort"), (10250, "agentPort"), (10256, "proxyHealthPort"), (10249, "proxyMetricsPort")];
    for (port, key) in ports {
        let held = TcpListener::bind(("0.0.0.0", port)).expect("bind");
        let directory = tempfile::tempdir().expect("tempdir");
        let data_dir = directory.path().join("data");
        let before = Snapshot::take(&data_dir.to_string_lossy());
        let output = oarlock(&data_dir, &["up"]);
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(&format!("port {port} ({key})")), "{said}");
        assert!(said.contains("ss -ltnp"), "{said}");
        before.assert_nothing_leaked(&Snapshot::take(&data_dir.to_string_lossy()));
        drop(held);
    }
}

fn malformed(cluster: &Cluster) {
    let output = cluster.kubectl_with_input("apply -f -", "apiVersion: v1\nkind: Pod\nmetadata: {name: [\n");
    assert!(!output.status.success() && text(&output.stderr).contains("yaml"), "{}", text(&output.stderr));
    let output = cluster.kubectl_with_input("create --validate=false -f -", &pod("Bad_Name", &["/bin/sleep"]));
    assert!(text(&output.stderr).contains("metadata.name: Invalid value"), "{}", text(&output.stderr));
    let wrong_type = pod("typed", &["/bin/sleep"])
        .replace("terminationGracePeriodSeconds: 2", "terminationGracePeriodSeconds: soon");
    let output = cluster.kubectl_with_input("create --validate=false -f -", &wrong_type);
    assert!(text(&output.stderr).contains("cannot unmarshal string"), "{}", text(&output.stderr));
    let empty = pod("empty", &["/bin/sleep"]).replace("name: main, ", "");
    let output = cluster.kubectl_with_input("create -f -", &empty);
    assert!(text(&output.stderr).contains("spec.containers[0].name: Required value"), "{}", text(&output.stderr));
}

fn missing_image(cluster: &Cluster) {
    cluster.apply(&pod("lost", &["/bin/sleep"]).replace("testimage:1", "absent:1"));
    let described = cluster.wait_for_output("describe pod lost", "a pull failure", |text| {
        text.contains("ErrImagePull") && text.contains("Failed to pull image \"oarlock.local/absent:1\"")
    });
    assert!(described.contains("Pulling"), "{described}");
    cluster.kubectl("delete pod lost --timeout=180s");
}

fn missing_command(cluster: &Cluster) {
    cluster.apply(&pod("typo", &["/bin/nothing"]));
    cluster.wait_for_output("describe pod typo", "a start failure", |text| {
        (text.contains("RunContainerError") || text.contains("StartError")) && text.contains("/bin/nothing")
    });
    cluster.kubectl("delete pod typo --timeout=180s");
}

fn impossible(cluster: &Cluster) {
    let huge =
        pod("huge", &["/bin/sleep"]).replace("name: main,", "name: main, resources: {requests: {cpu: \"1000\"}},");
    cluster.apply(&huge);
    cluster.wait_for_output("describe pod huge", "a scheduling failure", |text| text.contains("1 Insufficient cpu"));
    cluster.kubectl("delete pod huge --timeout=180s");
}

fn configuration(cluster: &Cluster) {
    let file = cluster.data_dir().join("wrong.yaml");
    std::fs::write(&file, "nodeNmae: edge\n").expect("write");
    let output = Command::new(binary("oarlock")).arg("--config").arg(&file).arg("up").output().expect("oarlock");
    std::fs::remove_file(&file).expect("remove");
    assert_eq!(output.status.code(), Some(64));
    assert!(text(&output.stderr).contains("nodeNmae"), "{}", text(&output.stderr));
}

fn second_up(cluster: &Cluster) {
    let output = cluster.oarlock(&["up"]);
    assert!(!output.status.success() && text(&output.stderr).contains("already running"), "{}", text(&output.stderr));
    let other = tempfile::tempdir().expect("tempdir");
    let output =
        Command::new(binary("oarlock")).arg("--data-dir").arg(other.path()).arg("up").output().expect("oarlock");
    assert!(!output.status.success() && text(&output.stderr).contains("port 6443"), "{}", text(&output.stderr));
}
