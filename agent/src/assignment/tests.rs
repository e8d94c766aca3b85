//! Tests of giving out processors and memory on a machine given as files; devices are tested with a plugin's process.

use std::path::Path;

use serde_json::json;

use super::*;

/// Two nodes of four processors each, two threads a core, with 4 GiB each.
fn machine(sys: &Path) {
    let put = |path: String, text: String| {
        let path = sys.join("devices/system").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("cpu/online".into(), "0-7".into());
    for cpu in 0..8 {
        let first = cpu / 4 * 4 + cpu % 2;
        put(format!("cpu/cpu{cpu}/topology/core_cpus_list"), format!("{first},{}", first + 2));
        put(format!("cpu/cpu{cpu}/topology/physical_package_id"), (cpu / 4).to_string());
    }
    for node in 0..2 {
        put(format!("node/node{node}/cpulist"), format!("{}-{}", node * 4, node * 4 + 3));
        put(format!("node/node{node}/meminfo"), format!("Node {node} MemTotal: {} kB\n", 4 << 20));
    }
}

fn config(dir: &Path, adjust: impl Fn(&mut AssignmentConfig)) -> Config {
    let mut config = Config::new("n", "127.0.0.1".parse().unwrap());
    config.kubelet_dir = dir.join("kubelet");
    config.reserved_cpu_millis = 1000;
    config.eviction.thresholds.clear();
    config.assignment.sys = dir.join("sys");
    config.assignment.cpu_static = true;
    adjust(&mut config.assignment);
    machine(&config.assignment.sys);
    config
}

fn pod(uid: &str, spec: serde_json::Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": uid, "namespace": "d", "uid": uid}, "spec": spec})).unwrap()
}

fn sized(name: &str, cpu: &str, memory: &str) -> serde_json::Value {
    json!({"name": name, "resources": {"limits": {"cpu": cpu, "memory": memory}, "requests": {"cpu": cpu, "memory": memory}}})
}

fn exact(uid: &str, cpu: &str) -> Pod {
    pod(uid, json!({"containers": [sized("c", cpu, "1Gi")]}))
}

fn open(config: &Config) -> Assignments {
    Assignments::open(config, &Machine::default()).unwrap()
}

#[tokio::test]
async fn whole_processors_are_a_containers_own_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), |_| {});
    let assignments = open(&config);
    assignments.admit(&exact("a", "2")).await.unwrap();
    assert_eq!(assignments.assigned("a", "c").cpus, "1,3", "a whole core beside the reserved processor");
    assert_eq!(assignments.assigned("b", "c").cpus, "0,2,4-7", "everybody else");
    let fraction = exact("f", "1500m");
    assert!(!assignments.concerns(&fraction), "only whole processors are given out");
    assert!(!assignments.concerns(&pod("x", json!({"containers": [{"name": "c"}]}))));
    // As after a kill.
    let again = open(&config);
    assert_eq!(again.assigned("a", "c").cpus, "1,3");
    let many = again.admit(&exact("b", "6")).await.unwrap_err();
    assert_eq!(many.reason, "UnexpectedAdmissionError");
    assert_eq!(
        many.message,
        "Allocate failed due to not enough cpus available to satisfy request: requested=6, available=5, which is unexpected"
    );
    again.keep_only(|_| false);
    assert_eq!(open(&config).assigned("a", "c").cpus, "0-7", "what was given back is shared again");
}

#[tokio::test]
async fn a_state_of_another_policy_keeps_the_agent_from_starting() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), |_| {});
    drop(open(&config));
    let mut other = config.clone();
    other.assignment.cpu_static = false;
    let error = Assignments::open(&other, &Machine::default()).err().expect("refused").to_string();
    assert!(
        error.starts_with("could not restore state from checkpoint: configured policy \"none\" differs"),
        "{error}"
    );
    assert!(error.contains("please drain this node and delete the CPU manager checkpoint file"), "{error}");
}

#[tokio::test]
async fn half_a_core_is_refused_where_only_whole_ones_are_given() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), |own| own.cpu_options.full_physical = true);
    let refused = open(&config).admit(&exact("a", "3")).await.unwrap_err();
    assert_eq!(refused.reason, "SMTAlignmentError");
    assert_eq!(refused.message, "SMT Alignment Error: requested 3 cpus not multiple cpus per core = 2");
}

#[tokio::test]
async fn processors_and_memory_come_from_one_node_or_the_pod_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), |own| {
        own.memory_static = true;
        own.topology_policy = Policy::SingleNumaNode;
        own.reserved_memory.insert(0, [("memory".to_owned(), 1 << 30)].into());
    });
    let wrong = Assignments::open(&config, &Machine::default()).err().expect("refused").to_string();
    assert!(wrong.contains("determined by Node Allocatable"), "{wrong}");
    config.reserved_memory_bytes = 1 << 30;
    let assignments = open(&config);
    let large = |uid: &str| pod(uid, json!({"containers": [sized("c", "2", "4Gi")]}));
    assignments.admit(&large("a")).await.unwrap();
    let assigned = assignments.assigned("a", "c");
    assert_eq!((assigned.cpus.as_str(), assigned.memory_nodes.as_str()), ("4,6", "1"), "node 0 has too little memory");
    let refused = assignments.admit(&large("b")).await.unwrap_err();
    assert_eq!(refused.reason, "TopologyAffinityError");
    assert_eq!(refused.message, "Resources cannot be allocated with Topology locality");
    assert!(assignments.resize_refused(&large("a")).is_some());
    // All or nothing: the second container does not fit, so the first gives back.
    let both = pod("d", json!({"containers": [sized("c", "1", "1Gi"), sized("e", "1", "4Gi")]}));
    assert!(assignments.admit(&both).await.is_err());
    assert_eq!(assignments.assigned("d", "c").memory_nodes, "");
    assert_eq!(open(&config).assigned("a", "c").memory_nodes, "1");
}

#[tokio::test]
async fn one_place_for_a_whole_pod_is_found_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), |own| {
        own.topology_policy = Policy::SingleNumaNode;
        own.topology_scope_pod = true;
    });
    let assignments = open(&config);
    let wide = pod("w", json!({"containers": [sized("a", "3", "1Gi"), sized("b", "2", "1Gi")]}));
    assert_eq!(assignments.admit(&wide).await.unwrap_err().reason, "TopologyAffinityError");
    let fits = pod(
        "f",
        json!({"initContainers": [sized("i", "4", "1Gi")],
        "containers": [sized("a", "2", "1Gi"), sized("b", "2", "1Gi")]}),
    );
    assignments.admit(&fits).await.unwrap();
    assert_eq!(assignments.assigned("f", "i").cpus, "4-7");
    let both = [assignments.assigned("f", "a").cpus, assignments.assigned("f", "b").cpus];
    assert_eq!(both, ["4,6", "5,7"], "what the init container had is used again");
}
