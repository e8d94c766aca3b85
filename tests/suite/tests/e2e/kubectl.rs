//! What people do with kubectl all day.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use super::Case;
use super::cluster::{Cluster, PATIENCE, text};

pub(crate) const CASES: &[Case] = &[
    ("version_names_kubernetes_1_36", version),
    ("get_prints_every_form", get_forms),
    ("describe_works_for_each_kind", describe),
    ("apply_again_changes_nothing_and_prunes_removed_fields", apply_repeatedly),
    ("create_makes_each_kind", create),
    ("patch_label_and_annotate", patch),
    ("edit_opens_an_editor_and_applies_its_change", edit),
    ("unknown_fields_warn_or_fail", field_validation),
    ("scale_and_roll_out_and_back", rollout),
    ("logs_in_every_way", logs),
    ("exec_piped_and_with_exit_codes", exec),
    ("exec_on_a_terminal_has_its_size_from_the_start", exec_on_a_terminal),
    ("cp_both_ways", cp),
    ("port_forward_carries_requests", port_forward),
    ("run_expose_and_delete", run_and_expose),
    ("watch_sees_changes", watch),
    ("authorization_answers", authorization),
    ("cordon_drain_uncordon", drain),
    ("proxy_and_cluster_info", proxy),
    ("explain_and_api_resources", explain),
    ("namespace_deletion_takes_its_contents", namespace_deletion),
    ("anonymous_is_refused", anonymous),
];

/// A pod that waits, in the default namespace.
pub(crate) fn pod(name: &str, command: &[&str]) -> String {
    let command = serde_json::to_string(command).expect("JSON");
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  terminationGracePeriodSeconds: 2\n  restartPolicy: Never\n  containers:\n  - {{name: main, image: \"oarlock.local/testimage:1\", command: {command}}}\n"
    )
}

fn wait_ready(cluster: &Cluster, name: &str) {
    cluster.kubectl(&format!("wait --for=condition=Ready pod/{name} --timeout=180s"));
}

fn delete_pod(cluster: &Cluster, name: &str) {
    cluster.kubectl(&format!("delete pod {name} --timeout=180s"));
}

fn version(cluster: &Cluster) {
    let answer = cluster.kubectl("version");
    assert!(answer.contains("Server Version: v1.36.0+oarlock."), "{answer}");
    let node = cluster.get("nodes");
    let kubelet = &node["items"][0]["status"]["nodeInfo"]["kubeletVersion"];
    assert!(kubelet.as_str().is_some_and(|version| version.starts_with("v1.36.0+oarlock.")), "{kubelet}");
}

fn get_forms(cluster: &Cluster) {
    let table = cluster.kubectl("get pods -n demo");
    let header: Vec<&str> = table.lines().next().unwrap_or("").split_whitespace().collect();
    assert_eq!(header, ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]);
    assert_eq!(table.matches("1/1 ").count(), 3, "{table}");
    assert!(cluster.kubectl("get pods -n demo -o wide").contains("10.42."));
    assert!(cluster.kubectl("get deployment -n demo page -o yaml").contains("readyReplicas: 3"));
    assert_eq!(cluster.kubectl("get deploy page -n demo -o jsonpath={.status.readyReplicas}"), "3");
    let everywhere = cluster.kubectl("get services --all-namespaces");
    assert!(everywhere.contains("kubernetes") && everywhere.contains("page-nodeport"), "{everywhere}");
    assert_eq!(cluster.kubectl("get pods -n demo -l app=page -o name").lines().count(), 3);
    assert_eq!(cluster.kubectl("get pods -n demo -l app!=page -o name").lines().count(), 0);
    assert_eq!(cluster.kubectl("get pods -n demo --field-selector=status.phase=Running -o name").lines().count(), 3);
    assert_eq!(cluster.kubectl("get pods -n demo --field-selector=status.phase=Failed -o name").lines().count(), 0);
    assert!(cluster.kubectl("get all -n demo").contains("replicaset.apps/page-"));
    assert!(cluster.kubectl_fails("get pods -n demo absent").contains("pods \"absent\" not found"));
    assert!(cluster.kubectl_fails("get boats").contains("the server doesn't have a resource type \"boats\""));
}

