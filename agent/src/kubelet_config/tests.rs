//! Tests of reading a KubeletConfiguration: what is taken, what is refused, and with which words.

use std::path::PathBuf;

use super::*;
use crate::{Amount, Signal};

fn read(text: &str) -> Result<Config, String> {
    let given: KubeletConfiguration = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    let mut config = Config::new("n", "127.0.0.1".parse().unwrap());
    given.apply(&mut config).map_err(|error| error.to_string())?;
    Ok(config)
}

#[test]
fn fields_are_taken_under_their_upstream_names() {
    let config = read(
        "kind: KubeletConfiguration
apiVersion: kubelet.config.k8s.io/v1beta1
maxPods: 250
clusterDNS: [10.0.0.10]
evictionHard: {memory.available: 1Gi, nodefs.available: 5%}
evictionSoft: {memory.available: 2Gi}
evictionSoftGracePeriod: {memory.available: 1m30s}
evictionPressureTransitionPeriod: 30s
imageGCHighThresholdPercent: 70
imageGCLowThresholdPercent: 60
containerLogMaxSize: 50Mi
kubeReserved: {cpu: 200m, memory: 256Mi}
systemReserved: {cpu: 100m}
podPidsLimit: 1024
allowedUnsafeSysctls: ['kernel.msg*', net.core.somaxconn]
cpuCFSQuotaPeriod: 50ms
crashLoopBackOff: {maxContainerRestartPeriod: 20s}
nodeStatusReportFrequency: 1m
registerWithTaints: [{key: a, effect: NoSchedule}]
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
",
    )
    .expect("valid");
    assert_eq!((config.max_pods, config.pod_pids_limit), (250, Some(1024)));
    assert_eq!((config.reserved_cpu_millis, config.reserved_memory_bytes), (300, 256 << 20));
    assert_eq!(config.eviction.hard(Signal::MemoryAvailable), Some(Amount::Absolute(1 << 30)));
    assert_eq!(config.eviction.thresholds.len(), 3);
    assert_eq!(config.eviction.transition_period, Duration::from_secs(30));
    assert_eq!((config.image_gc.high_percent, config.image_gc.low_percent), (70, 60));
    assert_eq!(config.container_log_max_bytes, 50 << 20);
    assert_eq!(config.max_restart_delay, Duration::from_secs(20));
    assert_eq!(config.cpu_cfs_quota_period, Duration::from_millis(50));
    assert_eq!(config.runtime_endpoint, PathBuf::from("/run/containerd/containerd.sock"));
    assert_eq!(config.register_with_taints[0].key, "a");
    assert_eq!(config.allowed_sysctls.patterns(), ["kernel.msg*", "net.core.somaxconn"]);
}

