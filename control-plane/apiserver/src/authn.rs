//! Authentication: client certificates, service-account tokens, and impersonation on top of either.

use http::HeaderMap;
use http::header::AUTHORIZATION;
use jiff::Timestamp;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::authz::{self, Action};
use crate::bootstrap_tokens;
use crate::core::Core;
use crate::error::{ApiError, ApiResult};
use crate::object;
use crate::request::decode;
use crate::tokens::Claims;
use crate::user::{AUTHENTICATED, User, split_service_account};

/// Where a request came from.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// Over TLS; the user of the client certificate, if one was shown (the handshake has verified it).
    Connection { certificate: Option<User> },
    /// From within this process, as this user.
    InProcess(User),
}

/// The user that a client certificate names: CN is the user, each O a group.
pub(crate) fn certificate_user(der: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|o| o.as_str().ok().map(str::to_owned)).collect::<Vec<_>>();
    Some(User::authenticated(name, groups))
}

/// The user of a request; anonymous when it carries no credential, an error when it carries a bad one.
pub(crate) fn authenticate(core: &Core, peer: &Peer, headers: &HeaderMap) -> ApiResult<User> {
    let certificate = match peer {
        Peer::InProcess(user) => return Ok(user.clone()),
        Peer::Connection { certificate } => certificate,
    };
    if let Some(user) = certificate {
        return Ok(user.clone());
    }
    if let Some(value) = headers.get(AUTHORIZATION) {
        let text = value.to_str().map_err(|_| ApiError::unauthorized())?;
        let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(ApiError::unauthorized());
        }
        return token_user(core, token.trim()).map(|(user, _)| user);
    }
    if let Some(token) = websocket_token(headers) {
        return token_user(core, &token).map(|(user, _)| user);
    }
    Ok(User::anonymous())
}

/// Browsers cannot set headers on a WebSocket; they send the token as a sub-protocol.
fn websocket_token(headers: &HeaderMap) -> Option<String> {
    use base64::Engine as _;
    let protocols = headers.get("sec-websocket-protocol")?.to_str().ok()?;
    let encoded =
        protocols.split(',').find_map(|one| one.trim().strip_prefix("base64url.bearer.authorization.k8s.io."))?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(encoded).ok()?;
    String::from_utf8(bytes).ok()
}

/// The service account a token speaks for, if the token, the account and what it is bound to are all still good.
pub(crate) fn token_user(core: &Core, token: &str) -> ApiResult<(User, Option<Claims>)> {
    if let Some((id, secret)) = bootstrap_tokens::parts(token) {
        return Ok((bootstrap_tokens::user(core, id, secret)?, None));
    }
    let claims = core.tokens.verify(token, Timestamp::now().as_second()).map_err(|error| {
        tracing::debug!(%error, "a bearer token was refused");
        ApiError::unauthorized()
    })?;
    let default_audience = &core.tokens.issuer;
    if !claims.aud.iter().any(|audience| audience == default_audience) {
        return Err(ApiError::unauthorized());
    }
    let user = account_of(core, &claims)?;
    Ok((user, Some(claims)))
}

/// Checks that the objects a token's claims name still exist as they were.
pub(crate) fn account_of(core: &Core, claims: &Claims) -> ApiResult<User> {
    let bound = &claims.bound;
    let (namespace, name) = split_service_account(&claims.sub).ok_or_else(ApiError::unauthorized)?;
    if namespace != bound.namespace || name != bound.serviceaccount.name {
        return Err(ApiError::unauthorized());
    }
    let exists = |plural: &str, namespace: &str, name: &str, uid: &str| {
        let kind = oarlock_kinds::find("", "v1", plural)?;
        let record = core.store.get(&object::key(kind, namespace, name))?;
        (*object::index(kind, &record).uid == *uid).then_some(record)
    };
    exists("serviceaccounts", namespace, name, &bound.serviceaccount.uid).ok_or_else(ApiError::unauthorized)?;
    let mut user = User::service_account(namespace, name, &bound.serviceaccount.uid);
    if let Some(pod) = &bound.pod {
        exists("pods", namespace, &pod.name, &pod.uid).ok_or_else(ApiError::unauthorized)?;
        user.extra.insert("authentication.kubernetes.io/pod-name".into(), vec![pod.name.clone()]);
        user.extra.insert("authentication.kubernetes.io/pod-uid".into(), vec![pod.uid.clone()]);
    }
    if let Some(secret) = &bound.secret {
        exists("secrets", namespace, &secret.name, &secret.uid).ok_or_else(ApiError::unauthorized)?;
    }
    if let Some(node) = &bound.node {
        user.extra.insert("authentication.kubernetes.io/node-name".into(), vec![node.name.clone()]);
        user.extra.insert("authentication.kubernetes.io/node-uid".into(), vec![node.uid.clone()]);
    }
    user.extra.insert("authentication.kubernetes.io/credential-id".into(), vec![format!("JTI={}", claims.jti)]);
    Ok(user)
}

/// Applies `Impersonate-*` headers, each of which the real user must be allowed.
pub(crate) fn impersonate(core: &Core, user: User, headers: &HeaderMap) -> ApiResult<User> {
    let all = |name: &str| -> Vec<String> {
        headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
    };
    let groups = all("impersonate-group");
    let extras: Vec<(String, Vec<String>)> = headers
        .keys()
        .filter_map(|name| name.as_str().strip_prefix("impersonate-extra-"))
        .map(|key| (decode(key, false), all(&format!("impersonate-extra-{key}"))))
        .collect();
    let Some(name) = all("impersonate-user").into_iter().next() else {
        if groups.is_empty() && extras.is_empty() && headers.get("impersonate-uid").is_none() {
            return Ok(user);
        }
        return Err(ApiError::internal("requested impersonation without impersonating a user"));
    };
    let ask = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let action = Action {
            verb: "impersonate".into(),
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            name: name.into(),
            path: None,
        };
        match authz::decide(core, &user, &action) {
            authz::Decision::Allowed(_) => Ok(()),
            authz::Decision::NoOpinion(reason) => Err(authz::refusal(&user, &action, &reason)),
        }
    };
    let mut assumed = match split_service_account(&name) {
        Some((namespace, account)) => {
            ask("", "serviceaccounts", "", namespace, account)?;
            User::service_account(namespace, account, "")
        }
        None => {
            ask("", "users", "", "", &name)?;
            User::authenticated(name, [])
        }
    };
    for group in &groups {
        ask("", "groups", "", "", group)?;
    }
    if !groups.is_empty() {
        assumed.groups = groups;
        if !assumed.is_in(AUTHENTICATED) {
            assumed.groups.push(AUTHENTICATED.into());
        }
    }
    for (key, values) in extras {
        for value in &values {
            ask("authentication.k8s.io", "userextras", &key, "", value)?;
        }
        assumed.extra.insert(key, values);
    }
    if let Some(uid) = all("impersonate-uid").into_iter().next() {
        ask("authentication.k8s.io", "uids", "", "", &uid)?;
        assumed.uid = uid;
    }
    Ok(assumed)
}
