//! What the agent does for pods that change, grow or come from files: resizing in place, volumes that follow their objects,
//! disk limits, static pods, last words.

use std::fs;
use std::time::{Duration, Instant};

use oarlock_testkit::wait_for;

use super::Case;
use super::cluster::{Cluster, PATIENCE};
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[
    ("resize_changes_the_cgroup_and_not_the_container", resize),
    ("a_container_that_gets_another_image_is_never_seen_away", another_image),
    ("a_label_that_a_node_was_just_given_is_good_for_its_pods", fresh_label),
    ("a_container_restarted_to_grow_fits_into_its_pod", grow_by_restart),
    ("a_pod_that_sets_what_others_would_feel_is_refused", unsafe_sysctl),
    ("a_mounted_config_map_follows_its_object", follow),
    ("a_pod_beyond_its_disk_limit_is_evicted", disk_limit),
    ("a_manifest_on_the_node_runs_without_the_api", static_pod),
    ("the_end_of_the_log_stands_in_for_last_words", last_words),
    ("a_server_that_starts_slowly_is_ready_soon", slow_start),
    ("top_shows_what_pods_and_nodes_use", top),
];

fn resize(cluster: &Cluster) {
    let resources = "resources: {requests: {cpu: 100m, memory: 32Mi}, limits: {cpu: 200m, memory: 64Mi}}";
    let manifest = pod("grows", &["/bin/sleep"]).replace("name: main,", &format!("name: main, {resources},"));
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/grows --timeout=180s");
    let before = cluster.get("pod grows");
    let patch = r#"{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"150m"},"limits":{"cpu":"300m","memory":"96Mi"}}}]}}"#;
    cluster.kubectl(&format!("patch pod grows --subresource resize -p {patch}"));
    let actual = "get pod grows -o jsonpath={.status.containerStatuses[0].resources.limits.memory}";
    cluster.wait_for_output(actual, "the new size", |text| text == "96Mi");
    let after = cluster.get("pod grows");
    let status = |pod: &serde_json::Value, field: &str| pod["status"]["containerStatuses"][0][field].clone();
    assert_eq!(status(&after, "containerID"), status(&before, "containerID"));
    assert_eq!(status(&after, "restartCount"), 0);
    assert_eq!(status(&after, "allocatedResources")["cpu"], "150m");
    assert_eq!(memory_limit(&after), 96 << 20);

    let patch =
        r#"{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"4000"},"limits":{"cpu":"4000"}}}]}}"#;
    cluster.kubectl(&format!("patch pod grows --subresource resize -p {patch}"));
    let reason = "get pod grows -o jsonpath={.status.conditions[?(@.type=='PodResizePending')].reason}";
    cluster.wait_for_output(reason, "the refusal", |text| text == "Infeasible");
    cluster.kubectl("delete pod grows --timeout=180s");
}

fn another_image(cluster: &Cluster) {
    cluster.apply(&pod("changes", &["/bin/sleep"]));
    cluster.kubectl("wait --for=condition=Ready pod/changes --timeout=180s");
    let status = |pod: &serde_json::Value, field: &str| pod["status"]["containerStatuses"][0][field].clone();
    let before = cluster.get("pod changes");
    let (image, version) = (status(&before, "imageID"), &before["metadata"]["resourceVersion"]);
    let patch = serde_json::json!({"spec": {"containers": [{"name": "main", "image": image}]}});
    cluster.kubectl(&format!("patch pod changes -p {patch}"));
    let restarts = "get pod changes -o jsonpath={.status.containerStatuses[0].restartCount}";
    cluster.wait_for_output(restarts, "the new container", |text| text == "1");
    let query = format!("watch=1&timeoutSeconds=1&resourceVersion={}", version.as_str().expect("a version"));
    let events = cluster.kubectl(&format!("get --raw /api/v1/namespaces/default/pods?{query}"));
    let events = events.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("an event"));
    let seen: Vec<serde_json::Value> =
        events.map(|event| event["object"].clone()).filter(|pod| pod["metadata"]["name"] == "changes").collect();
    let after = seen.last().expect("at least the change");
    // In whole seconds; a machine that is too busy to start the next one within this second shows that it was away.
    let (ended, started) =
        (&status(after, "lastState")["terminated"]["finishedAt"], &status(after, "state")["running"]["startedAt"]);
    let was_shown = seen.iter().any(|pod| status(pod, "ready") == false);
    assert!(!was_shown || ended != started, "it was away for milliseconds: {seen:#?}");
    assert_eq!((status(after, "restartCount"), status(after, "image")), (1.into(), image));
    assert_ne!(status(after, "containerID"), status(&before, "containerID"));
    cluster.kubectl("delete pod changes --timeout=180s");
}

