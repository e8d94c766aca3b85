//! The serving certificate, read again when its file changes, so that renewing it needs no restart.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject;

use crate::kubelet::certificates;
use crate::{Config, Error};

/// The files are looked at no more often than this.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

struct Loaded {
    key: Arc<CertifiedKey>,
    modified: Option<SystemTime>,
    looked: Instant,
}

/// Gives each handshake the certificate that is on disk.
pub(crate) struct ServingCertificate {
    cert_file: PathBuf,
    key_file: PathBuf,
    loaded: Mutex<Loaded>,
}

impl ServingCertificate {
    pub(crate) fn load(config: &Config) -> Result<ServingCertificate, Error> {
        let (cert_file, key_file) = (config.cert_file.clone(), config.key_file.clone());
        let modified = modified(&cert_file);
        let key = read(&cert_file, &key_file)?;
        let loaded = Mutex::new(Loaded { key, modified, looked: Instant::now() });
        Ok(ServingCertificate { cert_file, key_file, loaded })
    }

    fn current(&self) -> Arc<CertifiedKey> {
        let mut loaded = self.loaded.lock();
        if loaded.looked.elapsed() >= LOOK_INTERVAL {
            loaded.looked = Instant::now();
            self.look(&mut loaded);
        }
        loaded.key.clone()
    }

    fn look(&self, loaded: &mut Loaded) {
        let now = modified(&self.cert_file);
        if now == loaded.modified {
            return;
        }
        // A certificate and key that do not belong together yet are looked at again next time.
        match read(&self.cert_file, &self.key_file) {
            Ok(key) => {
                loaded.key = key;
                loaded.modified = now;
                tracing::info!(path = %self.cert_file.display(), "the serving certificate was read again");
            }
            Err(error) => tracing::warn!(%error, "the changed serving certificate is not usable; keeping the old one"),
        }
    }
}

fn modified(path: &std::path::Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn read(cert_file: &std::path::Path, key_file: &std::path::Path) -> Result<Arc<CertifiedKey>, Error> {
    let chain = certificates(cert_file)?;
    let key = PrivateKeyDer::from_pem_file(key_file)
        .map_err(|error| Error::Key { path: key_file.to_owned(), detail: error.to_string() })?;
    let provider = rustls::crypto::ring::default_provider();
    let key = CertifiedKey::from_der(chain, key, &provider)
        .map_err(|source| Error::Tls { path: cert_file.to_owned(), source })?;
    Ok(Arc::new(key))
}

impl std::fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServingCertificate").field("cert_file", &self.cert_file).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oarlock_pki::{Authority, Request, Usage};

    #[test]
    fn a_renewed_certificate_is_served_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::ensure(dir.path(), "ca").expect("an authority");
        let request = |name: &str| Request {
            common_name: name.into(),
            organizations: Vec::new(),
            dns_names: vec![name.into()],
            addresses: Vec::new(),
            usage: Usage::Server,
        };
        let identity = authority.ensure_identity("s", &request("one")).expect("a certificate");
        let config = Config { cert_file: identity.cert_file, key_file: identity.key_file, ..Config::default() };
        let serving = ServingCertificate::load(&config).expect("loads");
        let first = serving.current().cert.clone();
        let look_again = || {
            let mut loaded = serving.loaded.lock();
            loaded.modified = None;
            serving.look(&mut loaded);
            loaded.key.cert.clone()
        };
        authority.ensure_identity("s", &request("two")).expect("a new certificate");
        let second = look_again();
        assert_ne!(first, second);
        std::fs::write(&config.cert_file, "nonsense").expect("written");
        assert_eq!(look_again(), second);
    }
}
