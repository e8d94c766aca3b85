//! `kill -9` of any daemon, and of all: containers and connections go on, and the killed part picks up where it was.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use oarlock_testkit::wait_for;

use super::Case;
use super::cluster::{Cluster, PATIENCE};

pub(crate) const CASES: &[Case] = &[
    ("killed_server_comes_back", |cluster| survive(cluster, &["server"])),
    ("killed_agent_comes_back", |cluster| survive(cluster, &["agent"])),
    ("killed_runtime_comes_back", |cluster| survive(cluster, &["runtime"])),
    ("killed_netproxy_comes_back", |cluster| survive(cluster, &["netproxy"])),
    ("all_four_killed_come_back", |cluster| survive(cluster, &["server", "agent", "runtime", "netproxy"])),
    ("stop_and_up_again_brings_the_pods_back", stop_and_start),
];

/// Container id and restart count of each demo pod.
fn containers(cluster: &Cluster) -> BTreeMap<String, (String, u64)> {
    let pods = cluster.get("pods -n demo -l app=page");
    let items = pods["items"].as_array().cloned().unwrap_or_default();
    items
        .iter()
        .map(|pod| {
            let status = &pod["status"]["containerStatuses"][0];
            let id = status["containerID"].as_str().unwrap_or("").to_owned();
            (
                pod["metadata"]["name"].as_str().unwrap_or("").to_owned(),
                (id, status["restartCount"].as_u64().unwrap_or(99)),
            )
        })
        .collect()
}

/// A connection through the ClusterIP on which a line comes every 100 ms.
fn open_stream(cluster: &Cluster) -> BufReader<TcpStream> {
    let address = cluster.kubectl("get service -n demo page -o jsonpath={.spec.clusterIP}");
    let mut connection = TcpStream::connect((address.as_str(), 80)).expect("connect through the Service");
    connection.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    connection.write_all(b"GET /stream HTTP/1.1\r\nHost: page\r\n\r\n").expect("write");
    let mut reader = BufReader::new(connection);
    next_line(&mut reader);
    reader
}

fn next_line(stream: &mut BufReader<TcpStream>) {
    let mut line = String::new();
    let length = stream.read_line(&mut line).expect("the connection goes on");
    assert!(length > 0, "the connection was closed");
}

fn survive(cluster: &Cluster, daemons: &[&str]) {
    cluster.kubectl("rollout status -n demo deployment/page --timeout=180s");
    let before = containers(cluster);
    let mut stream = open_stream(cluster);
    let pids: Vec<(&str, i32)> = daemons.iter().map(|name| (*name, cluster.daemon_pid(name))).collect();
    for name in daemons {
        cluster.kill_daemon(name);
    }
    for _ in 0..10 {
        next_line(&mut stream);
    }
    for (name, old) in &pids {
        wait_for(&format!("{name} to come back"), PATIENCE, || {
            let alive = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cluster.daemon_pid(name)));
            alive.ok().filter(|pid| pid != old)
        });
    }
    // New work goes through every part again: a pod is created, scheduled, run, and answers by its name in a Service.
    cluster.wait_for_output("create configmap alive --from-literal=a=b", "the API to take a write", |text| {
        text.contains("created") || text.contains("already exists")
    });
    cluster.kubectl("delete configmap alive");
    cluster.kubectl("run survivor --image=oarlock.local/testimage:1 --port=8080 --labels=app=survivor");
    cluster.kubectl("expose pod survivor --port=80 --target-port=8080");
    cluster.kubectl("wait --for=condition=Ready pod/survivor --timeout=180s");
    wait_for("the new Service to answer", PATIENCE, || {
        let output = cluster.try_kubectl("exec survivor -- /bin/fetch survivor.default:80/hostname 2");
        output.status.success().then_some(())
    });
    cluster.kubectl("delete pod/survivor service/survivor --timeout=180s");
    assert_eq!(containers(cluster), before, "no container was replaced or restarted");
    next_line(&mut stream);
}

fn stop_and_start(cluster: &Cluster) {
    let objects = cluster.kubectl("get deployments,services,configmaps -n demo -o name");
    let stopped = cluster.oarlock(&["stop"]);
    assert!(stopped.status.success(), "{}", String::from_utf8_lossy(&stopped.stderr));
    let started = cluster.oarlock(&["up", "--detach"]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stdout));
    assert_eq!(cluster.kubectl("get deployments,services,configmaps -n demo -o name"), objects);
    cluster.wait_for_output("get pods -n demo -l app=page", "three Ready pods", |table| {
        table.matches("1/1 ").count() == 3
    });
}
