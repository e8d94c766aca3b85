//! Requests that end on a node or in a pod: logs, exec, attach, port-forward and the proxies.
//!
//! The server checks who may ask, works out where to send it, and then only passes bytes: an upgraded connection goes
//! through untouched in both directions, a failed upgrade is answered and its connection dropped.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, HOST, HeaderName, UPGRADE};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, IpAddr as TlsAddress, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::error::{ApiError, ApiResult};
use crate::wire::{self, Answer, Body, BoxError};
use crate::{Config, Error};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Hop-by-hop fields, which end at this server unless the connection is upgraded.
const HOP_BY_HOP: [&str; 7] =
    ["connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer", "transfer-encoding"];
/// The client's proof of who it is: for this server only.
const CREDENTIALS: [&str; 2] = ["authorization", "cookie"];

/// Where a proxied request goes.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    pub(crate) security: Security,
    /// Path and query, beginning with `/`.
    pub(crate) path: String,
}

/// How the connection to a backend is secured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Security {
    Plain,
    /// TLS without a check of the certificate: pods and services by `https:` name, as upstream.
    Unverified,
    /// The node's port: its certificate is checked and this server shows its own.
    Kubelet,
}

/// Connects to nodes.
pub(crate) struct Kubelets {
    kubelet: TlsConnector,
    unverified: TlsConnector,
}

impl Kubelets {
    pub(crate) fn new(config: &Config) -> Result<Kubelets, Error> {
        let chain = certificates(&config.kubelet_client_cert_file)?;
        let key = PrivateKeyDer::from_pem_file(&config.kubelet_client_key_file)
            .map_err(|error| Error::Key { path: config.kubelet_client_key_file.clone(), detail: error.to_string() })?;
        let mut roots = rustls::RootCertStore::empty();
        for certificate in certificates(&config.kubelet_ca_file)? {
            roots.add(certificate).map_err(|source| Error::Tls { path: config.kubelet_ca_file.clone(), source })?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = |source| Error::Tls { path: config.kubelet_client_cert_file.clone(), source };
        let kubelet = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(tls)?;
        let unverified = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(unverified::AnyCertificate::new(provider)))
            .with_no_client_auth();
        Ok(Kubelets {
            kubelet: TlsConnector::from(Arc::new(kubelet)),
            unverified: TlsConnector::from(Arc::new(unverified)),
        })
    }

    async fn connect(&self, backend: &Backend) -> Result<Box<dyn Stream>, std::io::Error> {
        let tcp = TcpStream::connect(backend.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::IpAddress(TlsAddress::from(backend.address.ip()));
        Ok(match backend.security {
            Security::Plain => Box::new(tcp),
            Security::Unverified => Box::new(self.unverified.connect(name, tcp).await?),
            Security::Kubelet => Box::new(self.kubelet.connect(name, tcp).await?),
        })
    }

    /// Sends a request on and answers what comes back, streaming; an upgrade is joined through.
    pub(crate) async fn forward(
        &self,
        backend: &Backend,
        mut request: Request<Body>,
        stopping: &CancellationToken,
    ) -> ApiResult<Answer> {
        let unreachable = |why: &dyn std::fmt::Display| {
            ApiError::internal(format_args!("error dialing backend: dial tcp {}: {why}", backend.address))
        };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, self.connect(backend)).await;
        let stream = connected.map_err(|_| unreachable(&"i/o timeout"))?.map_err(|error| unreachable(&error))?;
        let upgrade = wants_upgrade(request.headers());
        let client_side = upgrade.then(|| hyper::upgrade::on(&mut request));
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| unreachable(&error))?;
        let stop = stopping.clone();
        tokio::spawn(async move {
            let connection = connection.with_upgrades();
            tokio::select! {
                () = stop.cancelled() => {}
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "connection to a backend ended");
                }
            }
        });
        let outgoing = outgoing(backend, request, upgrade)?;
        let mut response = sender
            .send_request(outgoing)
            .await
            .map_err(|error| ApiError::internal(format_args!("error trying to reach service: {error}")))?;
        match client_side {
            Some(client_side) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                let backend_side = hyper::upgrade::on(&mut response);
                let stop = stopping.clone();
                tokio::spawn(join(client_side, backend_side, stop));
                let (parts, _) = response.into_parts();
                Ok(Response::from_parts(parts, wire::empty()))
            }
            _ => Ok(relayed(response)),
        }
    }
}

