//! Proxies an upgrade to the runtime's streaming server, byte for byte once it has agreed.
//!
//! A backend that does not agree is read for its status and message, relayed, and its connection dropped: nothing the client
//! sends afterwards can reach it.

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONNECTION, COOKIE, HOST, HeaderMap, HeaderValue, UPGRADE};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Answer, full};
use crate::backend::NodeError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Of a refusal's body.
const REFUSAL_LIMIT_BYTES: usize = 64 * 1024;

/// Whether the request asks to be upgraded.
pub(crate) fn is_upgrade(headers: &HeaderMap) -> bool {
    let mut connection = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asks = connection.any(|value| value.split(',').any(|token| token.trim().eq_ignore_ascii_case("upgrade")));
    asks && headers.contains_key(UPGRADE)
}

/// Sends the client's upgrade request to `url`; relays a refusal, or the upgraded connection.
pub(crate) async fn proxy(
    mut request: Request<Incoming>,
    url: &str,
    tasks: &TaskTracker,
    shutdown: CancellationToken,
) -> Result<Response<Answer>, NodeError> {
    let unavailable = |what: &str, why: String| {
        tracing::debug!(reason = %why, "the streaming backend failed");
        NodeError::Unavailable(format!("error dialing backend: {what}: {why}"))
    };
    let uri: Uri = url.parse().map_err(|_| NodeError::Internal("the runtime gave an invalid URL".to_string()))?;
    let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(NodeError::Internal("the runtime gave a URL that is not http".to_string()));
    };
    let host = authority.host().trim_matches(['[', ']']).to_string();
    let port = authority.port_u16().unwrap_or(80);
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect((host.as_str(), port)))
        .await
        .map_err(|_| unavailable("connect", "timed out".to_string()))?
        .map_err(|error| unavailable("connect", error.to_string()))?;
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| unavailable("handshake", error.to_string()))?;
    let driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection.with_upgrades()));
    let onward = onward(&request, &uri, authority.as_str())?;
    let response = tokio::time::timeout(ANSWER_TIMEOUT, sender.send_request(onward))
        .await
        .map_err(|_| unavailable("answer", "timed out".to_string()))?
        .map_err(|error| unavailable("answer", error.to_string()))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(refusal(response).await);
    }
    let (parts, body) = response.into_parts();
    let mut answer = Response::new(full(Bytes::new()));
    *answer.status_mut() = parts.status;
    *answer.headers_mut() = parts.headers.clone();
    let client = hyper::upgrade::on(&mut request);
    let backend = hyper::upgrade::on(Response::from_parts(parts, body));
    tasks.spawn(async move {
        tokio::select! {
            () = relay(client, backend) => {}
            () = shutdown.cancelled() => {}
        }
        drop(driver);
    });
    Ok(answer)
}

/// Both directions, each to its own end: a side that closes its sending half still receives.
async fn relay(client: hyper::upgrade::OnUpgrade, backend: hyper::upgrade::OnUpgrade) {
    let (client, backend) = match tokio::try_join!(client, backend) {
        Ok(both) => both,
        Err(error) => {
            tracing::debug!(error = %error, "an upgrade did not come about");
            return;
        }
    };
    let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut backend).await {
        tracing::debug!(error = %error, "a relayed stream ended");
    }
}

/// The client's request as the backend gets it: its own path, no credentials, everything else as it came.
fn onward(request: &Request<Incoming>, uri: &Uri, authority: &str) -> Result<Request<Empty<Bytes>>, NodeError> {
    let internal = |error: String| NodeError::Internal(format!("cannot pass the request on: {error}"));
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut onward = Request::builder()
        .method(request.method().clone())
        .uri(path)
        .body(Empty::new())
        .map_err(|error| internal(error.to_string()))?;
    let headers = onward.headers_mut();
    *headers = request.headers().clone();
    for name in [AUTHORIZATION, COOKIE, http::header::CONTENT_LENGTH, http::header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    headers.insert(HOST, HeaderValue::from_str(authority).map_err(|error| internal(error.to_string()))?);
    Ok(onward)
}

async fn refusal(response: Response<Incoming>) -> Response<Answer> {
    let (parts, body) = response.into_parts();
    let limited = tokio::time::timeout(CONNECT_TIMEOUT, Limited::new(body, REFUSAL_LIMIT_BYTES).collect()).await;
    let body = limited.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
    let mut answer = Response::new(full(body));
    *answer.status_mut() = parts.status;
    *answer.headers_mut() = parts.headers;
    for name in [CONNECTION, UPGRADE, http::header::CONTENT_LENGTH, http::header::TRANSFER_ENCODING] {
        answer.headers_mut().remove(name);
    }
    // The client's connection ends here too: whatever it sends next was meant for the backend.
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}
