//! Update: the one path that every change of an existing object takes, whoever asks and through which sub-resource.

use std::sync::Arc;

use http::StatusCode;
use oarlock_kinds::Kind;
use oarlock_schema::managed::{self, UpdateInput};
use oarlock_store::{Expect, Op, Outcome, Record};
use serde_json::Value;

use super::create::{create_object, refuse_invalid, stored_kind, ttl_seconds};
use super::respond::{record_answer, value_answer};
use crate::admission;
use crate::body::{self, FieldValidation};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object::{self, metadata};
use crate::strategy;
use crate::wire::{Answer, Body};

/// How often a change that did not name a revision is tried against newer states.
const ATTEMPTS: usize = 16;

/// An object after a write: as stored, or only computed (dry run).
pub(crate) enum Written {
    Record(Arc<Record>),
    Value(Value),
}

/// Which part of an object a change may touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Everything but what the status owns.
    Main,
    Status,
    /// The caller has put the change where it belongs, even where a plain update may not reach; the result must be valid.
    Part,
}

impl Mode {
    /// The way of a plain write to the object or a subresource of its own type.
    pub(crate) fn of_subresource(subresource: Option<&str>) -> Self {
        if matches!(subresource, Some("status" | "approval")) { Mode::Status } else { Mode::Main }
    }
}

/// What to change.
pub(crate) struct Change<'c> {
    pub(crate) mode: Mode,
    /// Recorded in managedFields.
    pub(crate) subresource: Option<&'c str>,
    /// False where the new object already carries its managedFields.
    pub(crate) track: bool,
}

/// PUT of an object.
pub(crate) async fn update(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let validation = FieldValidation::parse(&ctx.info.query)?;
    let bytes = body::read(request).await?;
    let decoded = body::decode(&body::content_type(&ctx.headers), &bytes)?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let kind = target.kind;
    let mut object = decoded.object;
    body::check_type(&mut object, kind.group, kind.version, kind.kind)?;
    let warnings = body::type_object(body::gvk_of(kind), &mut object, decoded.duplicates, validation)?;
    ctx.warnings.extend(warnings);
    check_names(target, &object)?;
    let subresource = target.subresource.clone();
    let mode = Mode::of_subresource(subresource.as_deref());
    let missing = ctx.core.store.get(&target.key()).is_none();
    if missing && mode == Mode::Main && allows_create_on_update(kind) && revision_of(&object).is_empty() {
        let written = create_object(ctx, target, object, true).await?;
        return written_answer(ctx, StatusCode::CREATED, kind, written);
    }
    let change = Change { mode, subresource: subresource.as_deref(), track: true };
    let written = modify(ctx, target, &change, |_| Ok(object.clone())).await?;
    written_answer(ctx, StatusCode::OK, kind, written)
}

pub(crate) fn written_answer(ctx: &Context, code: StatusCode, kind: &Kind, written: Written) -> ApiResult<Answer> {
    match written {
        Written::Record(record) => record_answer(ctx, code, kind, &record),
        Written::Value(value) => value_answer(ctx, code, kind, value),
    }
}

fn allows_create_on_update(kind: &Kind) -> bool {
    matches!(
        kind.storage,
        "events"
            | "endpoints"
            | "rbac.authorization.k8s.io/roles"
            | "rbac.authorization.k8s.io/rolebindings"
            | "rbac.authorization.k8s.io/clusterroles"
            | "rbac.authorization.k8s.io/clusterrolebindings"
    )
}

fn check_names(target: &Target, object: &Value) -> ApiResult<()> {
    let name = object::name(object);
    if !name.is_empty() && name != target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            target.name
        )));
    }
    let namespace = object::text(object, "/metadata/namespace");
    if target.kind.namespaced && !namespace.is_empty() && namespace != target.namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

fn revision_of(object: &Value) -> &str {
    match object::text(object, "/metadata/resourceVersion") {
        "0" => "",
        revision => revision,
    }
}