fn fresh_label(cluster: &Cluster) {
    let node = cluster.kubectl("get nodes -o jsonpath={.items[0].metadata.name}");
    cluster.kubectl(&format!("label node {node} bottom=sand"));
    cluster.apply(&(pod("choosy", &["/bin/sleep"]) + "  nodeSelector: {bottom: sand}\n"));
    cluster.kubectl("wait --for=condition=Ready pod/choosy --timeout=180s");
    cluster.kubectl("delete pod choosy --timeout=180s");
    cluster.kubectl(&format!("label node {node} bottom-"));
    let unfit = pod("unfit", &["/bin/sleep"]) + &format!("  nodeSelector: {{bottom: rock}}\n  nodeName: {node}\n");
    cluster.apply(&unfit);
    cluster.wait_for_output("get pod unfit -o jsonpath={.status.reason}", "the refusal", |text| text == "NodeAffinity");
    cluster.kubectl("delete pod unfit --timeout=180s");
}

fn grow_by_restart(cluster: &Cluster) {
    let resources = "resources: {requests: {cpu: 20m, memory: 32Mi}, limits: {cpu: 30m, memory: 48Mi}}, \
        resizePolicy: [{resourceName: cpu, restartPolicy: RestartContainer}]";
    let manifest = pod("regrows", &["/bin/sleep"])
        .replace("restartPolicy: Never", "restartPolicy: Always")
        .replace("name: main,", &format!("name: main, {resources},"));
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/regrows --timeout=180s");
    let patch =
        r#"{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"25m"},"limits":{"cpu":"35m"}}}]}}"#;
    cluster.kubectl(&format!("patch pod regrows --subresource resize -p {patch}"));
    let status = "get pod regrows -o jsonpath={.status.containerStatuses[0].restartCount},\
        {.status.containerStatuses[0].ready},{.status.containerStatuses[0].resources.limits.cpu}";
    cluster.wait_for_output(status, "the larger container", |text| text == "1,true,35m");
    cluster.kubectl("delete pod regrows --timeout=180s");
}

fn unsafe_sysctl(cluster: &Cluster) {
    let manifest = |name: &str, sysctl: &str| {
        pod(name, &["/bin/sleep"])
            + &format!("  securityContext: {{sysctls: [{{name: {sysctl}, value: \"16384\"}}]}}\n")
    };
    cluster.apply(&manifest("greedy", "kernel.msgmax"));
    let reason = "get pod greedy -o jsonpath={.status.phase},{.status.reason}";
    cluster.wait_for_output(reason, "the refusal", |text| text == "Failed,SysctlForbidden");
    let message = cluster.kubectl("get pod greedy -o jsonpath={.status.message}");
    assert!(message.contains("forbidden sysctl: \"kernel.msgmax\" not allowlisted"), "{message}");
    cluster.apply(&manifest("modest", "net.ipv4.tcp_keepalive_time"));
    cluster.kubectl("wait --for=condition=Ready pod/modest --timeout=180s");
    let value = cluster.kubectl("exec modest -- /bin/cat /proc/sys/net/ipv4/tcp_keepalive_time");
    assert_eq!(value.trim(), "16384");
    cluster.kubectl("delete pod greedy modest --timeout=180s");
}

