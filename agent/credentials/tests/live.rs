//! A client whose certificate changes while it is used, against a TLS server that asks for certificates.

use std::sync::Arc;

use oarlock_credentials::{Current, LiveClient, Store};
use oarlock_pki::{Authority, Request, Usage};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

fn server_config(authority: &Authority) -> Arc<ServerConfig> {
    let request = Request {
        common_name: "server".into(),
        organizations: Vec::new(),
        dns_names: vec!["localhost".into()],
        addresses: vec!["127.0.0.1".parse().unwrap()],
        usage: Usage::Server,
    };
    let identity = authority.ensure_identity("server", &request).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority.certificate_file()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let chain = vec![CertificateDer::from_pem_file(&identity.cert_file).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&identity.key_file).unwrap();
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap())
}

/// Answers every request with the user of the client's certificate; `/slow` only once it is told to.
async fn serve(listener: TcpListener, acceptor: TlsAcceptor, go: Arc<Notify>, began: Arc<Notify>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, go, began) = (acceptor.clone(), go.clone(), began.clone());
        tokio::spawn(async move {
            let mut stream = acceptor.accept(stream).await.unwrap();
            let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
            let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
            let user = parsed.subject().iter_common_name().next().unwrap().as_str().unwrap().to_owned();
            let mut head = Vec::new();
            while let Ok(byte) = stream.read_u8().await {
                head.push(byte);
                if head.ends_with(b"\r\n\r\n") {
                    if head.starts_with(b"GET /slow") {
                        began.notify_one();
                        go.notified().await;
                    }
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{user}", user.len());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    head.clear();
                }
            }
        });
    }
}

fn identity(authority: &Authority, store: &Store, user: &str) -> Current {
    let key = store.pending_key().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, user);
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    let made = authority.sign(&pem, &["client auth".to_owned()], std::time::Duration::from_secs(600)).unwrap();
    store.take(&made, &key).unwrap()
}

async fn ask(client: &kube::Client, path: &str) -> String {
    client.request_text(http::Request::get(path).body(Vec::new()).unwrap()).await.unwrap()
}

#[tokio::test]
async fn requests_under_way_go_on_and_new_ones_carry_the_new_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::ensure(dir.path(), "ca").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (go, began) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    tokio::spawn(serve(listener, TlsAcceptor::from(server_config(&authority)), go.clone(), began.clone()));
    let mut config = kube::Config::new(format!("https://{address}").parse().unwrap());
    config.root_cert = Some(vec![CertificateDer::from_pem_file(authority.certificate_file()).unwrap().to_vec()]);
    let store = Store::new(dir.path(), "client");
    let first = LiveClient::client_as(&config, &identity(&authority, &store, "first")).unwrap();
    let live = LiveClient::new(config, first);
    let client = live.client();
    assert_eq!(ask(&client, "/").await, "first");
    let slow = tokio::spawn({
        let client = client.clone();
        async move { ask(&client, "/slow").await }
    });
    began.notified().await;
    live.change(&identity(&authority, &store, "second")).unwrap();
    assert_eq!(ask(&client, "/").await, "second", "without a restart");
    go.notify_one();
    assert_eq!(slow.await.unwrap(), "first", "what had begun is not cut off");
}
