//! What runs in a pod beside its containers' own programs: lifecycle hooks, and what `kubectl debug` adds.

use std::fs;

use super::Case;
use super::cluster::Cluster;
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[
    ("debug_adds_a_container_that_sees_its_targets_processes", debug),
    ("hooks_run_after_the_start_and_before_the_end", hooks),
    ("a_hook_that_fails_is_told", failing_hooks),
];

fn debug(cluster: &Cluster) {
    cluster.apply(&pod("patient", &["/bin/sleep"]));
    cluster.kubectl("wait --for=condition=Ready pod/patient --timeout=180s");
    cluster.kubectl(
        "debug patient --image=oarlock.local/testimage:1 --container=doctor --target=main -- /bin/cat /proc/1/cmdline",
    );
    let ended = "get pod patient -o jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.exitCode}";
    cluster.wait_for_output(ended, "the end of the debugger", |text| text == "0");
    let seen = cluster.kubectl("logs patient -c doctor");
    assert!(seen.starts_with("/bin/sleep"), "the first process is the target's: {seen:?}");
    let after = cluster.get("pod patient");
    assert_eq!(after["status"]["containerStatuses"][0]["restartCount"], 0);
    assert_eq!(after["status"]["phase"], "Running");
    cluster.kubectl("delete pod patient --timeout=180s");
}

fn hooks(cluster: &Cluster) {
    let directory = cluster.data_dir().join("said");
    let lifecycle = "lifecycle: {postStart: {exec: {command: [/bin/write, /said/first, hello]}}, \
        preStop: {exec: {command: [/bin/write, /said/last, bye]}}}";
    let mount = "volumeMounts: [{name: said, mountPath: /said}]";
    let manifest = pod("polite", &["/bin/sleep"]).replace("name: main,", &format!("name: main, {lifecycle}, {mount},"))
        + &format!(
            "  volumes: [{{name: said, hostPath: {{path: {}, type: DirectoryOrCreate}}}}]\n",
            directory.display()
        );
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/polite --timeout=180s");
    let said = |name: &str| fs::read_to_string(directory.join(name)).ok();
    assert_eq!((said("first").as_deref(), said("last")), (Some("hello\n"), None));
    cluster.kubectl("delete pod polite --timeout=180s");
    // A command runs in a container only while that lives.
    assert_eq!(said("last").as_deref(), Some("bye\n"));
    fs::remove_dir_all(&directory).expect("the directory goes");
}

fn failing_hooks(cluster: &Cluster) {
    let with = |name: &str, hook: &str, command: &[&str]| {
        let lifecycle = format!("lifecycle: {{{hook}: {{exec: {{command: [/bin/exit, \"3\"]}}}}}}");
        pod(name, command).replace("name: main,", &format!("name: main, {lifecycle},"))
    };
    // It is killed in the end; one that obeys would have succeeded.
    cluster.apply(&with("stumbles", "postStart", &["/bin/signal", "ignore"]));
    cluster.wait_for_output("get pod stumbles -o jsonpath={.status.phase}", "its failure", |text| text == "Failed");
    cluster.apply(&with("lingers", "preStop", &["/bin/sleep"]));
    cluster.kubectl("wait --for=condition=Ready pod/lingers --timeout=180s");
    cluster.kubectl("delete pod stumbles lingers --timeout=180s");
    for (name, reason) in [("stumbles", "FailedPostStartHook"), ("lingers", "FailedPreStopHook")] {
        let events = format!("get events --field-selector=involvedObject.name={name}");
        cluster.wait_for_output(&events, reason, |text| text.contains(reason) && text.contains("exited with 3"));
    }
}