/// The memory limit in the cgroup of a pod's first container.
fn memory_limit(pod: &serde_json::Value) -> u64 {
    let id = pod["status"]["containerStatuses"][0]["containerID"].as_str().expect("an id");
    let id = id.rsplit('/').next().expect("an id");
    let (root, file) = if fs::exists("/sys/fs/cgroup/cgroup.controllers").expect("a look") {
        ("/sys/fs/cgroup", "memory.max")
    } else {
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
    };
    let mut pending = vec![std::path::PathBuf::from(root)];
    while let Some(directory) = pending.pop() {
        if directory.to_string_lossy().contains(id) {
            return fs::read_to_string(directory.join(file)).expect("the limit").trim().parse().expect("a number");
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        pending.extend(entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
    panic!("no cgroup of container {id}");
}

fn follow(cluster: &Cluster) {
    cluster.kubectl("create configmap depth --from-literal=metres=3");
    let manifest = pod("follower", &["/bin/sleep"])
        .replace("name: main,", "name: main, volumeMounts: [{name: v, mountPath: /depth}],")
        + "  volumes: [{name: v, configMap: {name: depth}}]\n";
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/follower --timeout=180s");
    assert_eq!(cluster.kubectl("exec follower -- /bin/cat /depth/metres"), "3");
    cluster.kubectl("patch configmap depth -p {\"data\":{\"metres\":\"7\"}}");
    let changed = Instant::now();
    cluster.wait_for_output("exec follower -- /bin/cat /depth/metres", "the new content", |text| text == "7");
    assert!(changed.elapsed() < Duration::from_secs(40), "it took {:?}", changed.elapsed());
    cluster.kubectl("delete pod/follower configmap/depth --timeout=180s");
}

fn disk_limit(cluster: &Cluster) {
    let resources = "resources: {limits: {ephemeral-storage: 1Mi}}";
    // Logs four megabytes and then waits.
    let manifest =
        pod("talks", &["/bin/log", "2000", "2000", "1"]).replace("name: main,", &format!("name: main, {resources},"));
    cluster.apply(&manifest);
    cluster.wait_for_output("get pod talks -o jsonpath={.status.reason}", "the eviction", |text| text == "Evicted");
    let message = cluster.kubectl("get pod talks -o jsonpath={.status.message}");
    assert!(message.contains("exceeds the total limit of containers 1Mi"), "{message}");
    cluster.wait_for_output("get events --field-selector=involvedObject.name=talks", "the event", |text| {
        text.contains("Evicted")
    });
    cluster.wait_for_output("get pod talks -o jsonpath={.status.phase}", "the end", |text| text == "Failed");
    cluster.kubectl("delete pod talks --timeout=180s");
}

fn static_pod(cluster: &Cluster) {
    let directory = cluster.data_dir().join("manifests");
    fs::create_dir_all(&directory).expect("the directory");
    let path = directory.join("lone.yaml");
    fs::write(&path, pod("lone", &["/bin/sleep"])).expect("the manifest");
    let node = cluster.kubectl("get nodes -o jsonpath={.items[0].metadata.name}");
    let name = format!("lone-{node}");
    wait_for("the mirror to be Ready", PATIENCE, || {
        let ready = cluster.try_kubectl(&format!("wait --for=condition=Ready pod/{name} --timeout=1s"));
        ready.status.success().then_some(())
    });
    let first = cluster.get(&format!("pod {name}"));
    let owner = &first["metadata"]["ownerReferences"][0];
    assert_eq!(owner["uid"], cluster.get(&format!("node {node}"))["metadata"]["uid"], "it goes with its node");
    // Deleting what shows it does not end it. The new one is there so soon that kubectl would take it for the old one.
    cluster.kubectl(&format!("delete pod {name} --wait=false"));
    wait_for("the mirror to be back", PATIENCE, || {
        let again = cluster.try_kubectl(&format!("get pod {name} -o json"));
        let again: serde_json::Value = serde_json::from_slice(&again.stdout).ok()?;
        let id = |pod: &serde_json::Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
        (again["metadata"]["uid"] != first["metadata"]["uid"] && id(&again) == id(&first)).then_some(())
    });
    fs::remove_file(&path).expect("remove");
    cluster.wait_for_output(&format!("get pod {name}"), "the pod to go", |text| text.contains("not found"));
}

fn last_words(cluster: &Cluster) {
    let manifest = pod("speaks", &["/bin/cat", "/absent"])
        .replace("name: main,", "name: main, terminationMessagePolicy: FallbackToLogsOnError,");
    cluster.apply(&manifest);
    let message = "get pod speaks -o jsonpath={.status.containerStatuses[0].state.terminated.message}";
    cluster.wait_for_output(message, "the message", |text| text.contains("/absent"));
    cluster.kubectl("delete pod speaks --timeout=180s");
}

/// A probe that fails at first and has a long period: Ready comes long before the second regular attempt.
fn slow_start(cluster: &Cluster) {
    let probe = "readinessProbe: {httpGet: {path: /hostname, port: 8080}, periodSeconds: 30}";
    let manifest = pod("slow", &["/bin/http"]).replace("name: main,", &format!("name: main, {probe},"));
    let began = Instant::now();
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/slow --timeout=180s");
    assert!(began.elapsed() < Duration::from_secs(28), "it took {:?}", began.elapsed());
    cluster.kubectl("delete pod slow --timeout=180s");
}

/// `kubectl top` without anything installed: what pods and the node use now.
fn top(cluster: &Cluster) {
    cluster.apply(&pod("busy", &["/bin/stress"]));
    cluster.kubectl("wait --for=condition=Ready pod/busy --timeout=180s");
    let table = cluster.wait_for_output("top pod busy --no-headers", "a busy pod", |text| {
        let cpu = text.split_whitespace().nth(1).and_then(|cell| cell.strip_suffix('m')?.parse::<u32>().ok());
        cpu.is_some_and(|milli| milli > 100)
    });
    assert!(table.contains("busy") && table.contains("Mi"), "{table}");
    let containers = cluster.kubectl("top pod busy --containers --no-headers");
    assert!(containers.contains("main"), "{containers}");
    let nodes = cluster.kubectl("top nodes --no-headers");
    assert!(nodes.contains('%') && nodes.contains("Mi"), "{nodes}");
    let selected = cluster.kubectl("top pods -l app=busy --no-headers");
    assert_eq!(selected.lines().count(), 1, "{selected}");
    let node = cluster.kubectl("get nodes -o jsonpath={.items[0].metadata.name}");
    let summary = cluster.kubectl(&format!("get --raw /api/v1/nodes/{node}/proxy/stats/summary"));
    let summary: serde_json::Value = serde_json::from_str(&summary).expect("JSON");
    let pods = summary["pods"].as_array().cloned().unwrap_or_default();
    let busy = pods.iter().find(|pod| pod["podRef"]["name"] == "busy").expect("the pod");
    for number in [
        &busy["containers"][0]["cpu"]["usageCoreNanoSeconds"],
        &busy["containers"][0]["rootfs"]["usedBytes"],
        &busy["containers"][0]["logs"]["usedBytes"],
        &busy["ephemeral-storage"]["usedBytes"],
        &busy["memory"]["workingSetBytes"],
        &summary["node"]["rlimit"]["curproc"],
        &summary["node"]["fs"]["availableBytes"],
        &summary["node"]["network"]["rxBytes"],
    ] {
        assert!(number.is_u64(), "{summary:#}");
    }
    cluster.kubectl("delete pod busy --timeout=180s");
}
