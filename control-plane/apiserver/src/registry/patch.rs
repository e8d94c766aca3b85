//! Patch: JSON patch, merge patch, strategic merge patch, and server-side apply.

use http::StatusCode;
use oarlock_kinds::{FieldError, Kind};
use oarlock_schema::managed::{self, ApplyError, ApplyInput};
use oarlock_schema::patch::{self as patches, PatchError};
use oarlock_schema::strict;
use serde_json::{Value, json};

use super::create::create_object;
use super::update::{Change, Mode, modify, written_answer};
use crate::body::{self, FieldValidation};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::wire::{Answer, Body};

const ACCEPTED: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

/// A parsed patch body.
pub(crate) enum Patch {
    Json(Value),
    Merge(Value),
    Strategic(Value),
    Apply { configuration: Value, duplicates: Vec<String> },
}

impl Patch {
    pub(crate) fn parse(content_type: &str, bytes: &[u8]) -> ApiResult<Patch> {
        let json = || -> ApiResult<Value> {
            let (value, _) = strict::parse_json(bytes)
                .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
            Ok(value)
        };
        match content_type {
            "application/json-patch+json" => json().map(Patch::Json),
            "application/merge-patch+json" => json().map(Patch::Merge),
            "application/strategic-merge-patch+json" => json().map(Patch::Strategic),
            "application/apply-patch+yaml" | "application/apply-patch+json" => {
                let (configuration, duplicates) = strict::parse_yaml(bytes)
                    .map_err(|error| ApiError::bad_request(format!("error decoding YAML: {error}")))?;
                Ok(Patch::Apply { configuration, duplicates })
            }
            _ => Err(ApiError::unsupported_media_type(ACCEPTED)),
        }
    }

    /// The patched document.
    pub(crate) fn apply_to(&self, gvk: oarlock_schema::Gvk<'_>, old: &Value) -> ApiResult<Value> {
        let mut new = old.clone();
        let result = match self {
            Patch::Json(patch) => patches::json_patch(&mut new, patch),
            Patch::Merge(patch) => {
                patches::merge_patch(&mut new, patch);
                Ok(())
            }
            Patch::Strategic(patch) => patches::strategic_merge(gvk, &mut new, patch),
            Patch::Apply { .. } => Ok(()),
        };
        match result {
            Ok(()) if new.is_object() => Ok(new),
            Ok(()) => Err(ApiError::bad_request("the patch does not leave an object")),
            Err(PatchError::Invalid(message)) => Err(ApiError::bad_request(message)),
            Err(PatchError::Unprocessable(message)) => Err(ApiError::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "Invalid",
                "the server rejected our request due to an error in our request",
            )
            .with_details(json!({"causes": [{"reason": "UnexpectedServerResponse", "message": message}]}))),
        }
    }
}

/// PATCH of an object or its status.
pub(crate) async fn patch(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let validation = FieldValidation::parse(&ctx.info.query)?;
    let content_type = body::content_type(&ctx.headers);
    let bytes = body::read(request).await?;
    let parsed = Patch::parse(&content_type, &bytes)?;
    let subresource = target.subresource.clone();
    let mode = Mode::of_subresource(subresource.as_deref());
    if let Patch::Apply { configuration, duplicates } = parsed {
        return apply(ctx, target, mode, validation, configuration, duplicates).await;
    }
    if ctx.info.query.get("force").is_some() {
        return Err(invalid_options(FieldError::forbidden("force", "may not be specified for non-apply patch")));
    }
    let kind = target.kind;
    let mut warnings = Vec::new();
    let change = Change { mode, subresource: subresource.as_deref(), track: true };
    let written = modify(ctx, target, &change, |old| {
        let mut new = parsed.apply_to(body::gvk_of(kind), old)?;
        body::check_type(&mut new, kind.group, kind.version, kind.kind)?;
        check_fixed(kind, target, old, &new)?;
        warnings = type_patched(kind, &mut new, validation, &bytes)?;
        // A patch that does not speak of the revision is tried against whatever is there.
        if object::text(&new, "/metadata/resourceVersion") == object::text(old, "/metadata/resourceVersion") {
            object::metadata(&mut new).remove("resourceVersion");
        }
        Ok(new)
    })
    .await?;
    ctx.warnings.extend(warnings);
    written_answer(ctx, StatusCode::OK, kind, written)
}

fn invalid_options(error: FieldError) -> ApiError {
    ApiError::invalid("meta.k8s.io", "PatchOptions", "", &[error])
}

