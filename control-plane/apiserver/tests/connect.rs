//! Logs, exec and proxies: what reaches a node's server, and that bytes pass through unchanged in both directions.

mod fixture;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use fixture::Fixture;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

fn chain(path: &Path) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_file_iter(path).expect("a file").collect::<Result<_, _>>().expect("certificates")
}

fn roots(dir: &Path) -> rustls::RootCertStore {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in chain(&dir.join("pki/ca.crt")) {
        roots.add(certificate).expect("an authority");
    }
    roots
}

/// A node's server that speaks just enough HTTP: `/exec` upgrades and echoes in upper case, `/containerLogs` sends two
/// lines and waits for a third to be allowed, anything else is refused. Says what it was asked.
async fn fake_kubelet(dir: &Path, asked: mpsc::Sender<String>, go_on: Arc<tokio::sync::Notify>) -> SocketAddr {
    let authority = oarlock_pki::Authority::ensure(&dir.join("pki"), "dev-ca").expect("an authority");
    let identity = authority
        .ensure_identity(
            "kubelet",
            &oarlock_pki::Request {
                common_name: "system:node:n1".into(),
                organizations: Vec::new(),
                dns_names: Vec::new(),
                addresses: vec!["127.0.0.1".parse().expect("an address")],
                usage: oarlock_pki::Usage::Server,
            },
        )
        .expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots(dir)), provider.clone())
        .build()
        .expect("a verifier");
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(&identity.cert_file), PrivateKeyDer::from_pem_file(&identity.key_file).expect("a key"))
        .expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, asked, go_on) = (acceptor.clone(), asked.clone(), go_on.clone());
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(BufReader::new(stream), asked, go_on).await;
                }
            });
        }
    });
    address
}

async fn serve<S>(mut stream: BufReader<S>, asked: mpsc::Sender<String>, go_on: Arc<tokio::sync::Notify>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let line = head.lines().next().unwrap_or_default().to_owned();
    let secret = if head.to_ascii_lowercase().contains("authorization:") { " WITH CREDENTIALS" } else { "" };
    let _ = asked.send(format!("{line}{secret}")).await;
    if line.contains("/exec/work/p/c") {
        let _ = stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: SPDY/3.1\r\nConnection: Upgrade\r\n\r\n")
            .await;
        let mut buffer = [0; 64];
        while let Ok(length @ 1..) = stream.read(&mut buffer).await {
            let _ = stream.write_all(&buffer[..length].to_ascii_uppercase()).await;
        }
    } else if line.contains("/containerLogs/") {
        let head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n";
        let _ = stream.write_all(head).await;
        let _ = stream.write_all(b"4\r\none\n\r\n4\r\ntwo\n\r\n").await;
        go_on.notified().await;
        let _ = stream.write_all(b"6\r\nthree\n\r\n0\r\n\r\n").await;
    } else {
        let _ = stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno\n").await;
    }
}

struct World {
    fixture: Fixture,
    asked: mpsc::Receiver<String>,
    go_on: Arc<tokio::sync::Notify>,
}

/// A pod `work/p` with container `c` on node n1, whose server is a fake.
async fn world() -> World {
    let fixture = Fixture::new().await;
    fixture.namespace("work").await;
    let (sender, asked) = mpsc::channel(16);
    let go_on = Arc::new(tokio::sync::Notify::new());
    let address = fake_kubelet(fixture.dir.path(), sender, go_on.clone()).await;
    let api = &fixture.admin;
    api.post("/api/v1/nodes", &json!({"metadata": {"name": "n1"}})).await.ok();
    let status = json!({"status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": address.port()}}}});
    api.patch("/api/v1/nodes/n1/status", "application/merge-patch+json", &status).await.ok();
    let pod =
        json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}});
    api.post("/api/v1/namespaces/work/pods", &pod).await.ok();
    World { fixture, asked, go_on }
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

/// A raw connection to the API server with the administrator's certificate.
async fn dial(dir: &Path, address: SocketAddr) -> BufReader<Tls> {
    let identity = fixture::client_identity(dir, "kubernetes-admin", &["system:masters"]).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(&identity.key_file).expect("a key");
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots(dir))
        .with_client_auth_cert(chain(&identity.cert_file), key)
        .expect("a configuration");
    let stream = TcpStream::connect(address).await.expect("connects");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    BufReader::new(connector.connect(name, stream).await.expect("shakes hands"))
}

async fn read_head(stream: &mut BufReader<Tls>) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(stream.read_line(&mut head).await.expect("reads"), 0, "the connection ended: {head}");
    }
    head
}

fn upgrade(path: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\n\
         X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    )
}

#[tokio::test]
async fn an_exec_session_passes_through_byte_for_byte() {
    let mut world = world().await;
    let address = world.fixture.server.local_addr();
    let dir = world.fixture.dir;
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(world.fixture.server.run(shutdown.clone()));
    let mut stream = dial(dir.path(), address).await;
    let path = "/api/v1/namespaces/work/pods/p/exec?command=sh&command=-c%20x&stdin=true&stdout=true&tty=true";
    stream.write_all(upgrade(path).as_bytes()).await.expect("writes");
    let head = read_head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert_eq!(
        world.asked.recv().await.expect("asked"),
        "POST /exec/work/p/c?input=1&output=1&tty=1&command=sh&command=-c%20x HTTP/1.1"
    );
    for word in [&b"hello"[..], b"world"] {
        stream.write_all(word).await.expect("writes");
        let mut echo = vec![0; word.len()];
        stream.read_exact(&mut echo).await.expect("reads");
        assert_eq!(echo, word.to_ascii_uppercase());
    }
    shutdown.cancel();
    running.await.expect("no panic").expect("stops");
}