fn describe(cluster: &Cluster) {
    let deployment = cluster.kubectl("describe deployment -n demo page");
    assert!(deployment.contains("3 desired | 3 updated | 3 total | 3 available"), "{deployment}");
    let pods = cluster.kubectl("describe pods -n demo");
    for expected in ["Liveness:", "Readiness:", "Scheduled", "Pulled", "Created", "Started", "QoS Class:"] {
        assert!(pods.contains(expected), "{expected} is not in\n{pods}");
    }
    let service = cluster.kubectl("describe service -n demo page");
    assert_eq!(service.matches(":8080").count(), 3, "{service}");
    let node = cluster.kubectl("describe node");
    for expected in ["KubeletReady", "Capacity:", "Allocatable:", "PodCIDR:", "Allocated resources:"] {
        assert!(node.contains(expected), "{expected} is not in\n{node}");
    }
    for line in [
        "describe namespace demo",
        "describe configmap -n demo page",
        "describe endpointslices -n demo",
        "describe replicasets -n demo",
    ] {
        cluster.kubectl(line);
    }
}

const CONFIG_MAP: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: pruned}\ndata: {keep: one, drop: two}\n";

fn apply_repeatedly(cluster: &Cluster) {
    assert!(cluster.apply(CONFIG_MAP).contains("configmap/pruned created"));
    assert!(cluster.apply(CONFIG_MAP).contains("configmap/pruned unchanged"));
    assert!(cluster.apply(&CONFIG_MAP.replace(", drop: two", "")).contains("configmap/pruned configured"));
    assert_eq!(cluster.get("configmap pruned")["data"], serde_json::json!({"keep": "one"}));
    let server_side = cluster.kubectl_with_input("apply --server-side --force-conflicts -f -", CONFIG_MAP);
    assert!(server_side.status.success(), "{}", text(&server_side.stderr));
    assert_eq!(cluster.get("configmap pruned")["data"]["drop"], "two");
    cluster.kubectl("delete configmap pruned");
}

fn create(cluster: &Cluster) {
    cluster.kubectl("create namespace made");
    cluster.kubectl("create configmap -n made settings --from-literal=a=b");
    cluster.kubectl("create secret generic -n made hidden --from-literal=key=value");
    cluster.kubectl("create serviceaccount -n made rower");
    let token = cluster.kubectl("create token -n made rower");
    assert_eq!(token.trim().split('.').count(), 3, "a token has three parts");
    cluster.kubectl("create deployment -n made web --image=oarlock.local/testimage:1 --replicas=2");
    cluster.kubectl("rollout status -n made deployment/web --timeout=180s");
    assert!(cluster.kubectl_fails("create namespace made").contains("already exists"));
    assert!(cluster.kubectl_fails("create namespace Not_A_Name").contains("Invalid value"));
    assert_eq!(cluster.get("secret -n made hidden")["data"]["key"], "dmFsdWU=");
    cluster.kubectl("delete namespace made --timeout=180s");
}

fn patch(cluster: &Cluster) {
    cluster.apply(CONFIG_MAP);
    cluster.kubectl("label configmap pruned tier=front");
    cluster.kubectl("annotate configmap pruned note=seen");
    assert!(cluster.kubectl_fails("label configmap pruned tier=back").contains("already has a value"));
    cluster.kubectl("label configmap pruned tier=back --overwrite");
    cluster.kubectl("patch configmap pruned --type=merge -p {\"data\":{\"drop\":null}}");
    cluster.kubectl("patch configmap pruned --type=json -p [{\"op\":\"add\",\"path\":\"/data/more\",\"value\":\"x\"}]");
    cluster.kubectl("patch configmap pruned -p {\"data\":{\"strategic\":\"yes\"}}");
    let object = cluster.get("configmap pruned");
    assert_eq!(object["metadata"]["labels"]["tier"], "back");
    assert_eq!(object["metadata"]["annotations"]["note"], "seen");
    assert_eq!(object["data"], serde_json::json!({"keep": "one", "more": "x", "strategic": "yes"}));
    cluster.kubectl("delete configmap pruned");
}

fn edit(cluster: &Cluster) {
    cluster.apply(CONFIG_MAP);
    let edit = |change: &str| {
        let editor = format!("sed -i {change}");
        cluster
            .kubectl_command()
            .env("KUBE_EDITOR", editor)
            .args(["edit", "configmap", "pruned"])
            .output()
            .expect("edit")
    };
    let changed = edit("s/one/three/");
    assert!(changed.status.success(), "{}", text(&changed.stderr));
    assert!(text(&changed.stdout).contains("configmap/pruned edited"), "{}", text(&changed.stdout));
    assert_eq!(cluster.get("configmap pruned")["data"]["keep"], "three");
    let same = edit("s/absent/words/");
    assert!(text(&same.stderr).contains("Edit cancelled, no changes made"), "{}", text(&same.stderr));
    cluster.kubectl("delete configmap pruned");
}

