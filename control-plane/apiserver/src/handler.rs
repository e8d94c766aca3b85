//! One request from the first byte to the answer: who, what, may they, do it.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use http::{HeaderValue, Method, Request, StatusCode};
use oarlock_kinds::Kind;

use crate::admission;
use crate::authn::{self, Peer};
use crate::authz::{self, Action, Decision};
use crate::core::{Context, Core, Target};
use crate::discovery;
use crate::error::{ApiError, ApiResult};
use crate::negotiate::Accept;
use crate::registry;
use crate::request::{RequestInfo, ResourcePath};
use crate::resource_metrics;
use crate::strategy::{connect, namespaces, pods, reviews, scale, token_requests};
use crate::user::UNAUTHENTICATED;
use crate::wire::{self, Answer, Body};

/// Requests that do not stream are answered within this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A request waits this long for one of the places.
const PLACE_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers a request. Never fails: every error is an answer.
pub(crate) async fn handle(core: Arc<Core>, peer: Peer, request: Request<Body>) -> Answer {
    let started = Instant::now();
    let gauge = core.metrics.request_started();
    let info = RequestInfo::parse(request.method(), request.uri().path(), request.uri().query().unwrap_or_default());
    let (verb, resource) = (info.verb, info.resource.as_ref().map_or("", |found| &*found.resource).to_owned());
    let path = info.path.clone();
    let answered = AssertUnwindSafe(answer(core.clone(), peer, info, request)).catch_unwind().await;
    let answer = match answered {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => wire::error(&error),
        Err(_) => {
            tracing::error!(%path, verb, "the handler of a request panicked");
            wire::error(&ApiError::internal("the request could not be handled"))
        }
    };
    let known = oarlock_kinds::all().iter().any(|kind| kind.plural == resource);
    let shown = if known { &*resource } else { "" };
    core.metrics.request_done(verb, shown, answer.status().as_u16(), started.elapsed());
    tracing::debug!(%path, verb, code = answer.status().as_u16(), took_us = started.elapsed().as_micros(), "request");
    drop(gauge);
    answer
}

/// The one object that a request without credentials may be about.
const CLUSTER_INFO: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";

fn is_public(path: &str) -> bool {
    matches!(path.trim_end_matches('/'), "/healthz" | "/livez" | "/readyz" | "/version")
        || path.starts_with("/livez/")
        || path.starts_with("/readyz/")
        || path.starts_with("/healthz/")
}

async fn answer(core: Arc<Core>, peer: Peer, info: RequestInfo, request: Request<Body>) -> ApiResult<Answer> {
    let user = authn::authenticate(&core, &peer, request.headers());
    let public = is_public(&info.path);
    if public && user.is_err() {
        return plain(&core, &info, &request).ok_or_else(ApiError::no_such_resource);
    }
    let user = user?;
    // Whoever is to join has nothing to show yet. The roles say whether it may read this, as they do for everybody.
    let open = public || info.path == CLUSTER_INFO;
    if user.is_in(UNAUTHENTICATED) && !open {
        return Err(ApiError::unauthorized());
    }
    let user = authn::impersonate(&core, user, request.headers())?;
    let action = Action::of(&info);
    if !public && let Decision::NoOpinion(reason) = authz::decide(&core, &user, &action) {
        return Err(authz::refusal(&user, &action, &reason));
    }
    if info.resource.is_none() {
        return plain(&core, &info, &request).map_or_else(|| Ok(wire::page_not_found()), Ok);
    }
    let accept = match info.resource.as_ref().and_then(|resource| resource.subresource.as_deref()) {
        Some("log" | "proxy" | "exec" | "attach" | "portforward") => Accept::JSON,
        _ => Accept::negotiate(request.headers())?,
    };
    let dry_run = info.is_dry_run()?;
    let headers = request.headers().clone();
    let mut ctx = Context { core, user, info, accept, headers, dry_run, warnings: Vec::new() };
    let mut answer = resource(&mut ctx, request).await?;
    for warning in &ctx.warnings {
        wire::add_warning(&mut answer, warning);
    }
    answer.headers_mut().insert("cache-control", HeaderValue::from_static("no-cache, private"));
    Ok(answer)
}

