//! Limits reach the kernel: the cgroup of a container holds what the pod asked for, and exceeding memory is told as such.

use std::fs;
use std::path::{Path, PathBuf};

use oarlock_testkit::{is_lab, wait_for};

use super::Case;
use super::cluster::{Cluster, LOGIN_DROP_IN, PATIENCE};
use super::kubectl::pod;

pub(crate) const CASES: &[Case] = &[
    ("limits_are_enforced_in_cgroups", limits),
    ("each_class_of_pods_has_its_cgroup", classes),
    ("a_container_beyond_its_memory_is_oom_killed", oom),
    ("the_machines_stop_waits_for_pods", shutdown_lock),
    ("swap_and_huge_pages_are_bounded", swap_and_huge_pages),
];

fn with_resources(manifest: &str, resources: &str) -> String {
    manifest.replace("name: main,", &format!("name: main, resources: {resources},"))
}

fn limits(cluster: &Cluster) {
    let manifest = with_resources(
        &pod("limited", &["/bin/sleep"]),
        "{limits: {memory: 64Mi, cpu: 250m}, requests: {memory: 32Mi, cpu: 100m}}",
    );
    cluster.apply(&manifest);
    cluster.kubectl("wait --for=condition=Ready pod/limited --timeout=180s");
    let object = cluster.get("pod limited");
    let uid = object["metadata"]["uid"].as_str().expect("uid");
    let id = object["status"]["containerStatuses"][0]["containerID"].as_str().expect("id");
    let id = id.rsplit('/').next().expect("an id");
    assert_eq!(object["status"]["qosClass"], "Burstable");
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let container = container_group(Path::new("/sys/fs/cgroup"), uid, id);
        assert_eq!(read(&container, "memory.max"), "67108864");
        assert_eq!(read(&container, "cpu.max"), "25000 100000");
        let pod = container.parent().expect("the pod's cgroup");
        assert_eq!(read(pod, "memory.max"), "67108864");
        assert_eq!(read(pod, "cpu.max"), "25000 100000");
        if pod.extension().is_some_and(|kind| kind == "slice") {
            a_reload_of_systemd_changes_no_limit([pod, &container, pod.parent().expect("the class's cgroup")]);
        }
    } else {
        let container = container_group(Path::new("/sys/fs/cgroup/memory"), uid, id);
        assert_eq!(read(&container, "memory.limit_in_bytes"), "67108864");
        assert_eq!(read(container.parent().expect("the pod's cgroup"), "memory.limit_in_bytes"), "67108864");
        let container = container_group(Path::new("/sys/fs/cgroup/cpu"), uid, id);
        assert_eq!(read(&container, "cpu.cfs_quota_us"), "25000");
        assert_eq!(read(&container, "cpu.shares"), "102");
    }
    cluster.kubectl("delete pod limited --timeout=180s");
}

fn a_reload_of_systemd_changes_no_limit(groups: [&Path; 3]) {
    let limits =
        || groups.map(|group| ["memory.max", "cpu.max", "cpu.weight", "pids.max"].map(|file| read(group, file)));
    let before = limits();
    let reloaded = std::process::Command::new("systemctl").arg("daemon-reload").status().expect("systemctl");
    assert!(reloaded.success());
    assert_eq!(limits(), before);
}

/// Each class of pods has its place in the tree, which a pod leaves without a trace.
fn classes(cluster: &Cluster) {
    const LIMITED: &str = "{limits: {memory: 32Mi, cpu: 50m}}";
    let pods = [
        ("guaranteed", with_resources(&pod("guaranteed", &["/bin/sleep"]), LIMITED), "kubepods"),
        ("besteffort", pod("besteffort", &["/bin/sleep"]), "besteffort"),
    ];
    for (_, manifest, _) in &pods {
        cluster.apply(manifest);
    }
    cluster.kubectl("wait --for=condition=Ready pod/guaranteed pod/besteffort --timeout=180s");
    let mut groups = Vec::new();
    for (name, _, class) in &pods {
        let object = cluster.get(&format!("pod {name}"));
        let uid = object["metadata"]["uid"].as_str().expect("uid");
        let id = object["status"]["containerStatuses"][0]["containerID"].as_str().expect("id");
        let hierarchy = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].map(Path::new);
        let hierarchy = hierarchy.into_iter().find(|path| path.is_dir()).expect("control groups");
        let container = container_group(hierarchy, uid, id.rsplit('/').next().expect("an id"));
        let group = container.parent().expect("the pod's cgroup").to_owned();
        let above =
            group.parent().expect("the class's cgroup").file_name().expect("a name").to_string_lossy().into_owned();
        let slices = [format!("{class}.slice"), format!("kubepods-{class}.slice")];
        let by_systemd = slices.contains(&above);
        assert!(by_systemd || (above == *class && !is_lab()), "{name} is in {above}");
        groups.push(group);
    }
    cluster.kubectl("delete pod guaranteed besteffort --timeout=180s");
    wait_for("the pods' cgroups to go", PATIENCE, || groups.iter().all(|group| !group.exists()).then_some(()));
}

