//! grpc probes: `grpc.health.v1.Health/Check` over plain HTTP/2.
//!
//! The two messages are small enough to be written and read by hand.

use std::net::IpAddr;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::action::{Attempt, OUTPUT_LIMIT_BYTES};
use crate::tcp::{describe, join_host_port};

const SERVING: u64 = 1;
const UNIMPLEMENTED: &str = "12";

pub(crate) async fn check(host: IpAddr, port: u16, service: &str, timeout: Duration) -> Attempt {
    let address = join_host_port(&host.to_string(), port);
    let deadline = tokio::time::Instant::now() + timeout;
    let stream = match tokio::time::timeout_at(deadline, TcpStream::connect((host, port))).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return Attempt::Failure(format!(
                "timeout: failed to connect service {address:?} within {timeout:?}: dial tcp {address}: {}",
                describe(&error)
            ));
        }
        Err(_) => {
            return Attempt::Failure(format!(
                "timeout: failed to connect service {address:?} within {timeout:?}: context deadline exceeded"
            ));
        }
    };
    match tokio::time::timeout_at(deadline, call(stream, &address, service)).await {
        Ok(Ok((headers, body))) => judge(&headers, &body),
        Ok(Err(error)) => Attempt::Failure(format!("error: health rpc probe failed: {error}")),
        Err(_) => Attempt::Failure(format!("timeout: health rpc did not complete within {timeout:?}")),
    }
}

/// Sends the request; gives headers and trailers together, and the body.
async fn call(stream: TcpStream, address: &str, service: &str) -> Result<(HeaderMap, Bytes), hyper::Error> {
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let answer = async move {
        let response = sender.send_request(request(address, service)).await?;
        let (head, mut incoming) = response.into_parts();
        let mut headers = head.headers;
        let mut body = BytesMut::new();
        while let Some(frame) = incoming.frame().await {
            match frame?.into_data() {
                Ok(data) if body.len() + data.len() <= OUTPUT_LIMIT_BYTES => body.extend_from_slice(&data),
                Ok(_) => break,
                Err(frame) => headers.extend(frame.into_trailers().unwrap_or_default()),
            }
        }
        Ok((headers, body.freeze()))
    };
    tokio::pin!(connection, answer);
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            ended = &mut connection, if open => {
                open = false;
                ended?;
            }
        }
    }
}

fn request(address: &str, service: &str) -> Request<Full<Bytes>> {
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", crate::http::AGENT);
    // An address and a port always make a URI; an empty request stands in if not, and fails as a probe.
    request.body(Full::new(encode(service))).unwrap_or_default()
}

/// HealthCheckRequest{service = 1} in a gRPC frame.
fn encode(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        message.put_u8(length as u8);
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    frame.put_u32(message.len() as u32);
    frame.extend_from_slice(&message);
    frame.freeze()
}

/// The status of a HealthCheckResponse in a gRPC frame; None when it is not one.
fn decode(body: &[u8]) -> Option<u64> {
    let (head, rest) = body.split_at_checked(5)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let mut message = rest.get(..length).filter(|_| head[0] == 0)?;
    let mut status = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        match key & 7 {
            0 => {
                let value = varint(&mut message)?;
                if key >> 3 == 1 {
                    status = value;
                }
            }
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message = message.get(length..)?;
            }
            _ => return None,
        }
    }
    Some(status)
}

fn varint(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = input.split_first()?;
        *input = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn judge(headers: &HeaderMap, body: &[u8]) -> Attempt {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match text("grpc-status") {
        "0" => match decode(body) {
            Some(SERVING) => Attempt::Success("service healthy".to_string()),
            Some(status) => {
                let name = match status {
                    0 => "UNKNOWN".to_string(),
                    2 => "NOT_SERVING".to_string(),
                    3 => "SERVICE_UNKNOWN".to_string(),
                    other => other.to_string(),
                };
                Attempt::Failure(format!("service unhealthy (responded with {name:?})"))
            }
            None => Attempt::Failure("error: health rpc probe failed: malformed response".to_string()),
        },
        UNIMPLEMENTED => Attempt::Failure(format!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
            text("grpc-message")
        )),
        "" => Attempt::Failure("error: health rpc probe failed: not a gRPC server".to_string()),
        code => Attempt::Failure(format!("error: health rpc probe failed: code {code}: {}", text("grpc-message"))),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{HeaderValue, Response};
    use http_body_util::StreamBody;
    use hyper::body::{Frame, Incoming};
    use hyper::service::service_fn;

    use super::*;

    /// Serves one connection: answers with `status` when asked for `service`, else with gRPC code 5.
    async fn serve(service: &'static str, status: u8) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let handler = service_fn(move |request: Request<Incoming>| async move {
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                let asked = request.into_body().collect().await.unwrap().to_bytes();
                let known = asked == encode(service);
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static(if known { "0" } else { "5" }));
                let data = Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 8, status]);
                let frames = [Frame::data(data), Frame::trailers(trailers)].map(Ok::<_, Infallible>);
                Ok::<_, Infallible>(Response::new(StreamBody::new(futures::stream::iter(frames))))
            });
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), handler)
                .await;
        });
        port
    }

    async fn ask(port: u16, service: &str) -> Attempt {
        check("127.0.0.1".parse().unwrap(), port, service, Duration::from_secs(5)).await
    }

    #[tokio::test]
    async fn a_serving_service_is_healthy() {
        assert!(matches!(ask(serve("db", 1).await, "db").await, Attempt::Success(_)));
        assert!(matches!(ask(serve("", 1).await, "").await, Attempt::Success(_)));
    }

    #[tokio::test]
    async fn a_service_that_is_not_serving_fails_by_name() {
        let attempt = ask(serve("db", 2).await, "db").await;
        assert_eq!(attempt, Attempt::Failure("service unhealthy (responded with \"NOT_SERVING\")".into()));
        assert!(matches!(ask(serve("db", 1).await, "other").await, Attempt::Failure(m) if m.contains("code 5")));
    }

    #[test]
    fn broken_answers_are_not_believed() {
        for body in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x09\x08", b"\x01\0\0\0\x02\x08\x01", b"\0\0\0\0\x01\xff"] {
            assert_eq!(decode(body), None);
        }
        assert_eq!(decode(b"\0\0\0\0\0"), Some(0));
    }
}
