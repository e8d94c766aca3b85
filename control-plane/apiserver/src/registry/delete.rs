//! Delete and delete-collection: preconditions, grace, and finalizers by propagation policy.
//!
//! ```text
//! present ─▶ nothing holds it ─▶ removed
//!     └────▶ finalizers, grace or spec.finalizers ─▶ deletionTimestamp set ─▶ (later updates) ─▶ removed
//! ```

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use oarlock_kinds::Kind;
use oarlock_store::{Expect, Op, Outcome, Record};
use serde::Deserialize;
use serde_json::{Value, json};

use super::read;
use super::respond::spelled;
use super::update::is_finished;
use crate::body;
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult, deleted_status};
use crate::object::{self, metadata};
use crate::wire::{Answer, Body};

const ATTEMPTS: usize = 16;
const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Preconditions {
    pub(crate) uid: Option<String>,
    pub(crate) resource_version: Option<String>,
}

/// `DeleteOptions` from the body, with what the query says where the body is silent.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DeleteOptions {
    pub(crate) grace_period_seconds: Option<i64>,
    pub(crate) propagation_policy: Option<String>,
    pub(crate) orphan_dependents: Option<bool>,
    pub(crate) preconditions: Option<Preconditions>,
    pub(crate) dry_run: Option<Vec<String>>,
}

