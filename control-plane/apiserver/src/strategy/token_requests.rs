//! POST to `serviceaccounts/<name>/token`: a token for an account, bound to an object where asked.

use http::StatusCode;
use jiff::Timestamp;
use oarlock_kinds::FieldError;
use oarlock_schema::Gvk;
use serde_json::{Map, Value, json};

use crate::authz::node::pod_refers_to;
use crate::body::{self, FieldValidation};
use crate::core::{Context, Target};
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::tokens::{Bound, Claims, NamedUid};
use crate::wire::{self, Answer, Body};

const GVK: Gvk<'static> = Gvk { group: "authentication.k8s.io", version: "v1", kind: "TokenRequest" };
const DEFAULT_SECONDS: i64 = 3600;
const SHORTEST_SECONDS: i64 = 600;
const LONGEST_SECONDS: i64 = 1 << 32;
/// A pod's own token is asked for with this life and then lasts a year, for clients that never read it again.
const POD_SECONDS: i64 = 3607;
const EXTENDED_SECONDS: i64 = 365 * 24 * 3600;

pub(crate) async fn create(ctx: &mut Context, target: &Target, request: Body) -> ApiResult<Answer> {
    let bytes = body::read(request).await?;
    let decoded = body::decode(&body::content_type(&ctx.headers), &bytes)?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let mut object = decoded.object;
    body::check_type(&mut object, GVK.group, GVK.version, GVK.kind)?;
    body::type_object(GVK, &mut object, decoded.duplicates, FieldValidation::Ignore)?;
    let account = ctx.core.store.get(&target.key()).ok_or_else(|| target.not_found())?;
    let account = object::parse(&account);
    let asked = object.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(DEFAULT_SECONDS);
    check_seconds(&target.name, asked)?;
    let bound_to = object.pointer("/spec/boundObjectRef").filter(|reference| !reference.is_null());
    let mut bound = Bound {
        namespace: target.namespace.clone(),
        node: None,
        pod: None,
        secret: None,
        serviceaccount: NamedUid { name: target.name.clone(), uid: object::text(&account, "/metadata/uid").into() },
        warnafter: None,
    };
    bind(ctx, target, bound_to, &mut bound)?;
    check_node(ctx, target, &bound)?;
    let now = Timestamp::now().as_second();
    let own_audience = &ctx.core.tokens.issuer;
    let mut audiences: Vec<String> = object::strings(object.pointer("/spec/audiences")).map(str::to_owned).collect();
    if audiences.is_empty() {
        audiences.push(own_audience.clone());
    }
    let extended = asked == POD_SECONDS && bound.pod.is_some() && audiences == [own_audience.clone()];
    let seconds = if extended { EXTENDED_SECONDS } else { asked };
    if extended {
        bound.warnafter = Some(now + asked);
    }
    let claims = Claims {
        aud: audiences.clone(),
        exp: now + seconds,
        iat: now,
        iss: own_audience.clone(),
        jti: uuid::Uuid::new_v4().to_string(),
        bound,
        nbf: now,
        sub: format!("system:serviceaccount:{}:{}", target.namespace, target.name),
    };
    let token = ctx.core.tokens.sign(&claims).ok_or_else(|| ApiError::internal("the token could not be signed"))?;
    let expires = Timestamp::from_second(now + asked).map_err(ApiError::internal)?;
    Ok(wire::json(StatusCode::CREATED, &answer(target, object, &audiences, asked, &token, expires)))
}

fn answer(
    target: &Target,
    request: Value,
    audiences: &[String],
    seconds: i64,
    token: &str,
    expires: Timestamp,
) -> Value {
    let mut spec = Map::new();
    spec.insert("audiences".into(), audiences.to_vec().into());
    spec.insert("expirationSeconds".into(), seconds.into());
    spec.insert("boundObjectRef".into(), request.pointer("/spec/boundObjectRef").cloned().unwrap_or_default());
    json!({
        "kind": GVK.kind, "apiVersion": GVK.api_version(),
        "metadata": {"name": target.name, "namespace": target.namespace, "creationTimestamp": object::now_text()},
        "spec": spec, "status": {"token": token, "expirationTimestamp": object::seconds_text(expires)},
    })
}