fn field_validation(cluster: &Cluster) {
    let manifest = format!("{CONFIG_MAP}colour: red\n");
    let strict = cluster.kubectl_with_input("apply --validate=strict -f -", &manifest);
    assert!(!strict.status.success());
    assert!(text(&strict.stderr).contains("unknown field \"colour\""), "{}", text(&strict.stderr));
    let warned = cluster.kubectl_with_input("apply --validate=warn -f -", &manifest);
    assert!(warned.status.success());
    assert!(text(&warned.stderr).contains("unknown field \"colour\""), "{}", text(&warned.stderr));
    let ignored = cluster.kubectl_with_input("apply --validate=ignore -f -", &manifest);
    assert!(ignored.status.success() && text(&ignored.stderr).is_empty(), "{}", text(&ignored.stderr));
    cluster.kubectl("delete configmap pruned");
}

fn rollout(cluster: &Cluster) {
    cluster.kubectl("create deployment fleet --image=oarlock.local/testimage:1");
    cluster.kubectl("rollout status deployment/fleet --timeout=180s");
    cluster.kubectl("scale deployment fleet --replicas=3");
    cluster.kubectl("rollout status deployment/fleet --timeout=180s");
    assert_eq!(cluster.kubectl("get deployment fleet -o jsonpath={.status.readyReplicas}"), "3");
    cluster.kubectl("set env deployment/fleet GREETING=second");
    cluster.kubectl("rollout status deployment/fleet --timeout=180s");
    let history = cluster.kubectl("rollout history deployment/fleet");
    assert!(history.contains("\n1 ") && history.contains("\n2 "), "{history}");
    cluster.kubectl("rollout undo deployment/fleet");
    cluster.kubectl("rollout status deployment/fleet --timeout=180s");
    assert!(!cluster.kubectl("get deployment fleet -o yaml").contains("second"));
    cluster.kubectl("rollout restart deployment/fleet");
    cluster.kubectl("rollout status deployment/fleet --timeout=180s");
    cluster.kubectl("set image deployment/fleet testimage=oarlock.local/testimage:absent");
    cluster.wait_for_output("get pods -l app=fleet", "a pod that cannot pull", |table| {
        table.contains("ErrImagePull") || table.contains("ImagePullBackOff")
    });
    let ready = cluster.kubectl("get deployment fleet -o jsonpath={.status.availableReplicas}");
    assert_eq!(ready, "3", "a bad image must not take working pods away");
    cluster.kubectl("delete deployment fleet --timeout=180s");
    cluster.wait_for_output("get pods -l app=fleet -o name", "no pod of the deleted deployment", |list| {
        !list.contains("pod/")
    });
}

