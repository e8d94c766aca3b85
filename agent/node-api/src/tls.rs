//! TLS: the serving certificate and the client CA, read again when their files change.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::Instant;

use crate::backend::User;
use crate::server::{Config, NodeApiError};

/// The files are looked at no more often than this.
const CHECK_PERIOD: Duration = Duration::from_secs(1);

/// What tells one version of a file from another.
type Stamp = Option<(u64, i64, i64, u64)>;

/// The current TLS configuration.
pub(crate) struct ReloadingTls {
    files: [PathBuf; 3],
    stamps: [Stamp; 3],
    checked_at: Instant,
    current: Arc<ServerConfig>,
}

impl ReloadingTls {
    pub fn load(config: &Config) -> Result<Self, NodeApiError> {
        let files = [config.cert_file.clone(), config.key_file.clone(), config.client_ca_file.clone()];
        let stamps = files.each_ref().map(|file| stamp(file));
        let current = Arc::new(build(&files)?);
        Ok(Self { files, stamps, checked_at: Instant::now(), current })
    }

    /// The configuration for a new connection. Files that changed and cannot be used leave the old one in place.
    pub fn current(&mut self) -> Arc<ServerConfig> {
        if self.checked_at.elapsed() >= CHECK_PERIOD {
            self.checked_at = Instant::now();
            let stamps = self.files.each_ref().map(|file| stamp(file));
            if stamps != self.stamps {
                match build(&self.files) {
                    Ok(config) => {
                        self.current = Arc::new(config);
                        tracing::info!("serving certificate and client CA were read again");
                    }
                    Err(error) => tracing::warn!(error = %error, "changed certificates cannot be used, the old stay"),
                }
                self.stamps = stamps;
            }
        }
        self.current.clone()
    }
}

fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

fn build([cert, key, ca]: &[PathBuf; 3]) -> Result<ServerConfig, NodeApiError> {
    let failed = |operation: &str, path: &Path, message: String| NodeApiError::Tls {
        operation: format!("{operation} {}", path.display()),
        message,
    };
    let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, NodeApiError> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        read.map_err(|error| failed("read certificates of", path, error.to_string()))
    };
    let chain = certificates(cert)?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| failed("read key", key, error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for root in certificates(ca)? {
        roots.add(root).map_err(|error| failed("use client CA", ca, error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| failed("use client CA", ca, error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed("set up TLS with", cert, error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key_der)
        .map_err(|error| failed("use certificate", cert, error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Who a verified client certificate names: CN is the user, each O a group.
pub(crate) fn user_of(certificate: &CertificateDer<'_>) -> Option<User> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let subject = parsed.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_string();
    let mut groups: Vec<String> =
        subject.iter_organization().filter_map(|organization| organization.as_str().ok()).map(str::to_string).collect();
    groups.push("system:authenticated".to_string());
    (!name.is_empty()).then_some(User { name, uid: String::new(), groups })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn write_pair(dir: &Path) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["node".to_string()]).unwrap().self_signed(&key).unwrap();
        fs::write(dir.join("key"), key.serialize_pem()).unwrap();
        fs::write(dir.join("cert"), certificate.pem()).unwrap();
        fs::write(dir.join("ca"), certificate.pem()).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn files_that_cannot_be_used_leave_the_old_ones_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        write_pair(dir.path());
        let listen = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            listen,
            cert_file: path("cert"),
            key_file: path("key"),
            client_ca_file: path("ca"),
            debugging: true,
        };
        let mut tls = ReloadingTls::load(&config).unwrap();
        let first = tls.current();
        fs::write(path("cert"), "rubbish").unwrap();
        tokio::time::advance(CHECK_PERIOD).await;
        assert!(Arc::ptr_eq(&tls.current(), &first));
        write_pair(dir.path());
        assert!(Arc::ptr_eq(&tls.current(), &first), "files are not looked at for every connection");
        tokio::time::advance(CHECK_PERIOD).await;
        assert!(!Arc::ptr_eq(&tls.current(), &first));
        fs::write(path("key"), "").unwrap();
        assert!(ReloadingTls::load(&config).is_err());
    }

    #[test]
    fn a_certificate_names_user_and_groups() {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver-kubelet-client");
        params.distinguished_name.push(DnType::OrganizationName, "admins");
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let user = user_of(certificate.der()).unwrap();
        assert_eq!(user.name, "kube-apiserver-kubelet-client");
        assert_eq!(user.groups, ["admins", "system:authenticated"]);
        assert_eq!(user_of(&CertificateDer::from(vec![1, 2, 3])), None);
    }
}
