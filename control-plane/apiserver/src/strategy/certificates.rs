//! CertificateSigningRequests: who asks is noted by the server, and who may approve or sign is asked of authorization.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use oarlock_kinds::{FieldError, Kind};
use serde_json::{Value, json};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use crate::authz::{self, Action};
use crate::core::Context;
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::user::MASTERS;

const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";

/// Notes who asks, and refuses what is no request.
pub(crate) fn on_create(ctx: &Context, kind: &Kind, object: &mut Value) -> ApiResult<()> {
    let name = object::name(object).to_owned();
    let shown = object::text(object, "/spec/request").to_owned();
    let refuse = |detail: &str| {
        let error = FieldError::invalid("spec.request", shown.clone(), detail);
        ApiError::invalid(kind.group, kind.kind, &name, &[error])
    };
    let organizations = read_request(&shown).map_err(|problem| refuse(&problem))?;
    if object::text(object, "/spec/signerName") == CLIENT_SIGNER && organizations.iter().any(|o| o == MASTERS) {
        let why = format!("use of {CLIENT_SIGNER} signer with {MASTERS} group is not allowed");
        return Err(ApiError::forbidden(kind, &name, &why));
    }
    let user = &ctx.user;
    let spec = object::section(object, "spec");
    spec.insert("username".into(), user.name.clone().into());
    spec.insert("groups".into(), json!(user.groups));
    for (field, value) in [("uid", json!(user.uid)), ("extra", json!(user.extra))] {
        let empty = value.as_str() == Some("") || value.as_object().is_some_and(serde_json::Map::is_empty);
        if empty {
            spec.remove(field);
        } else {
            spec.insert(field.into(), value);
        }
    }
    Ok(())
}

/// The organizations of a request that is well made and signed with its own key.
fn read_request(encoded: &str) -> Result<Vec<String>, String> {
    let pem = STANDARD.decode(encoded).map_err(|_| "the request is not base64".to_owned())?;
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(&pem).map_err(|_| "PEM block type must be CERTIFICATE REQUEST".to_owned())?;
    if pem.label != "CERTIFICATE REQUEST" {
        return Err("PEM block type must be CERTIFICATE REQUEST".to_owned());
    }
    let (_, request) = X509CertificationRequest::from_der(&pem.contents).map_err(|error| error.to_string())?;
    request.verify_signature().map_err(|error| error.to_string())?;
    let subject = &request.certification_request_info.subject;
    Ok(subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect())
}

fn conditions(object: &Value) -> Vec<Value> {
    object.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default()
}

fn kind_of(condition: &Value) -> &str {
    object::text(condition, "/type")
}

/// A change through `approval` reaches the conditions and nothing else.
pub(crate) fn only_approval(old: &Value, new: &mut Value) {
    let wanted = conditions(new);
    let mut kept = old.clone();
    if let Some(metadata) = new.get("metadata").cloned() {
        kept["metadata"] = metadata;
    }
    object::section(&mut kept, "status").insert("conditions".into(), wanted.into());
    *new = kept;
}

/// Refuses to approve, deny or sign what the user may not, and notes when conditions changed.
pub(crate) fn on_status_update(
    ctx: &Context,
    kind: &Kind,
    approval: bool,
    old: &Value,
    new: &mut Value,
) -> ApiResult<()> {
    let decided = |object: &Value| -> Vec<String> {
        let all = conditions(object);
        let decisions = all.iter().map(kind_of).filter(|kind| matches!(*kind, "Approved" | "Denied"));
        decisions.map(str::to_owned).collect()
    };
    if approval {
        may(ctx, kind, old, "approve")?;
    } else {
        // Decisions are made through approval alone.
        if decided(old) != decided(new) {
            let mut all: Vec<Value> =
                conditions(new).into_iter().filter(|c| !matches!(kind_of(c), "Approved" | "Denied")).collect();
            all.extend(conditions(old).into_iter().filter(|c| matches!(kind_of(c), "Approved" | "Denied")));
            object::section(new, "status").insert("conditions".into(), all.into());
        }
        let certificate = |object: &Value| object::text(object, "/status/certificate").to_owned();
        let failed = |object: &Value| conditions(object).iter().any(|c| kind_of(c) == "Failed");
        if certificate(old) != certificate(new) || failed(old) != failed(new) {
            may(ctx, kind, old, "sign")?;
        }
    }
    stamp(old, new);
    Ok(())
}

fn may(ctx: &Context, kind: &Kind, object: &Value, verb: &str) -> ApiResult<()> {
    let signer = object::text(object, "/spec/signerName");
    let domain = signer.split_once('/').map_or("", |(domain, _)| domain);
    let allowed = [signer.to_owned(), format!("{domain}/*")].into_iter().any(|name| {
        let action = Action {
            verb: verb.into(),
            group: "certificates.k8s.io".into(),
            resource: "signers".into(),
            subresource: "".into(),
            namespace: "".into(),
            name,
            path: None,
        };
        matches!(authz::decide(&ctx.core, &ctx.user, &action), authz::Decision::Allowed(_))
    });
    if allowed {
        return Ok(());
    }
    let why = format!("user not permitted to {verb} requests with signerName {signer:?}");
    Err(ApiError::forbidden(kind, object::name(object), &why))
}

fn stamp(old: &Value, new: &mut Value) {
    let now = object::now_text();
    let before = conditions(old);
    let mut all = conditions(new);
    for condition in &mut all {
        let same = before.iter().find(|known| kind_of(known) == kind_of(condition));
        if same.is_some_and(|known| known == condition) {
            continue;
        }
        let Some(fields) = condition.as_object_mut() else { continue };
        fields.entry("lastUpdateTime").or_insert_with(|| now.clone().into());
        fields.entry("lastTransitionTime").or_insert_with(|| now.clone().into());
    }
    if !all.is_empty() {
        object::section(new, "status").insert("conditions".into(), all.into());
    }
}
