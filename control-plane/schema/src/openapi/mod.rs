//! The OpenAPI documents that clients read: the v3 index, one v3 document for each group and version, and v2.
//! They carry structure and the Kubernetes extensions, from the catalogue; descriptions are few and our own.

mod paths;
mod schemas;
mod v2_wire;

pub use v2_wire::v2_protobuf;

use crate::Gvk;
use crate::catalogue::{TypeId, catalogue};
use schemas::Style;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// One served resource, as much of it as the documents say.
#[derive(Debug, Clone)]
pub struct ServedResource {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub namespaced: bool,
    /// `get list create update patch delete deletecollection watch`
    pub verbs: Vec<String>,
    pub subresources: Vec<ServedSubresource>,
}

#[derive(Debug, Clone)]
pub struct ServedSubresource {
    /// `status`, `scale`, `log` …
    pub name: String,
    /// The group, version and kind that the subresource speaks (`autoscaling`, `v1`, `Scale` for scale).
    pub group: String,
    pub version: String,
    pub kind: String,
    pub verbs: Vec<String>,
}

impl ServedResource {
    fn gvk(&self) -> Gvk<'_> {
        Gvk::new(&self.group, &self.version, &self.kind)
    }
}

impl ServedSubresource {
    fn gvk(&self) -> Gvk<'_> {
        Gvk::new(&self.group, &self.version, &self.kind)
    }
}

/// `api/v1` or `apis/apps/v1`.
fn root(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// Changes whenever what is served changes, so that clients may cache by it.
fn fingerprint(resources: &[ServedResource]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in format!("{} {resources:?}", env!("CARGO_PKG_VERSION")).bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016X}")
}

/// The answer to `GET /openapi/v3`.
pub fn v3_index(resources: &[ServedResource]) -> Value {
    let hash = fingerprint(resources);
    let roots: BTreeSet<String> = resources.iter().map(|served| root(&served.group, &served.version)).collect();
    let paths: Map<String, Value> = roots
        .into_iter()
        .map(|root| {
            let url = format!("/openapi/v3/{root}?hash={hash}");
            (root, json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({"paths": paths})
}

/// The types of a document: those of the served kinds, their lists, and all that they refer to.
fn types_of<'a>(resources: impl Iterator<Item = &'a ServedResource>) -> BTreeSet<TypeId> {
    let mut roots = Vec::new();
    for served in resources {
        roots.extend(catalogue().by_gvk(served.gvk()));
        let list = format!("{}List", served.kind);
        roots.extend(catalogue().by_gvk(Gvk { kind: &list, ..served.gvk() }));
        roots.extend(served.subresources.iter().filter_map(|subresource| catalogue().by_gvk(subresource.gvk())));
    }
    for name in ["meta.v1.DeleteOptions", "meta.v1.Status", "meta.v1.Patch"] {
        roots.extend(catalogue().by_name(name));
    }
    schemas::closure(roots)
}

/// The answer to `GET /openapi/v3/apis/<group>/<version>` (or `/openapi/v3/api/v1`); `None` when nothing of it is served.
pub fn v3_document(group: &str, version: &str, resources: &[ServedResource]) -> Option<Value> {
    let served = || resources.iter().filter(|served| served.group == group && served.version == version);
    served().next()?;
    let schemas = schemas::render(&types_of(served()), Style::V3);
    let mut paths = Map::new();
    for resource in served() {
        paths::add(&mut paths, resource, Style::V3);
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }))
}

/// The answer to `GET /openapi/v2` in JSON.
pub fn v2_document(resources: &[ServedResource]) -> Value {
    let definitions = schemas::render(&types_of(resources.iter()), Style::V2);
    let mut paths = Map::new();
    for resource in resources {
        paths::add(&mut paths, resource, Style::V2);
    }
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths,
        "definitions": definitions,
    })
}

#[cfg(test)]
mod tests;
