//! Fetching from registries, through mirrors where configured. What arrives is verified by the callers' digests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use oci_client::client::{BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference as Remote};

use crate::{Auth, ImageError, Reference, RegistryConfig, credentials};

const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const READ_LIMIT: Duration = Duration::from_secs(60);
const MANIFEST_LIMIT: Duration = Duration::from_secs(90);
/// How often one transfer goes on after it broke off; the first few times even without progress.
const RESUMPTIONS_MAX: u32 = 20;
const RESUMPTIONS_FREE: u32 = 2;
const RESUMPTION_PAUSE: Duration = Duration::from_millis(300);

const ACCEPTED: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// A place to fetch one image from: the registry itself or a mirror of it.
#[derive(Clone)]
pub(crate) struct Source {
    client: Client,
    remote: Remote,
    auth: RegistryAuth,
    name: String,
}

/// The places to try for an image, in order.
pub(crate) fn sources(
    config: &RegistryConfig,
    reference: &Reference,
    auth: Option<&Auth>,
) -> Result<Vec<Source>, ImageError> {
    let mut sources = Vec::new();
    for rule in &config.mirrors {
        if rule.registry == reference.registry || rule.registry == "*" {
            for endpoint in &rule.endpoints {
                let known = known(config, bare(endpoint), &reference.repository)?;
                sources.push(source(config, reference, endpoint, known.as_ref())?);
            }
        }
    }
    let known = if auth.is_none() { known(config, &reference.registry, &reference.repository)? } else { None };
    sources.push(source(config, reference, &reference.registry, auth.or(known.as_ref()))?);
    Ok(sources)
}

fn known(config: &RegistryConfig, registry: &str, repository: &str) -> Result<Option<Auth>, ImageError> {
    config.credentials.as_deref().map_or(Ok(None), |file| credentials::find(file, registry, repository))
}

fn bare(endpoint: &str) -> &str {
    let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://")).unwrap_or(endpoint);
    host.trim_end_matches('/')
}