/// Paths that are not resources.
fn plain(core: &Core, info: &RequestInfo, request: &Request<Body>) -> Option<Answer> {
    if !matches!(info.method, Method::GET | Method::HEAD) {
        return Some(wire::error(&ApiError::method_not_allowed()));
    }
    let path = info.path.trim_end_matches('/');
    match path {
        "/healthz" | "/livez" | "/readyz" => Some(health(core, path, info)),
        "/metrics" => Some(wire::answer(StatusCode::OK, "text/plain; version=0.0.4", core.metrics.render(core))),
        "/openid/v1/jwks" => {
            Some(wire::answer(StatusCode::OK, "application/jwk-set+json", core.tokens.key_set().to_string()))
        }
        "/.well-known/openid-configuration" => {
            let host = request.headers().get("host").and_then(|host| host.to_str().ok());
            let host = host.or_else(|| request.uri().authority().map(|authority| authority.as_str()));
            let own = SocketAddr::new(core.config.advertise_address, core.config.listen.port()).to_string();
            let uri = format!("https://{}/openid/v1/jwks", host.unwrap_or(&own));
            Some(wire::json(StatusCode::OK, &core.tokens.provider(&uri)))
        }
        _ if path.starts_with("/openapi/") => discovery::openapi(path, request.headers()),
        _ if path.starts_with("/livez/") || path.starts_with("/readyz/") || path.starts_with("/healthz/") => {
            Some(wire::text(StatusCode::OK, "ok"))
        }
        _ => core.discovery.answer(path, request.headers()),
    }
}

fn health(core: &Core, path: &str, info: &RequestInfo) -> Answer {
    let name = path.trim_start_matches('/');
    if name == "readyz" && core.stopping.is_cancelled() {
        return wire::text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "[-]shutdown failed: the server is stopping\nreadyz check failed\n",
        );
    }
    if info.query.flag("verbose") {
        return wire::text(StatusCode::OK, format!("[+]ping ok\n[+]store ok\n{name} check passed\n"));
    }
    wire::text(StatusCode::OK, "ok")
}

fn target_of(path: &ResourcePath) -> Option<Target> {
    let kind = oarlock_kinds::find(&path.group, &path.version, &path.resource)?;
    let namespace = if kind.namespaced { path.namespace.clone().unwrap_or_default() } else { String::new() };
    Some(Target { kind, namespace, name: path.name.clone().unwrap_or_default(), subresource: path.subresource.clone() })
}

async fn resource(ctx: &mut Context, request: Request<Body>) -> ApiResult<Answer> {
    let Some(path) = ctx.info.resource.clone() else { return Ok(wire::page_not_found()) };
    let Some(mut target) = target_of(&path) else { return Ok(wire::page_not_found()) };
    let kind = target.kind;
    // A selector by name set the name for authorization only; the request is about the collection.
    if matches!(ctx.info.verb, "list" | "watch" | "deletecollection") {
        target.name.clear();
    }
    if let Some(subresource) = path.subresource.clone() {
        if kind.subresource_type(&subresource).is_none() {
            return Ok(wire::page_not_found());
        }
        return subresource_request(ctx, &target, &subresource, request).await;
    }
    if !kind.namespaced && path.namespace.is_some() && path.resource != "namespaces" {
        return Ok(wire::page_not_found());
    }
    if kind.group == "metrics.k8s.io" {
        return resource_metrics::answer(ctx, kind, &target).await;
    }
    if !kind.stored {
        return review(ctx, kind, &path, request).await;
    }
    if !kind.verbs.contains(&ctx.info.verb) {
        return Err(ApiError::method_not_allowed());
    }
    let namespaced_write = matches!(ctx.info.verb, "create" | "update" | "patch" | "delete" | "get");
    if kind.namespaced && target.namespace.is_empty() && namespaced_write {
        return Err(ApiError::method_not_allowed());
    }
    let needs_name = matches!(ctx.info.verb, "get" | "update" | "patch" | "delete");
    if needs_name == target.name.is_empty() {
        return Err(ApiError::method_not_allowed());
    }
    let core = ctx.core.clone();
    let body = request.into_body();
    let work = async {
        match ctx.info.verb {
            "get" => registry::get(ctx, &target).await,
            "list" => registry::list(ctx, &target).await,
            "watch" => registry::watch(ctx, &target).await,
            "create" => registry::create(ctx, &target, body).await,
            "update" => registry::update(ctx, &target, body).await,
            "patch" => registry::patch(ctx, &target, body).await,
            "delete" => {
                admission::on_delete(ctx, &target)?;
                registry::delete(ctx, &target, body).await
            }
            "deletecollection" => registry::delete_collection(ctx, &target, body).await,
            _ => Err(ApiError::method_not_allowed()),
        }
    };
    within_time(&core, work).await
}

