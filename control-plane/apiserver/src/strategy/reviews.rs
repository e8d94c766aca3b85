//! The review kinds: questions about users, tokens and permissions that are answered and not stored.

use http::StatusCode;
use jiff::Timestamp;
use oarlock_kinds::{FieldError, Kind};
use serde_json::{Map, Value, json};

use crate::authn;
use crate::authz::{self, Action, Decision};
use crate::body::{self, FieldValidation};
use crate::core::Context;
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::user::{AUTHENTICATED, User};
use crate::wire::{self, Answer, Body};

pub(crate) async fn create(ctx: &mut Context, kind: &Kind, namespace: &str, request: Body) -> ApiResult<Answer> {
    let bytes = body::read(request).await?;
    let decoded = body::decode(&body::content_type(&ctx.headers), &bytes)?;
    let mut review = match decoded {
        Some(decoded) => decoded.object,
        None if kind.kind == "SelfSubjectReview" => json!({}),
        None => return Err(ApiError::bad_request("the request has no body")),
    };
    body::check_type(&mut review, kind.group, kind.version, kind.kind)?;
    body::type_object(body::gvk_of(kind), &mut review, Vec::new(), FieldValidation::parse(&ctx.info.query)?)?;
    let status = match kind.kind {
        "SelfSubjectReview" => json!({"userInfo": user_info(&ctx.user)}),
        "TokenReview" => token_status(ctx, &review),
        "SelfSubjectRulesReview" => rules_status(ctx, &review)?,
        "SelfSubjectAccessReview" => access_status(ctx, kind, &ctx.user, &review["spec"])?,
        "LocalSubjectAccessReview" => {
            let asked = object::text(&review, "/spec/resourceAttributes/namespace");
            if asked != namespace {
                let error = FieldError::invalid(
                    "spec.resourceAttributes.namespace",
                    asked,
                    format!("must match metadata.namespace: {namespace}"),
                );
                return Err(ApiError::invalid(kind.group, kind.kind, "", &[error]));
            }
            access_status(ctx, kind, &asked_user(kind, &review["spec"])?, &review["spec"])?
        }
        "SubjectAccessReview" => access_status(ctx, kind, &asked_user(kind, &review["spec"])?, &review["spec"])?,
        _ => return Err(ApiError::method_not_allowed()),
    };
    let metadata = object::metadata(&mut review);
    metadata.insert("creationTimestamp".into(), Value::Null);
    object::section(&mut review, "status");
    review["status"] = status;
    Ok(wire::json(StatusCode::CREATED, &review))
}

fn user_info(user: &User) -> Value {
    let mut info = Map::new();
    info.insert("username".into(), user.name.clone().into());
    if !user.uid.is_empty() {
        info.insert("uid".into(), user.uid.clone().into());
    }
    info.insert("groups".into(), user.groups.clone().into());
    if !user.extra.is_empty() {
        info.insert("extra".into(), json!(user.extra));
    }
    Value::Object(info)
}

fn token_status(ctx: &Context, review: &Value) -> Value {
    let refused = |why: &str| json!({"user": {}, "error": why});
    let token = object::text(review, "/spec/token");
    let Ok(claims) = ctx.core.tokens.verify(token, Timestamp::now().as_second()) else {
        return refused("invalid bearer token");
    };
    let wanted: Vec<&str> = object::strings(review.pointer("/spec/audiences")).collect();
    let own = ctx.core.tokens.issuer.as_str();
    let wanted = if wanted.is_empty() { vec![own] } else { wanted };
    let common: Vec<&String> = claims.aud.iter().filter(|audience| wanted.contains(&audience.as_str())).collect();
    if common.is_empty() {
        return refused("token audiences are not among those asked for");
    }
    match authn::account_of(&ctx.core, &claims) {
        Ok(user) => json!({"authenticated": true, "user": user_info(&user), "audiences": common}),
        Err(_) => refused("invalid bearer token"),
    }
}

fn asked_user(kind: &Kind, spec: &Value) -> ApiResult<User> {
    let name = object::text(spec, "/user");
    let mut groups: Vec<String> = object::strings(spec.get("groups")).map(str::to_owned).collect();
    if name.is_empty() && groups.is_empty() {
        let error = FieldError::invalid("spec.user", "", "at least one of user or group must be specified");
        return Err(ApiError::invalid(kind.group, kind.kind, "", &[error]));
    }
    groups.dedup();
    let mut user = User::authenticated(name, groups.clone());
    if !groups.iter().any(|group| group == AUTHENTICATED) {
        user.groups = groups;
    }
    Ok(user)
}

fn access_status(ctx: &Context, kind: &Kind, user: &User, spec: &Value) -> ApiResult<Value> {
    let present = |field: &str| spec.get(field).filter(|value| !value.is_null());
    let action = match (present("resourceAttributes"), present("nonResourceAttributes")) {
        (Some(resource), None) => Action {
            verb: object::text(resource, "/verb").into(),
            group: object::text(resource, "/group").into(),
            resource: object::text(resource, "/resource").into(),
            subresource: object::text(resource, "/subresource").into(),
            namespace: object::text(resource, "/namespace").into(),
            name: object::text(resource, "/name").into(),
            path: None,
        },
        (None, Some(path)) => Action {
            verb: object::text(path, "/verb").into(),
            path: Some(object::text(path, "/path").into()),
            ..Action::default()
        },
        (both, _) => {
            let detail = match both {
                Some(_) => "cannot be specified in combination with resourceAttributes",
                None => "exactly one of nonResourceAttributes or resourceAttributes must be specified",
            };
            let error = FieldError::invalid("spec.resourceAttributes", Value::Null, detail);
            return Err(ApiError::invalid(kind.group, kind.kind, "", &[error]));
        }
    };
    Ok(match authz::decide(&ctx.core, user, &action) {
        Decision::Allowed(reason) => with_reason(json!({"allowed": true}), reason),
        Decision::NoOpinion(reason) => with_reason(json!({"allowed": false}), reason),
    })
}

fn with_reason(mut status: Value, reason: String) -> Value {
    if !reason.is_empty() {
        status["reason"] = reason.into();
    }
    status
}

fn rules_status(ctx: &Context, review: &Value) -> ApiResult<Value> {
    let namespace = object::text(review, "/spec/namespace");
    if namespace.is_empty() {
        return Err(ApiError::bad_request("no namespace on request"));
    }
    let mut rules = ctx.core.rbac.rules_for(&*ctx.core.store, &ctx.user, namespace);
    if ctx.user.is_in(crate::user::MASTERS) {
        rules.push(authz::rbac::Rule::everything());
    }
    let (paths, resources): (Vec<_>, Vec<_>) = rules.iter().partition(|rule| !rule.paths.is_empty());
    let shown = |rules: Vec<&authz::rbac::Rule>| rules.iter().map(|rule| rule.to_value()).collect::<Vec<_>>();
    Ok(json!({"resourceRules": shown(resources), "nonResourceRules": shown(paths), "incomplete": false}))
}
