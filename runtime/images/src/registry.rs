//! Fetching from registries, through mirrors where configured. What arrives is verified by the callers' digests.

use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference as Remote};

use crate::{Auth, ImageError, Reference, RegistryConfig};

const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const READ_LIMIT: Duration = Duration::from_secs(60);
const MANIFEST_LIMIT: Duration = Duration::from_secs(90);

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
                sources.push(source(config, reference, endpoint, None)?);
            }
        }
    }
    sources.push(source(config, reference, &reference.registry, auth)?);
    Ok(sources)
}

fn source(
    config: &RegistryConfig,
    reference: &Reference,
    endpoint: &str,
    auth: Option<&Auth>,
) -> Result<Source, ImageError> {
    let (host, explicit) = match (endpoint.strip_prefix("http://"), endpoint.strip_prefix("https://")) {
        (Some(host), _) => (host, Some(true)),
        (_, Some(host)) => (host, Some(false)),
        _ => (endpoint, None),
    };
    let host = host.trim_end_matches('/');
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
    let client = Client::new(ClientConfig {
        protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
        extra_root_certificates: certificates(config)?,
        connect_timeout: Some(CONNECT_LIMIT),
        read_timeout: Some(READ_LIMIT),
        user_agent: concat!("oarlock/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    });
    Ok(Source { client, remote, auth, name: host.to_owned() })
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

    /// A blob as it comes.
    pub(crate) async fn blob(
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
