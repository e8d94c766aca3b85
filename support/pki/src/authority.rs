//! The certificate authority and the certificates that it signs.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::files::write_private;

/// How long a CA certificate lives, in days.
const CA_DAYS: i64 = 3650;
/// How long a certificate signed by it lives, in days.
const LEAF_DAYS: i64 = 365;
/// A certificate with less than this left is made anew, in days.
const RENEW_DAYS: i64 = 90;

/// What can go wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make or read the key or certificate {path}")]
    Certificate {
        path: PathBuf,
        #[source]
        source: rcgen::Error,
    },
    #[error("the certificate request cannot be signed: {0}")]
    Request(&'static str),
}

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    Client,
    Server,
}

/// A certificate that is wanted.
#[derive(Clone, Debug)]
pub struct Request {
    /// Subject CN; a user name in client certificates.
    pub common_name: String,
    /// Subject O, one a group.
    pub organizations: Vec<String>,
    /// Subject alternative names.
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub usage: Usage,
}

/// Where a certificate and its key are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

/// A certificate authority kept in a directory as `ca.crt` and `ca.key`.
pub struct Authority {
    directory: PathBuf,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Opens the authority in `directory`, making it if there is none. `common_name` names a new one.
    pub fn ensure(directory: &Path, common_name: &str) -> Result<Self, PkiError> {
        let cert_file = directory.join("ca.crt");
        let key_file = directory.join("ca.key");
        if !(cert_file.exists() && key_file.exists()) {
            create_authority(&cert_file, &key_file, common_name)?;
        }
        let certificate_pem = read(&cert_file)?;
        let key = load_key(&key_file)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)
            .map_err(|source| PkiError::Certificate { path: cert_file, source })?;
        Ok(Self { directory: directory.to_owned(), certificate_pem, issuer })
    }

    pub(crate) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.issuer
    }

    /// The CA certificate as PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The file that holds the CA certificate.
    pub fn certificate_file(&self) -> PathBuf {
        self.directory.join("ca.crt")
    }

    /// Returns the certificate `name` (`<name>.crt`, `<name>.key`), making it when it is missing, near its end, signed by
    /// another authority, or says something else than `request`.
    pub fn ensure_identity(&self, name: &str, request: &Request) -> Result<Identity, PkiError> {
        let identity = Identity {
            cert_file: self.directory.join(format!("{name}.crt")),
            key_file: self.directory.join(format!("{name}.key")),
        };
        if identity.key_file.exists() && self.is_current(&identity.cert_file, request) {
            return Ok(identity);
        }
        let failed = |source| PkiError::Certificate { path: identity.cert_file.clone(), source };
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = leaf_params(request).map_err(failed)?.signed_by(&key, &self.issuer).map_err(failed)?;
        write(&identity.key_file, key.serialize_pem().as_bytes())?;
        write(&identity.cert_file, certificate.pem().as_bytes())?;
        Ok(identity)
    }

    fn is_current(&self, cert_file: &Path, request: &Request) -> bool {
        let (Ok(pem), Ok((_, ca))) =
            (fs::read(cert_file), x509_parser::pem::parse_x509_pem(self.certificate_pem.as_bytes()))
        else {
            return false;
        };
        let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(&pem) else { return false };
        let (Ok(certificate), Ok(ca)) = (pem.parse_x509(), ca.parse_x509()) else { return false };
        let left = certificate.validity().not_after.timestamp() - jiff::Timestamp::now().as_second();
        left > RENEW_DAYS * 86_400
            && certificate.verify_signature(Some(ca.public_key())).is_ok()
            && subject_of(&certificate) == (request.common_name.clone(), request.organizations.clone())
            && names_of(&certificate) == wanted_names(request)
    }
}

/// Makes sure that `path` holds a P-256 private key in PKCS#8 PEM form, for signing tokens.
pub fn ensure_signing_key(path: &Path) -> Result<(), PkiError> {
    if path.exists() {
        return load_key(path).map(|_| ());
    }
    let key = KeyPair::generate().map_err(|source| PkiError::Certificate { path: path.to_owned(), source })?;
    write(path, key.serialize_pem().as_bytes())
}