impl DeleteOptions {
    pub(crate) async fn read(ctx: &mut Context, request: Body) -> ApiResult<DeleteOptions> {
        let bytes = body::read(request).await?;
        let mut options: DeleteOptions = match body::decode(&body::content_type(&ctx.headers), &bytes)? {
            None => DeleteOptions::default(),
            Some(decoded) => {
                let kind = object::text(&decoded.object, "/kind");
                if !matches!(kind, "" | "DeleteOptions") {
                    return Err(ApiError::bad_request(format!(
                        "decoded object cannot be converted to DeleteOptions: it is a {kind}"
                    )));
                }
                serde_json::from_value(decoded.object).map_err(|error| ApiError::bad_request(error.to_string()))?
            }
        };
        let query = &ctx.info.query;
        if bytes.is_empty() {
            options.grace_period_seconds = query.number("gracePeriodSeconds")?;
            options.propagation_policy = query.get("propagationPolicy").map(str::to_owned);
            options.orphan_dependents = query.get("orphanDependents").map(|_| query.flag("orphanDependents"));
        }
        if options.dry_run.iter().flatten().any(|value| value == "All") {
            ctx.dry_run = true;
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> ApiResult<()> {
        let invalid = |detail: String| {
            Err(ApiError::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "Invalid",
                format!("DeleteOptions.meta.k8s.io \"\" is invalid: {detail}"),
            ))
        };
        match self.propagation_policy.as_deref() {
            None | Some("Background" | "Foreground" | "Orphan") => {}
            Some(other) => {
                return invalid(format!(
                    "propagationPolicy: Unsupported value: {other:?}: supported values: \"Background\", \"Foreground\", \
                     \"Orphan\""
                ));
            }
        }
        if self.propagation_policy.is_some() && self.orphan_dependents.is_some() {
            return invalid(
                "propagationPolicy: Invalid value: orphanDependents and deletionPropagation cannot be both set".into(),
            );
        }
        Ok(())
    }

    fn check_preconditions(&self, kind: &Kind, name: &str, current: &Value) -> ApiResult<()> {
        let Some(preconditions) = &self.preconditions else { return Ok(()) };
        let uid = object::text(current, "/metadata/uid");
        if let Some(wanted) = preconditions.uid.as_deref().filter(|wanted| *wanted != uid) {
            let why = format!(
                "the UID in the precondition ({wanted}) does not match the UID in record ({uid}). The object might have \
                 been deleted and then recreated"
            );
            return Err(ApiError::conflict(kind, name, &why));
        }
        let revision = object::text(current, "/metadata/resourceVersion");
        if let Some(wanted) = preconditions.resource_version.as_deref().filter(|wanted| *wanted != revision) {
            let why = format!(
                "the ResourceVersion in the precondition ({wanted}) does not match the ResourceVersion in record \
                 ({revision}). The object might have been modified"
            );
            return Err(ApiError::conflict(kind, name, &why));
        }
        Ok(())
    }

    /// The finalizers an object has once this deletion has begun.
    fn finalizers(&self, current: Vec<String>) -> Vec<String> {
        let (orphan, foreground) = match (self.propagation_policy.as_deref(), self.orphan_dependents) {
            (Some("Orphan"), _) | (None, Some(true)) => (true, false),
            (Some("Foreground"), _) => (false, true),
            (Some(_), _) | (None, Some(false)) => (false, false),
            (None, None) => return current,
        };
        let mut kept: Vec<String> =
            current.into_iter().filter(|finalizer| finalizer != ORPHAN && finalizer != FOREGROUND).collect();
        if orphan {
            kept.push(ORPHAN.into());
        }
        if foreground {
            kept.push(FOREGROUND.into());
        }
        kept
    }
}

/// What became of an object that was to be deleted.
pub(crate) enum Deleted {
    /// It is gone; its last state.
    Gone(Value),
    /// It is still there, being deleted.
    Pending(Value),
}

/// DELETE of one object.
pub(crate) async fn delete(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let options = DeleteOptions::read(ctx, request).await?;
    let kind = target.kind;
    match delete_object(ctx, target, &options).await? {
        Deleted::Pending(object) => spelled(ctx, StatusCode::OK, &object),
        // Pods and service accounts, as upstream, answer with their last state.
        Deleted::Gone(object) if matches!(kind.storage, "pods" | "serviceaccounts" | "services") => {
            spelled(ctx, StatusCode::OK, &object)
        }
        Deleted::Gone(object) => {
            spelled(ctx, StatusCode::OK, &deleted_status(kind, &target.name, object::text(&object, "/metadata/uid")))
        }
    }
}

/// Deletes, or begins to delete, one object.
pub(crate) async fn delete_object(ctx: &Context, target: &Target, options: &DeleteOptions) -> ApiResult<Deleted> {
    let kind = target.kind;
    for _ in 0..ATTEMPTS {
        let record = ctx.core.store.get(&target.key()).ok_or_else(|| target.not_found())?;
        let current = object::parse_as(kind, &record);
        options.check_preconditions(kind, &target.name, &current)?;
        check_allowed(kind, &target.name)?;
        let Some(new) = begin_deletion(kind, &current, options) else {
            return Ok(Deleted::Pending(current));
        };
        if ctx.dry_run {
            return Ok(if is_finished(kind, &new) { Deleted::Gone(new) } else { Deleted::Pending(new) });
        }
        if let Some(deleted) = carry_out(ctx, target, &record, new).await? {
            return Ok(deleted);
        }
    }
    Err(ApiError::modified(kind, &target.name))
}

fn check_allowed(kind: &Kind, name: &str) -> ApiResult<()> {
    let kept = kind.storage == "namespaces" && matches!(name, "default" | "kube-system" | "kube-public");
    if kept { Err(ApiError::forbidden(kind, name, "this namespace may not be deleted")) } else { Ok(()) }
}

/// The state of an object once its deletion has begun; `None` when it already has and nothing changes.
fn begin_deletion(kind: &Kind, current: &Value, options: &DeleteOptions) -> Option<Value> {
    let mut new = current.clone();
    let finalizers = options.finalizers(object::finalizers(current));
    let grace = grace_seconds(kind, current, options);
    let deleting = object::is_deleting(current);
    let present_grace = current.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let changes_finalizers = finalizers != object::finalizers(current);
    if deleting && !changes_finalizers && grace >= present_grace && !(grace == 0 && is_finished(kind, current)) {
        return None;
    }
    let metadata = metadata(&mut new);
    if finalizers.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".into(), finalizers.into());
    }
    if !deleting || grace < present_grace {
        let at = Timestamp::now() + SignedDuration::from_secs(grace.clamp(0, i64::from(i32::MAX)));
        metadata.insert("deletionTimestamp".into(), object::seconds_text(at).into());
        metadata.insert("deletionGracePeriodSeconds".into(), grace.into());
        if let Some(generation) =
            metadata.get("generation").and_then(Value::as_i64).filter(|generation| *generation > 0)
        {
            metadata.insert("generation".into(), (generation + 1).into());
        }
    }
    if kind.storage == "namespaces" {
        object::section(&mut new, "status").insert("phase".into(), "Terminating".into());
    }
    Some(new)
}

/// Only pods wait: those that run, for as long as they or the request say.
fn grace_seconds(kind: &Kind, current: &Value, options: &DeleteOptions) -> i64 {
    if kind.storage != "pods" {
        return 0;
    }
    let unscheduled = object::text(current, "/spec/nodeName").is_empty();
    let over = matches!(object::text(current, "/status/phase"), "Succeeded" | "Failed");
    if unscheduled || over {
        return 0;
    }
    let own = current.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(30);
    match options.grace_period_seconds {
        Some(asked) if asked >= 0 => asked,
        Some(_) => 1,
        None if own < 0 => 1,
        None => own,
    }
}