fn logs(cluster: &Cluster) {
    cluster.apply(&pod("logger", &["/bin/log", "20", "16", "1"]));
    wait_ready(cluster, "logger");
    cluster.wait_for_output("logs logger", "twenty lines", |text| text.lines().count() == 20);
    assert_eq!(cluster.kubectl("logs logger --tail=3").lines().count(), 3);
    assert_eq!(cluster.kubectl("logs logger --since=1h").lines().count(), 20);
    assert!(cluster.kubectl("logs logger --timestamps --tail=1").starts_with("20"));
    let mut follow = cluster
        .kubectl_command()
        .args(["logs", "-f", "logger"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl logs -f");
    let lines = BufReader::new(follow.stdout.take().expect("stdout")).lines().take(20).count();
    assert_eq!(lines, 20);
    follow.kill().expect("end kubectl");
    follow.wait().expect("kubectl");
    delete_pod(cluster, "logger");
    cluster.apply(&pod("again", &["/bin/exit", "3"]).replace("restartPolicy: Never", "restartPolicy: Always"));
    cluster.wait_for_output("get pod again", "a restarted container", |table| {
        table.contains("CrashLoopBackOff") || table.contains("Error")
    });
    cluster.wait_for_output("logs -p again", "the log of the previous container", |text| !text.contains("not found"));
    delete_pod(cluster, "again");
}

fn exec(cluster: &Cluster) {
    cluster.apply(&pod("shell", &["/bin/sleep"]));
    wait_ready(cluster, "shell");
    assert_eq!(cluster.kubectl("exec shell -- /bin/echo hello rower").trim(), "hello rower");
    let piped = cluster.kubectl_with_input("exec -i shell -- /bin/cat", "one\ntwo\n");
    assert_eq!(text(&piped.stdout), "one\ntwo\n");
    let failed = cluster.try_kubectl("exec shell -- /bin/exit 7");
    assert_eq!(failed.status.code(), Some(7), "{}", text(&failed.stderr));
    let absent = cluster.kubectl_fails("exec shell -- /bin/nothing");
    assert!(absent.contains("no such file") || absent.contains("not found"), "{absent}");
    let large = "x".repeat(1 << 20);
    let echoed = cluster.kubectl_with_input("exec -i shell -- /bin/cat", &large);
    assert_eq!(echoed.stdout.len(), large.len(), "a megabyte comes back whole");
    delete_pod(cluster, "shell");
}

/// `script` gives kubectl a terminal, whose size `stty` sets.
fn exec_on_a_terminal(cluster: &Cluster) {
    cluster.apply(&pod("terminal", &["/bin/sleep"]));
    wait_ready(cluster, "terminal");
    let kubectl = cluster.kubectl_command();
    let line: Vec<String> = std::iter::once(kubectl.get_program())
        .chain(kubectl.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    for _ in 0..5 {
        let command = format!("stty rows 33 cols 101; {} exec -it terminal -- /bin/tty-size", line.join(" "));
        let output = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .env("HOME", cluster.data_dir())
            .stdin(Stdio::null())
            .output()
            .expect("script");
        assert!(output.status.success(), "{}", text(&output.stdout));
        assert!(text(&output.stdout).contains("33 101"), "{:?}", text(&output.stdout));
    }
    delete_pod(cluster, "terminal");
}

fn cp(cluster: &Cluster) {
    cluster.apply(&pod("files", &["/bin/sleep"]));
    wait_ready(cluster, "files");
    let local = cluster.data_dir().join("copied.txt");
    std::fs::write(&local, "over the water\n").expect("write");
    cluster.kubectl(&format!("cp {} files:/tmp/copied.txt", local.display()));
    assert_eq!(cluster.kubectl("exec files -- /bin/cat /tmp/copied.txt"), "over the water\n");
    let back = cluster.data_dir().join("back.txt");
    cluster.kubectl(&format!("cp files:/tmp/copied.txt {}", back.display()));
    assert_eq!(std::fs::read_to_string(&back).expect("read"), "over the water\n");
    std::fs::remove_file(local).expect("remove");
    std::fs::remove_file(back).expect("remove");
    delete_pod(cluster, "files");
}

fn port_forward(cluster: &Cluster) {
    let mut forward = cluster
        .kubectl_command()
        .args(["port-forward", "-n", "demo", "deployment/page", ":8080"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl port-forward");
    let mut line = String::new();
    // The pipe stays open: kubectl says something about each connection and would die of a closed one.
    let mut output = BufReader::new(forward.stdout.take().expect("stdout"));
    output.read_line(&mut line).expect("read");
    let port: u16 = line
        .split("127.0.0.1:")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .and_then(|port| port.parse().ok())
        .unwrap_or_else(|| panic!("no port in {line:?}"));
    for _ in 0..5 {
        let mut connection = TcpStream::connect(("127.0.0.1", port)).expect("connect");
        connection.set_read_timeout(Some(PATIENCE)).expect("timeout");
        connection.write_all(b"GET / HTTP/1.1\r\nHost: page\r\nConnection: close\r\n\r\n").expect("write");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).expect("read");
        assert!(answer.contains("Oarlock rows"), "{answer}");
    }
    forward.kill().expect("end kubectl");
    forward.wait().expect("kubectl");
}

fn run_and_expose(cluster: &Cluster) {
    cluster.kubectl("run single --image=oarlock.local/testimage:1 --port=8080");
    wait_ready(cluster, "single");
    cluster.kubectl("expose pod single --port=80 --target-port=8080");
    assert!(cluster.kubectl("get service single").contains("10.43."));
    cluster.kubectl("delete pod/single service/single --timeout=180s");
    assert!(cluster.kubectl_fails("get pod single").contains("NotFound"));
}

fn watch(cluster: &Cluster) {
    let mut watching = cluster
        .kubectl_command()
        .args(["get", "configmaps", "-w", "--output-watch-events", "-o", "name"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl get -w");
    let mut lines = BufReader::new(watching.stdout.take().expect("stdout")).lines();
    let first = lines.next().expect("a line").expect("read");
    assert!(first.contains("kube-root-ca.crt"), "{first}");
    cluster.apply(CONFIG_MAP);
    cluster.kubectl("delete configmap pruned");
    let seen: Vec<String> = lines.take(2).map(|line| line.expect("read")).collect();
    assert!(seen.iter().all(|line| line.contains("pruned")), "{seen:?}");
    watching.kill().expect("end kubectl");
    watching.wait().expect("kubectl");
}

fn authorization(cluster: &Cluster) {
    assert_eq!(cluster.kubectl("auth can-i delete nodes").trim(), "yes");
    let refused = cluster.kubectl_fails("auth can-i delete nodes --as=stranger");
    assert!(refused.contains("no"), "{refused}");
    let denied = cluster.kubectl_fails("get secrets --as=stranger");
    assert!(denied.contains("forbidden") && denied.contains("cannot list resource \"secrets\""), "{denied}");
    cluster.kubectl("create clusterrole reader --verb=get,list --resource=secrets");
    cluster.kubectl("create clusterrolebinding reader --clusterrole=reader --user=stranger");
    cluster.kubectl("get secrets --as=stranger");
    cluster.kubectl("delete clusterrole/reader clusterrolebinding/reader");
    assert!(cluster.kubectl("auth whoami").contains("kubernetes-admin"));
}

fn drain(cluster: &Cluster) {
    let node = cluster.get("nodes")["items"][0]["metadata"]["name"].as_str().expect("name").to_owned();
    cluster.kubectl(&format!("cordon {node}"));
    assert!(cluster.kubectl("get nodes").contains("SchedulingDisabled"));
    cluster.apply(&pod("waiting", &["/bin/sleep"]));
    cluster.wait_for_output("describe pod waiting", "a scheduling failure", |text| {
        text.contains("FailedScheduling") && text.contains("0/1 nodes are available: 1 node(s) were unschedulable")
    });
    let drained =
        cluster.kubectl(&format!("drain {node} --ignore-daemonsets --force --delete-emptydir-data --timeout=180s"));
    assert_eq!(drained.matches(" evicted").count(), 3, "{drained}");
    cluster.kubectl(&format!("uncordon {node}"));
    wait_ready(cluster, "waiting");
    cluster.kubectl("rollout status -n demo deployment/page --timeout=180s");
    delete_pod(cluster, "waiting");
}

fn proxy(cluster: &Cluster) {
    assert!(cluster.kubectl("cluster-info").contains("is running at"));
    let mut proxy =
        cluster.kubectl_command().args(["proxy", "--port=0"]).stdout(Stdio::piped()).spawn().expect("kubectl proxy");
    let mut line = String::new();
    BufReader::new(proxy.stdout.take().expect("stdout")).read_line(&mut line).expect("read");
    let address = line.trim().rsplit(' ').next().expect("address").to_owned();
    let mut connection = TcpStream::connect(&address).unwrap_or_else(|error| panic!("{line}: {error}"));
    connection.write_all(b"GET /api/v1/namespaces/demo/services/page:http/proxy/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").expect("write");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("read");
    assert!(answer.contains("Oarlock rows"), "{answer}");
    proxy.kill().expect("end kubectl");
    proxy.wait().expect("kubectl");
}

fn explain(cluster: &Cluster) {
    assert!(cluster.kubectl("explain deployment.spec.strategy").contains("rollingUpdate"));
    let resources = cluster.kubectl("api-resources");
    for expected in ["deployments", "po ", "endpointslices", "clusterrolebindings", "leases"] {
        assert!(resources.contains(expected), "{expected} is not in\n{resources}");
    }
    assert!(cluster.kubectl("get events -n demo").contains("Started"));
}

fn namespace_deletion(cluster: &Cluster) {
    cluster.kubectl("create namespace doomed");
    cluster.kubectl("create deployment -n doomed web --image=oarlock.local/testimage:1");
    cluster.kubectl("create configmap -n doomed settings --from-literal=a=b");
    cluster.kubectl("delete namespace doomed --timeout=180s");
    assert!(cluster.kubectl_fails("get namespace doomed").contains("not found"));
    assert_eq!(cluster.kubectl("get pods,configmaps -A -o name").matches("doomed").count(), 0);
}

/// Without a certificate only the health endpoints answer.
fn anonymous(_: &Cluster) {
    let status = |path: &str| {
        let url = format!("https://127.0.0.1:6443{path}");
        let arguments =
            ["--silent", "--insecure", "--max-time", "10", "--output", "/dev/null", "--write-out", "%{http_code}"];
        text(&Command::new("curl").args(arguments).arg(url).output().expect("curl").stdout)
    };
    for path in ["/healthz", "/livez", "/readyz"] {
        assert_eq!(status(path), "200", "{path}");
    }
    for path in ["/api/v1/namespaces", "/api/v1/secrets", "/apis", "/metrics"] {
        assert_eq!(status(path), "401", "{path}");
    }
}
