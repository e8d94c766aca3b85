//! HTTP probes against a small server on loopback.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Answers each connection with the next canned answer; gives the port and what was asked.
async fn serve(answers: Vec<String>) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (asked, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let byte = stream.read_u8().await.unwrap();
                request.push(byte);
            }
            let _ = asked.send(String::from_utf8(request).unwrap());
            let _ = stream.write_all(answer.replace("PORT", &port.to_string()).as_bytes()).await;
        }
    });
    (port, receiver)
}

fn answer(status: &str, more: &str) -> String {
    format!("HTTP/1.1 {status}\r\n{more}content-length: 2\r\n\r\nok")
}

async fn get(port: u16, path: &str, headers: &[(&str, &str)]) -> Attempt {
    let headers: Vec<(String, String)> = headers.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
    let target = Target { tls: false, host: "127.0.0.1", port, path };
    HttpProber::new().get(target, &headers, Duration::from_secs(5)).await
}

#[tokio::test]
async fn two_and_three_hundreds_succeed_and_others_fail() {
    for (status, good) in [("200 OK", true), ("204 No Content", true), ("304 Not Modified", true), ("399 X", true)] {
        let (port, _asked) = serve(vec![answer(status, "")]).await;
        assert_eq!(matches!(get(port, "/", &[]).await, Attempt::Success(_)), good, "{status}");
    }
    for code in ["404", "500", "503"] {
        let (port, _asked) = serve(vec![answer(&format!("{code} X"), "")]).await;
        let message = format!("HTTP probe failed with statuscode: {code}");
        assert_eq!(get(port, "/", &[]).await, Attempt::Failure(message));
    }
}

#[tokio::test]
async fn the_request_is_the_one_that_servers_know() {
    let (port, mut asked) = serve(vec![answer("200 OK", "")]).await;
    get(port, "health z?a=b", &[("X-Custom", "1"), ("Host", "web.local")]).await;
    let request = asked.recv().await.unwrap().to_lowercase();
    assert!(request.starts_with("get /health%20z?a=b http/1.1\r\n"), "{request}");
    for line in ["user-agent: kube-probe/1.36", "accept: */*", "connection: close", "x-custom: 1", "host: web.local"] {
        assert!(request.contains(line), "{line} in {request}");
    }
}

#[tokio::test]
async fn an_own_user_agent_wins_and_an_empty_one_removes_it() {
    let (port, mut asked) = serve(vec![answer("200 OK", ""), answer("200 OK", "")]).await;
    get(port, "/", &[("User-Agent", "mine")]).await;
    assert!(asked.recv().await.unwrap().to_lowercase().contains("user-agent: mine\r\n"));
    get(port, "/", &[("User-Agent", "")]).await;
    assert!(!asked.recv().await.unwrap().to_lowercase().contains("user-agent"));
}

#[tokio::test]
async fn redirects_stay_on_the_host() {
    let (port, mut asked) = serve(vec![answer("302 Found", "location: /there\r\n"), answer("500 No", "")]).await;
    assert!(matches!(get(port, "/", &[]).await, Attempt::Failure(_)));
    asked.recv().await.unwrap();
    assert!(asked.recv().await.unwrap().starts_with("GET /there"));
    let (port, _asked) = serve(vec![answer("302 Found", "location: http://10.255.255.1/\r\n")]).await;
    assert!(
        matches!(get(port, "/", &[]).await, Attempt::Warning(text) if text.starts_with("Probe terminated redirects"))
    );
}

#[tokio::test]
async fn endless_redirects_end() {
    let (port, _asked) = serve(vec![answer("302 Found", "location: /\r\n"); 20]).await;
    assert!(matches!(get(port, "/", &[]).await, Attempt::Failure(m) if m.contains("stopped after 10 redirects")));
}

#[tokio::test]
async fn an_endless_body_is_cut() {
    let body = "x".repeat(100_000);
    let (port, _asked) = serve(vec![format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{body}")]).await;
    assert!(matches!(get(port, "/", &[]).await, Attempt::Success(body) if body.len() == OUTPUT_LIMIT_BYTES));
}

#[tokio::test]
async fn refused_connections_and_bad_headers_are_told() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let message = format!("Get \"http://127.0.0.1:{port}/\": dial tcp 127.0.0.1:{port}: connect: connection refused");
    assert_eq!(get(port, "/", &[]).await, Attempt::Failure(message));
    assert!(matches!(get(port, "/", &[("bad name", "x")]).await, Attempt::Error(_)));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_runs_into_the_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(matches!(get(port, "/", &[]).await, Attempt::Failure(m) if m.contains("context deadline exceeded")));
}

#[tokio::test]
async fn a_hook_takes_any_answer_and_a_server_without_tls() {
    let (port, mut asked) = serve(vec![answer("500 X", "")]).await;
    let get = LifecycleGet { tls: false, host: "127.0.0.1", port, path: "stop", headers: &[] };
    assert_eq!(lifecycle_get(get).await, Ok(()));
    let request = asked.recv().await.unwrap().to_lowercase();
    assert!(request.starts_with("get /stop http/1.1\r\n") && request.contains("user-agent: kube-lifecycle/1.36"));

    // The first connection gets a greeting that it takes for HTTP, the second one asks in plain.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut some = [0; 16];
            let _ = stream.read(&mut some).await;
            let _ = stream.write_all(answer("400 Bad Request", "connection: close\r\n").as_bytes()).await;
        }
    });
    let get = LifecycleGet { tls: true, host: "127.0.0.1", port, path: "/", headers: &[] };
    assert_eq!(lifecycle_get(get).await, Ok(()));
    server.await.unwrap();

    let get = LifecycleGet { tls: false, host: "127.0.0.1", port, path: "/", headers: &[] };
    assert!(lifecycle_get(get).await.unwrap_err().contains("connection refused"));
}
