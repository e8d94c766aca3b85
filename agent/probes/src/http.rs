//! httpGet probes: one request on a connection of its own, certificates not verified, redirects followed only on the same host.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::action::{Attempt, OUTPUT_LIMIT_BYTES};
use crate::tcp::{describe, join_host_port};

pub(crate) const AGENT: &str = "kube-probe/1.36";
const LIFECYCLE_AGENT: &str = "kube-lifecycle/1.36";

/// Redirects followed before giving up.
const REDIRECT_LIMIT: usize = 10;

/// Where to go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub tls: bool,
    pub host: &'a str,
    pub port: u16,
    pub path: &'a str,
}

/// Sends probe requests.
#[derive(Clone)]
pub(crate) struct HttpProber {
    tls: Arc<rustls::ClientConfig>,
}

/// Why a request got no answer.
enum Failed {
    Connect(String),
    Other(String),
}

impl HttpProber {
    pub fn new() -> Self {
        Self { tls: Arc::new(crate::tls::unverified()) }
    }

    pub async fn get(&self, target: Target<'_>, headers: &[(String, String)], timeout: Duration) -> Attempt {
        let uri = match uri_of(target) {
            Ok(uri) => uri,
            Err(message) => return Attempt::Error(message),
        };
        let headers = match header_map(headers) {
            Ok(headers) => headers,
            Err(message) => return Attempt::Error(message),
        };
        match tokio::time::timeout(timeout, self.follow(uri.clone(), headers)).await {
            Ok(attempt) => attempt,
            Err(_) => Attempt::Failure(format!(
                "Get \"{uri}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
            )),
        }
    }

    async fn follow(&self, first: Uri, headers: HeaderMap) -> Attempt {
        let mut uri = first.clone();
        for _ in 0..=REDIRECT_LIMIT {
            let (status, location, body) = match self.once(&uri, &headers).await {
                Ok(answer) => answer,
                Err(Failed::Connect(message) | Failed::Other(message)) => {
                    return Attempt::Failure(format!("Get \"{uri}\": {message}"));
                }
            };
            match location.and_then(|location| next_hop(&uri, &location)) {
                // Another host is not asked: that the container redirects is a success.
                Some(next) if next.host() == first.host() => uri = next,
                Some(_) => return Attempt::Warning(format!("Probe terminated redirects, Response body: {body}")),
                None => return judge(status, body),
            }
        }
        Attempt::Failure(format!("Get \"{uri}\": stopped after {REDIRECT_LIMIT} redirects"))
    }

    /// One request: status, the Location of a redirect, and the beginning of the body.
    async fn once(&self, uri: &Uri, headers: &HeaderMap) -> Result<(StatusCode, Option<String>, String), Failed> {
        let tls = uri.scheme_str() == Some("https");
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await.map_err(|error| {
            Failed::Connect(format!("dial tcp {}: {}", join_host_port(host, port), describe(&error)))
        })?;
        let _ = stream.set_nodelay(true);
        let request = build_request(uri, headers)?;
        if !tls {
            return exchange(stream, request).await;
        }
        let name = rustls::pki_types::ServerName::try_from(host.to_string())
            .map_err(|error| Failed::Other(format!("tls: {error}")))?;
        let stream = TlsConnector::from(self.tls.clone())
            .connect(name, stream)
            .await
            .map_err(|error| Failed::Other(format!("tls: {error}")))?;
        exchange(stream, request).await
    }
}

/// A lifecycle hook's request: any answer is success, as upstream takes it.
#[derive(Debug, Clone, Copy)]
pub struct LifecycleGet<'a> {
    /// HTTPS without a check of the certificate.
    pub tls: bool,
    pub host: &'a str,
    pub port: u16,
    pub path: &'a str,
    pub headers: &'a [(String, String)],
}

/// Sends it. Not bounded in time.
pub async fn lifecycle_get(get: LifecycleGet<'_>) -> Result<(), String> {
    let prober = HttpProber::new();
    let mut headers = get.headers.to_vec();
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("user-agent")) {
        headers.push(("User-Agent".to_owned(), LIFECYCLE_AGENT.to_owned()));
    }
    let headers = header_map(&headers)?;
    let mut tls = get.tls;
    loop {
        let uri = uri_of(Target { tls, host: get.host, port: get.port, path: get.path })?;
        match prober.once(&uri, &headers).await {
            Ok(_) => return Ok(()),
            // A server without TLS where TLS was asked for is asked again without, as upstream does.
            Err(Failed::Other(message)) if tls && message.contains("InvalidContentType") => tls = false,
            Err(Failed::Connect(message) | Failed::Other(message)) => return Err(format!("Get \"{uri}\": {message}")),
        }
    }
}