/// Computes a new state from the stored one and writes it, again and again while others write in between, unless the
/// new state names the revision it was made from.
pub(crate) async fn modify(
    ctx: &mut Context,
    target: &Target,
    change: &Change<'_>,
    mut compute: impl FnMut(&Value) -> ApiResult<Value>,
) -> ApiResult<Written> {
    let kind = target.kind;
    let key = target.key();
    for _ in 0..ATTEMPTS {
        let record = ctx.core.store.get(&key).ok_or_else(|| target.not_found())?;
        let old = object::parse_as(kind, &record);
        let mut new = compute(&old)?;
        let named = revision_of(&new).to_owned();
        let stale = !named.is_empty() && named != record.revision().to_string();
        if stale {
            return Err(ApiError::modified(kind, &target.name));
        }
        check_uid(kind, target, &old, &new)?;
        carry_over(&old, &mut new);
        if target.subresource.as_deref() == Some("approval") {
            strategy::certificates::only_approval(&old, &mut new);
        }
        (kind.default)(&mut new);
        match change.mode {
            Mode::Main => (kind.prepare_update)(&mut new, &old),
            Mode::Status => (kind.prepare_status_update)(&mut new, &old),
            Mode::Part => {}
        }
        admission::on_update(ctx, target, change, &old, &mut new)?;
        let reserved = strategy::on_update(ctx, kind, (change.mode, target.subresource.as_deref()), &old, &mut new)?;
        let errors = match change.mode {
            Mode::Status => (kind.validate_status_update)(&new, &old),
            Mode::Main => (kind.validate_update)(&new, &old),
            Mode::Part => strategy::validate_part(kind, &new),
        };
        refuse_invalid(kind, &target.name, &errors)?;
        if change.track {
            track(ctx, kind, change, &old, &mut new);
        }
        if same_but_times(&old, &new) {
            return Ok(Written::Record(record));
        }
        if ctx.dry_run {
            return Ok(Written::Value(new));
        }
        let written = write(ctx, target, &record, new).await?;
        drop(reserved);
        match written {
            Some(written) => return Ok(written),
            None if named.is_empty() => continue,
            None => return Err(ApiError::modified(kind, &target.name)),
        }
    }
    Err(ApiError::modified(kind, &target.name))
}

fn track(ctx: &Context, kind: &Kind, change: &Change<'_>, old: &Value, new: &mut Value) {
    let manager = ctx.field_manager();
    let now = object::now_text();
    managed::track_update(UpdateInput {
        gvk: body::gvk_of(kind),
        old: Some(old),
        new,
        manager: &manager,
        subresource: change.subresource,
        now: &now,
    });
}

fn check_uid(kind: &Kind, target: &Target, old: &Value, new: &Value) -> ApiResult<()> {
    let (have, want) = (object::text(old, "/metadata/uid"), object::text(new, "/metadata/uid"));
    if want.is_empty() || want == have {
        return Ok(());
    }
    let why = format!("Precondition failed: UID in precondition: {want}, UID in object meta: {have}");
    Err(ApiError::conflict(kind, &target.name, &why))
}

/// What no client may change: identity and the progress of deletion.
fn carry_over(old: &Value, new: &mut Value) {
    const FIXED: [&str; 7] = [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ];
    let metadata = metadata(new);
    metadata.remove("selfLink");
    for field in FIXED {
        match old["metadata"].get(field) {
            Some(value) => metadata.insert(field.into(), value.clone()),
            None => metadata.remove(field),
        };
    }
    if metadata.get("managedFields").is_none_or(Value::is_null) {
        match old["metadata"].get("managedFields") {
            Some(value) => metadata.insert("managedFields".into(), value.clone()),
            None => metadata.remove("managedFields"),
        };
    }
    if let Some(revision) = old["metadata"].get("resourceVersion") {
        metadata.insert("resourceVersion".into(), revision.clone());
    }
}

/// Whether two states differ in nothing but the times in managedFields.
fn same_but_times(old: &Value, new: &Value) -> bool {
    fn without_times(object: &Value) -> Value {
        let mut object = object.clone();
        let managed = object.pointer_mut("/metadata/managedFields").and_then(Value::as_array_mut);
        for entry in managed.into_iter().flatten() {
            if let Some(entry) = entry.as_object_mut() {
                entry.remove("time");
            }
        }
        object
    }
    old == new || without_times(old) == without_times(new)
}

/// Writes a new state over the one it was made from; removes the object instead where that was its last finalizer.
/// `None` when somebody else wrote in between.
async fn write(ctx: &Context, target: &Target, old: &Record, mut new: Value) -> ApiResult<Option<Written>> {
    let kind = target.kind;
    let expect = Expect::Revision(old.revision());
    if is_finished(kind, &new) {
        let op = Op::Delete { key: old.key().clone(), expect };
        let outcome = ctx.core.try_commit(kind, &target.name, op).await?;
        return Ok(outcome.map(|outcome| match outcome {
            Outcome::Written(record) | Outcome::Deleted(record) => Written::Record(record),
            Outcome::Absent => Written::Value(new),
        }));
    }
    if !object::is_native(kind) {
        (kind.to_stored)(&mut new);
    }
    let op = Op::Put {
        key: old.key().clone(),
        value: object::encode(stored_kind(kind), &new),
        expect,
        ttl_seconds: ttl_seconds(ctx, kind),
    };
    let outcome = ctx.core.try_commit(kind, &target.name, op).await?;
    Ok(outcome.and_then(|outcome| outcome.record().cloned()).map(Written::Record))
}

/// Whether an object is being deleted and nothing holds it any more.
pub(crate) fn is_finished(kind: &Kind, object: &Value) -> bool {
    let grace = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let held = kind.storage == "namespaces"
        && object.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|held| !held.is_empty());
    object::is_deleting(object) && object::finalizers(object).is_empty() && grace == 0 && !held
}
