//! Who controls what: controller references, adoption of orphans and release of what no longer matches.

use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Api, Resource, ResourceExt};
use oarlock_machinery::{ApiError, Informer, Selector, call, merge_metadata};
use serde::de::DeserializeOwned;
use serde_json::json;

/// The one owner that manages the object.
pub(crate) fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// A reference that makes `owner` the controller, and makes foreground deletion of it wait.
pub(crate) fn controller_reference<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: owner.name_any(),
        uid: owner.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// What a controller should do about an object.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Claim {
    Ours,
    Adopt,
    Release,
    Ignore,
}

/// Decides by the object's controller, the selector, and whether either of both is going away.
pub(crate) fn claim(object: &ObjectMeta, owner: &ObjectMeta, matches: bool) -> Claim {
    let owner_goes = owner.deletion_timestamp.is_some();
    match controller_of(object) {
        Some(controller) if Some(&controller.uid) != owner.uid.as_ref() => Claim::Ignore,
        Some(_) if matches => Claim::Ours,
        Some(_) if owner_goes => Claim::Ignore,
        Some(_) => Claim::Release,
        None if owner_goes || !matches || object.deletion_timestamp.is_some() => Claim::Ignore,
        None => Claim::Adopt,
    }
}

/// The objects of `informer` that `owner` controls, after adopting and releasing as [`claim`] says.
pub(crate) async fn claim_all<O, K>(
    owners: &Api<O>,
    objects: &Api<K>,
    informer: &Informer<K>,
    owner: &O,
    selector: &Selector,
) -> Result<Vec<Arc<K>>, ApiError>
where
    O: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let mut ours = Vec::new();
    let mut adopting_is_safe = false;
    for object in informer.in_namespace(&owner.namespace().unwrap_or_default()) {
        let matches = selector.matches(object.meta().labels.as_ref());
        match claim(object.meta(), owner.meta(), matches) {
            Claim::Ignore => {}
            Claim::Ours => ours.push(object),
            Claim::Release => {
                release(objects, object.as_ref(), owner.meta().uid.as_deref().unwrap_or_default()).await?
            }
            Claim::Adopt => {
                if !adopting_is_safe {
                    // The cache may be behind: a deleted owner must not catch orphans.
                    let live = call("get owner", owners.get_metadata(&owner.name_any())).await?;
                    if live.metadata.uid != owner.meta().uid || live.metadata.deletion_timestamp.is_some() {
                        return Ok(ours);
                    }
                    adopting_is_safe = true;
                }
                adopt(objects, object.as_ref(), owner).await?;
                ours.push(object);
            }
        }
    }
    Ok(ours)
}

async fn adopt<O, K>(objects: &Api<K>, object: &K, owner: &O) -> Result<(), ApiError>
where
    O: Resource<DynamicType = ()>,
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let mut references = object.owner_references().to_vec();
    references.retain(|reference| Some(&reference.uid) != owner.meta().uid.as_ref());
    references.push(controller_reference(owner));
    set_references(objects, object, &references).await
}

async fn release<K>(objects: &Api<K>, object: &K, owner_uid: &str) -> Result<(), ApiError>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let mut references = object.owner_references().to_vec();
    references.retain(|reference| reference.uid != owner_uid);
    match set_references(objects, object, &references).await {
        Err(error) if error.is_not_found() => Ok(()),
        result => result,
    }
}

async fn set_references<K>(objects: &Api<K>, object: &K, references: &[OwnerReference]) -> Result<(), ApiError>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    // With the version that was read: a concurrent change of the owners must not be undone.
    let patch = json!({"metadata": {
        "uid": object.meta().uid, "resourceVersion": object.meta().resource_version, "ownerReferences": references,
    }});
    let name = object.name_any();
    merge_metadata("patch ownerReferences", objects, &name, &patch).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    fn meta(uid: &str, controller: Option<&str>, deleting: bool) -> ObjectMeta {
        ObjectMeta {
            uid: Some(uid.into()),
            owner_references: controller
                .map(|uid| vec![OwnerReference { uid: uid.into(), controller: Some(true), ..Default::default() }]),
            deletion_timestamp: deleting.then_some(Time(Timestamp::UNIX_EPOCH)),
            ..Default::default()
        }
    }

    #[test]
    fn claims_follow_controller_selector_and_deletion() {
        let owner = meta("me", None, false);
        let leaving = meta("me", None, true);
        let cases = [
            (meta("a", Some("me"), false), &owner, true, Claim::Ours),
            (meta("a", Some("me"), false), &owner, false, Claim::Release),
            (meta("a", Some("me"), false), &leaving, false, Claim::Ignore),
            (meta("a", Some("other"), false), &owner, true, Claim::Ignore),
            (meta("a", None, false), &owner, true, Claim::Adopt),
            (meta("a", None, true), &owner, true, Claim::Ignore),
            (meta("a", None, false), &owner, false, Claim::Ignore),
            (meta("a", None, false), &leaving, true, Claim::Ignore),
        ];
        for (object, owner, matches, expected) in cases {
            assert_eq!(claim(&object, owner, matches), expected, "{object:?} {matches}");
        }
    }
}
