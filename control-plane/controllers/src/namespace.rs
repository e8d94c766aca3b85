//! Deletion of namespaces: everything in it goes, pods first, then the finalizer `kubernetes`. What is left, and why,
//! is shown in the namespace's conditions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, DynamicObject, ListParams, PostParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Change, Next, WorkQueue, call, merge_status, queue};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::conditions::{self, Condition};
use crate::garbage::discovery::{self, Resource};
use crate::shared::{Shared, Task};

const FINALIZER: &str = "kubernetes";
const CONCURRENCY: usize = 4;
/// Between looks at a namespace whose content takes its time; a pod that ends brings the look forward.
const RECHECK: Duration = Duration::from_secs(1);

pub(crate) fn start(shared: &Arc<Shared>, stop: &CancellationToken) -> Task {
    let queue: Arc<WorkQueue<String>> = WorkQueue::new();
    let (on_namespace, on_pod) = (queue.clone(), queue.clone());
    shared.namespaces.on_change(move |change| {
        if change.object().metadata.deletion_timestamp.is_some() && !matches!(change, Change::Deleted(_)) {
            on_namespace.add(change.object().name_any());
        }
    });
    let namespaces = shared.namespaces.clone();
    shared.pods.on_change(move |change| {
        if let Change::Deleted(pod) = change {
            let name = pod.namespace().unwrap_or_default();
            if namespaces.get("", &name).is_some_and(|namespace| namespace.metadata.deletion_timestamp.is_some()) {
                on_pod.add(name);
            }
        }
    });
    let (shared, stop) = (shared.clone(), stop.clone());
    Box::pin(async move {
        shared.namespaces.wait_synced().await;
        queue::work("namespace", queue, CONCURRENCY, stop, |name| reconcile(shared.clone(), name)).await;
    })
}

/// What one pass over the content found.
#[derive(Default, Debug)]
struct Remains {
    discovery_failures: Vec<String>,
    failures: Vec<String>,
    /// Number of objects by "resource.group".
    objects: BTreeMap<String, usize>,
    finalizers: BTreeMap<String, usize>,
}

impl Remains {
    fn is_nothing(&self) -> bool {
        self.discovery_failures.is_empty() && self.failures.is_empty() && self.objects.is_empty()
    }
}

async fn reconcile(shared: Arc<Shared>, name: String) -> Result<Next, ApiError> {
    let Some(namespace) = shared.namespaces.get("", &name) else { return Ok(Next::Done) };
    let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.clone()).unwrap_or_default();
    if namespace.metadata.deletion_timestamp.is_none() || !finalizers.iter().any(|f| f == FINALIZER) {
        return Ok(Next::Done);
    }
    let (resources, failures) = discovery::discover(&shared.client).await?;
    let mut remains =
        Remains { discovery_failures: failures.iter().map(ToString::to_string).collect(), ..Default::default() };
    // Pods first: what they still need while they end (secrets, accounts, policies) must be there until then.
    let (pods, others): (Vec<&Resource>, Vec<&Resource>) = resources
        .iter()
        .filter(|resource| resource.namespaced && resource.deletable)
        .partition(|resource| resource.group.is_empty() && resource.plural == "pods");
    for resource in pods {
        empty(&shared, &name, resource, &mut remains).await;
    }
    if remains.objects.is_empty() && remains.failures.is_empty() {
        for resource in others {
            empty(&shared, &name, resource, &mut remains).await;
        }
    }
    write_conditions(&shared, &namespace, &remains).await?;
    if !remains.is_nothing() {
        return Ok(Next::After(RECHECK));
    }
    finalize(&shared, &namespace, finalizers).await.map(|()| Next::Done)
}

async fn empty(shared: &Shared, namespace: &str, resource: &Resource, remains: &mut Remains) {
    if let Err(error) = try_empty(shared, namespace, resource, remains).await
        && !error.is_not_found()
        && !error.is_method_not_allowed()
    {
        remains.failures.push(format!("{}: {}", resource.qualified(), error.user_message()));
    }
}

async fn try_empty(
    shared: &Shared,
    namespace: &str,
    resource: &Resource,
    remains: &mut Remains,
) -> Result<(), ApiError> {
    let api: Api<DynamicObject> = Api::namespaced_with(shared.client.clone(), namespace, &resource.api_resource());
    let mut left = call("list namespace content", api.list_metadata(&ListParams::default())).await?.items;
    if left.iter().any(|object| object.metadata.deletion_timestamp.is_none()) {
        let parameters = DeleteParams::background();
        match call("delete namespace content", api.delete_collection(&parameters, &ListParams::default())).await {
            Err(error) if error.is_method_not_allowed() => {
                for object in &left {
                    let preconditions = Preconditions { uid: object.metadata.uid.clone(), resource_version: None };
                    let parameters = DeleteParams::background().preconditions(preconditions);
                    match call("delete namespace content", api.delete(&object.name_any(), &parameters)).await {
                        Err(error) if !(error.is_not_found() || error.is_conflict()) => return Err(error),
                        _ => {}
                    }
                }
            }
            result => drop(result?),
        }
        left = call("list namespace content", api.list_metadata(&ListParams::default())).await?.items;
    }
    if left.is_empty() {
        return Ok(());
    }
    *remains.objects.entry(resource.qualified()).or_default() += left.len();
    for finalizer in left.iter().flat_map(|object| object.metadata.finalizers.iter().flatten()) {
        *remains.finalizers.entry(finalizer.clone()).or_default() += 1;
    }
    Ok(())
}