/// Anything bytes go through.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Joins two upgraded connections until either ends.
async fn join(client: hyper::upgrade::OnUpgrade, backend: hyper::upgrade::OnUpgrade, stop: CancellationToken) {
    let (client, backend) = match tokio::try_join!(client, backend) {
        Ok(both) => both,
        Err(error) => {
            tracing::debug!(%error, "an upgrade was not completed");
            return;
        }
    };
    let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
    tokio::select! {
        () = stop.cancelled() => {}
        ended = copy_bidirectional(&mut client, &mut backend) => if let Err(error) = ended {
            tracing::debug!(%error, "an upgraded connection broke");
        }
    }
}

fn wants_upgrade(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some()
        && headers.get_all(CONNECTION).iter().any(|value| {
            value.to_str().is_ok_and(|text| text.split(',').any(|one| one.trim().eq_ignore_ascii_case("upgrade")))
        })
}

fn outgoing(backend: &Backend, request: Request<Body>, upgrade: bool) -> ApiResult<Request<Body>> {
    let (parts, body) = request.into_parts();
    let uri: Uri = backend.path.parse().map_err(|_| ApiError::bad_request("the path cannot be sent on"))?;
    let mut outgoing = Request::new(body);
    *outgoing.method_mut() = parts.method;
    *outgoing.uri_mut() = uri;
    let named_by_connection: Vec<HeaderName> = connection_options(&parts.headers);
    for (name, value) in &parts.headers {
        let dropped = CREDENTIALS.contains(&name.as_str())
            || name == HOST
            || name.as_str().starts_with("impersonate-")
            || (!upgrade
                && (HOP_BY_HOP.contains(&name.as_str()) || name == UPGRADE || named_by_connection.contains(name)));
        if !dropped {
            outgoing.headers_mut().append(name, value.clone());
        }
    }
    let host =
        backend.address.to_string().parse().map_err(|_| ApiError::internal("the backend has no usable address"))?;
    outgoing.headers_mut().insert(HOST, host);
    Ok(outgoing)
}

fn connection_options(headers: &HeaderMap) -> Vec<HeaderName> {
    let lines = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).filter_map(|one| one.trim().to_ascii_lowercase().parse().ok()).collect()
}

/// A backend's answer as ours: status, fields and body, without what concerns only its connection.
fn relayed(response: Response<hyper::body::Incoming>) -> Answer {
    let (mut parts, body) = response.into_parts();
    for name in HOP_BY_HOP {
        parts.headers.remove(name);
    }
    Response::from_parts(parts, body.map_err(|error| Box::new(error) as BoxError).boxed_unsync())
}

/// Whether the method is one that proxies pass on.
pub(crate) fn is_proxied_method(method: &Method) -> bool {
    [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::HEAD, Method::OPTIONS]
        .contains(method)
}

/// Reads the certificates of a PEM file, at least one.
pub(crate) fn certificates(path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bad = |detail: String| Error::Certificate { path: path.to_owned(), detail };
    let read = CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))?;
    let chain: Vec<_> = read.collect::<Result<_, _>>().map_err(|error| bad(error.to_string()))?;
    if chain.is_empty() { Err(bad("it holds no certificate".into())) } else { Ok(chain) }
}

mod unverified {
    //! TLS to workloads whose certificates nobody here can check; what upstream does for `https:` proxies.

    use std::sync::Arc;

    use rustls::DigitallySignedStruct;
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
    use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

    #[derive(Debug)]
    pub(super) struct AnyCertificate {
        provider: Arc<CryptoProvider>,
    }

    impl AnyCertificate {
        pub(super) fn new(provider: Arc<CryptoProvider>) -> AnyCertificate {
            AnyCertificate { provider }
        }
    }

    impl ServerCertVerifier for AnyCertificate {
        fn verify_server_cert(
            &self,
            _end_entity: &CertificateDer<'_>,
            _intermediates: &[CertificateDer<'_>],
            _server_name: &ServerName<'_>,
            _ocsp: &[u8],
            _now: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.provider.signature_verification_algorithms.supported_schemes()
        }
    }
}
