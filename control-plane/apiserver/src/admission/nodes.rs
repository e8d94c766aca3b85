//! What a node may write: its own Node, Lease and mirror pods, and the status of pods bound to it.

use serde_json::Value;

use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::registry::Change;

const MIRROR: &str = "/metadata/annotations/kubernetes.io~1config.mirror";

fn refuse<T>(target: &Target, why: &str) -> ApiResult<T> {
    Err(ApiError::forbidden(target.kind, &target.name, why))
}

pub(crate) fn on_create(ctx: &Context, target: &Target, object: &Value) -> ApiResult<()> {
    let Some(node) = ctx.user.node_name() else { return Ok(()) };
    match target.kind.storage {
        "nodes" if object::name(object) != node => {
            refuse(target, &format!("node \"{node}\" is not allowed to modify node \"{}\"", object::name(object)))
        }
        "nodes" => check_labels(target, node, &Value::Null, object),
        "coordination.k8s.io/leases" => {
            let own = target.namespace == "kube-node-lease" && object::name(object) == node;
            if own {
                Ok(())
            } else {
                refuse(target, "can only access node lease with the same name as the requesting node")
            }
        }
        "storage.k8s.io/csinodes" if object::name(object) != node => {
            refuse(target, "can only access CSINode with the same name as the requesting node")
        }
        "pods" => {
            if object::text(object, MIRROR).is_empty() {
                return refuse(
                    target,
                    &format!(
                        "pod does not have \"kubernetes.io/config.mirror\" annotation, node \"{node}\" can only create mirror pods"
                    ),
                );
            }
            if object::text(object, "/spec/nodeName") != node {
                return refuse(
                    target,
                    &format!("node \"{node}\" can only create pods with spec.nodeName set to itself"),
                );
            }
            owned_by_its_node(ctx, target, node, object)?;
            refers_to_nothing(target, node, object)
        }
        _ => Ok(()),
    }
}

pub(crate) fn on_update(
    ctx: &Context,
    target: &Target,
    _change: &Change<'_>,
    old: &Value,
    new: &Value,
) -> ApiResult<()> {
    let Some(node) = ctx.user.node_name() else { return Ok(()) };
    match target.kind.storage {
        "nodes" if target.name != node => {
            refuse(target, &format!("node \"{node}\" is not allowed to modify node \"{}\"", target.name))
        }
        "nodes" if target.subresource.is_none() => {
            if old.pointer("/spec/taints") != new.pointer("/spec/taints") {
                return refuse(target, &format!("node \"{node}\" is not allowed to modify taints"));
            }
            check_labels(target, node, old, new)
        }
        "pods" if object::text(old, "/spec/nodeName") != node => refuse(
            target,
            &format!("node \"{node}\" can only update pod status for pods with spec.nodeName set to itself"),
        ),
        _ => Ok(()),
    }
}

pub(crate) fn on_delete(ctx: &Context, target: &Target) -> ApiResult<()> {
    let Some(node) = ctx.user.node_name() else { return Ok(()) };
    match target.kind.storage {
        "nodes" => refuse(target, &format!("node \"{node}\" cannot delete nodes")),
        "pods" => {
            let record = ctx.core.store.get(&target.key()).ok_or_else(|| target.not_found())?;
            if object::index(target.kind, &record).field("spec.nodeName") == node {
                return Ok(());
            }
            let verb = if target.subresource.as_deref() == Some("eviction") { "evict" } else { "delete" };
            refuse(target, &format!("node \"{node}\" can only {verb} pods with spec.nodeName set to itself"))
        }
        _ => Ok(()),
    }
}

/// A pod that a node makes up goes with the node, and keeps nothing else from going.
fn owned_by_its_node(ctx: &Context, target: &Target, node: &str, pod: &Value) -> ApiResult<()> {
    let owner = match pod.pointer("/metadata/ownerReferences").and_then(Value::as_array).map_or(&[][..], Vec::as_slice)
    {
        [] => return Ok(()),
        [owner] => owner,
        _ => {
            let why = format!("node \"{node}\" can only create pods with a single owner reference set to itself");
            return refuse(target, &why);
        }
    };
    let is = |field: &str, wanted: &str| owner.get(field).and_then(Value::as_str) == Some(wanted);
    if !(is("apiVersion", "v1") && is("kind", "Node") && is("name", node)) {
        let why = format!("node \"{node}\" can only create pods with an owner reference set to itself");
        return refuse(target, &why);
    }
    if owner.get("controller") != Some(&Value::Bool(true)) {
        let why = format!("node \"{node}\" can only create pods with a controller owner reference set to itself");
        return refuse(target, &why);
    }
    if owner.get("blockOwnerDeletion") == Some(&Value::Bool(true)) {
        let why = format!("node \"{node}\" must not set blockOwnerDeletion on an owner reference");
        return refuse(target, &why);
    }
    let nodes = oarlock_kinds::find("", "v1", "nodes").ok_or_else(ApiError::no_such_resource)?;
    let record = ctx.core.store.get(&object::key(nodes, "", node)).ok_or_else(|| ApiError::not_found(nodes, node))?;
    let found = object::parse(&record);
    let (asked, own) = (object::text(owner, "/uid"), object::text(&found, "/metadata/uid"));
    if asked != own {
        return refuse(target, &format!("node {node} UID mismatch: expected {asked} got {own}"));
    }
    Ok(())
}

/// A pod that a node makes up must not open to the node what the pod refers to.
fn refers_to_nothing(target: &Target, node: &str, pod: &Value) -> ApiResult<()> {
    let references = object::pod_references(pod);
    let mut resources = references.iter().filter_map(|one| one.split_once('/')).filter(|(_, name)| !name.is_empty());
    let Some((resource, _)) = resources.next() else { return Ok(()) };
    let what = if resource == "serviceaccounts" { "a service account" } else { resource };
    refuse(target, &format!("node \"{node}\" can not create pods that reference {what}"))
}

/// Labels under `node-restriction.kubernetes.io/` are for administrators to pin workloads by.
fn check_labels(target: &Target, node: &str, old: &Value, new: &Value) -> ApiResult<()> {
    let restricted = |object: &Value| -> Vec<(String, Value)> {
        let labels = object.pointer("/metadata/labels").and_then(Value::as_object).into_iter().flatten();
        let held = labels.filter(|(key, _)| {
            let prefix = key.split_once('/').map_or("", |(prefix, _)| prefix);
            prefix == "node-restriction.kubernetes.io" || prefix.ends_with(".node-restriction.kubernetes.io")
        });
        held.map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    if restricted(old) == restricted(new) {
        return Ok(());
    }
    refuse(
        target,
        &format!("is not allowed to modify labels: node \"{node}\" may not set node-restriction.kubernetes.io labels"),
    )
}
