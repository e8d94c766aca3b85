//! What a node may do beyond the `system:node` role: read what the pods bound to it refer to, and nothing of others.

use oarlock_store::Range;

use super::{Action, Decision};
use crate::core::Core;
use crate::object;

/// Decides for the node `node`. What is not about the node's own things is left to its role.
pub(crate) fn decide(core: &Core, node: &str, action: &Action) -> Decision {
    let refused = |why: &str| Decision::NoOpinion(why.to_owned());
    let allowed = || Decision::Allowed(String::new());
    match (&*action.group, &*action.resource, &*action.subresource) {
        ("", "secrets" | "configmaps", "") => {
            if !matches!(&*action.verb, "get" | "list" | "watch") {
                return refused("can only read resources of this type");
            }
            if action.name.is_empty() {
                return refused("can only read namespaced object of this type");
            }
            let direct = pod_refers_to(core, node, &action.namespace, &format!("{}/{}", action.resource, action.name));
            let through_volume = || action.resource == "secrets" && volume_refers_to(core, node, action);
            match direct || through_volume() {
                true => allowed(),
                false => refused(&format!("no relationship found between node '{node}' and this object")),
            }
        }
        ("", "persistentvolumeclaims", "" | "status") => {
            let verb = action.verb == "get" || (action.subresource == "status" && action.verb == "patch");
            let claim = format!("persistentvolumeclaims/{}", action.name);
            if verb && !action.name.is_empty() && pod_refers_to(core, node, &action.namespace, &claim) {
                return allowed();
            }
            refused(&format!("no relationship found between node '{node}' and this object"))
        }
        ("", "persistentvolumes", "") | ("storage.k8s.io", "volumeattachments", "") => {
            if action.verb == "get" && !action.name.is_empty() && has_volume(core, node, action) {
                return allowed();
            }
            refused(&format!("no relationship found between node '{node}' and this object"))
        }
        ("storage.k8s.io", "csinodes", "") => {
            let own = action.name == node || (action.name.is_empty() && action.verb == "create");
            let verb = matches!(&*action.verb, "get" | "create" | "update" | "patch" | "delete");
            if own && verb {
                allowed()
            } else {
                refused("can only access CSINode with the same name as the requesting node")
            }
        }
        ("", "serviceaccounts", "") => {
            let account = format!("serviceaccounts/{}", action.name);
            if action.verb == "get" && pod_refers_to(core, node, &action.namespace, &account) {
                return allowed();
            }
            refused(&format!("no relationship found between node '{node}' and this object"))
        }
        ("", "serviceaccounts", "token") => {
            if action.verb != "create" {
                return refused("can only create tokens for individual service accounts");
            }
            match pod_refers_to(core, node, &action.namespace, &format!("serviceaccounts/{}", action.name)) {
                true => allowed(),
                false => refused(&format!("no relationship found between node '{node}' and this object")),
            }
        }
        ("coordination.k8s.io", "leases", "") if action.namespace == "kube-node-lease" => {
            let own = action.name == node || (action.name.is_empty() && action.verb == "create");
            let verb = matches!(&*action.verb, "get" | "create" | "update" | "patch" | "delete");
            if own && verb {
                allowed()
            } else {
                refused("can only access node lease with the same name as the requesting node")
            }
        }
        _ => refused(""),
    }
}

/// Whether the volume is of a claim of some pod of the node, or the attachment to the node.
fn has_volume(core: &Core, node: &str, action: &Action) -> bool {
    let Some(kind) = oarlock_kinds::find(&action.group, "v1", &action.resource) else { return false };
    let Some(record) = core.store.get(&object::key(kind, "", &action.name)) else {
        // Whether an attachment is there yet is what nodes wait to know.
        return action.resource == "volumeattachments";
    };
    let found = object::parse_as(kind, &record);
    if action.resource == "volumeattachments" {
        return object::text(&found, "/spec/nodeName") == node;
    }
    let claim = format!("persistentvolumeclaims/{}", object::text(&found, "/spec/claimRef/name"));
    pod_refers_to(core, node, object::text(&found, "/spec/claimRef/namespace"), &claim)
}

/// Whether the volume of a claim of some pod of the node names the secret.
fn volume_refers_to(core: &Core, node: &str, action: &Action) -> bool {
    let Some(volumes) = oarlock_kinds::find("", "v1", "persistentvolumes") else { return false };
    let prefix = object::key(volumes, "", "");
    let Ok(page) = core.store.range(Range { prefix: &prefix, ..Range::default() }) else { return false };
    page.records.iter().any(|record| {
        let volume = object::parse_as(volumes, record);
        let named = ["nodeStageSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef"].iter().any(|field| {
            let of = |part: &str| object::text(&volume, &format!("/spec/csi/{field}/{part}")).to_owned();
            of("name") == *action.name && of("namespace") == *action.namespace
        });
        let claim = object::text(&volume, "/spec/claimRef/name");
        let namespace = object::text(&volume, "/spec/claimRef/namespace");
        named && pod_refers_to(core, node, namespace, &format!("persistentvolumeclaims/{claim}"))
    })
}

/// Whether a pod that is bound to the node, in this namespace, refers to `reference` (such as `secrets/x`).
pub(crate) fn pod_refers_to(core: &Core, node: &str, namespace: &str, reference: &str) -> bool {
    let Some(pods) = oarlock_kinds::find("", "v1", "pods") else { return false };
    let prefix = object::key(pods, namespace, "");
    let Ok(page) = core.store.range(Range { prefix: &prefix, ..Range::default() }) else { return false };
    page.records.iter().any(|record| {
        let index = object::index(pods, record);
        index.field("spec.nodeName") == node && index.references.iter().any(|own| **own == *reference)
    })
}
