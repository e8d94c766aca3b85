//! The node's status as the API shows it. Pure: what was read of machine and runtime comes in.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus, NodeSwapStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use oarlock_proto::cri;

use super::capacity::{Capacity, quantities};
use crate::eviction::Pressure;
use crate::{Config, VERSION};

/// Who the machine is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel: String,
    pub os_image: String,
    pub architecture: String,
    pub host_name: String,
    pub swap_bytes: i64,
}

/// How runtime and resources are at the moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Health {
    /// `<name>://<version>`; empty until the runtime was reached.
    pub runtime_version: String,
    /// What keeps the node from being Ready; empty when nothing does.
    pub troubles: Vec<String>,
    pub pressure: Pressure,
    pub images: Vec<ContainerImage>,
    /// What the runtime can do, by handler.
    pub runtime_handlers: Vec<NodeRuntimeHandler>,
    pub features: Option<NodeFeatures>,
    /// Attached volumes that pods have.
    pub volumes_in_use: Vec<String>,
}

/// What the runtime's status says against Ready.
pub(crate) fn runtime_troubles(status: &Result<cri::StatusResponse, String>) -> Vec<String> {
    let conditions = match status {
        Err(error) => return vec![format!("container runtime is down: {error}")],
        Ok(response) => response.status.clone().unwrap_or_default().conditions,
    };
    let mut troubles = Vec::new();
    for (kind, what) in [("RuntimeReady", "container runtime"), ("NetworkReady", "container runtime network")] {
        match conditions.iter().find(|condition| condition.r#type == kind) {
            Some(condition) if condition.status => {}
            Some(condition) => troubles.push(format!(
                "{what} not ready: {kind}=false reason:{} message:{}",
                condition.reason, condition.message
            )),
            None => troubles.push(format!("{what} status check may not have completed yet")),
        }
    }
    troubles
}

/// By handler, and as a whole.
pub(crate) type Abilities = (Vec<NodeRuntimeHandler>, Option<NodeFeatures>);

/// What the runtime says it can do: by handler, and as a whole.
pub(crate) fn abilities(status: &cri::StatusResponse) -> Abilities {
    let mut handlers: Vec<NodeRuntimeHandler> = status
        .runtime_handlers
        .iter()
        .map(|handler| NodeRuntimeHandler {
            name: Some(handler.name.clone()),
            features: handler.features.as_ref().map(|able| NodeRuntimeHandlerFeatures {
                recursive_read_only_mounts: Some(able.recursive_read_only_mounts),
                user_namespaces: Some(able.user_namespaces),
            }),
        })
        .collect();
    handlers.sort_by(|a, b| a.name.cmp(&b.name));
    let features = status.features.as_ref();
    (handlers, features.map(|able| NodeFeatures { supplemental_groups_policy: Some(able.supplemental_groups_policy) }))
}

/// The runtime's images as the node lists them: the largest ones, at most `most`.
pub(crate) fn listed_images(mut images: Vec<cri::Image>, most: usize) -> Vec<ContainerImage> {
    images.sort_by_key(|image| std::cmp::Reverse(image.size));
    images
        .into_iter()
        .take(most)
        .map(|image| {
            let names: Vec<String> = image.repo_digests.into_iter().chain(image.repo_tags).collect();
            ContainerImage { names: Some(names), size_bytes: i64::try_from(image.size).ok() }
        })
        .collect()
}

/// The labels that every node has, and the configured ones.
pub(crate) fn labels(config: &Config, identity: &Identity) -> BTreeMap<String, String> {
    let mut labels = config.node_labels.clone();
    for (name, value) in [
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", identity.architecture.as_str()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", identity.architecture.as_str()),
    ] {
        labels.insert(name.to_owned(), value.to_owned());
    }
    labels
}

/// The object that registers the node.
pub(crate) fn new_node(config: &Config, identity: &Identity, status: NodeStatus) -> Node {
    let taints = (!config.register_with_taints.is_empty()).then(|| config.register_with_taints.clone());
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config, identity)),
            annotations: Some(BTreeMap::from([(
                "volumes.kubernetes.io/controller-managed-attach-detach".to_owned(),
                "true".to_owned(),
            )])),
            ..Default::default()
        },
        spec: Some(NodeSpec { taints, provider_id: config.provider_id.clone(), ..Default::default() }),
        status: Some(status),
    }
}

/// What stays the same while the agent runs.
pub(crate) struct Fixed<'a> {
    pub config: &'a Config,
    pub capacity: Capacity,
    pub identity: &'a Identity,
}