fn create_authority(cert_file: &Path, key_file: &Path, common_name: &str) -> Result<(), PkiError> {
    let failed = |source| PkiError::Certificate { path: cert_file.to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished_name(common_name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    set_validity(&mut params, CA_DAYS);
    let certificate = params.self_signed(&key).map_err(failed)?;
    write(key_file, key.serialize_pem().as_bytes())?;
    write(cert_file, certificate.pem().as_bytes())
}

fn leaf_params(request: &Request) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished_name(&request.common_name, &request.organizations);
    for name in &request.dns_names {
        params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    params.subject_alt_names.extend(request.addresses.iter().copied().map(SanType::IpAddress));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![match request.usage {
        Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
        Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
    }];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, LEAF_DAYS);
    Ok(params)
}

fn distinguished_name(common_name: &str, organizations: &[String]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for organization in organizations {
        name.push(DnType::OrganizationName, organization.as_str());
    }
    name.push(DnType::CommonName, common_name);
    name
}

/// From an hour ago, so that a machine whose clock runs a little behind accepts it, for `days`.
fn set_validity(params: &mut CertificateParams, days: i64) {
    let now = jiff::Timestamp::now().as_second();
    let at = |second: i64| {
        let date =
            jiff::Timestamp::from_second(second).unwrap_or(jiff::Timestamp::MAX).to_zoned(jiff::tz::TimeZone::UTC);
        rcgen::date_time_ymd(
            i32::from(date.year()),
            u8::try_from(date.month()).unwrap_or(1),
            u8::try_from(date.day()).unwrap_or(1),
        )
    };
    params.not_before = at(now - 86_400);
    params.not_after = at(now + days * 86_400);
}

fn subject_of(certificate: &x509_parser::certificate::X509Certificate<'_>) -> (String, Vec<String>) {
    let subject = certificate.subject();
    let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().unwrap_or("").to_owned();
    let common_name = subject.iter_common_name().next().map(text).unwrap_or_default();
    (common_name, subject.iter_organization().map(text).collect())
}

fn names_of(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Vec<String> {
    use x509_parser::extensions::GeneralName;
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    let mut names: Vec<String> = extension
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(octets) => address_of(octets).map(|address| address.to_string()),
            _ => None,
        })
        .collect();
    names.sort();
    names
}

pub(crate) fn address_of(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => <[u8; 4]>::try_from(octets).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
        _ => None,
    }
}

fn wanted_names(request: &Request) -> Vec<String> {
    let mut names = request.dns_names.clone();
    names.extend(request.addresses.iter().map(ToString::to_string));
    names.sort();
    names
}

fn load_key(path: &Path) -> Result<KeyPair, PkiError> {
    KeyPair::from_pem(&read(path)?).map_err(|source| PkiError::Certificate { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Read { path: path.to_owned(), source })
}

fn write(path: &Path, contents: &[u8]) -> Result<(), PkiError> {
    write_private(path, contents).map_err(|source| PkiError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn request(addresses: &[&str]) -> Request {
        Request {
            common_name: "system:node:edge".to_owned(),
            organizations: vec!["system:nodes".to_owned()],
            dns_names: vec!["edge".to_owned()],
            addresses: addresses.iter().map(|address| address.parse().expect("address")).collect(),
            usage: Usage::Server,
        }
    }

    #[test]
    fn identities_are_kept_until_the_request_changes() {
        let directory = tempfile::tempdir().expect("tempdir");
        let authority = Authority::ensure(directory.path(), "test-ca").expect("authority");
        let first = authority.ensure_identity("node", &request(&["10.0.0.1"])).expect("identity");
        let before = fs::read(&first.cert_file).expect("certificate");
        let reopened = Authority::ensure(directory.path(), "ignored").expect("authority");
        reopened.ensure_identity("node", &request(&["10.0.0.1"])).expect("identity");
        assert_eq!(
            before,
            fs::read(&first.cert_file).expect("certificate"),
            "an unchanged request keeps the certificate"
        );
        reopened.ensure_identity("node", &request(&["10.0.0.2"])).expect("identity");
        assert_ne!(before, fs::read(&first.cert_file).expect("certificate"), "a new address needs a new certificate");
    }

    #[test]
    fn a_certificate_of_another_authority_is_replaced() {
        let directory = tempfile::tempdir().expect("tempdir");
        let authority = Authority::ensure(directory.path(), "old").expect("authority");
        let identity = authority.ensure_identity("node", &request(&[])).expect("identity");
        let before = fs::read(&identity.cert_file).expect("certificate");
        fs::remove_file(directory.path().join("ca.key")).expect("remove");
        Authority::ensure(directory.path(), "new")
            .expect("authority")
            .ensure_identity("node", &request(&[]))
            .expect("identity");
        assert_ne!(before, fs::read(&identity.cert_file).expect("certificate"));
    }

    #[test]
    fn every_file_is_private() {
        let directory = tempfile::tempdir().expect("tempdir");
        let authority = Authority::ensure(directory.path(), "test-ca").expect("authority");
        authority.ensure_identity("node", &request(&[])).expect("identity");
        ensure_signing_key(&directory.path().join("sa.key")).expect("signing key");
        for entry in fs::read_dir(directory.path()).expect("directory") {
            let entry = entry.expect("entry");
            let mode = entry.metadata().expect("metadata").permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{}", entry.path().display());
        }
    }
}