/// The directory of a container below that of its pod.
fn container_group(hierarchy: &Path, uid: &str, id: &str) -> PathBuf {
    let mut pending = vec![hierarchy.to_owned()];
    while let Some(directory) = pending.pop() {
        let path = directory.to_string_lossy().into_owned();
        let of_pod = path.contains(uid) || path.contains(&uid.replace('-', "_"));
        if of_pod && path.contains(id) {
            return directory;
        }
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pending.push(entry.path());
            }
        }
    }
    panic!("no cgroup of container {id} in pod {uid} below {}", hierarchy.display());
}

fn read(directory: &Path, file: &str) -> String {
    let path = directory.join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

/// Where login1 is, the agent holds the stop of the machine up, for as long as it is configured.
fn shutdown_lock(_: &Cluster) {
    if !is_lab() {
        println!("not run: login1 of this machine is not to be configured by tests");
        return;
    }
    let output = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program).args(arguments).output().expect(program);
        String::from_utf8(output.stdout).expect("text")
    };
    wait_for("the agent's lock", PATIENCE, || {
        let locks = output("systemd-inhibit", &["--list", "--no-legend", "--no-pager"]);
        locks.lines().any(|line| line.starts_with("kubelet ") && line.contains(" shutdown ")).then_some(())
    });
    assert!(fs::read_to_string(LOGIN_DROP_IN).expect("the file").ends_with("InhibitDelayMaxSec=30\n"));
    let login = ["get-property", "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"];
    assert_eq!(output("busctl", &[&login[..], &["InhibitDelayMaxUSec"]].concat()).trim(), "t 30000000");
}

/// Swap is shared out by what burstable containers request of the node's memory; huge pages are bounded and mounted.
fn swap_and_huge_pages(cluster: &Cluster) {
    if !is_lab() {
        println!("not run: this machine's swap and huge pages are not to be configured by tests");
        return;
    }
    let node = cluster.get("nodes");
    let node = &node["items"][0]["status"];
    let swap = node["nodeInfo"]["swap"]["capacity"].as_u64().expect("the node's swap");
    let memory = node["capacity"]["memory"].as_str().and_then(|text| text.strip_suffix("Ki")).expect("kibibytes");
    let memory = memory.parse::<u64>().expect("a number") << 10;
    assert_eq!(node["allocatable"]["hugepages-2Mi"], "16Mi");
    let huge = "  volumes: [{name: huge, emptyDir: {medium: HugePages}}]\n";
    let mount = "{limits: {hugepages-2Mi: 4Mi, memory: 96Mi}, requests: {memory: 64Mi, cpu: 10m}}, \
        volumeMounts: [{name: huge, mountPath: /huge}]";
    cluster.apply(&(with_resources(&pod("swaps", &["/bin/sleep"]), mount) + huge));
    cluster.apply(&with_resources(&pod("stays", &["/bin/sleep"]), "{limits: {memory: 32Mi, cpu: 50m}}"));
    cluster.kubectl("wait --for=condition=Ready pod/swaps pod/stays --timeout=180s");
    let group = |name: &str| {
        let object = cluster.get(&format!("pod {name}"));
        let uid = object["metadata"]["uid"].as_str().expect("uid");
        let id = object["status"]["containerStatuses"][0]["containerID"].as_str().expect("id");
        container_group(Path::new("/sys/fs/cgroup"), uid, id.rsplit('/').next().expect("an id"))
    };
    let container = group("swaps");
    let share = (u128::from(64_u64 << 20) * u128::from(swap) / u128::from(memory)) as u64;
    let bound: u64 = read(&container, "memory.swap.max").parse().expect("a bound");
    assert!(share > 0 && share.abs_diff(bound) <= 4096, "{bound} of {swap} bytes of swap, not {share}");
    assert_eq!(read(&group("stays"), "memory.swap.max"), "0", "guaranteed pods do not swap");
    assert_eq!(read(&container, "hugetlb.2MB.max"), (4 << 20).to_string());
    let process = read(&container, "cgroup.procs");
    let mounts = read(&Path::new("/proc").join(process), "mountinfo");
    let mount = mounts.lines().find(|line| line.contains(" /huge ")).expect("the mount");
    assert!(mount.contains("hugetlbfs") && mount.contains("pagesize=2M"), "{mount}");
    cluster.kubectl("delete pod swaps stays --timeout=180s");
}

fn oom(cluster: &Cluster) {
    cluster.apply(&with_resources(&pod("hungry", &["/bin/oom"]), "{limits: {memory: 32Mi}}"));
    cluster.wait_for_output("get pod hungry", "an OOM kill", |table| table.contains("OOMKilled"));
    let object = cluster.get("pod hungry");
    let state = &object["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(state["reason"], "OOMKilled");
    assert_eq!(state["exitCode"], 137);
    assert_eq!(object["status"]["phase"], "Failed");
    cluster.kubectl("delete pod hungry --timeout=180s");
}
