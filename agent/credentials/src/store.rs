//! [`Store`]: a certificate with its key in one file, replaced as a whole, and the key of the next one while it is asked for.
//!
//! The key of a request is on disk before the request is made, and stays until its certificate is: whoever comes after a kill asks with
//! the same key, finds the same request, and nothing is asked for twice.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rcgen::KeyPair;

/// `<name>-current.pem` and `<name>-pending.key` in a directory.
#[derive(Debug, Clone)]
pub struct Store {
    current: PathBuf,
    pending: PathBuf,
}

/// A certificate and its key.
#[derive(Clone)]
pub struct Current {
    /// Certificates and key in PEM.
    pub pem: String,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    /// Made by the node itself, until somebody signs one.
    pub self_signed: bool,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Current {
    /// Reads a PEM text; None when it is no certificate with its own key.
    pub fn read(pem: &str) -> Option<Self> {
        let blocks = x509_parser::pem::Pem::iter_from_buffer(pem.as_bytes());
        let first = blocks.filter_map(Result::ok).find(|block| block.label == "CERTIFICATE")?;
        let certificate = first.parse_x509().ok()?;
        let key = KeyPair::from_pem(&key_block(pem)?).ok()?;
        if certificate.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return None;
        }
        let validity = certificate.validity();
        Some(Self {
            not_before: Timestamp::from_second(validity.not_before.timestamp()).ok()?,
            not_after: Timestamp::from_second(validity.not_after.timestamp()).ok()?,
            self_signed: certificate.issuer() == certificate.subject(),
            pem: pem.to_owned(),
        })
    }

    pub fn expired(&self, now: Timestamp) -> bool {
        now >= self.not_after
    }

    /// The certificates alone, and the key alone.
    pub fn parts(&self) -> (String, String) {
        let key = key_block(&self.pem).unwrap_or_default();
        (self.pem.replace(&key, ""), key)
    }
}

/// The block of the private key.
fn key_block(pem: &str) -> Option<String> {
    let start = pem.find("-----BEGIN PRIVATE KEY-----")?;
    let end = "-----END PRIVATE KEY-----";
    let length = pem[start..].find(end)? + end.len();
    Some(format!("{}\n", &pem[start..start + length]))
}

impl Store {
    pub fn new(directory: &Path, name: &str) -> Self {
        Self {
            current: directory.join(format!("{name}-current.pem")),
            pending: directory.join(format!("{name}-pending.key")),
        }
    }

    /// Where the current certificate and key are.
    pub fn file(&self) -> &Path {
        &self.current
    }

    /// The current certificate, if there is a usable one. Blocks.
    pub fn current(&self) -> Option<Current> {
        Current::read(&std::fs::read_to_string(&self.current).ok()?)
    }

    /// The key of the request under way, or a new one that is on disk by then. Blocks.
    pub fn pending_key(&self) -> io::Result<KeyPair> {
        if let Ok(text) = std::fs::read_to_string(&self.pending)
            && let Ok(key) = KeyPair::from_pem(&text)
        {
            return Ok(key);
        }
        let key = KeyPair::generate().map_err(io::Error::other)?;
        replace(&self.pending, &key.serialize_pem())?;
        Ok(key)
    }

    /// Gives the request under way up: the next one is made with another key. Blocks.
    pub fn forget_pending(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.pending) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes a certificate for the pending key in. Blocks.
    pub fn take(&self, certificate: &str, key: &KeyPair) -> io::Result<Current> {
        let pem = format!("{}\n{}", certificate.trim_end(), key.serialize_pem());
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the certificate is not one of the key");
        let current = Current::read(&pem).ok_or_else(wrong)?;
        replace(&self.current, &pem)?;
        self.forget_pending()?;
        Ok(current)
    }

    /// Makes a certificate of the node's own where there is none, so that something can be served until one is signed. Blocks.
    pub fn ensure_self_signed(&self, names: Vec<String>) -> io::Result<()> {
        if self.current().is_some() {
            return Ok(());
        }
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let params = rcgen::CertificateParams::new(names).map_err(io::Error::other)?;
        let certificate = params.self_signed(&key).map_err(io::Error::other)?;
        replace(&self.current, &format!("{}\n{}", certificate.pem().trim_end(), key.serialize_pem()))
    }
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let partial = path.with_extension("new");
    match std::fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_kept_until_its_certificate_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), "kubelet-client");
        let key = store.pending_key().unwrap();
        let again = store.pending_key().unwrap();
        assert_eq!(key.serialize_pem(), again.serialize_pem(), "after a kill the same key is asked with");
        let other = KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
        assert!(store.take(&params.self_signed(&other).unwrap().pem(), &key).is_err(), "not of this key");
        assert!(store.current().is_none());
        store.take(&params.self_signed(&key).unwrap().pem(), &key).unwrap();
        let current = store.current().unwrap();
        assert!(current.self_signed && !current.expired(Timestamp::now()));
        let (certificate, private) = current.parts();
        assert!(certificate.contains("CERTIFICATE") && !certificate.contains("PRIVATE"));
        assert!(private.starts_with("-----BEGIN PRIVATE KEY-----"));
        assert_ne!(store.pending_key().unwrap().serialize_pem(), key.serialize_pem());
    }

    #[test]
    fn half_a_file_is_no_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), "x");
        std::fs::write(store.file(), "-----BEGIN CERTIFICATE-----\nAAA").unwrap();
        assert!(store.current().is_none());
        store.ensure_self_signed(vec!["node".to_owned()]).unwrap();
        assert!(store.current().is_some());
    }
}
