//! The whole server over TLS on loopback: who may do what, and what each path answers.

use std::collections::HashSet;
use std::fs;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use k8s_openapi::api::core::v1::Pod;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::backend::{ContainerRef, ExecRequest, LogFile, MetricsPage, NodeError, PodList, PortForwardRequest};

struct Fake {
    dir: PathBuf,
    streaming: String,
    asked: Mutex<Vec<String>>,
}

#[async_trait]
impl NodeBackend for Fake {
    async fn pods(&self) -> PodList {
        PodList { items: vec![Pod::default()], metadata: Default::default() }
    }
    async fn running_pods(&self) -> PodList {
        PodList::default()
    }
    async fn container_log_path(&self, ns: &str, pod: &str, c: &str, previous: bool) -> Result<LogFile, NodeError> {
        if previous {
            return Err(NodeError::BadRequest(format!("previous terminated container {c:?} in pod {pod:?} not found")));
        }
        let path = self.dir.join(format!("{ns}_{pod}_u/{c}/0.log"));
        Ok(LogFile { path, running: watch::Sender::new(false).subscribe() })
    }
    async fn exec_url(&self, request: ExecRequest) -> Result<String, NodeError> {
        self.asked.lock().unwrap().push(format!("{:?} tty={}", request.command, request.tty));
        Ok(self.streaming.clone())
    }
    async fn attach_url(&self, _request: ExecRequest) -> Result<String, NodeError> {
        Err(NodeError::NotFound("container not found (\"c\")".into()))
    }
    async fn port_forward_url(&self, _request: PortForwardRequest) -> Result<String, NodeError> {
        Ok("http://127.0.0.1:1/nobody".into())
    }
    async fn run_in_container(&self, request: ExecRequest) -> Result<Vec<u8>, NodeError> {
        Ok(request.command.join("|").into_bytes())
    }
    async fn stats_summary(&self) -> Value {
        json!({"node": {"nodeName": "n", "fs": {}}, "pods": []})
    }
    async fn metrics(&self, page: MetricsPage) -> String {
        format!("{page:?} 1\n")
    }
    async fn configz(&self) -> Value {
        json!({"kubeletconfig": {}})
    }
    async fn checkpoint(&self, target: ContainerRef, timeout: Duration) -> Result<Vec<String>, NodeError> {
        let ContainerRef { namespace, pod, container, .. } = target;
        Ok(vec![format!("/checkpoints/{namespace}-{pod}-{container}-{}.tar", timeout.as_secs())])
    }
}

/// Allows `nodes/<subresource>` by verb to users by name; knows one token.
struct Rules(HashSet<(&'static str, &'static str, &'static str)>);

#[async_trait]
impl Authorizer for Rules {
    async fn authenticate_token(&self, token: &str) -> Option<User> {
        (token == "good").then(|| User { name: "robot".into(), ..Default::default() })
    }
    async fn authorize(&self, user: &User, verb: &str, subresource: &str) -> bool {
        let in_group = user.groups.iter().any(|group| group == "masters");
        in_group || self.0.iter().any(|rule| *rule == (user.name.as_str(), verb, subresource))
    }
}

struct Authority {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
}

fn authority() -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "ca");
    let pem = params.self_signed(&key).unwrap().pem();
    Authority { params, key, pem }
}

