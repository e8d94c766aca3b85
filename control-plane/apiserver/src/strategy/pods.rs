//! Pods: binding, eviction, ephemeral containers and resizing.

use http::StatusCode;
use oarlock_kinds::FieldError;
use oarlock_schema::Gvk;
use oarlock_store::Range;
use serde_json::{Value, json};

use crate::admission;
use crate::body::{self, FieldValidation};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::registry::{self, Change, DeleteOptions, Mode, Patch};
use crate::selector::LabelSelector;
use crate::wire::{self, Answer, Body};

async fn read_typed(ctx: &Context, request: Body, gvk: Gvk<'_>) -> ApiResult<Value> {
    let bytes = body::read(request).await?;
    let decoded = body::decode(&body::content_type(&ctx.headers), &bytes)?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let mut object = decoded.object;
    body::check_type(&mut object, gvk.group, gvk.version, gvk.kind)?;
    body::type_object(gvk, &mut object, decoded.duplicates, FieldValidation::Ignore)?;
    Ok(object)
}

fn success() -> Answer {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    wire::json(StatusCode::CREATED, &status)
}

/// POST to `pods/<name>/binding` or to `bindings`: assigns a pod to a node.
pub(crate) async fn bind(ctx: &mut Context, namespace: &str, name: Option<&str>, request: Body) -> ApiResult<Answer> {
    let binding = read_typed(ctx, request, Gvk { group: "", version: "v1", kind: "Binding" }).await?;
    let pods = oarlock_kinds::find("", "v1", "pods").ok_or_else(ApiError::no_such_resource)?;
    let named = object::name(&binding);
    if name.is_some_and(|name| !named.is_empty() && name != named) {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({named}) does not match the name on the URL ({})",
            name.unwrap_or_default()
        )));
    }
    let name = name.unwrap_or(named).to_owned();
    let node = object::text(&binding, "/target/name").to_owned();
    let kind = object::text(&binding, "/target/kind");
    let mut errors = Vec::new();
    if !matches!(kind, "" | "Node") {
        errors.push(FieldError::not_supported("target.kind", kind, &["Node", "<empty>"]));
    }
    if node.is_empty() {
        errors.push(FieldError::required("target.name", ""));
    }
    if !errors.is_empty() {
        return Err(ApiError::invalid("", "Binding", &name, &errors));
    }
    let target = Target { kind: pods, namespace: namespace.into(), name: name.clone(), subresource: None };
    let refused = |why: String| {
        ApiError::new(
            StatusCode::CONFLICT,
            "Conflict",
            format!("Operation cannot be fulfilled on pods/binding \"{name}\": {why}"),
        )
        .with_details(json!({"name": name, "kind": "pods/binding"}))
    };
    let annotations = binding.pointer("/metadata/annotations").and_then(Value::as_object).cloned().unwrap_or_default();
    let uid = object::text(&binding, "/metadata/uid").to_owned();
    let change = Change { mode: Mode::Part, subresource: Some("binding"), track: true };
    registry::modify(ctx, &target, &change, |old| {
        if !uid.is_empty() && uid != object::text(old, "/metadata/uid") {
            let why = format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                object::text(old, "/metadata/uid")
            );
            return Err(refused(why));
        }
        if object::is_deleting(old) {
            return Err(refused(format!("pod {name} is being deleted, cannot be assigned to a host")));
        }
        let present = object::text(old, "/spec/nodeName");
        if !present.is_empty() {
            return Err(refused(format!("pod {name} is already assigned to node \"{present}\"")));
        }
        if old.pointer("/spec/schedulingGates").and_then(Value::as_array).is_some_and(|gates| !gates.is_empty()) {
            return Err(refused(format!("pod {name} has non-empty .spec.schedulingGates")));
        }
        let mut new = old.clone();
        let metadata = object::metadata(&mut new);
        metadata.remove("resourceVersion");
        if !annotations.is_empty() {
            let own = metadata.entry("annotations").or_insert_with(|| json!({}));
            for (key, value) in &annotations {
                own[key.as_str()] = value.clone();
            }
        }
        object::section(&mut new, "spec").insert("nodeName".into(), node.clone().into());
        set_scheduled(&mut new);
        Ok(new)
    })
    .await?;
    Ok(success())
}