/// Removes the object or stores its new state. `None` when somebody else wrote in between.
async fn carry_out(ctx: &Context, target: &Target, record: &Record, new: Value) -> ApiResult<Option<Deleted>> {
    let kind = target.kind;
    let expect = Expect::Revision(record.revision());
    let key = record.key().clone();
    let op = if is_finished(kind, &new) {
        Op::Delete { key, expect }
    } else {
        let mut stored = new.clone();
        if !object::is_native(kind) {
            (kind.to_stored)(&mut stored);
        }
        Op::Put { key, value: object::encode(super::create::stored_kind(kind), &stored), expect, ttl_seconds: None }
    };
    Ok(match ctx.core.try_commit(kind, &target.name, op).await? {
        Some(Outcome::Deleted(last)) => Some(Deleted::Gone(object::parse_as(kind, &last))),
        Some(Outcome::Written(record)) => Some(Deleted::Pending(object::parse_as(kind, &record))),
        Some(Outcome::Absent) => Some(Deleted::Gone(new)),
        None => None,
    })
}

/// DELETE of every object a list with the same parameters would give.
pub(crate) async fn delete_collection(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let options = DeleteOptions::read(ctx, request).await?;
    let kind = target.kind;
    let listed = read::select(ctx, target).await?;
    let mut items = Vec::new();
    for record in &listed.records {
        let (namespace, name) = split_key(kind, record.key());
        let one = Target { kind, namespace: namespace.into(), name: name.into(), subresource: None };
        match delete_object(ctx, &one, &options).await {
            Ok(Deleted::Gone(object) | Deleted::Pending(object)) => items.push(object),
            Err(error) if error.reason == "NotFound" => {}
            Err(error) => return Err(error),
        }
    }
    let metadata = json!({"resourceVersion": ctx.core.store.current_revision().to_string()});
    let list = json!({
        "kind": format!("{}List", kind.kind), "apiVersion": kind.api_version(), "metadata": metadata, "items": items,
    });
    spelled(ctx, StatusCode::OK, &list)
}

fn split_key<'k>(kind: &Kind, key: &'k str) -> (&'k str, &'k str) {
    let rest = key.split_once('/').map_or("", |(_, rest)| rest);
    if kind.namespaced { rest.split_once('/').unwrap_or(("", rest)) } else { ("", rest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(node: &str) -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"nodeName": node, "terminationGracePeriodSeconds": 30}})
    }

    fn pods() -> &'static Kind {
        oarlock_kinds::find("", "v1", "pods").expect("a row")
    }

    #[test]
    fn a_running_pod_waits_and_an_unscheduled_one_does_not() {
        let waiting = begin_deletion(pods(), &pod("n1"), &DeleteOptions::default()).expect("begins");
        assert_eq!(waiting["metadata"]["deletionGracePeriodSeconds"], 30);
        assert!(!is_finished(pods(), &waiting));
        let gone = begin_deletion(pods(), &pod(""), &DeleteOptions::default()).expect("begins");
        assert!(is_finished(pods(), &gone));
    }

    #[test]
    fn a_second_deletion_can_only_shorten_the_grace() {
        let waiting = begin_deletion(pods(), &pod("n1"), &DeleteOptions::default()).expect("begins");
        assert!(begin_deletion(pods(), &waiting, &DeleteOptions::default()).is_none());
        let options = |seconds| DeleteOptions { grace_period_seconds: Some(seconds), ..DeleteOptions::default() };
        assert!(begin_deletion(pods(), &waiting, &options(60)).is_none());
        let shorter = begin_deletion(pods(), &waiting, &options(5)).expect("shortens");
        assert_eq!(shorter["metadata"]["deletionGracePeriodSeconds"], 5);
        let now = begin_deletion(pods(), &waiting, &options(0)).expect("ends");
        assert!(is_finished(pods(), &now));
    }

    #[test]
    fn foreground_deletion_leaves_a_finalizer() {
        let kind = oarlock_kinds::find("apps", "v1", "deployments").expect("a row");
        let options = DeleteOptions { propagation_policy: Some("Foreground".into()), ..DeleteOptions::default() };
        let held = begin_deletion(kind, &json!({"metadata": {"name": "d"}}), &options).expect("begins");
        assert_eq!(object::finalizers(&held), [FOREGROUND]);
        assert!(!is_finished(kind, &held));
    }
}
