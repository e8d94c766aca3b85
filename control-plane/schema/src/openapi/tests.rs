//! What clients look up in the documents.

use super::*;

fn deployments() -> ServedResource {
    ServedResource {
        group: "apps".to_owned(),
        version: "v1".to_owned(),
        kind: "Deployment".to_owned(),
        plural: "deployments".to_owned(),
        namespaced: true,
        verbs: ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
            .map(str::to_owned)
            .to_vec(),
        subresources: vec![ServedSubresource {
            name: "scale".to_owned(),
            group: "autoscaling".to_owned(),
            version: "v1".to_owned(),
            kind: "Scale".to_owned(),
            verbs: ["get", "patch", "update"].map(str::to_owned).to_vec(),
        }],
    }
}

#[test]
fn the_index_links_each_group_and_version() {
    let index = v3_index(&[deployments()]);
    let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().expect("a link");
    assert!(url.starts_with("/openapi/v3/apis/apps/v1?hash="), "{url}");
}

/// What kubectl does before it sends `fieldValidation`: find the PATCH operation of the kind and its parameter.
#[test]
fn the_patch_operation_of_a_kind_takes_field_validation() {
    let document = v3_document("apps", "v1", &[deployments()]).expect("served");
    let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
    assert_eq!(
        patch["x-kubernetes-group-version-kind"],
        json!({"group": "apps", "version": "v1", "kind": "Deployment"})
    );
    let parameters = patch["parameters"].as_array().expect("parameters");
    assert!(parameters.iter().any(|parameter| parameter["name"] == "fieldValidation"));
    let scale = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}/scale"]["get"];
    assert_eq!(scale["x-kubernetes-group-version-kind"]["kind"], "Scale");
    assert!(v3_document("batch", "v1", &[deployments()]).is_none());
}

#[test]
fn every_reference_of_a_document_resolves() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match value {
                        Value::String(text) if key == "$ref" => found.push(text.clone()),
                        other => references(other, found),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }
    for (document, prefix) in [
        (v3_document("apps", "v1", &[deployments()]).expect("served"), "#/components/schemas/"),
        (v2_document(&[deployments()]), "#/definitions/"),
    ] {
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 100);
        let schemas = document.get("definitions").unwrap_or(&document["components"]["schemas"]);
        for reference in found {
            let name = reference.strip_prefix(prefix).expect("a local reference");
            assert!(schemas.get(name).is_some(), "{name}");
        }
    }
}

#[test]
fn schemas_carry_merge_keys() {
    let document = v3_document("apps", "v1", &[deployments()]).expect("served");
    let containers = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
    assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
    assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
    assert_eq!(containers["items"]["allOf"][0]["$ref"], "#/components/schemas/io.k8s.api.core.v1.Container");
}

#[test]
fn the_protobuf_document_starts_with_its_version() {
    let bytes = v2_protobuf(&[deployments()]);
    assert!(bytes.starts_with(b"\x0a\x032.0"));
    assert!(bytes.len() > 10_000);
}
