//! Create.

use http::StatusCode;
use oarlock_kinds::{FieldError, Kind};
use oarlock_schema::managed::{self, UpdateInput};
use oarlock_store::{Expect, Op, Outcome};
use rand::Rng;
use serde_json::Value;

use super::respond::{record_answer, value_answer};
use super::update::Written;
use crate::admission;
use crate::body::{self, FieldValidation};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object::{self, metadata};
use crate::strategy;
use crate::wire::{Answer, Body};

const NAME_ATTEMPTS: usize = 8;
const SUFFIX_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;
const LONGEST_BASE: usize = 63 - SUFFIX_LENGTH;

/// POST of an object to its collection.
pub(crate) async fn create(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let validation = FieldValidation::parse(&ctx.info.query)?;
    let bytes = body::read(request).await?;
    let decoded = body::decode(&body::content_type(&ctx.headers), &bytes)?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let mut object = decoded.object;
    let kind = target.kind;
    body::check_type(&mut object, kind.group, kind.version, kind.kind)?;
    let warnings = body::type_object(body::gvk_of(kind), &mut object, decoded.duplicates, validation)?;
    ctx.warnings.extend(warnings);
    match create_object(ctx, target, object, true).await? {
        Written::Record(record) => record_answer(ctx, StatusCode::CREATED, kind, &record),
        Written::Value(value) => value_answer(ctx, StatusCode::CREATED, kind, value),
    }
}

/// Creates a typed object. `track` is false where the caller has set `managedFields` itself (server-side apply).
pub(crate) async fn create_object(
    ctx: &mut Context,
    target: &Target,
    object: Value,
    track: bool,
) -> ApiResult<Written> {
    let kind = target.kind;
    check_request(target, &object)?;
    let generate = object::text(&object, "/metadata/generateName").to_owned();
    let generated = object::name(&object).is_empty() && !generate.is_empty();
    let mut attempts = if generated { NAME_ATTEMPTS } else { 1 };
    loop {
        attempts -= 1;
        let mut object = object.clone();
        if generated {
            metadata(&mut object).insert("name".into(), random_name(&generate).into());
        }
        let result = create_once(ctx, target, object, track).await;
        match result {
            Err(error) if error.reason == "AlreadyExists" && attempts > 0 => continue,
            Err(error) if error.reason == "AlreadyExists" && generated => {
                return Err(ApiError::new(StatusCode::CONFLICT, "AlreadyExists", error.message).with_details(
                    serde_json::json!({"group": kind.group, "kind": kind.plural, "retryAfterSeconds": 1}),
                ));
            }
            other => return other,
        }
    }
}

fn check_request(target: &Target, object: &Value) -> ApiResult<()> {
    let namespace = object::text(object, "/metadata/namespace");
    if target.kind.namespaced && !namespace.is_empty() && namespace != target.namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    if !object::text(object, "/metadata/resourceVersion").is_empty() {
        return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
    }
    Ok(())
}

/// What every name must be, whatever its kind says: there, and one segment of a path.
fn check_name(kind: &Kind, name: &str) -> ApiResult<()> {
    let error = match name {
        "" => FieldError::required("metadata.name", "name or generateName is required"),
        "." | ".." => FieldError::invalid("metadata.name", name, format!("may not be '{name}'")),
        _ => match name.chars().find(|c| matches!(c, '/' | '%')) {
            Some(c) => FieldError::invalid("metadata.name", name, format!("may not contain '{c}'")),
            None => return Ok(()),
        },
    };
    Err(ApiError::invalid(kind.group, kind.kind, name, &[error]))
}

/// A base, cut so that the result is a DNS label, and five random letters.
fn random_name(base: &str) -> String {
    let mut cut = base.len().min(LONGEST_BASE);
    while !base.is_char_boundary(cut) {
        cut -= 1;
    }
    let mut name = base[..cut].to_owned();
    let mut random = rand::rng();
    name.extend((0..SUFFIX_LENGTH).map(|_| SUFFIX_LETTERS[random.random_range(0..SUFFIX_LETTERS.len())] as char));
    name
}

async fn create_once(ctx: &mut Context, target: &Target, mut object: Value, track: bool) -> ApiResult<Written> {
    let kind = target.kind;
    initialise_metadata(target, &mut object);
    (kind.default)(&mut object);
    admission::on_create(ctx, target, &mut object).await?;
    (kind.prepare_create)(&mut object);
    let name = object::name(&object).to_owned();
    check_name(kind, &name)?;
    let reserved = strategy::on_create(ctx, kind, &mut object)?;
    let errors = (kind.validate)(&object);
    refuse_invalid(kind, &name, &errors)?;
    if track {
        let manager = ctx.field_manager();
        let now = object::now_text();
        managed::track_update(UpdateInput {
            gvk: body::gvk_of(kind),
            old: None,
            new: &mut object,
            manager: &manager,
            subresource: None,
            now: &now,
        });
    }
    let key = object::key(kind, &target.namespace, &name);
    if ctx.dry_run {
        if ctx.core.store.get(&key).is_some() {
            return Err(ApiError::already_exists(kind, &name));
        }
        return Ok(Written::Value(object));
    }
    if !object::is_native(kind) {
        (kind.to_stored)(&mut object);
    }
    let op = Op::Put {
        key: key.into(),
        value: object::encode(stored_kind(kind), &object),
        expect: Expect::Absent,
        ttl_seconds: ttl_seconds(ctx, kind),
    };
    let outcome = ctx.core.try_commit(kind, &name, op).await?;
    drop(reserved);
    match outcome {
        Some(Outcome::Written(record)) => Ok(Written::Record(record)),
        _ => Err(ApiError::already_exists(kind, &name)),
    }
}

/// The kind whose view is the stored one.
pub(crate) fn stored_kind(kind: &'static Kind) -> &'static Kind {
    if object::is_native(kind) {
        return kind;
    }
    let native = oarlock_kinds::all().iter().find(|other| other.storage == kind.storage && object::is_native(other));
    native.unwrap_or(kind)
}

pub(crate) fn ttl_seconds(ctx: &Context, kind: &Kind) -> Option<u32> {
    (kind.storage == "events").then_some(ctx.core.config.event_ttl_seconds)
}

pub(crate) fn refuse_invalid(kind: &Kind, name: &str, errors: &[FieldError]) -> ApiResult<()> {
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(kind.group, kind.kind, name, errors)) }
}

fn initialise_metadata(target: &Target, object: &mut Value) {
    let metadata = metadata(object);
    for gone in ["resourceVersion", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds", "generation"] {
        metadata.remove(gone);
    }
    if target.kind.namespaced {
        metadata.insert("namespace".into(), target.namespace.clone().into());
    } else {
        metadata.remove("namespace");
    }
    metadata.insert("uid".into(), uuid::Uuid::new_v4().to_string().into());
    metadata.insert("creationTimestamp".into(), object::now_text().into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names_keep_the_base_and_stay_short() {
        let name = random_name("web-");
        assert!(name.starts_with("web-") && name.len() == 9);
        assert_eq!(random_name(&"x".repeat(100)).len(), 63);
    }
}