/// Does the work on one of the places, within the time a request has.
async fn within_time(core: &Core, work: impl Future<Output = ApiResult<Answer>>) -> ApiResult<Answer> {
    let Ok(Ok(_place)) = tokio::time::timeout(PLACE_TIMEOUT, core.places.acquire()).await else {
        let details = serde_json::json!({"retryAfterSeconds": 1});
        return Err(ApiError::too_many_requests("Too many requests, please try again later.", details));
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, work).await {
        Ok(answer) => answer,
        Err(_) => Err(ApiError::timeout("Timeout: request did not complete within the allotted timeout")),
    }
}

async fn subresource_request(
    ctx: &mut Context,
    target: &Target,
    subresource: &str,
    request: Request<Body>,
) -> ApiResult<Answer> {
    let spoken = target.kind.subresource_type(subresource).ok_or_else(ApiError::no_such_resource)?;
    let connects = matches!(subresource, "log" | "exec" | "attach" | "portforward" | "proxy");
    if connects {
        let allowed = spoken.verbs.contains(&ctx.info.verb) || subresource == "proxy";
        if !allowed {
            return Err(ApiError::method_not_allowed());
        }
        return connect::connect(ctx, target, request).await;
    }
    if !spoken.verbs.contains(&ctx.info.verb) {
        return Err(ApiError::method_not_allowed());
    }
    let core = ctx.core.clone();
    let body = request.into_body();
    let work = async {
        match (subresource, ctx.info.verb) {
            ("scale", "get") => scale::get(ctx, target),
            ("scale", _) => scale::change(ctx, target, body).await,
            ("binding", _) => pods::bind(ctx, &target.namespace.clone(), Some(&target.name), body).await,
            ("eviction", _) => pods::evict(ctx, target, body).await,
            ("token", _) => token_requests::create(ctx, target, body).await,
            ("finalize", _) => namespaces::finalize(ctx, target, body).await,
            (_, "get") => registry::get(ctx, target).await,
            ("ephemeralcontainers" | "resize", _) => pods::change_part(ctx, target, body).await,
            ("status" | "approval", "update") => registry::update(ctx, target, body).await,
            ("status" | "approval", "patch") => registry::patch(ctx, target, body).await,
            _ => Err(ApiError::method_not_allowed()),
        }
    };
    within_time(&core, work).await
}

async fn review(ctx: &mut Context, kind: &Kind, path: &ResourcePath, request: Request<Body>) -> ApiResult<Answer> {
    if ctx.info.verb != "create" || path.name.is_some() {
        return Err(ApiError::method_not_allowed());
    }
    let namespace = path.namespace.clone().unwrap_or_default();
    let core = ctx.core.clone();
    let body = request.into_body();
    if kind.kind == "Binding" {
        return within_time(&core, pods::bind(ctx, &namespace, None, body)).await;
    }
    within_time(&core, reviews::create(ctx, kind, &namespace, body)).await
}