/// The whole status. Transition times of `last` are kept where nothing changed.
pub(crate) fn node_status(fixed: &Fixed<'_>, health: &Health, last: Option<&NodeStatus>, now: Timestamp) -> NodeStatus {
    let Fixed { config, capacity, identity } = fixed;
    let port = config.listen.port();
    let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    NodeStatus {
        addresses: Some(
            [config.node_ip]
                .into_iter()
                .chain(config.second_node_ip)
                .map(|ip| address("InternalIP", ip.to_string()))
                .chain([address("Hostname", config.node_name.clone())])
                .collect(),
        ),
        capacity: Some(quantities(&capacity.capacity)),
        allocatable: Some(quantities(&capacity.allocatable)),
        conditions: Some(conditions(health, last, now)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(port) }),
        }),
        images: Some(health.images.clone()),
        runtime_handlers: Some(health.runtime_handlers.clone()).filter(|handlers| !handlers.is_empty()),
        features: health.features.clone(),
        volumes_in_use: Some(health.volumes_in_use.clone()).filter(|volumes| !volumes.is_empty()),
        node_info: Some(NodeSystemInfo {
            architecture: identity.architecture.clone(),
            boot_id: identity.boot_id.clone(),
            container_runtime_version: health.runtime_version.clone(),
            kernel_version: identity.kernel.clone(),
            kube_proxy_version: String::new(),
            kubelet_version: VERSION.to_owned(),
            machine_id: identity.machine_id.clone(),
            operating_system: "linux".to_owned(),
            os_image: identity.os_image.clone(),
            system_uuid: identity.system_uuid.clone(),
            swap: Some(NodeSwapStatus { capacity: Some(identity.swap_bytes).filter(|bytes| *bytes > 0) })
                .filter(|swap| swap.capacity.is_some()),
        }),
        ..Default::default()
    }
}

fn conditions(health: &Health, last: Option<&NodeStatus>, now: Timestamp) -> Vec<NodeCondition> {
    let pressure = |kind: &'static str, on: bool, yes: (&'static str, &str), no: (&'static str, &str)| {
        let (reason, message) = if on { yes } else { no };
        (kind, on, reason, message.to_owned())
    };
    let ready = if health.troubles.is_empty() {
        ("Ready", true, "KubeletReady", "kubelet is posting ready status".to_owned())
    } else {
        let message = match health.troubles.as_slice() {
            [one] => one.clone(),
            several => format!("[{}]", several.join(", ")),
        };
        ("Ready", false, "KubeletNotReady", message)
    };
    let all = [
        pressure(
            "MemoryPressure",
            health.pressure.memory,
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        pressure(
            "DiskPressure",
            health.pressure.disk,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        pressure(
            "PIDPressure",
            health.pressure.pid,
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
        ready,
    ];
    let before = |kind: &str| {
        last.and_then(|last| last.conditions.as_ref()).and_then(|all| all.iter().find(|c| c.type_ == kind))
    };
    let second = Timestamp::from_second(now.as_second()).unwrap_or(now);
    all.into_iter()
        .map(|(kind, on, reason, message)| {
            let status = if on { "True" } else { "False" };
            let same = before(kind).filter(|before| before.status == status);
            let since = same.and_then(|before| before.last_transition_time.clone());
            NodeCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message),
                last_heartbeat_time: Some(Time(second)),
                last_transition_time: Some(since.unwrap_or(Time(second))),
            }
        })
        .collect()
}

/// The pressures, with the reasons of the events that tell of them when they begin and when they end.
const PRESSURE_EVENTS: [(&str, &str, &str); 3] = [
    ("MemoryPressure", "NodeHasInsufficientMemory", "NodeHasSufficientMemory"),
    ("DiskPressure", "NodeHasDiskPressure", "NodeHasNoDiskPressure"),
    ("PIDPressure", "NodeHasInsufficientPID", "NodeHasSufficientPID"),
];

/// The reasons of the events that tell how `next` differs from `before` in what the node is short of.
pub(crate) fn pressure_events(before: Option<&NodeStatus>, next: &NodeStatus) -> Vec<&'static str> {
    let says = |status: &NodeStatus, kind: &str| {
        status.conditions.iter().flatten().find(|condition| condition.type_ == kind).map(|found| found.status.clone())
    };
    let changed = PRESSURE_EVENTS.iter().filter_map(|(kind, begun, ended)| {
        let now = says(next, kind)?;
        let same = before.and_then(|before| says(before, kind)).is_some_and(|before| before == now);
        (!same).then_some(if now == "True" { *begun } else { *ended })
    });
    changed.collect()
}

/// Whether the machine was started anew since the node's status was written.
pub(crate) fn rebooted(before: Option<&NodeStatus>, identity: &Identity) -> bool {
    let known = before.and_then(|before| before.node_info.as_ref()).map(|info| info.boot_id.as_str());
    known.is_some_and(|known| !known.is_empty() && known != identity.boot_id)
}

/// Whether two statuses say the same, heart-beat times aside.
pub(crate) fn same(a: &NodeStatus, b: &NodeStatus) -> bool {
    let still = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
        }
        status
    };
    still(a) == still(b)
}

