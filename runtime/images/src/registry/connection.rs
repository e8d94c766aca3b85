//! One place over HTTP: TLS as configured, authentication when asked for, redirections. Knows paths of the registry
//! protocol only as far as they are given.
//!
//! ```text
//! request ──▶ 401 with a challenge ──▶ token or password ──▶ the same request once more ──▶ answer
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, WWW_AUTHENTICATE};
use reqwest::{Certificate, Client, Identity, Response, StatusCode, Url};
use serde::Deserialize;

use super::challenge::{self, Challenge};
use super::endpoints::Endpoint;
use super::hosts::invalid;
use crate::{Auth, ImageError, RegistryConfig};

const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const READ_LIMIT: Duration = Duration::from_secs(60);
const REDIRECTIONS_MAX: usize = 10;
const TOKEN_BYTES_MAX: usize = 1 << 20;
const CERTIFICATES_BYTES_MAX: u64 = 4 << 20;
/// How servers say that they were shown no certificate.
const WANTS_CERTIFICATE: [&str; 2] =
    ["received fatal alert: BadCertificate", "received fatal alert: CertificateRequired"];
/// Of what a registry says, so much is passed on: of one message, and of all.
const MESSAGE_CHARS_MAX: usize = 256;
const TOLD_BYTES_MAX: usize = 1024;
/// What a token server is told that we are.
const CLIENT_ID: &str = "oarlock";
const USER_AGENT: &str = concat!("oarlock/", env!("CARGO_PKG_VERSION"));

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    NotFound,
    Denied(String),
    Other(String),
}