fn set_scheduled(pod: &mut Value) {
    let now = object::now_text();
    let status = object::section(pod, "status");
    let conditions = status.entry("conditions").or_insert_with(|| json!([]));
    let Some(conditions) = conditions.as_array_mut() else { return };
    let generation = conditions.iter().find(|condition| condition["type"] == "PodScheduled").cloned();
    conditions.retain(|condition| condition["type"] != "PodScheduled");
    let mut condition =
        json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now});
    if let Some(observed) = generation.and_then(|old| old.get("observedGeneration").cloned()) {
        condition["observedGeneration"] = observed;
    }
    conditions.push(condition);
}

/// POST to `pods/<name>/eviction`: a delete that asks the disruption budgets first.
pub(crate) async fn evict(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let eviction = read_eviction(ctx, request).await?;
    let named = object::name(&eviction);
    if !named.is_empty() && named != target.name {
        return Err(ApiError::bad_request("name in URL does not match name in Eviction object"));
    }
    let options: DeleteOptions = match eviction.get("deleteOptions") {
        Some(options) => serde_json::from_value(options.clone()).map_err(|e| ApiError::bad_request(e.to_string()))?,
        None => DeleteOptions::default(),
    };
    if options.dry_run.iter().flatten().any(|value| value == "All") {
        ctx.dry_run = true;
    }
    admission::on_delete(ctx, target)?;
    let pod_target = Target { subresource: None, ..target.clone() };
    let record = ctx.core.store.get(&pod_target.key()).ok_or_else(|| target.not_found())?;
    let pod = object::parse(&record);
    if !ignores_budgets(&pod) {
        take_disruption(ctx, &pod_target, &pod).await?;
    }
    registry::delete_object(ctx, &pod_target, &options).await?;
    Ok(success())
}

async fn read_eviction(ctx: &Context, request: Body) -> ApiResult<Value> {
    let bytes = body::read(request).await?;
    let decoded = body::decode(&body::content_type(&ctx.headers), &bytes)?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let mut object = decoded.object;
    let version = match object::text(&object, "/apiVersion") {
        "policy/v1beta1" => "v1beta1",
        _ => "v1",
    };
    body::check_type(&mut object, "policy", version, "Eviction")?;
    Ok(object)
}

