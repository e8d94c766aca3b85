//! Signing what others ask for: reading a certificate signing request, and making the certificate.

use std::net::IpAddr;
use std::time::Duration;

use rcgen::{CertificateSigningRequestParams, ExtendedKeyUsagePurpose, KeyUsagePurpose};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

use crate::authority::{Authority, PkiError, address_of};

/// Clocks of others may be behind by so much.
const BACKDATED: Duration = Duration::from_secs(300);

/// What a request asks to be certified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    /// Mail addresses, URIs and other names.
    pub other_names: usize,
}

impl Asked {
    /// Reads a PEM request; None when it is not one that is signed with its own key.
    pub fn read(pem: &str) -> Option<Self> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).ok()?;
        request.verify_signature().ok()?;
        let subject = &request.certification_request_info.subject;
        let text =
            |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
        let mut asked = Self {
            common_name: subject.iter_common_name().next().and_then(text).unwrap_or_default(),
            organizations: subject.iter_organization().filter_map(text).collect(),
            ..Default::default()
        };
        for extension in request.requested_extensions().into_iter().flatten() {
            let ParsedExtension::SubjectAlternativeName(names) = extension else { continue };
            for name in &names.general_names {
                match name {
                    GeneralName::DNSName(name) => asked.dns_names.push((*name).to_owned()),
                    GeneralName::IPAddress(octets) => asked.addresses.extend(address_of(octets)),
                    _ => asked.other_names += 1,
                }
            }
        }
        Some(asked)
    }
}

fn key_usage(name: &str) -> Option<KeyUsagePurpose> {
    Some(match name {
        "signing" | "digital signature" => KeyUsagePurpose::DigitalSignature,
        "content commitment" => KeyUsagePurpose::ContentCommitment,
        "key encipherment" => KeyUsagePurpose::KeyEncipherment,
        "key agreement" => KeyUsagePurpose::KeyAgreement,
        "data encipherment" => KeyUsagePurpose::DataEncipherment,
        "encipher only" => KeyUsagePurpose::EncipherOnly,
        "decipher only" => KeyUsagePurpose::DecipherOnly,
        _ => return None,
    })
}

fn extended_usage(name: &str) -> Option<ExtendedKeyUsagePurpose> {
    Some(match name {
        "any" => ExtendedKeyUsagePurpose::Any,
        "server auth" => ExtendedKeyUsagePurpose::ServerAuth,
        "client auth" => ExtendedKeyUsagePurpose::ClientAuth,
        "code signing" => ExtendedKeyUsagePurpose::CodeSigning,
        "email protection" => ExtendedKeyUsagePurpose::EmailProtection,
        "timestamping" => ExtendedKeyUsagePurpose::TimeStamping,
        "ocsp signing" => ExtendedKeyUsagePurpose::OcspSigning,
        _ => return None,
    })
}

impl Authority {
    /// Signs a PEM request for `life`, with usages by the names of the certificates API; others are left out. Never makes another
    /// authority. Gives the certificate as PEM.
    pub fn sign(&self, pem: &str, usages: &[String], life: Duration) -> Result<String, PkiError> {
        let failed = |source| PkiError::Certificate { path: self.certificate_file(), source };
        let mut request = CertificateSigningRequestParams::from_pem(pem).map_err(failed)?;
        let params = &mut request.params;
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        params.key_usages = usages.iter().filter_map(|name| key_usage(name)).collect();
        params.extended_key_usages = usages.iter().filter_map(|name| extended_usage(name)).collect();
        params.use_authority_key_identifier_extension = true;
        let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0);
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(now).saturating_sub(BACKDATED);
        params.not_after = epoch + Duration::from_secs(now) + life;
        Ok(request.signed_by(self.issuer()).map_err(failed)?.pem())
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    #[test]
    fn a_request_is_read_and_signed_for_as_long_as_it_may() {
        let directory = tempfile::tempdir().expect("tempdir");
        let authority = Authority::ensure(directory.path(), "test-ca").expect("authority");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec!["edge".to_owned(), "10.0.0.1".to_owned()]).expect("names");
        params.distinguished_name.push(DnType::CommonName, "system:node:edge");
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        let pem = params.serialize_request(&key).expect("a request").pem().expect("PEM");
        let asked = Asked::read(&pem).expect("it reads");
        assert_eq!(
            (asked.common_name.as_str(), asked.organizations.as_slice()),
            ("system:node:edge", ["system:nodes".to_owned()].as_slice())
        );
        assert_eq!((asked.dns_names.len(), asked.addresses.len(), asked.other_names), (1, 1, 0));
        let usages = ["client auth".to_owned(), "digital signature".to_owned()];
        let made = authority.sign(&pem, &usages, Duration::from_secs(600)).expect("signed");
        let (_, made) = x509_parser::pem::parse_x509_pem(made.as_bytes()).expect("PEM");
        let certificate = made.parse_x509().expect("a certificate");
        let left = certificate.validity().not_after.timestamp() - jiff::Timestamp::now().as_second();
        assert!((595..=600).contains(&left), "{left}");
        assert!(!certificate.is_ca());
        let usage = certificate.extended_key_usage().expect("readable").expect("there").value;
        assert!(usage.client_auth && !usage.server_auth);
        assert_eq!(Asked::read("rubbish"), None);
    }
}