/// A place that can be asked about one repository.
#[derive(Clone)]
pub(super) struct Connection {
    client: Client,
    endpoint: Endpoint,
    headers: HeaderMap,
    scope: String,
    /// What the registry was shown last and took.
    authorization: Arc<Mutex<Option<HeaderValue>>>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

#[derive(Deserialize)]
struct Problems {
    #[serde(default)]
    errors: Vec<Problem>,
}

#[derive(Deserialize)]
struct Problem {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Connection {
    pub(super) fn new(config: &RegistryConfig, endpoint: Endpoint, repository: &str) -> Result<Connection, ImageError> {
        let client = client(config, &endpoint)?;
        let mut headers = HeaderMap::new();
        for (name, value) in &endpoint.headers {
            let parsed = (HeaderName::try_from(name), HeaderValue::try_from(value));
            let (Ok(name), Ok(value)) = parsed else {
                return Err(wrong(&endpoint, &format!("header.{name}"), "is no header of HTTP"));
            };
            headers.append(name, value);
        }
        // A token for a registry needs no challenge first.
        let authorization = match &endpoint.auth {
            Some(Auth::Bearer(token)) => secret(&format!("Bearer {token}")).ok(),
            _ => None,
        };
        let scope = format!("repository:{repository}:pull");
        Ok(Connection { client, endpoint, headers, scope, authorization: Arc::new(Mutex::new(authorization)) })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A successful answer to a GET of a path below the place's base.
    pub(super) async fn get(&self, path: &str, accepted: &str, range: Option<(u64, u64)>) -> Result<Response, Failure> {
        let mut url = Url::parse(&format!("{}/{path}", self.endpoint.base))
            .map_err(|error| Failure::Other(format!("{path}: {error}")))?;
        if let Some(registry) = &self.endpoint.stands_for {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        let mut response = self.send(&url, accepted, range).await?;
        // Whoever else was asked in between has no claim to what is for the registry.
        if response.status() == StatusCode::UNAUTHORIZED && response.url().origin() == url.origin() {
            let asked = response.headers().get_all(WWW_AUTHENTICATE).iter();
            let challenge = challenge::best(asked.filter_map(|value| value.to_str().ok()));
            if let Some(shown) = self.answer(challenge).await? {
                *self.authorization.lock() = Some(shown);
                response = self.send(&url, accepted, range).await?;
            }
        }
        if response.status().is_success() { Ok(response) } else { Err(self.refused(response).await) }
    }

    /// Follows redirections; what is secret goes to the first origin only.
    async fn send(&self, url: &Url, accepted: &str, range: Option<(u64, u64)>) -> Result<Response, Failure> {
        let mut at = url.clone();
        for _ in 0..REDIRECTIONS_MAX {
            let mut headers = HeaderMap::new();
            if at.origin() == url.origin() {
                headers.clone_from(&self.headers);
                if let Some(shown) = self.authorization.lock().clone() {
                    headers.insert(AUTHORIZATION, shown);
                }
            }
            if let Ok(accepted) = HeaderValue::from_str(accepted) {
                headers.insert(ACCEPT, accepted);
            }
            if let Some((first, last)) = range
                && let Ok(range) = HeaderValue::from_str(&format!("bytes={first}-{last}"))
            {
                headers.insert(RANGE, range);
            }
            let response = self.client.get(at.clone()).headers(headers).send().await;
            let response = response.map_err(|error| self.unreachable(error))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| at.join(location).ok());
            at = next.ok_or_else(|| Failure::Other(format!("{} redirects to nowhere", self.endpoint.name)))?;
            if !matches!(at.scheme(), "http" | "https") {
                return Err(Failure::Other(format!("{} redirects to what is no address of HTTP", self.endpoint.name)));
            }
        }
        Err(Failure::Other(format!("{} redirects too often", self.endpoint.name)))
    }

    /// What to show for a challenge; None when there is nothing that could be shown.
    async fn answer(&self, challenge: Option<Challenge>) -> Result<Option<HeaderValue>, Failure> {
        match (challenge, &self.endpoint.auth) {
            (Some(Challenge::Basic), Some(Auth::Basic { username, password })) => {
                let papers = STANDARD.encode(format!("{username}:{password}"));
                secret(&format!("Basic {papers}")).map(Some)
            }
            (_, Some(Auth::Bearer(_))) | (None | Some(Challenge::Basic), _) => Ok(None),
            (Some(Challenge::Bearer { realm, service, scope }), auth) => {
                self.token(&realm, service.as_deref(), scope.as_deref(), auth.as_ref()).await.map(Some)
            }
        }
    }

    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        auth: Option<&Auth>,
    ) -> Result<HeaderValue, Failure> {
        let mut fields = vec![("scope", scope.unwrap_or(&self.scope))];
        fields.extend(service.map(|service| ("service", service)));
        let request = match auth {
            // OAuth2: the token stands for the person, and another is given for it.
            Some(Auth::Identity(token)) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token.as_str()),
                    ("client_id", CLIENT_ID),
                ]);
                self.client.post(realm).form(&fields)
            }
            Some(Auth::Basic { username, password }) => {
                fields.push(("account", username));
                self.client.get(realm).query(&fields).basic_auth(username, Some(password))
            }
            Some(Auth::Bearer(_)) | None => self.client.get(realm).query(&fields),
        };
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        if matches!(status.as_u16(), 400 | 401 | 403) {
            return Err(Failure::Denied(format!("{}'s token server answered {status}", self.endpoint.name)));
        }
        if !status.is_success() {
            return Err(Failure::Other(format!("{}'s token server answered {status}", self.endpoint.name)));
        }
        let body = self.body(response, TOKEN_BYTES_MAX).await?;
        let unreadable = || Failure::Other(format!("{}'s token server gave no token", self.endpoint.name));
        let token: Token = serde_json::from_slice(&body).map_err(|_| unreadable())?;
        let given = [token.token, token.access_token].into_iter().flatten().find(|token| !token.is_empty());
        secret(&format!("Bearer {}", given.ok_or_else(unreadable)?))
    }

    /// The whole of a body that is not larger than it may be.
    pub(super) async fn body(&self, mut response: Response, bytes_max: usize) -> Result<Bytes, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(error))? {
            if body.len() + chunk.len() > bytes_max {
                return Err(Failure::Other(format!("{} sent more than {bytes_max} bytes", self.endpoint.name)));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.into())
    }

    async fn refused(&self, response: Response) -> Failure {
        let status = response.status();
        let body = self.body(response, TOKEN_BYTES_MAX).await.unwrap_or_default();
        let problems = serde_json::from_slice::<Problems>(&body).map(|parsed| parsed.errors).unwrap_or_default();
        let is = |codes: &[&str]| problems.iter().any(|problem| codes.contains(&problem.code.as_str()));
        let told = told(problems.iter().map(|problem| problem.message.as_str()));
        let told = if told.is_empty() { told } else { format!(": {told}") };
        let message = format!("{} answered {status}{told}", self.endpoint.name);
        if status == StatusCode::NOT_FOUND || is(&["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "BLOB_UNKNOWN", "NOT_FOUND"]) {
            Failure::NotFound
        } else if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) || is(&["DENIED", "UNAUTHORIZED"])
        {
            Failure::Denied(message)
        } else {
            Failure::Other(message)
        }
    }

    /// Of an address only the host is told: the rest may be signed, and so as good as a password.
    fn unreachable(&self, error: reqwest::Error) -> Failure {
        let host = error.url().map(|url| format!("{}: ", place(url))).unwrap_or_default();
        let text = chain(&error.without_url());
        let Endpoint { name, file, tls, .. } = &self.endpoint;
        let place = |field: &str| match file {
            Some(file) => format!("the field {field} in {}", file.display()),
            None => format!("the field {field} of a hosts.toml"),
        };
        let why = if text.contains("invalid peer certificate") {
            format!("the certificate of {name} is not trusted; its authority belongs into {}: ", place("ca"))
        } else if tls.client.is_none() && WANTS_CERTIFICATE.iter().any(|alert| text.contains(alert)) {
            format!("{name} wants a client's certificate, which belongs into {}: ", place("client"))
        } else {
            String::new()
        };
        Failure::Other(format!("{why}{host}{text}"))
    }
}