/// Pods that are over, not started or already going are not what budgets protect.
fn ignores_budgets(pod: &Value) -> bool {
    object::is_deleting(pod) || matches!(object::text(pod, "/status/phase"), "Succeeded" | "Failed" | "Pending")
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    conditions.into_iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn refused_by(budget: &Value) -> ApiError {
    let message = format!(
        "The disruption budget {} needs {} healthy pods and has {} currently",
        object::name(budget),
        budget.pointer("/status/desiredHealthy").and_then(Value::as_i64).unwrap_or(0),
        budget.pointer("/status/currentHealthy").and_then(Value::as_i64).unwrap_or(0),
    );
    ApiError::too_many_requests(
        "Cannot evict pod as it would violate the pod's disruption budget.",
        json!({"causes": [{"reason": "DisruptionBudget", "message": message}], "retryAfterSeconds": 10}),
    )
}

async fn take_disruption(ctx: &mut Context, target: &Target, pod: &Value) -> ApiResult<()> {
    let Some(kind) = oarlock_kinds::find("policy", "v1", "poddisruptionbudgets") else { return Ok(()) };
    let prefix = object::key(kind, &target.namespace, "");
    let page = ctx.core.store.range(Range { prefix: &prefix, ..Range::default() });
    let page = page.map_err(|error| ApiError::from_store(&error, kind, ""))?;
    let labels = object::Index::of(target.kind, pod).labels;
    let mut budgets = page.records.iter().map(|record| object::parse(record)).filter(|budget| selects(budget, &labels));
    let Some(budget) = budgets.next() else { return Ok(()) };
    if budgets.next().is_some() {
        return Err(ApiError::internal(
            "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
        ));
    }
    drop(budgets);
    if !is_ready(pod) && unhealthy_may_go(&budget) {
        return Ok(());
    }
    let budget_target =
        Target { kind, namespace: target.namespace.clone(), name: object::name(&budget).to_owned(), subresource: None };
    let change = Change { mode: Mode::Part, subresource: Some("status"), track: false };
    let pod_name = target.name.clone();
    registry::modify(ctx, &budget_target, &change, |old| {
        let number = |pointer: &str| old.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
        let stale = number("/status/observedGeneration") < number("/metadata/generation");
        let allowed = number("/status/disruptionsAllowed");
        if stale || allowed <= 0 {
            return Err(refused_by(old));
        }
        let mut new = old.clone();
        object::metadata(&mut new).remove("resourceVersion");
        let status = object::section(&mut new, "status");
        status.insert("disruptionsAllowed".into(), (allowed - 1).into());
        let disrupted = status.entry("disruptedPods").or_insert_with(|| json!({}));
        disrupted[pod_name.as_str()] = object::now_text().into();
        Ok(new)
    })
    .await?;
    Ok(())
}

/// Whether a budget lets pods go that do not count as healthy anyway.
fn unhealthy_may_go(budget: &Value) -> bool {
    let number = |pointer: &str| budget.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
    let wanted = number("/status/desiredHealthy");
    object::text(budget, "/spec/unhealthyPodEvictionPolicy") == "AlwaysAllow"
        || (wanted > 0 && number("/status/currentHealthy") >= wanted)
}

fn selects(budget: &Value, labels: &[(Box<str>, Box<str>)]) -> bool {
    let Some(selector) = budget.pointer("/spec/selector") else { return false };
    let mut terms: Vec<String> = Vec::new();
    for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
        terms.push(format!("{key}={}", value.as_str().unwrap_or_default()));
    }
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = object::text(expression, "/key");
        let values: Vec<&str> = object::strings(expression.get("values")).collect();
        terms.push(match object::text(expression, "/operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    LabelSelector::parse(&terms.join(",")).is_ok_and(|selector| selector.matches(labels))
}

/// PUT or PATCH of `pods/<name>/ephemeralcontainers` or `pods/<name>/resize`: only that part of the spec changes.
pub(crate) async fn change_part(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let kind = target.kind;
    let validation = FieldValidation::parse(&ctx.info.query)?;
    let bytes = body::read(request).await?;
    let content_type = body::content_type(&ctx.headers);
    let patch = match ctx.info.verb {
        "patch" => Some(Patch::parse(&content_type, &bytes)?),
        _ => None,
    };
    let put = match &patch {
        Some(Patch::Apply { .. }) => return Err(ApiError::unsupported_media_type(&["application/json-patch+json"])),
        Some(_) => None,
        None => {
            let decoded =
                body::decode(&content_type, &bytes)?.ok_or_else(|| ApiError::bad_request("the request has no body"))?;
            Some(decoded.object)
        }
    };
    let subresource = target.subresource.clone().unwrap_or_default();
    let whole = Target { subresource: None, ..target.clone() };
    let change = Change { mode: Mode::Part, subresource: Some(&subresource), track: true };
    let written = registry::modify(ctx, &whole, &change, |old| {
        let mut asked = match (&patch, &put) {
            (Some(patch), _) => patch.apply_to(body::gvk_of(kind), old)?,
            (None, Some(put)) => put.clone(),
            (None, None) => old.clone(),
        };
        body::check_type(&mut asked, kind.group, kind.version, kind.kind)?;
        body::type_object(body::gvk_of(kind), &mut asked, Vec::new(), validation)?;
        let mut new = old.clone();
        let revision = asked.pointer("/metadata/resourceVersion").cloned();
        let unchanged = patch.is_some() && revision.as_ref() == old.pointer("/metadata/resourceVersion");
        match revision.filter(|_| !unchanged) {
            Some(revision) => object::metadata(&mut new).insert("resourceVersion".into(), revision),
            None => object::metadata(&mut new).remove("resourceVersion"),
        };
        match &*subresource {
            "ephemeralcontainers" => take_ephemeral_containers(target, old, &asked, &mut new)?,
            _ => take_resources(&asked, &mut new),
        }
        Ok(new)
    })
    .await?;
    registry::written_answer(ctx, StatusCode::OK, kind, written)
}

fn take_ephemeral_containers(target: &Target, old: &Value, asked: &Value, new: &mut Value) -> ApiResult<()> {
    let wanted = asked.pointer("/spec/ephemeralContainers").cloned().unwrap_or_else(|| json!([]));
    object::section(new, "spec").insert("ephemeralContainers".into(), wanted);
    (target.kind.default)(new);
    let errors = oarlock_kinds::pod_ephemeral_containers_update(new, old);
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid("", "Pod", &target.name, &errors)) }
}

fn take_resources(asked: &Value, new: &mut Value) {
    for list in ["containers", "initContainers"] {
        let wanted = asked.pointer(&format!("/spec/{list}")).and_then(Value::as_array).cloned().unwrap_or_default();
        let containers = object::section(new, "spec").get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten().filter_map(Value::as_object_mut) {
            let Some(source) = wanted.iter().find(|one| one.get("name") == container.get("name")) else { continue };
            for field in ["resources", "resizePolicy"] {
                if let Some(value) = source.get(field) {
                    container.insert(field.into(), value.clone());
                }
            }
        }
    }
}