/// The five conditions by which a user sees why a namespace is still there.
fn conditions_of(remains: &Remains, now: Timestamp) -> Vec<NamespaceCondition> {
    let make = |type_: &str, trouble: Option<(&str, String)>, fine: (&str, &str)| {
        let (status, reason, message) = match trouble {
            Some((reason, message)) => (true, reason, message),
            None => (false, fine.0, fine.1.to_owned()),
        };
        NamespaceCondition::new(type_, status, reason, message, now)
    };
    let counted = |counts: &BTreeMap<String, usize>, what: &str| {
        let parts: Vec<String> = counts.iter().map(|(name, count)| format!("{name} has {count} {what}")).collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    };
    let discovery = (!remains.discovery_failures.is_empty()).then(|| {
        let message = format!(
            "Discovery failed for some groups, {} failing: {}",
            remains.discovery_failures.len(),
            remains.discovery_failures.join(", ")
        );
        ("DiscoveryFailed", message)
    });
    let failures = (!remains.failures.is_empty()).then(|| {
        (
            "ContentDeletionFailed",
            format!(
                "Failed to delete all resource types, {} remaining: {}",
                remains.failures.len(),
                remains.failures.join(", ")
            ),
        )
    });
    let objects = counted(&remains.objects, "resource instances")
        .map(|list| ("SomeResourcesRemain", format!("Some resources are remaining: {list}")));
    let finalizers = counted(&remains.finalizers, "resource instances").map(|list| {
        let list = list.replace(" has ", " in ");
        ("SomeFinalizersRemain", format!("Some content in the namespace has finalizers remaining: {list}"))
    });
    vec![
        make(
            "NamespaceDeletionDiscoveryFailure",
            discovery,
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        make(
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        make(
            "NamespaceDeletionContentFailure",
            failures,
            ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
        ),
        make("NamespaceContentRemaining", objects, ("ContentRemoved", "All content successfully removed")),
        make(
            "NamespaceFinalizersRemaining",
            finalizers,
            ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
        ),
    ]
}

async fn write_conditions(shared: &Shared, namespace: &Namespace, remains: &Remains) -> Result<(), ApiError> {
    let old = namespace.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let mut all = old.clone();
    for condition in conditions_of(remains, Timestamp::now()) {
        let same = conditions::find(&all, condition.type_()).is_some_and(|old| {
            old.status == condition.status && old.reason == condition.reason && old.message == condition.message
        });
        if !same {
            conditions::replace(&mut all, condition);
        }
    }
    // An empty namespace is gone the next moment: nobody would read what is written now.
    if all == old || remains.is_nothing() {
        return Ok(());
    }
    let api: Api<Namespace> = Api::all(shared.client.clone());
    let patch = json!({"metadata": {"uid": namespace.uid()}, "status": {"conditions": all}});
    let name = namespace.name_any();
    match merge_status("patch namespace status", &api, &name, &patch).await {
        Err(error) if error.is_not_found() => Ok(()),
        result => result.map(drop),
    }
}

async fn finalize(shared: &Shared, namespace: &Namespace, finalizers: Vec<String>) -> Result<(), ApiError> {
    let api: Api<Namespace> = Api::all(shared.client.clone());
    let name = namespace.name_any();
    let mut live = match call("get namespace", api.get(&name)).await {
        Err(error) if error.is_not_found() => return Ok(()),
        result => result?,
    };
    if live.metadata.uid != namespace.metadata.uid {
        return Ok(());
    }
    let kept: Vec<String> = finalizers.into_iter().filter(|finalizer| finalizer != FINALIZER).collect();
    live.spec.get_or_insert_default().finalizers = Some(kept);
    let parameters = PostParams::default();
    match call("finalize namespace", api.replace_subresource("finalize", &name, &parameters, &live)).await {
        Err(error) if error.is_not_found() => Ok(()),
        result => result.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_name_what_is_left_and_why() {
        let mut remains = Remains::default();
        remains.objects.insert("pods".into(), 2);
        remains.finalizers.insert("example.com/hold".into(), 1);
        let all = conditions_of(&remains, Timestamp::UNIX_EPOCH);
        let message = |type_: &str| conditions::find(&all, type_).unwrap().message().to_owned();
        assert_eq!(message("NamespaceContentRemaining"), "Some resources are remaining: pods has 2 resource instances");
        assert_eq!(
            message("NamespaceFinalizersRemaining"),
            "Some content in the namespace has finalizers remaining: example.com/hold in 1 resource instances"
        );
        assert_eq!(conditions::find(&all, "NamespaceDeletionContentFailure").unwrap().status, "False");
    }
}
