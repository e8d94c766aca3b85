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
            match pod_refers_to(core, node, &action.namespace, &format!("{}/{}", action.resource, action.name)) {
                true => allowed(),
                false => refused(&format!("no relationship found between node '{node}' and this object")),
            }
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
