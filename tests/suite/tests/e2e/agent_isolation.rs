//! Pods apart from the node: user namespaces, and images as volumes.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::Case;
use super::cluster::Cluster;
use super::kubectl::pod;

pub(crate) const CASES: &[Case] =
    &[("root_of_a_pod_without_host_users_is_nobody_on_the_node", users), ("an_image_is_a_volume", image_volume)];

fn ready(cluster: &Cluster, manifest: &str, name: &str) {
    cluster.apply(manifest);
    cluster.kubectl(&format!("wait --for=condition=Ready pod/{name} --timeout=180s"));
}

fn users(cluster: &Cluster) {
    let node = cluster.get("nodes");
    let handlers = node["items"][0]["status"]["runtimeHandlers"].as_array().cloned().unwrap_or_default();
    let own = handlers.iter().find(|handler| handler["name"] == "").expect("the default handler");
    assert_eq!(own["features"]["userNamespaces"], true, "{handlers:?}");
    let shared = cluster.data_dir().join("of-the-node");
    fs::create_dir(&shared).expect("a directory");
    let apart = |name: &str| {
        let mounts = "volumeMounts: [{name: v, mountPath: /data}, {name: host, mountPath: /host}],";
        let manifest = pod(name, &["/bin/sleep"]).replace("name: main,", &format!("name: main, {mounts}"));
        let manifest = manifest.replace("spec:\n", "spec:\n  hostUsers: false\n  securityContext: {fsGroup: 2000}\n");
        let host = shared.display();
        manifest + &format!("  volumes: [{{name: v, emptyDir: {{}}}}, {{name: host, hostPath: {{path: {host}}}}}]\n")
    };
    for name in ["apart", "aside"] {
        ready(cluster, &apart(name), name);
    }
    let map = |name: &str| -> Vec<u64> {
        let text = cluster.kubectl(&format!("exec {name} -- cat /proc/self/uid_map"));
        text.split_whitespace().map(|word| word.parse().expect("a number")).collect()
    };
    let (apart, aside) = (map("apart"), map("aside"));
    assert_eq!((apart[0], apart[2]), (0, 65_536));
    assert!(apart[1] >= 65_536 && aside[1] >= 65_536 && apart[1].abs_diff(aside[1]) >= 65_536, "{apart:?} {aside:?}");
    // Root inside owns what it writes, on the node as well: volumes are mapped.
    for path in ["/data/own", "/host/own", "/etc/hosts"] {
        cluster.kubectl(&format!("exec apart -- write {path} x"));
    }
    assert_eq!(fs::metadata(shared.join("own")).expect("the file").uid(), 0);
    let uid = cluster.get("pod apart")["metadata"]["uid"].as_str().expect("a uid").to_owned();
    let directory = cluster.data_dir().join("agent/pods").join(&uid);
    let own = fs::metadata(directory.join("volumes/kubernetes.io~empty-dir/v/own")).expect("the file");
    assert_eq!((own.uid(), own.gid()), (0, 2000));
    assert!(directory.join("userns").exists());
    // What belongs to the node's root does not obey it.
    cluster.kubectl_fails("exec apart -- write /proc/sys/kernel/core_pattern x");
    cluster.kubectl("delete pod apart aside --timeout=180s");
    fs::remove_dir_all(&shared).expect("removed");

    let refused = pod("both", &["/bin/sleep"]).replace("spec:\n", "spec:\n  hostUsers: false\n  hostNetwork: true\n");
    let output = cluster.kubectl_with_input("apply -f -", &refused);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("when `pod.Spec.HostUsers` is false"), "{said}");
}

fn image_volume(cluster: &Cluster) {
    let mounts = "volumeMounts: [{name: i, mountPath: /whole}, {name: i, mountPath: /part, subPath: bin}],";
    let volume = |name: &str, reference: &str| {
        pod(name, &["/bin/sleep"]).replace("name: main,", &format!("name: main, {mounts}"))
            + &format!("  volumes: [{{name: i, image: {{reference: \"{reference}\", pullPolicy: Never}}}}]\n")
    };
    ready(cluster, &volume("reads", "oarlock.local/testimage:1"), "reads");
    assert!(cluster.kubectl("exec reads -- ls /whole").contains("bin"));
    assert!(cluster.kubectl("exec reads -- ls /part").contains("sleep"));
    cluster.kubectl_fails("exec reads -- write /whole/file x");
    cluster.kubectl("delete pod reads --timeout=180s");
    cluster.apply(&volume("lacks", "oarlock.local/absent:1"));
    let reason = "get pod lacks -o jsonpath={.status.containerStatuses[0].state.waiting.reason}";
    cluster.wait_for_output(reason, "the refusal", |text| text == "ErrImageNeverPull");
    cluster.kubectl("delete pod lacks --timeout=180s");
}
