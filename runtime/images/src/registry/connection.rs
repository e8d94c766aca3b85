//! One place over HTTP: authentication when asked for, redirections. Knows paths of the registry
//! protocol only as far as they are given.
//!
//! ```text
//! request ──▶ 401 with a challenge ──▶ token or password ──▶ the same request once more ──▶ answer
//! ```

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;

use super::challenge::{self, Challenge};
use super::clients::{Clients, chain, wrong};
use super::endpoints::{Endpoint, is_plain};
use crate::{Auth, ImageError, RegistryConfig};

const REDIRECTIONS_MAX: usize = 10;
const TOKEN_BYTES_MAX: usize = 1 << 20;
/// How servers say that they were shown no certificate.
const WANTS_CERTIFICATE: [&str; 2] =
    ["received fatal alert: BadCertificate", "received fatal alert: CertificateRequired"];
/// Of what a registry says, so much is passed on: of one message, and of all.
const MESSAGE_CHARS_MAX: usize = 256;
const TOLD_BYTES_MAX: usize = 1024;
/// What a token server is told that we are.
const CLIENT_ID: &str = "oarlock";

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
    clients: Arc<Clients>,
    endpoint: Endpoint,
    /// Where plain HTTP will do.
    plain_http: Arc<[String]>,
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
        let clients = Arc::new(Clients::new(config, &endpoint)?);
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
        let plain_http = config.plain_http.as_slice().into();
        let authorization = Arc::new(Mutex::new(authorization));
        Ok(Connection { clients, endpoint, plain_http, headers, scope, authorization })
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
            let client = self.clients.client(&at).map_err(Failure::Other)?;
            let response = client.get(at.clone()).headers(headers).send().await;
            let response = response.map_err(|error| self.unreachable(error))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| at.join(location).ok());
            let next = next.ok_or_else(|| Failure::Other(format!("{} redirects to nowhere", self.endpoint.name)))?;
            self.check_step(&at, &next)?;
            at = next;
        }
        Err(Failure::Other(format!("{} redirects too often", self.endpoint.name)))
    }

    /// What was safe from others so far does not go on in the open.
    fn check_step(&self, from: &Url, to: &Url) -> Result<(), Failure> {
        let name = &self.endpoint.name;
        let open = match to.scheme() {
            "https" => false,
            "http" => from.scheme() == "https" && !is_plain(&self.plain_http, &host(to)),
            _ => return Err(Failure::Other(format!("{name} sends us to what is no address of HTTP"))),
        };
        if open {
            let place = place(to);
            return Err(Failure::Other(format!("{name} sends us to {place}, which is not safe from others (no TLS)")));
        }
        Ok(())
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
        let nowhere = |_| Failure::Other(format!("{} names no token server", self.endpoint.name));
        let (own, realm) = (Url::parse(&self.endpoint.base).map_err(nowhere)?, Url::parse(realm).map_err(nowhere)?);
        self.check_step(&own, &realm)?;
        let client = self.clients.client(&realm).map_err(Failure::Other)?;
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
                client.post(realm).form(&fields)
            }
            Some(Auth::Basic { username, password }) => {
                fields.push(("account", username));
                client.get(realm).query(&fields).basic_auth(username, Some(password))
            }
            Some(Auth::Bearer(_)) | None => client.get(realm).query(&fields),
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
        let Endpoint { name, file, tls, .. } = &self.endpoint;
        let (at, name) = match error.url() {
            Some(url) => (format!("{}: ", place(url)), host(url)),
            None => (String::new(), name.clone()),
        };
        let text = chain(&error.without_url());
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
        Failure::Other(format!("{why}{at}{text}"))
    }
}

/// `host[:port]` of an address.
fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Scheme and host of an address.
fn place(url: &Url) -> String {
    url.origin().ascii_serialization()
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

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
