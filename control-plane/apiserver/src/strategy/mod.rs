//! What single kinds need beyond the generic registry: sub-resources with a life of their own, allocation, reviews.

pub(crate) mod certificates;
pub(crate) mod connect;
pub(crate) mod namespaces;
pub(crate) mod pods;
pub(crate) mod reviews;
pub(crate) mod scale;
pub(crate) mod services;
pub(crate) mod token_requests;

use oarlock_kinds::{FieldError, Kind};
use serde_json::Value;

use crate::core::Context;
use crate::error::ApiResult;
use crate::object;
use crate::registry::Mode;

/// Holds what was allocated for an object until the object is stored.
pub(crate) type Reserved<'a> = Option<services::Reservation<'a>>;

/// Runs on a new object before it is validated.
pub(crate) fn on_create<'a>(ctx: &'a Context, kind: &Kind, object: &mut Value) -> ApiResult<Reserved<'a>> {
    match kind.storage {
        "services" => services::on_create(ctx, kind, object),
        "certificates.k8s.io/certificatesigningrequests" => {
            certificates::on_create(ctx, kind, object)?;
            Ok(None)
        }
        "namespaces" => {
            namespaces::on_create(object);
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Checks an object of which a sub-resource has changed a part that plain updates may not.
pub(crate) fn validate_part(kind: &Kind, object: &Value) -> Vec<FieldError> {
    if kind.storage != "pods" {
        return (kind.validate)(object);
    }
    // What create forbids is checked where it is added, against what was there before.
    let mut plain = object.clone();
    object::section(&mut plain, "spec").remove("ephemeralContainers");
    (kind.validate)(&plain)
}

/// Runs on a changed object before it is validated.
pub(crate) fn on_update<'a>(
    ctx: &'a Context,
    kind: &Kind,
    (mode, subresource): (Mode, Option<&str>),
    old: &Value,
    new: &mut Value,
) -> ApiResult<Reserved<'a>> {
    match (kind.storage, mode) {
        ("services", Mode::Main) => services::on_update(ctx, kind, old, new),
        ("certificates.k8s.io/certificatesigningrequests", Mode::Status) => {
            certificates::on_status_update(ctx, kind, subresource == Some("approval"), old, new)?;
            Ok(None)
        }
        ("namespaces", Mode::Main | Mode::Status) => {
            namespaces::on_update(old, new);
            Ok(None)
        }
        _ => Ok(None),
    }
}