#[tokio::test]
async fn a_refused_upgrade_is_relayed() {
    let world = world().await;
    let address = world.fixture.server.local_addr();
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(world.fixture.server.run(shutdown.clone()));
    let mut stream = dial(world.fixture.dir.path(), address).await;
    let path = "/api/v1/namespaces/work/pods/p/portforward";
    stream.write_all(upgrade(path).as_bytes()).await.expect("writes");
    let head = read_head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    shutdown.cancel();
    running.await.expect("no panic").expect("stops");
}

#[tokio::test]
async fn logs_arrive_while_they_are_written() {
    use http_body_util::BodyExt;
    let mut world = world().await;
    let path = "/api/v1/namespaces/work/pods/p/log?follow=true&tailLines=5";
    let request = http::Request::get(path).header("authorization", "Bearer secret");
    let request = request.body(kube::client::Body::empty()).expect("a request");
    let response = world.fixture.admin.client.send(request).await.expect("an answer");
    assert_eq!(response.status(), 200);
    let asked = world.asked.recv().await.expect("asked");
    assert_eq!(asked, "GET /containerLogs/work/p/c?follow=true&tailLines=5 HTTP/1.1", "and no credentials went along");
    let mut body = response.into_body();
    let mut text = String::new();
    while !text.ends_with("two\n") {
        let frame = body.frame().await.expect("more").expect("holds");
        text.push_str(&String::from_utf8_lossy(frame.data_ref().expect("data")));
    }
    world.go_on.notify_one();
    let rest = body.collect().await.expect("the rest").to_bytes();
    assert_eq!(text + &String::from_utf8_lossy(&rest), "one\ntwo\nthree\n");
}

#[tokio::test]
async fn what_cannot_be_reached_is_said_plainly() {
    let world = world().await;
    let api = &world.fixture.admin;
    let pods = "/api/v1/namespaces/work/pods";
    let pod = json!({"metadata": {"name": "waiting"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    api.post(pods, &pod).await.ok();
    let unscheduled = api.get(&format!("{pods}/waiting/log")).await;
    assert_eq!((unscheduled.code, unscheduled.message()), (400, "pod waiting does not have a host assigned"));
    assert_eq!(api.get(&format!("{pods}/none/log")).await.code, 404);
    let wrong = api.get(&format!("{pods}/p/log?container=x")).await;
    assert_eq!((wrong.code, wrong.message()), (400, "container x is not valid for pod p"));
    let nothing = api.get(&format!("{pods}/p/exec?command=sh")).await;
    assert_eq!((nothing.code, nothing.message()), (400, "you must specify at least 1 of stdin, stdout, stderr"));
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}});
    api.post("/api/v1/namespaces/work/services", &service).await.ok();
    let empty = api.get("/api/v1/namespaces/work/services/s/proxy/").await;
    assert_eq!((empty.code, empty.message()), (503, "no endpoints available for service \"s\""));
    let refused = api.get("/api/v1/nodes/n1/proxy/stats").await;
    assert_eq!((refused.code, refused.body), (403, json!("no\n")));
    let gone = json!({"status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 1}}}});
    api.patch("/api/v1/nodes/n1/status", "application/merge-patch+json", &gone).await.ok();
    let unreachable = api.get(&format!("{pods}/p/log")).await;
    assert_eq!(unreachable.code, 500);
    assert!(unreachable.message().contains("error dialing backend: dial tcp 127.0.0.1:1"), "{}", unreachable.message());
}

#[tokio::test]
async fn a_viewer_may_read_logs_but_not_exec() {
    let world = world().await;
    let binding = json!({
        "metadata": {"name": "v"}, "subjects": [{"kind": "User", "name": "alice"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
    });
    world.fixture.admin.post("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await.ok();
    let alice = world.fixture.as_user("alice", &[]);
    world.go_on.notify_one();
    assert_eq!(alice.get("/api/v1/namespaces/work/pods/p/log").await.code, 200);
    assert_eq!(alice.get("/api/v1/namespaces/work/pods/p/exec?command=sh&stdout=1").await.code, 403);
    let reader = json!({
        "metadata": {"name": "get-exec"}, "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods/exec"]}]});
    world.fixture.admin.post("/apis/rbac.authorization.k8s.io/v1/clusterroles", &reader).await.ok();
    let mut binding = binding;
    binding["metadata"]["name"] = "w".into();
    binding["roleRef"]["name"] = "get-exec".into();
    world.fixture.admin.post("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await.ok();
    let refused = alice.get("/api/v1/namespaces/work/pods/p/exec?command=sh&stdout=1").await;
    assert_eq!(refused.code, 403, "a WebSocket opens with GET, yet to exec is to create");
    assert!(refused.message().contains("cannot create resource \"pods/exec\""), "{}", refused.message());
}
