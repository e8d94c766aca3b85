//! [`PodResources`]: what the pod resources API shows of pods, devices, processors and memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;
use oarlock_plugins::pod_resources::{Source, wire};

use super::Pools;
use crate::shared::Shared;
use crate::spec;

/// Answers from the table of pods and the record of what was given out.
pub(crate) struct PodResources {
    pub shared: Arc<Shared>,
}

fn topology(nodes: impl IntoIterator<Item = i64>) -> Option<wire::TopologyInfo> {
    let nodes: Vec<wire::NumaNode> =
        nodes.into_iter().filter(|node| *node >= 0).map(|id| wire::NumaNode { id }).collect();
    (!nodes.is_empty()).then_some(wire::TopologyInfo { nodes })
}

fn container(pools: &Pools, pod: &str, name: &str) -> wire::ContainerResources {
    let mut devices = Vec::new();
    for (resource, given) in pools.devices.container(pod, name) {
        for (node, ids) in &given.by_node {
            devices.push(wire::ContainerDevices {
                resource_name: resource.to_owned(),
                device_ids: ids.iter().cloned().collect(),
                topology: topology([*node]),
            });
        }
    }
    let cpus = pools.cpus.as_ref().and_then(|cpus| cpus.of(pod, name));
    let blocks = pools.memory.as_ref().map(|memory| memory.of(pod, name)).unwrap_or_default();
    let memory = blocks.iter().map(|block| wire::ContainerMemory {
        memory_type: block.kind.clone(),
        size: block.size,
        topology: topology(block.nodes.iter().map(|node| i64::from(*node))),
    });
    wire::ContainerResources {
        name: name.to_owned(),
        devices,
        cpu_ids: cpus.into_iter().flat_map(|cpus| cpus.iter()).map(i64::from).collect(),
        memory: memory.collect(),
    }
}

fn pod(pools: &Pools, pod: &Pod) -> wire::PodResources {
    let spec = pod.spec.clone().unwrap_or_default();
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let names = sidecars.chain(&spec.containers).map(|container| container.name.as_str());
    wire::PodResources {
        name: spec::pod_name(pod).to_owned(),
        namespace: spec::pod_namespace(pod).to_owned(),
        containers: names.map(|name| container(pools, spec::pod_uid(pod), name)).collect(),
    }
}

#[async_trait]
impl Source for PodResources {
    async fn list(&self) -> Vec<wire::PodResources> {
        let over = |phase: Option<&str>| matches!(phase, Some("Succeeded" | "Failed"));
        let mut entries = self.shared.table.all();
        entries.retain(|entry| !over(entry.status.phase.as_deref()));
        let current = self.shared.assignments.current.lock();
        entries.iter().map(|entry| pod(&current.pools, &entry.pod)).collect()
    }

    async fn allocatable(&self) -> wire::AllocatableResourcesResponse {
        let assignments = &self.shared.assignments;
        let mut devices = Vec::new();
        for resource in assignments.plugins.counts().into_keys() {
            let known = assignments.plugins.devices(&resource);
            let mut by_place: BTreeMap<&[u32], Vec<String>> = BTreeMap::new();
            for (id, nodes) in known.nodes.iter().filter(|(id, _)| known.healthy.contains(*id)) {
                by_place.entry(nodes).or_default().push(id.clone());
            }
            devices.extend(by_place.into_iter().map(|(nodes, device_ids)| wire::ContainerDevices {
                resource_name: resource.clone(),
                device_ids,
                topology: topology(nodes.iter().map(|node| i64::from(*node))),
            }));
        }
        let current = assignments.current.lock();
        let cpus = current.pools.cpus.as_ref().map(|cpus| cpus.allocatable()).unwrap_or_default();
        let nodes = current.pools.memory.iter().flat_map(|memory| memory.nodes());
        let memory = nodes.flat_map(|(node, state)| {
            state.memory_map.iter().map(|(kind, table)| wire::ContainerMemory {
                memory_type: kind.clone(),
                size: table.allocatable,
                topology: topology([i64::from(*node)]),
            })
        });
        wire::AllocatableResourcesResponse {
            devices,
            cpu_ids: cpus.iter().map(i64::from).collect(),
            memory: memory.collect(),
        }
    }
}
