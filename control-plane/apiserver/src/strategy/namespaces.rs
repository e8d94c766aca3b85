//! Namespaces: the `kubernetes` finalizer that keeps one until it is empty, and the sub-resource that lets it go.

use http::StatusCode;
use serde_json::{Value, json};

use crate::body::{self, FieldValidation};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::registry::{self, Change, Mode};
use crate::wire::{Answer, Body};

/// A new namespace is active, is held until emptied, and carries its name as a label.
pub(crate) fn on_create(namespace: &mut Value) {
    let name = object::name(namespace).to_owned();
    let metadata = object::metadata(namespace);
    let labels = metadata.entry("labels").or_insert_with(|| json!({}));
    labels["kubernetes.io/metadata.name"] = name.into();
    let spec = object::section(namespace, "spec");
    let finalizers = spec.entry("finalizers").or_insert_with(|| json!([]));
    if let Some(list) = finalizers.as_array_mut().filter(|list| !list.iter().any(|one| one == "kubernetes")) {
        list.push("kubernetes".into());
    }
    let status = object::section(namespace, "status");
    status.clear();
    status.insert("phase".into(), "Active".into());
}

/// Finalizers are changed through `finalize` only, and the name label is kept.
pub(crate) fn on_update(old: &Value, new: &mut Value) {
    let name = object::name(old).to_owned();
    let metadata = object::metadata(new);
    let labels = metadata.entry("labels").or_insert_with(|| json!({}));
    labels["kubernetes.io/metadata.name"] = name.into();
    let held = old.pointer("/spec/finalizers").cloned();
    let spec = object::section(new, "spec");
    match held {
        Some(held) => spec.insert("finalizers".into(), held),
        None => spec.remove("finalizers"),
    };
}

/// PUT to `namespaces/<name>/finalize`.
pub(crate) async fn finalize(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let bytes = body::read(request).await?;
    let decoded = body::decode(&body::content_type(&ctx.headers), &bytes)?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let mut wanted = decoded.object;
    body::check_type(&mut wanted, "", "v1", "Namespace")?;
    body::type_object(body::gvk_of(target.kind), &mut wanted, decoded.duplicates, FieldValidation::Ignore)?;
    let change = Change { mode: Mode::Part, subresource: Some("finalize"), track: true };
    let written = registry::modify(ctx, target, &change, |old| {
        let mut new = old.clone();
        let revision = wanted.pointer("/metadata/resourceVersion").cloned().unwrap_or_default();
        object::metadata(&mut new).insert("resourceVersion".into(), revision);
        let spec = object::section(&mut new, "spec");
        match wanted.pointer("/spec/finalizers") {
            Some(finalizers) => spec.insert("finalizers".into(), finalizers.clone()),
            None => spec.remove("finalizers"),
        };
        Ok(new)
    })
    .await?;
    registry::written_answer(ctx, StatusCode::OK, target.kind, written)
}
