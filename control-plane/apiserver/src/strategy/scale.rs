//! The `scale` sub-resource of deployments and replica sets.

use http::StatusCode;
use oarlock_kinds::{FieldError, Kind};
use oarlock_schema::Gvk;
use serde_json::{Map, Value, json};

use crate::body::{self, FieldValidation};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::registry::{self, Change, Mode, Written};
use crate::wire::{self, Answer, Body};

/// The Scale view of an object.
fn view(object: &Value) -> Value {
    let mut metadata = Map::new();
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object["metadata"].get(field) {
            metadata.insert(field.into(), value.clone());
        }
    }
    let mut spec = Map::new();
    let replicas = object.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
    if replicas != 0 {
        spec.insert("replicas".into(), replicas.into());
    }
    let current = object.pointer("/status/replicas").cloned().unwrap_or_else(|| 0.into());
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec,
        "status": {"replicas": current, "selector": selector_text(object.pointer("/spec/selector"))},
    })
}

fn selector_text(selector: Option<&Value>) -> String {
    let Some(selector) = selector else { return String::new() };
    let mut terms: Vec<String> = Vec::new();
    for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
        terms.push(format!("{key}={}", value.as_str().unwrap_or_default()));
    }
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = object::text(expression, "/key");
        let mut values: Vec<&str> = object::strings(expression.get("values")).collect();
        values.sort_unstable();
        terms.push(match object::text(expression, "/operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    terms.sort_unstable();
    terms.join(",")
}

pub(crate) fn get(ctx: &Context, target: &Target) -> ApiResult<Answer> {
    let record = ctx.core.store.get(&target.key()).ok_or_else(|| target.not_found())?;
    Ok(wire::json(StatusCode::OK, &view(&object::parse(&record))))
}

/// PUT or PATCH.
pub(crate) async fn change(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let bytes = body::read(request).await?;
    let content_type = body::content_type(&ctx.headers);
    let patch = match ctx.info.verb {
        "patch" => Some(registry::Patch::parse(&content_type, &bytes)?),
        _ => None,
    };
    let put = match &patch {
        Some(_) => None,
        None => {
            let decoded =
                body::decode(&content_type, &bytes)?.ok_or_else(|| ApiError::bad_request("the request has no body"))?;
            Some(decoded.object)
        }
    };
    let kind = target.kind;
    let change = Change { mode: Mode::Main, subresource: Some("scale"), track: true };
    let written = registry::modify(ctx, target, &change, |old| {
        let seen = view(old);
        let gvk = Gvk { group: "autoscaling", version: "v1", kind: "Scale" };
        let mut scale = match (&patch, &put) {
            (Some(patch), _) => patch.apply_to(gvk, &seen)?,
            (None, Some(put)) => put.clone(),
            (None, None) => seen.clone(),
        };
        body::check_type(&mut scale, "autoscaling", "v1", "Scale")?;
        body::type_object(gvk, &mut scale, Vec::new(), FieldValidation::Ignore)?;
        scaled(kind, target, old, &scale, patch.is_some())
    })
    .await?;
    let object = match written {
        Written::Record(record) => object::parse(&record),
        Written::Value(value) => value,
    };
    Ok(wire::json(StatusCode::OK, &view(&object)))
}

fn scaled(kind: &Kind, target: &Target, old: &Value, scale: &Value, patched: bool) -> ApiResult<Value> {
    let name = object::name(scale);
    if !name.is_empty() && name != target.name {
        return Err(ApiError::bad_request("the name of the Scale does not match the name on the URL"));
    }
    let replicas = scale.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
    if replicas < 0 {
        let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        return Err(ApiError::invalid("autoscaling", "Scale", &target.name, &[error]));
    }
    let mut new = old.clone();
    let seen = object::text(old, "/metadata/resourceVersion");
    let named = object::text(scale, "/metadata/resourceVersion");
    let metadata = object::metadata(&mut new);
    if named.is_empty() || (patched && named == seen) {
        metadata.remove("resourceVersion");
    } else if named != seen {
        return Err(ApiError::modified(kind, &target.name));
    }
    object::section(&mut new, "spec").insert("replicas".into(), replicas.into());
    Ok(new)
}