fn check_seconds(name: &str, seconds: i64) -> ApiResult<()> {
    let invalid = |detail: &str| {
        let error = FieldError::invalid("spec.expirationSeconds", seconds, detail);
        Err(ApiError::invalid(GVK.group, GVK.kind, name, &[error]))
    };
    if seconds < SHORTEST_SECONDS {
        return invalid("may not specify a duration less than 10 minutes");
    }
    if seconds > LONGEST_SECONDS {
        return invalid("may not specify a duration larger than 2^32 seconds");
    }
    Ok(())
}

/// Looks up the object a token is to be bound to, and checks that it is the one that was meant.
fn bind(ctx: &Context, target: &Target, reference: Option<&Value>, bound: &mut Bound) -> ApiResult<()> {
    let Some(reference) = reference else { return Ok(()) };
    let (kind, name) = (object::text(reference, "/kind"), object::text(reference, "/name"));
    let uid = object::text(reference, "/uid");
    let plural = match (object::text(reference, "/apiVersion"), kind) {
        ("v1", "Pod") => "pods",
        ("v1", "Secret") => "secrets",
        ("v1", "Node") => "nodes",
        (version, kind) => {
            return Err(ApiError::bad_request(format!("cannot bind token to object of type {version}, Kind={kind}")));
        }
    };
    let row = oarlock_kinds::find("", "v1", plural).ok_or_else(ApiError::no_such_resource)?;
    let found = find(ctx, plural, &target.namespace, name).ok_or_else(|| ApiError::not_found(row, name))?;
    let actual = object::text(&found, "/metadata/uid");
    if !uid.is_empty() && uid != actual {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(ApiError::conflict(row, name, &why));
    }
    let named = NamedUid { name: name.to_owned(), uid: actual.to_owned() };
    match plural {
        "pods" => {
            let account = object::text(&found, "/spec/serviceAccountName");
            if account != target.name {
                return Err(ApiError::bad_request(format!(
                    "cannot bind token for serviceaccount \"{}\" to pod running with different serviceaccount name.",
                    target.name
                )));
            }
            let node = object::text(&found, "/spec/nodeName");
            if let Some(node_object) = find(ctx, "nodes", "", node) {
                let uid = object::text(&node_object, "/metadata/uid").to_owned();
                bound.node = Some(NamedUid { name: node.to_owned(), uid });
            }
            bound.pod = Some(named);
        }
        "nodes" => bound.node = Some(named),
        _ => bound.secret = Some(named),
    }
    Ok(())
}

fn find(ctx: &Context, plural: &str, namespace: &str, name: &str) -> Option<Value> {
    if name.is_empty() {
        return None;
    }
    let kind = oarlock_kinds::find("", "v1", plural)?;
    ctx.core.store.get(&object::key(kind, namespace, name)).map(|record| object::parse(&record))
}

/// A node gets tokens only for pods that run on it, bound to them.
fn check_node(ctx: &Context, target: &Target, bound: &Bound) -> ApiResult<()> {
    let Some(node) = ctx.user.node_name() else { return Ok(()) };
    let refuse = |why: String| Err(ApiError::forbidden(target.kind, &target.name, &why));
    let Some(pod) = &bound.pod else { return refuse(format!("node \"{node}\" requested token not bound to a pod")) };
    let here = bound.node.as_ref().is_some_and(|bound| bound.name == node)
        && pod_refers_to(&ctx.core, node, &target.namespace, &format!("serviceaccounts/{}", target.name));
    if here {
        return Ok(());
    }
    refuse(format!("node \"{node}\" requested token bound to a pod scheduled on a different node: {}", pod.name))
}