fn source(
    config: &RegistryConfig,
    reference: &Reference,
    endpoint: &str,
    auth: Option<&Auth>,
) -> Result<Source, ImageError> {
    let host = bare(endpoint);
    let explicit = endpoint.starts_with("http://").then_some(true);
    let explicit = explicit.or_else(|| endpoint.starts_with("https://").then_some(false));
    let plain = explicit.unwrap_or_else(|| is_loopback(host) || config.plain_http.iter().any(|known| known == host));
    let remote = match (&reference.digest, &reference.tag) {
        (Some(digest), _) => Remote::with_digest(host.to_owned(), reference.repository.clone(), digest.clone()),
        (None, tag) => {
            let tag = tag.clone().unwrap_or_else(|| "latest".into());
            Remote::with_tag(host.to_owned(), reference.repository.clone(), tag)
        }
    };
    let auth = match auth {
        None => RegistryAuth::Anonymous,
        Some(Auth::Basic { username, password }) => RegistryAuth::Basic(username.clone(), password.clone()),
        Some(Auth::Bearer(token)) => RegistryAuth::Bearer(token.clone()),
    };
    ensure_roots(reference)?;
    let client = Client::try_from(ClientConfig {
        protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
        extra_root_certificates: certificates(config)?,
        connect_timeout: Some(CONNECT_LIMIT),
        read_timeout: Some(READ_LIMIT),
        user_agent: concat!("oarlock/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    })
    .map_err(|error| ImageError::Registry { reference: reference.to_string(), message: error.to_string() })?;
    Ok(Source { client, remote, auth, name: host.to_owned() })
}

/// The client cannot be made at all, not even for plain HTTP, on a machine that knows no certificate authority.
fn ensure_roots(reference: &Reference) -> Result<(), ImageError> {
    static FOUND: AtomicBool = AtomicBool::new(false);
    if FOUND.load(Ordering::Relaxed) || !rustls_native_certs::load_native_certs().certs.is_empty() {
        FOUND.store(true, Ordering::Relaxed);
        return Ok(());
    }
    let message = "this machine has no certificates of authorities; install the package ca-certificates".to_owned();
    Err(ImageError::Registry { reference: reference.to_string(), message })
}

/// Nobody else can listen in or answer there.
fn is_loopback(host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn certificates(config: &RegistryConfig) -> Result<Vec<Certificate>, ImageError> {
    let read = |path: &std::path::PathBuf| {
        let data = std::fs::read(path).map_err(ImageError::io("read", path))?;
        Ok(Certificate { encoding: CertificateEncoding::Pem, data })
    };
    config.ca_files.iter().map(read).collect()
}

impl Source {
    /// The registry's host, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A manifest or index with the digest the registry says it has; by digest where given, else as referred to.
    pub(crate) async fn document(&self, digest: Option<&str>) -> Result<(Bytes, String), ImageError> {
        let remote = match digest {
            Some(digest) => self.remote.clone_with_digest(digest.to_owned()),
            None => self.remote.clone(),
        };
        let fetch = self.client.pull_manifest_raw(&remote, &self.auth, ACCEPTED);
        match tokio::time::timeout(MANIFEST_LIMIT, fetch).await {
            Err(_) => Err(self.failed(format!("{} did not answer in time", self.name))),
            Ok(fetched) => fetched.map_err(|error| self.translate(error)),
        }
    }

    /// A blob as it comes, but for its first `from` bytes. A transfer that breaks off goes on where it was, as long as each try brings it further.
    pub(crate) async fn blob(
        &self,
        digest: &str,
        size_bytes: u64,
        from: u64,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, ImageError> {
        let stream = match from {
            0 => self.whole_blob(digest, size_bytes).await?,
            // There is nothing left to ask for.
            all if all == size_bytes => futures::stream::empty().boxed(),
            from => self.rest_of_blob(digest, size_bytes, from).await?,
        };
        let transfer = Transfer {
            source: self.clone(),
            digest: digest.to_owned(),
            size_bytes,
            stream,
            arrived: from,
            arrived_before: from,
            resumptions: 0,
        };
        Ok(futures::stream::unfold(transfer, |mut transfer| async move {
            transfer.next().await.map(|item| (item, transfer))
        })
        .boxed())
    }

    async fn rest_of_blob(
        &self,
        digest: &str,
        size_bytes: u64,
        offset: u64,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, ImageError> {
        let size = i64::try_from(size_bytes).unwrap_or(i64::MAX);
        let descriptor = OciDescriptor { digest: digest.to_owned(), size, ..OciDescriptor::default() };
        let length = size_bytes.saturating_sub(offset);
        let fetch = self.client.pull_blob_stream_partial(&self.remote, &descriptor, offset, Some(length));
        match tokio::time::timeout(MANIFEST_LIMIT, fetch).await {
            Err(_) => Err(self.failed(format!("{} did not answer in time", self.name))),
            Ok(Ok(BlobResponse::Partial(sized))) => Ok(sized.stream),
            // It cannot do ranges: what is there already comes again and is passed over.
            Ok(Ok(BlobResponse::Full(sized))) => Ok(skip(sized.stream, offset)),
            Ok(Err(error)) => Err(self.translate(error)),
        }
    }

    async fn whole_blob(
        &self,
        digest: &str,
        size_bytes: u64,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, ImageError> {
        let size = i64::try_from(size_bytes).unwrap_or(i64::MAX);
        let descriptor = OciDescriptor { digest: digest.to_owned(), size, ..OciDescriptor::default() };
        let fetch = self.client.pull_blob_stream(&self.remote, &descriptor);
        match tokio::time::timeout(MANIFEST_LIMIT, fetch).await {
            Err(_) => Err(self.failed(format!("{} did not answer in time", self.name))),
            Ok(fetched) => fetched.map(|sized| sized.stream).map_err(|error| self.translate(error)),
        }
    }

    fn failed(&self, message: String) -> ImageError {
        ImageError::Registry { reference: self.remote.to_string(), message }
    }

    fn translate(&self, error: OciDistributionError) -> ImageError {
        use oci_client::errors::OciErrorCode::{Denied, ManifestUnknown, NameUnknown, NotFound, Unauthorized};
        let reference = self.remote.to_string();
        match &error {
            OciDistributionError::ImageManifestNotFoundError(_) => ImageError::NotFound { reference },
            OciDistributionError::ServerError { code: 404, .. } => ImageError::NotFound { reference },
            OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
                ImageError::Denied { reference, message: error.to_string() }
            }
            OciDistributionError::RegistryError { envelope, .. } => {
                let is = |codes: &[oci_client::errors::OciErrorCode]| {
                    envelope.errors.iter().any(|error| codes.contains(&error.code))
                };
                if is(&[ManifestUnknown, NameUnknown, NotFound]) {
                    ImageError::NotFound { reference }
                } else if is(&[Denied, Unauthorized]) {
                    ImageError::Denied { reference, message: error.to_string() }
                } else {
                    self.failed(chain(&error))
                }
            }
            _ => self.failed(chain(&error)),
        }
    }
}

type Blob = BoxStream<'static, std::io::Result<Bytes>>;

/// One blob on its way.
struct Transfer {
    source: Source,
    digest: String,
    size_bytes: u64,
    stream: Blob,
    arrived: u64,
    arrived_before: u64,
    resumptions: u32,
}

impl Transfer {
    async fn next(&mut self) -> Option<std::io::Result<Bytes>> {
        loop {
            let broken = match self.stream.next().await {
                Some(Ok(chunk)) => {
                    self.arrived += chunk.len() as u64;
                    return Some(Ok(chunk));
                }
                None if self.arrived >= self.size_bytes => return None,
                None => std::io::Error::from(std::io::ErrorKind::UnexpectedEof),
                Some(Err(error)) => error,
            };
            // The first two tries are free; a later one must have brought something.
            let stuck = self.resumptions >= RESUMPTIONS_FREE && self.arrived == self.arrived_before;
            if stuck || self.resumptions >= RESUMPTIONS_MAX || self.arrived > self.size_bytes {
                return Some(Err(broken));
            }
            tracing::debug!(digest = %self.digest, arrived = self.arrived, error = %broken, "transfer broke off and goes on");
            self.arrived_before = self.arrived;
            self.resumptions += 1;
            tokio::time::sleep(RESUMPTION_PAUSE).await;
            match self.source.rest_of_blob(&self.digest, self.size_bytes, self.arrived).await {
                Ok(stream) => self.stream = stream,
                Err(error) => return Some(Err(std::io::Error::other(error.to_string()))),
            }
        }
    }
}

fn skip(stream: Blob, bytes: u64) -> Blob {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let rest = stream.map(move |item| {
        item.map(|mut chunk| {
            let passed = left.min(chunk.len());
            left -= passed;
            chunk.split_off(passed)
        })
    });
    rest.boxed()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_and_configured_hosts_only() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.8.0.1", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example.org", "10.0.0.1:5000", "example.org:80", "127.0.0.1.example.org"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
