//! Getting and replacing the node's certificates, against a fake API server with a signer that gives short lives.

mod fakes;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fakes::api::FakeApi;
use fakes::node::Node;
use oarlock_credentials::{Purpose, Rotation, Store};
use oarlock_pki::{Asked, Authority};
use serde_json::{Value, json};

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests/";

fn requests(api: &FakeApi) -> Vec<Value> {
    api.all(REQUESTS)
}

/// Signs every request that has no answer yet.
fn sign(api: &FakeApi, authority: &Authority, life: Duration) -> usize {
    let mut signed = 0;
    for mut request in requests(api).into_iter().filter(|request| request["status"]["certificate"].is_null()) {
        let pem = STANDARD.decode(request["spec"]["request"].as_str().expect("a request")).expect("base64");
        let pem = String::from_utf8(pem).expect("PEM");
        let asked = Asked::read(&pem).expect("a good request");
        assert_eq!((asked.common_name.as_str(), asked.organizations.len()), ("system:node:node-1", 1));
        let usages: Vec<String> = serde_json::from_value(request["spec"]["usages"].clone()).expect("usages");
        let certificate = authority.sign(&pem, &usages, life).expect("signed");
        request["status"] = json!({"certificate": STANDARD.encode(certificate)});
        let name = request["metadata"]["name"].as_str().expect("a name").to_owned();
        api.put(&format!("{REQUESTS}{name}"), request);
        signed += 1;
    }
    signed
}

fn rotation(dir: &Path) -> Rotation {
    Rotation { store: Store::new(dir, "kubelet-client"), node_name: "node-1".into(), purpose: Purpose::Client }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let reached = fakes::reached(condition);
    assert!(reached.await, "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_finds_its_request_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::ensure(&dir.path().join("ca"), "ca").expect("an authority");
    let api = FakeApi::new();
    let (client, own) = (api.client(), rotation(dir.path()));
    let first = tokio::spawn({
        let (client, own) = (client.clone(), own.clone());
        async move { own.obtain(&client).await }
    });
    until("a request", || requests(&api).len() == 1).await;
    first.abort();
    let second = tokio::spawn(async move { own.obtain(&client).await });
    tokio::task::yield_now().await;
    sign(&api, &authority, Duration::from_secs(600));
    let current = second.await.expect("it ends").expect("a certificate");
    assert_eq!(requests(&api).len(), 1, "nothing is asked for twice");
    let kept = rotation(dir.path()).store.current().expect("it is on disk");
    assert_eq!(kept.pem, current.pem);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_request_is_followed_by_one_with_another_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let api = FakeApi::new();
    let (client, own) = (api.client(), rotation(dir.path()));
    let asking = tokio::spawn({
        let (client, own) = (client.clone(), own.clone());
        async move { own.obtain(&client).await }
    });
    until("a request", || requests(&api).len() == 1).await;
    let mut request = requests(&api).remove(0);
    request["status"] =
        json!({"conditions": [{"type": "Denied", "status": "True", "reason": "No", "message": "not you"}]});
    let name = request["metadata"]["name"].as_str().expect("a name").to_owned();
    api.put(&format!("{REQUESTS}{name}"), request);
    let refused = asking.await.expect("it ends").expect_err("refused").to_string();
    assert!(refused.ends_with("was refused: No: not you"), "{refused}");
    tokio::spawn(async move { own.obtain(&client).await });
    until("another request", || requests(&api).len() == 2).await;
}

/// The certificate that the node's API serves with.
async fn served(address: SocketAddr, authority: &Authority) -> Option<Vec<u8>> {
    use rustls::pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    let root = rustls::pki_types::CertificateDer::from_pem_file(authority.certificate_file()).expect("a root");
    roots.add(root).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(address).await.ok()?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = rustls::pki_types::ServerName::from(address.ip());
    let stream = connector.connect(name, stream).await.ok()?;
    stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).map(|certificate| certificate.to_vec())
}

const PORT: u16 = 31_250;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_serving_certificate_is_replaced_while_the_node_serves() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::ensure(dir.path(), "ca").expect("an authority");
    let node = Node::start_with(&[], |config| {
        config.server_tls_bootstrap = true;
        config.listen = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
    })
    .await;
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
    let mut seen: Vec<Vec<u8>> = Vec::new();
    let found = tokio::time::timeout(Duration::from_secs(60), async {
        while seen.len() < 3 {
            sign(&node.api, &authority, Duration::from_secs(4));
            // Only certificates that the authority has signed and that are good now are accepted here.
            if let Some(certificate) = served(address, &authority).await
                && !seen.contains(&certificate)
            {
                seen.push(certificate);
            }
            tokio::task::yield_now().await;
        }
    });
    assert!(found.await.is_ok(), "{} certificates were served", seen.len());
}
