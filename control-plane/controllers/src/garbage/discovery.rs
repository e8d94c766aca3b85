//! Which resources the server has, by the discovery documents every server understands.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use kube::Client;
use kube::api::ApiResource;
use kube::core::GroupVersionKind;
use oarlock_machinery::{ApiError, call};

/// A resource in its group's preferred version.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Resource {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub namespaced: bool,
    pub watchable: bool,
    pub deletable: bool,
}

impl Resource {
    /// "deployments.apps", "pods".
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }

    pub fn api_resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(&self.group, &self.version, &self.kind);
        ApiResource::from_gvk_with_plural(&gvk, &self.plural)
    }
}

/// A group version that could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("{group_version}: {}", source.user_message())]
pub(crate) struct DiscoveryFailure {
    pub group_version: String,
    #[source]
    pub source: ApiError,
}

/// All resources, and the group versions that did not answer. An error means that nothing could be asked at all.
pub(crate) async fn discover(client: &Client) -> Result<(Vec<Resource>, Vec<DiscoveryFailure>), ApiError> {
    let mut resources = Vec::new();
    let mut failures = Vec::new();
    let core = call("discover core resources", client.list_core_api_resources("v1")).await?;
    collect("", "v1", core, &mut resources);
    for group in call("discover groups", client.list_api_groups()).await?.groups {
        let preferred = group.preferred_version.as_ref().or(group.versions.first()).map(|v| v.version.clone());
        // The preferred version first: a resource that two versions serve is one resource.
        let mut versions: Vec<String> = group.versions.iter().map(|version| version.version.clone()).collect();
        versions.sort_by_key(|version| Some(version) != preferred.as_ref());
        for version in versions {
            let group_version = format!("{}/{version}", group.name);
            match call("discover resources", client.list_api_group_resources(&group_version)).await {
                Ok(list) => collect(&group.name, &version, list, &mut resources),
                Err(source) => failures.push(DiscoveryFailure { group_version, source }),
            }
        }
    }
    Ok((resources, failures))
}

fn collect(group: &str, version: &str, list: APIResourceList, resources: &mut Vec<Resource>) {
    for found in list.resources {
        let known = |resource: &Resource| resource.group == group && resource.plural == found.name;
        if found.name.contains('/') || resources.iter().any(known) {
            continue;
        }
        let can = |verb: &str| found.verbs.iter().any(|candidate| candidate == verb);
        resources.push(Resource {
            group: group.to_owned(),
            version: version.to_owned(),
            watchable: can("list") && can("watch"),
            deletable: can("delete"),
            kind: found.kind,
            plural: found.name,
            namespaced: found.namespaced,
        });
    }
}
