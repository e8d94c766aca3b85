//! The OpenAPI documents that clients read: the v3 index, one v3 document for each group and version, and v2.

use serde_json::{Value, json};

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

/// The answer to `GET /openapi/v3`.
pub fn v3_index(resources: &[ServedResource]) -> Value {
    let _ = resources;
    json!({"paths": {}})
}

/// The answer to `GET /openapi/v3/apis/<group>/<version>` (or `/openapi/v3/api/v1`); `None` when nothing of it is served.
pub fn v3_document(group: &str, version: &str, resources: &[ServedResource]) -> Option<Value> {
    let _ = (group, version, resources);
    None
}

/// The answer to `GET /openapi/v2` in JSON.
pub fn v2_document(resources: &[ServedResource]) -> Value {
    let _ = resources;
    json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": "v1.36.0"}, "paths": {}, "definitions": {}})
}