fn check_fixed(kind: &Kind, target: &Target, old: &Value, new: &Value) -> ApiResult<()> {
    for (field, pointer) in [("name", "/metadata/name"), ("namespace", "/metadata/namespace")] {
        let (before, after) = (object::text(old, pointer), object::text(new, pointer));
        if before != after {
            return Err(ApiError::bad_request(format!(
                "the {field} of the object ({after}) does not match the {field} on the URL ({before})"
            )));
        }
    }
    let (before, after) = (object::text(old, "/metadata/uid"), object::text(new, "/metadata/uid"));
    if before != after && !after.is_empty() {
        let why = format!("Precondition failed: UID in precondition: {after}, UID in object meta: {before}");
        return Err(ApiError::conflict(kind, &target.name, &why));
    }
    Ok(())
}

fn type_patched(kind: &Kind, object: &mut Value, validation: FieldValidation, patch: &[u8]) -> ApiResult<Vec<String>> {
    body::type_object(body::gvk_of(kind), object, Vec::new(), validation).map_err(|error| {
        let Some((_, detail)) = error.message.split_once("strict decoding error") else { return error };
        let shown = String::from_utf8_lossy(patch).into_owned();
        let detail = format!("strict decoding error{detail}");
        ApiError::invalid("", "", "", &[FieldError::invalid("patch", shown, detail)])
    })
}

async fn apply(
    ctx: &mut Context,
    target: &Target,
    mode: Mode,
    validation: FieldValidation,
    mut configuration: Value,
    duplicates: Vec<String>,
) -> ApiResult<Answer> {
    let kind = target.kind;
    let Some(manager) = ctx.info.query.get("fieldManager").map(str::to_owned) else {
        return Err(invalid_options(FieldError::required("fieldManager", "is required for apply patch")));
    };
    let force = ctx.info.query.flag("force");
    check_apply(kind, target, &mut configuration)?;
    let warnings = body::type_object(body::gvk_of(kind), &mut configuration, duplicates, validation)?;
    ctx.warnings.extend(warnings);
    let subresource = target.subresource.clone();
    let merge = |live: Option<&Value>| {
        let now = object::now_text();
        managed::apply(ApplyInput {
            gvk: body::gvk_of(kind),
            live,
            applied: &configuration,
            manager: &manager,
            force,
            subresource: subresource.as_deref(),
            now: &now,
        })
        .map_err(apply_error)
    };
    if ctx.core.store.get(&target.key()).is_none() {
        if mode != Mode::Main {
            return Err(target.not_found());
        }
        if !object::text(&configuration, "/metadata/uid").is_empty() {
            let why = "Precondition failed: UID in precondition, but the object does not exist";
            return Err(ApiError::conflict(kind, &target.name, why));
        }
        let object = merge(None)?;
        let created = create_object(ctx, target, object, false).await;
        match created {
            Err(error) if error.reason == "AlreadyExists" => {}
            created => return written_answer(ctx, StatusCode::CREATED, kind, created?),
        }
    }
    let change = Change { mode, subresource: subresource.as_deref(), track: false };
    let named_revision = !object::text(&configuration, "/metadata/resourceVersion").is_empty();
    let written = modify(ctx, target, &change, |old| {
        let mut new = merge(Some(old))?;
        if !named_revision {
            object::metadata(&mut new).remove("resourceVersion");
        }
        Ok(new)
    })
    .await?;
    written_answer(ctx, StatusCode::OK, kind, written)
}

fn check_apply(kind: &Kind, target: &Target, configuration: &mut Value) -> ApiResult<()> {
    if !configuration.is_object() {
        return Err(ApiError::bad_request("the applied configuration is not an object"));
    }
    body::check_type(configuration, kind.group, kind.version, kind.kind)?;
    if configuration.pointer("/metadata/managedFields").is_some_and(|fields| !fields.is_null()) {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let metadata = object::metadata(configuration);
    metadata.entry("name").or_insert_with(|| target.name.clone().into());
    if kind.namespaced {
        metadata.entry("namespace").or_insert_with(|| target.namespace.clone().into());
    }
    if object::name(configuration) != target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            object::name(configuration),
            target.name
        )));
    }
    if kind.namespaced && object::text(configuration, "/metadata/namespace") != target.namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

fn apply_error(error: ApplyError) -> ApiError {
    match error {
        ApplyError::Conflicts(conflicts) => {
            let message = ApplyError::Conflicts(conflicts.clone()).to_string();
            let causes: Vec<Value> = conflicts
                .iter()
                .map(|conflict| {
                    json!({
                        "reason": "FieldManagerConflict",
                        "message": format!("conflict with {}", conflict.manager),
                        "field": conflict.field,
                    })
                })
                .collect();
            ApiError::new(StatusCode::CONFLICT, "Conflict", message).with_details(json!({"causes": causes}))
        }
        ApplyError::Invalid(message) => ApiError::bad_request(message),
    }
}