#[test]
fn what_is_wrong_is_refused_and_named() {
    for (text, expected) in [
        ("evictionHrad: {}", "unknown field `evictionHrad`"),
        ("allowedUnsafeSysctls: [vm.swappiness]", "allowedUnsafeSysctls: \"vm.swappiness\" is no kernel parameter"),
        ("staticPodURL: x", "staticPodURL: this agent does not implement the field"),
        ("shutdownGracePeriodCriticalPods: 30s", "must be <= shutdownGracePeriod"),
        ("kind: Pod", "kind: must be KubeletConfiguration"),
        ("apiVersion: v1", "apiVersion: must be"),
        ("maxPods: many", "invalid type"),
        ("imageMinimumGCAge: 5", "invalid type"),
        ("imageMinimumGCAge: 5 minutes", "is not a duration"),
        ("evictionHard: {disk: 1Gi}", "unknown eviction signal disk"),
        ("imageGCLowThresholdPercent: 90", "must be less than"),
        ("containerLogMaxFiles: 1", "must be greater than 1"),
        ("readOnlyPort: 10255", "readOnlyPort"),
        ("authentication: {anonymous: {enabled: true}}", "authentication.anonymous.enabled"),
        ("authentication: {anonymus: {}}", "unknown field `anonymus`"),
        ("cpuManagerPolicy: static", "cpuManagerPolicy: the static policy needs"),
        ("cpuManagerPolicy: fast", "cpuManagerPolicy: \"fast\" is neither"),
        ("cpuManagerPolicyOptions: {full-pcpus-only: \"true\"}", "cpuManagerPolicyOptions"),
        ("cpuManagerPolicy: static\nreservedSystemCPUs: \"0\"\ncpuManagerPolicyOptions: {fast: \"true\"}", "fast"),
        ("reservedSystemCPUs: 0-a", "reservedSystemCPUs"),
        ("memoryManagerPolicy: Static", "memoryManagerPolicy: the Static policy needs reservedMemory"),
        ("reservedMemory: [{numaNode: 0, limits: {cpu: \"1\"}}]", "reservedMemory"),
        ("topologyManagerPolicy: all", "topologyManagerPolicy"),
        ("topologyManagerScope: node", "topologyManagerScope"),
        ("kubeReserved: {memory: lots}", "kubeReserved: memory"),
        ("cpuCFSQuotaPeriod: 2s", "cpuCFSQuotaPeriod"),
        ("memorySwap: {swapBehavior: AllSwap}", "memorySwap.swapBehavior: invalid value"),
        ("enforceNodeAllocatable: [pods, all]", "enforceNodeAllocatable: \"all\" is not an option"),
        ("enforceNodeAllocatable: [pods, none]", "enforceNodeAllocatable: may contain only one"),
        ("enforceNodeAllocatable: [kube-reserved]", "kubeReservedCgroup: must be specified when"),
        ("userNamespaces: {idsPerPod: 1000}", "userNamespaces.idsPerPod: must be a multiple of 65536"),
        ("cgroupDriver: auto", "cgroupDriver: must be cgroupfs or systemd"),
        ("containerRuntimeEndpoint: tcp://1.2.3.4:1", "containerRuntimeEndpoint"),
    ] {
        let error = read(text).expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn what_changes_nothing_is_named_and_what_was_given_is_shown() {
    let given: KubeletConfiguration = serde_yaml_ng::from_str("syncFrequency: 1m\nmaxPods: 5\n").expect("valid");
    assert_eq!(given.without_effect(), ["syncFrequency"]);
    assert_eq!(given.given(), serde_json::json!({"maxPods": 5}));
}

#[test]
fn daemons_are_held_to_what_is_reserved_for_them() {
    let config = read(
        "kubeReserved: {cpu: 200m, memory: 256Mi, pid: \"500\"}
systemReserved: {cpu: 100m, memory: 1Gi}
kubeReservedCgroup: /kube.slice
systemReservedCgroup: /system.slice
enforceNodeAllocatable: [kube-reserved, system-reserved-compressible]
memorySwap: {swapBehavior: LimitedSwap}
userNamespaces: {idsPerPod: 131072}
",
    )
    .expect("valid");
    let [kube, system] = &config.enforced[..] else { panic!("two groups") };
    assert_eq!((kube.whose, kube.cgroup.as_str(), kube.cpu_millis), ("kube", "/kube.slice", Some(200)));
    assert_eq!((kube.memory_bytes, kube.pids), (Some(256 << 20), Some(500)));
    assert_eq!((system.whose, system.cpu_millis, system.memory_bytes), ("system", Some(100), None));
    assert!(!config.enforce_pods && config.limited_swap);
    assert_eq!((config.reserved_memory_bytes, config.ids_per_pod), ((1 << 30) + (256 << 20), 131_072));
    assert!(read("enforceNodeAllocatable: [pods]").expect("valid").enforce_pods);
}

#[test]
fn default_thresholds_can_be_kept_beside_own_ones() {
    let config = read("evictionHard: {memory.available: 1Gi}\nmergeDefaultEvictionSettings: true\n").expect("valid");
    assert_eq!(config.eviction.hard(Signal::MemoryAvailable), Some(Amount::Absolute(1 << 30)));
    assert_eq!(config.eviction.hard(Signal::NodefsAvailable), Some(Amount::Percent(5.0)));
}

#[test]
fn the_managers_are_set_up() {
    let config = read(
        "cpuManagerPolicy: static
cpuManagerPolicyOptions: {full-pcpus-only: \"true\"}
reservedSystemCPUs: 0,2
memoryManagerPolicy: Static
reservedMemory: [{numaNode: 1, limits: {memory: 1Gi, hugepages-2Mi: 4Mi}}]
topologyManagerPolicy: single-numa-node
topologyManagerScope: pod
topologyManagerPolicyOptions: {prefer-closest-numa-nodes: \"true\", max-allowable-numa-nodes: \"12\"}
",
    )
    .expect("valid");
    let own = config.assignment;
    assert!(own.cpu_static && own.cpu_options.full_physical && own.memory_static && own.topology_scope_pod);
    assert_eq!(config.reserved_cpu_millis, 2000);
    assert_eq!(own.reserved_memory[&1]["hugepages-2Mi"], 4 << 20);
    assert!(own.prefer_closest && own.most_nodes == 12);
}

#[test]
fn no_field_is_in_two_lists() {
    let known = serde_json::to_value(Fields::default()).expect("JSON");
    for name in WITHOUT_EFFECT.iter().chain(UNSUPPORTED) {
        assert!(known.get(*name).is_none(), "{name}");
        assert!(!(WITHOUT_EFFECT.contains(name) && UNSUPPORTED.contains(name)), "{name}");
    }
}

#[test]
fn who_may_ask_the_node_and_for_how_long_answers_hold() {
    let text = "enableDebuggingHandlers: false\nauthentication: {webhook: {enabled: false, cacheTTL: 1m}}\n\
        authorization: {mode: Webhook, webhook: {cacheAuthorizedTTL: 10s, cacheUnauthorizedTTL: 0s}}\n";
    let config = read(text).unwrap();
    assert!(!config.debugging_handlers && !config.review.tokens);
    let seconds =
        [config.review.token_kept, config.review.allowed_kept, config.review.denied_kept].map(|d| d.as_secs());
    assert_eq!(seconds, [60, 10, 0]);
}