fn judge(status: StatusCode, body: String) -> Attempt {
    if (200..400).contains(&status.as_u16()) {
        Attempt::Success(body)
    } else {
        Attempt::Failure(format!("HTTP probe failed with statuscode: {}", status.as_u16()))
    }
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<(StatusCode, Option<String>, String), Failed> {
    let failed = |error: hyper::Error| Failed::Other(chain(&error));
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(64 * 1024)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    let answer = async move {
        let response: Response<Incoming> = sender.send_request(request).await.map_err(failed)?;
        let status = response.status();
        let redirect = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok()).map(str::to_string);
        let body = read_capped(response.into_body()).await;
        Ok((status, location.filter(|_| redirect), body))
    };
    tokio::pin!(connection, answer);
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            _ = &mut connection, if open => open = false,
        }
    }
}

/// The beginning of a body; what comes after it is never read.
async fn read_capped(mut body: Incoming) -> String {
    let mut text = Vec::new();
    while text.len() < OUTPUT_LIMIT_BYTES {
        let Some(Ok(frame)) = body.frame().await else { break };
        if let Some(data) = frame.data_ref() {
            text.extend_from_slice(&data[..data.len().min(OUTPUT_LIMIT_BYTES - text.len())]);
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn uri_of(target: Target<'_>) -> Result<Uri, String> {
    let scheme = if target.tls { "https" } else { "http" };
    let path = encode_path(target.path);
    let text = format!("{scheme}://{}{path}", join_host_port(target.host, target.port));
    text.parse().map_err(|error| format!("invalid probe URL {text:?}: {error}"))
}

/// Makes a path absolute and escapes what may not stand in a URL; a fragment is dropped.
fn encode_path(path: &str) -> String {
    let path = path.split('#').next().unwrap_or_default();
    let mut out = String::with_capacity(path.len() + 1);
    if !path.starts_with('/') {
        out.push('/');
    }
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => out.push(byte as char),
            b'-' | b'.' | b'_' | b'~' | b'/' | b'?' | b'=' | b'&' | b'%' | b':' | b'@' | b'!' | b'$' | b'\'' | b'('
            | b')' | b'*' | b'+' | b',' | b';' | b'[' | b']' => out.push(byte as char),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// The manifest's headers, with the usual ones added unless they are given; an empty one removes it.
fn header_map(given: &[(String, String)]) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, value) in given {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("invalid header name {name:?}"))?;
        let value = HeaderValue::from_str(value).map_err(|_| format!("invalid value of header {name}"))?;
        map.append(name, value);
    }
    for (name, usual) in [(USER_AGENT, AGENT), (ACCEPT, "*/*")] {
        match map.get(&name) {
            None => drop(map.insert(name, HeaderValue::from_static(usual))),
            Some(value) if value.is_empty() => drop(map.remove(&name)),
            Some(_) => {}
        }
    }
    map.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(map)
}

fn build_request(uri: &Uri, headers: &HeaderMap) -> Result<Request<Empty<Bytes>>, Failed> {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::get(path).body(Empty::new()).map_err(|error| Failed::Other(error.to_string()))?;
    *request.headers_mut() = headers.clone();
    if !headers.contains_key(HOST) {
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let value = HeaderValue::from_str(authority).map_err(|error| Failed::Other(error.to_string()))?;
        request.headers_mut().insert(HOST, value);
    }
    Ok(request)
}

/// Where a redirect leads.
fn next_hop(from: &Uri, location: &str) -> Option<Uri> {
    let authority = from.authority()?.as_str();
    let scheme = from.scheme_str()?;
    let text = if location.contains("://") {
        location.to_string()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{}", encode_path(location))
    } else {
        let base = from.path().rsplit_once('/').map_or("", |(base, _)| base);
        format!("{scheme}://{authority}{base}{}", encode_path(location))
    };
    let uri: Uri = text.parse().ok()?;
    matches!(uri.scheme_str(), Some("http" | "https")).then_some(uri)
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
