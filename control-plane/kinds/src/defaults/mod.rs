//! Defaults, as upstream applies them when it decodes an object. Idempotent.

mod cluster;
mod container;
mod pod;
mod service;
mod storage;
mod workload;

pub(crate) use cluster::{namespace, node, priority_class, role_binding, secret};
pub(crate) use pod::{pod, pod_spec};
pub(crate) use service::{endpoint_slice, endpoints, network_policy, service};
pub(crate) use storage::{csi_driver, persistent_volume, persistent_volume_claim, storage_class};
pub(crate) use workload::{deployment, replica_set};

#[cfg(test)]
mod tests;