impl Authority {
    /// A certificate and key in PEM.
    fn issue(&self, name: &str, group: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_string()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![usage];
        let issuer = Issuer::from_params(&self.params, &self.key);
        (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
    }
}

struct Bench {
    dir: tempfile::TempDir,
    authority: Authority,
    address: SocketAddr,
    fake: Arc<Fake>,
    shutdown: CancellationToken,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

async fn bench(rules: &[(&'static str, &'static str, &'static str)], streaming: &str) -> Bench {
    bench_with(rules, streaming, true).await
}

async fn bench_with(rules: &[(&'static str, &'static str, &'static str)], streaming: &str, debugging: bool) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority();
    let (cert, key) = authority.issue("node", "nodes", ExtendedKeyUsagePurpose::ServerAuth);
    let path = |name: &str| dir.path().join(name);
    fs::write(path("cert"), cert).unwrap();
    fs::write(path("key"), key).unwrap();
    fs::write(path("ca"), &authority.pem).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = Config {
        listen: address,
        cert_file: path("cert"),
        key_file: path("key"),
        client_ca_file: path("ca"),
        debugging,
    };
    let fake =
        Arc::new(Fake { dir: dir.path().to_path_buf(), streaming: streaming.to_string(), asked: Mutex::default() });
    let api = NodeApi::new(config, fake.clone(), Arc::new(Rules(rules.iter().copied().collect())));
    let shutdown = CancellationToken::new();
    tokio::spawn(api.serve(listener, shutdown.clone()));
    Bench { dir, authority, address, fake, shutdown }
}

impl Bench {
    async fn connect(&self, identity: Option<(String, String)>) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(roots);
        let config = match identity {
            Some((cert, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        let stream = TcpStream::connect(self.address).await?;
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
    }

    fn admin(&self) -> Option<(String, String)> {
        Some(self.authority.issue("admin", "masters", ExtendedKeyUsagePurpose::ClientAuth))
    }

    async fn ask(&self, as_admin: bool, method: &str, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
        let identity = if as_admin { self.admin() } else { None };
        let stream = self.connect(identity).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "n");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        self.ask(true, "GET", path, &[]).await
    }
}

#[tokio::test]
async fn without_debugging_handlers_nobody_gets_into_containers() {
    let bench = bench_with(&[], "", false).await;
    for path in ["/exec/shop/web/c?command=id", "/containerLogs/shop/web/c", "/runningpods/", "/portForward/shop/web"] {
        let answer = bench.ask(true, "GET", path, &[]).await;
        assert_eq!(answer, (405, "Debug endpoints are disabled.".to_owned()), "{path}");
    }
    assert_eq!(bench.ask(true, "GET", "/pods", &[]).await.0, 200);
}

#[tokio::test]
async fn nobody_without_a_name_gets_anything() {
    let bench = bench(&[], "").await;
    for path in ["/healthz", "/pods", "/metrics", "/exec/a/b/c", "/nope"] {
        assert_eq!(bench.ask(false, "GET", path, &[]).await.0, 401, "{path}");
        assert_eq!(bench.ask(false, "GET", path, &[("authorization", "Bearer bad")]).await.0, 401, "{path}");
    }
}

#[tokio::test]
async fn certificates_of_others_are_refused() {
    let bench = bench(&[], "").await;
    let stranger = authority().issue("admin", "masters", ExtendedKeyUsagePurpose::ClientAuth);
    let outcome = async {
        let mut stream = bench.connect(Some(stranger)).await?;
        stream.write_all(b"GET /pods HTTP/1.1\r\nhost: n\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.map(|_| answer)
    };
    assert!(outcome.await.map_or(true, |answer| answer.is_empty()));
}

#[tokio::test]
async fn tokens_get_what_their_rules_give() {
    let rules = [("robot", "get", "metrics"), ("robot", "get", "proxy"), ("robot", "get", "stats")];
    let bench = bench(&rules, "").await;
    let headers = [("authorization", "Bearer good")];
    let cases = [
        ("GET", "/metrics", 200),
        ("GET", "/metrics/resource", 200),
        ("GET", "/stats/summary", 200),
        ("GET", "/pods", 200),
        ("GET", "/healthz", 200),
        ("POST", "/run/a/b/c?cmd=ls", 403),
        // Reading is not running: a WebSocket exec is a GET.
        ("GET", "/exec/a/b/c?command=ls&output=1", 403),
        ("GET", "/attach/a/b/c?output=1", 403),
        ("GET", "/portForward/a/b", 403),
        ("POST", "/checkpoint/a/b/c", 403),
    ];
    for (method, path, status) in cases {
        assert_eq!(bench.ask(false, method, path, &headers).await.0, status, "{method} {path}");
    }
}

#[tokio::test]
async fn every_page_answers() {
    let bench = bench(&[], "").await;
    assert_eq!(bench.get("/healthz").await, (200, "ok".into()));
    let (_, pods) = bench.get("/pods").await;
    let pods: Value = serde_json::from_str(&pods).unwrap();
    assert_eq!((&pods["kind"], &pods["apiVersion"]), (&json!("PodList"), &json!("v1")));
    assert_eq!(bench.get("/metrics/cadvisor").await.1, "CAdvisor 1\n");
    assert_eq!(bench.get("/metrics/probes").await.1, "Probes 1\n");
    assert!(bench.get("/configz").await.1.contains("kubeletconfig"));
    assert!(!bench.get("/stats/summary?only_cpu_and_memory=true").await.1.contains("fs"));
    assert_eq!(bench.ask(true, "POST", "/run/a/b/c?cmd=ls%20-l", &[]).await, (200, "ls|-l".into()));
    let made = bench.ask(true, "POST", "/checkpoint/a/b/c?timeout=7", &[]).await;
    assert_eq!(made, (200, r#"{"items":["/checkpoints/a-b-c-7.tar"]}"#.into()));
    assert_eq!(bench.ask(true, "POST", "/checkpoint/a/b/c?timeout=-1", &[]).await.0, 400);
    assert_eq!(bench.get("/nope").await.0, 404);
    assert_eq!(bench.get("/run/a/b/c").await.0, 405);
}

#[tokio::test]
async fn logs_are_read_with_their_options() {
    let bench = bench(&[], "").await;
    let dir = bench.dir.path().join("shop_web_u/c");
    fs::create_dir_all(&dir).unwrap();
    let lines: String = (0..9).map(|n| format!("2026-01-01T00:00:0{n}Z stdout F line {n}\n")).collect();
    fs::write(dir.join("0.log"), lines).unwrap();
    assert_eq!(bench.get("/containerLogs/shop/web/c?tailLines=2").await, (200, "line 7\nline 8\n".into()));
    let (_, text) = bench.get("/containerLogs/shop/web/c?tailLines=1&timestamps=true&follow=true").await;
    assert_eq!(text, "2026-01-01T00:00:08Z line 8\n");
    assert_eq!(bench.get("/containerLogs/shop/web/c?tailLines=-1").await.0, 400);
    assert_eq!(bench.get("/containerLogs/shop/web/gone").await.0, 404);
    let (status, text) = bench.get("/containerLogs/shop/web/c?previous=true").await;
    assert_eq!((status, &*text), (400, "previous terminated container \"c\" in pod \"web\" not found"));
}

/// A streaming server that answers its one request with `head` and then echoes; gives its URL and what it was sent.
async fn streaming(head: &'static str) -> (String, tokio::sync::oneshot::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/exec/token", listener.local_addr().unwrap());
    let (asked, receiver) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
        let _ = asked.send(String::from_utf8(request).unwrap());
        stream.write_all(head.as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = write.write_all(b" bye").await;
        let _ = write.shutdown().await;
    });
    (url, receiver)
}

const UPGRADE: &str = "POST /exec/shop/web/c?command=sh&command=-c&input=1&output=1&tty=1 HTTP/1.1\r\nhost: n\r\n\
    connection: Upgrade\r\nupgrade: SPDY/3.1\r\nx-stream-protocol-version: v4.channel.k8s.io\r\n\
    authorization: Bearer secret\r\n\r\n";

/// Reads up to the empty line.
async fn head(stream: &mut TlsStream<TcpStream>) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap().to_lowercase()
}

#[tokio::test]
async fn an_upgrade_is_relayed_both_ways_with_half_close() {
    let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\n\
        x-stream-protocol-version: v4.channel.k8s.io\r\n\r\nearly ";
    let (url, asked) = streaming(answer).await;
    let bench = bench(&[], &url).await;
    let mut stream = bench.connect(bench.admin()).await.unwrap();
    stream.write_all(UPGRADE.as_bytes()).await.unwrap();
    let head = head(&mut stream).await;
    assert!(head.starts_with("http/1.1 101") && head.contains("x-stream-protocol-version: v4.channel.k8s.io"));
    stream.write_all(b"to and fro").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "early to and fro bye");
    let asked = asked.await.unwrap().to_lowercase();
    assert!(asked.starts_with("post /exec/token http/1.1\r\n") && asked.contains("upgrade: spdy/3.1"), "{asked}");
    assert!(!asked.contains("secret"), "credentials are not passed on");
    assert_eq!(bench.fake.asked.lock().unwrap()[0], "[\"sh\", \"-c\"] tty=true");
}

#[tokio::test]
async fn a_refused_upgrade_is_told_and_closes_both_connections() {
    let (url, _asked) = streaming("HTTP/1.1 403 Forbidden\r\ncontent-length: 4\r\n\r\nno!\n").await;
    let bench = bench(&[], &url).await;
    let mut stream = bench.connect(bench.admin()).await.unwrap();
    stream.write_all(UPGRADE.as_bytes()).await.unwrap();
    // A second request on the same connection must not reach anybody.
    stream.write_all(b"GET /pods HTTP/1.1\r\nhost: n\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403") && answer.ends_with("no!\n"), "{answer}");
}

#[tokio::test]
async fn upgrades_that_cannot_be_are_told() {
    let bench = bench(&[], "").await;
    let headers = [("connection", "Upgrade"), ("upgrade", "websocket")];
    assert_eq!(bench.ask(true, "GET", "/exec/a/b/c?command=ls&output=1", &[]).await.0, 400);
    assert_eq!(bench.ask(true, "GET", "/exec/a/b/c?output=1", &headers).await.0, 400);
    assert_eq!(bench.ask(true, "GET", "/exec/a/b/c?command=ls", &headers).await.0, 400);
    assert_eq!(bench.ask(true, "GET", "/attach/a/b/c?output=1", &headers).await.0, 404);
    assert_eq!(bench.ask(true, "GET", "/portForward/a/b", &headers).await.0, 503);
}

#[tokio::test]
async fn a_changed_certificate_is_served_without_a_restart() {
    let bench = bench(&[], "").await;
    let serial = |stream: &TlsStream<TcpStream>| stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    let before = serial(&bench.connect(None).await.unwrap());
    let (cert, key) = bench.authority.issue("node", "nodes", ExtendedKeyUsagePurpose::ServerAuth);
    fs::write(bench.dir.path().join("key"), key).unwrap();
    fs::write(bench.dir.path().join("cert"), cert).unwrap();
    let changed = async {
        loop {
            if serial(&bench.connect(None).await.unwrap()) != before {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), changed).await.expect("the new certificate");
}