/// Scheme and host of an address.
fn place(url: &Url) -> String {
    url.origin().ascii_serialization()
}

fn client(config: &RegistryConfig, endpoint: &Endpoint) -> Result<Client, ImageError> {
    let unusable = |error: &reqwest::Error| wrong(endpoint, "tls", &chain(error));
    if !endpoint.tls.skip_verify {
        ensure_roots(endpoint)?;
    }
    let mut builder = Client::builder()
        .connect_timeout(endpoint.dial_limit.unwrap_or(CONNECT_LIMIT))
        .read_timeout(READ_LIMIT)
        .user_agent(USER_AGENT)
        .redirect(reqwest::redirect::Policy::none())
        .tls_danger_accept_invalid_certs(endpoint.tls.skip_verify);
    let mut authorities = Vec::new();
    for path in config.ca_files.iter().chain(&endpoint.tls.authorities) {
        let found = Certificate::from_pem_bundle(&read(endpoint, "ca", path)?).unwrap_or_default();
        if found.is_empty() {
            return Err(wrong(endpoint, "ca", &format!("{} has no certificate in PEM form", path.display())));
        }
        authorities.extend(found);
    }
    builder = builder.tls_certs_merge(authorities);
    if let Some((certificate, key)) = &endpoint.tls.client {
        let mut pem = read(endpoint, "client", certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(endpoint, "client", key)?);
        }
        let identity = Identity::from_pem(&pem).map_err(|_| {
            let problem = format!("{} and its key are not a pair in PEM form", certificate.display());
            wrong(endpoint, "client", &problem)
        })?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|error| unusable(&error))
}

fn read(endpoint: &Endpoint, field: &str, path: &Path) -> Result<Vec<u8>, ImageError> {
    let failed = |problem: &str| wrong(endpoint, field, &format!("{}: {problem}", path.display()));
    let size = std::fs::metadata(path).map_err(|error| failed(&error.to_string()))?.len();
    if size > CERTIFICATES_BYTES_MAX {
        return Err(failed("larger than any file of certificates"));
    }
    std::fs::read(path).map_err(|error| failed(&error.to_string()))
}

fn wrong(endpoint: &Endpoint, field: &str, problem: &str) -> ImageError {
    match &endpoint.file {
        Some(file) => invalid(file, field, &format!("{}: {problem}", endpoint.name)),
        None => ImageError::Registry { reference: endpoint.name.clone(), message: format!("{field}: {problem}") },
    }
}

/// The client cannot be made at all, not even for plain HTTP, on a machine that knows no certificate authority.
fn ensure_roots(endpoint: &Endpoint) -> Result<(), ImageError> {
    static FOUND: AtomicBool = AtomicBool::new(false);
    if FOUND.load(Ordering::Relaxed) || !rustls_native_certs::load_native_certs().certs.is_empty() {
        FOUND.store(true, Ordering::Relaxed);
        return Ok(());
    }
    let message = "this machine has no certificates of authorities; install the package ca-certificates".to_owned();
    Err(ImageError::Registry { reference: endpoint.name.clone(), message })
}

/// The messages of a registry, which may say anything at any length: on one line, and cut.
fn told<'a>(messages: impl Iterator<Item = &'a str>) -> String {
    let mut told = String::new();
    for message in messages.filter(|message| !message.is_empty()) {
        let mut chars = message.chars().map(|c| if c.is_control() { ' ' } else { c });
        let mut shown: String = chars.by_ref().take(MESSAGE_CHARS_MAX).collect();
        if chars.next().is_some() {
            shown.push('…');
        }
        let joint = if told.is_empty() { "" } else { ", " };
        if !told.is_empty() && told.len() + joint.len() + shown.len() > TOLD_BYTES_MAX {
            told.push_str(", …");
            break;
        }
        told.push_str(joint);
        told.push_str(&shown);
    }
    told
}

fn secret(text: &str) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_| Failure::Denied("the credentials have characters that cannot be sent".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