/// Whether some condition of the node is not as it was sent: of a node that was cut off others say that it is unknown.
pub(crate) fn is_overwritten(sent: &NodeStatus, node: &Node) -> bool {
    let found = || node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let stands = |sent: &NodeCondition| found().any(|one| one.type_ == sent.type_ && one.status == sent.status);
    !sent.conditions.iter().flatten().all(stands)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a small number")
    }

    fn status(health: &Health, last: Option<&NodeStatus>, now: Timestamp) -> NodeStatus {
        let config = Config::new("n", "192.0.2.1".parse().unwrap());
        let (capacity, identity) = (Capacity::default(), Identity::default());
        let fixed = Fixed { config: &config, capacity, identity: &identity };
        node_status(&fixed, health, last, now)
    }

    fn ready(status: &NodeStatus) -> NodeCondition {
        status.conditions.iter().flatten().find(|c| c.type_ == "Ready").cloned().expect("a Ready condition")
    }

    #[test]
    fn what_the_runtime_can_do_is_shown_by_handler() {
        let handler = |name: &str, user_namespaces| cri::RuntimeHandler {
            name: name.into(),
            features: Some(cri::RuntimeHandlerFeatures { user_namespaces, ..Default::default() }),
        };
        let response = cri::StatusResponse {
            runtime_handlers: vec![handler("kata", false), handler("", true)],
            features: Some(cri::RuntimeFeatures { supplemental_groups_policy: true, ..Default::default() }),
            ..Default::default()
        };
        let (runtime_handlers, features) = abilities(&response);
        let shown = status(&Health { runtime_handlers, features, ..Default::default() }, None, at(10));
        let handlers = serde_json::to_value(shown.runtime_handlers).unwrap();
        let able = |users: bool| serde_json::json!({"recursiveReadOnlyMounts": false, "userNamespaces": users});
        assert_eq!(
            handlers,
            serde_json::json!([{"name": "", "features": able(true)}, {"name": "kata", "features": able(false)}])
        );
        assert_eq!(shown.features.and_then(|features| features.supplemental_groups_policy), Some(true));
    }

    #[test]
    fn ready_says_what_is_missing_and_keeps_its_transition_time() {
        let response = cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: vec![
                    cri::RuntimeCondition { r#type: "RuntimeReady".into(), status: true, ..Default::default() },
                    cri::RuntimeCondition {
                        r#type: "NetworkReady".into(),
                        status: false,
                        reason: "NetworkPluginNotReady".into(),
                        message: "no network config".into(),
                    },
                ],
            }),
            ..Default::default()
        };
        let down = Health { troubles: runtime_troubles(&Ok(response)), ..Default::default() };
        let first = status(&down, None, at(10));
        assert_eq!(
            ready(&first).message.as_deref(),
            Some(
                "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:no network config"
            )
        );
        let second = status(&down, Some(&first), at(20));
        assert_eq!(ready(&second).last_transition_time, Some(Time(at(10))));
        assert!(same(&first, &second));
        let up = status(&Health::default(), Some(&second), at(30));
        assert_eq!((ready(&up).status.as_str(), ready(&up).last_transition_time), ("True", Some(Time(at(30)))));
        assert!(!same(&second, &up));
    }

    #[test]
    fn events_tell_which_pressure_began_and_which_ended() {
        let short_of = |memory, disk, pid| {
            let pressure = Pressure { memory, disk, pid };
            status(&Health { pressure, ..Default::default() }, None, at(10))
        };
        let calm = short_of(false, false, false);
        let at_first = ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"];
        assert_eq!(pressure_events(None, &calm), at_first);
        assert_eq!(pressure_events(Some(&calm), &calm), [""; 0]);
        let short = short_of(true, false, true);
        assert_eq!(pressure_events(Some(&calm), &short), ["NodeHasInsufficientMemory", "NodeHasInsufficientPID"]);
        let other = short_of(false, true, true);
        assert_eq!(pressure_events(Some(&short), &other), ["NodeHasSufficientMemory", "NodeHasDiskPressure"]);
        // Somebody else has found that nothing is known of the node.
        let mut unknown = calm.clone();
        unknown.conditions.iter_mut().flatten().for_each(|condition| condition.status = "Unknown".to_owned());
        assert_eq!(pressure_events(Some(&unknown), &calm), at_first);
    }

    #[test]
    fn another_boot_id_is_a_reboot() {
        let before = |boot_id: &str| {
            let info = NodeSystemInfo { boot_id: boot_id.to_owned(), ..Default::default() };
            Some(NodeStatus { node_info: Some(info), ..Default::default() })
        };
        let identity = Identity { boot_id: "b".to_owned(), ..Default::default() };
        assert!(rebooted(before("a").as_ref(), &identity));
        assert!(!rebooted(before("b").as_ref(), &identity));
        // A node that somebody else made, and a new one.
        assert!(!rebooted(before("").as_ref(), &identity));
        assert!(!rebooted(None, &identity));
    }
}
