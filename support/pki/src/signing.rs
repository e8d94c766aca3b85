//! Signing what others ask for: reading a certificate signing request, and making the certificate.

use std::net::IpAddr;
use std::time::Duration;

use rcgen::{
    CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME};
use x509_parser::prelude::FromDer;

use crate::authority::{Authority, PkiError, address_of};

const LABEL: &str = "CERTIFICATE REQUEST";
/// id-at-organizationName.
const ORGANIZATION_NAME: [u64; 4] = [2, 5, 4, 10];
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
    /// Reads a PEM request; None when it is not one that is signed with its own key, or when it could be read in two ways: with
    /// several common names, or with names that are no text.
    pub fn read(pem: &str) -> Option<Self> {
        Self::decode(pem).map(|(asked, _)| asked)
    }

    /// What a PEM request asks for, and its DER. Whoever signs takes both from here, so that nothing is signed but what was read.
    fn decode(pem: &str) -> Option<(Self, Vec<u8>)> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
        if pem.label != LABEL {
            return None;
        }
        let (rest, request) = X509CertificationRequest::from_der(&pem.contents).ok()?;
        if !rest.is_empty() {
            return None;
        }
        request.verify_signature().ok()?;
        let mut asked = Self::default();
        let mut common_names = Vec::new();
        for attribute in request.certification_request_info.subject.iter_attributes() {
            let text = || attribute.as_str().ok().map(str::to_owned);
            if *attribute.attr_type() == OID_X509_COMMON_NAME {
                common_names.push(text()?);
            } else if *attribute.attr_type() == OID_X509_ORGANIZATION_NAME {
                asked.organizations.push(text()?);
            }
        }
        if common_names.len() > 1 {
            return None;
        }
        asked.common_name = common_names.pop().unwrap_or_default();
        for extension in request.requested_extensions().into_iter().flatten() {
            let ParsedExtension::SubjectAlternativeName(names) = extension else { continue };
            for name in &names.general_names {
                match name {
                    GeneralName::DNSName(name) => asked.dns_names.push((*name).to_owned()),
                    GeneralName::IPAddress(octets) => asked.addresses.push(address_of(octets)?),
                    _ => asked.other_names += 1,
                }
            }
        }
        Some((asked, pem.contents))
    }

    /// The subject as it is signed: the common name and the organizations, and nothing else.
    fn subject(&self) -> Option<DistinguishedName> {
        let mut subject = DistinguishedName::new();
        if !self.common_name.is_empty() {
            subject.push(DnType::CommonName, self.common_name.as_str());
        }
        // The library keeps one value of a kind, so a second one goes under the kind's number.
        let kinds = [DnType::OrganizationName, DnType::CustomDnType(ORGANIZATION_NAME.to_vec())];
        if self.organizations.len() > kinds.len() {
            return None;
        }
        for (kind, organization) in kinds.into_iter().zip(&self.organizations) {
            subject.push(kind, organization.as_str());
        }
        Some(subject)
    }

    fn alternative_names(&self) -> Result<Vec<SanType>, rcgen::Error> {
        let names = self.dns_names.iter().map(|name| Ok(SanType::DnsName(name.as_str().try_into()?)));
        names.chain(self.addresses.iter().map(|address| Ok(SanType::IpAddress(*address)))).collect()
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
    /// authority. Gives the certificate as PEM. It says what [`Asked::read`] gives of the request, without mail addresses and URIs.
    pub fn sign(&self, pem: &str, usages: &[String], life: Duration) -> Result<String, PkiError> {
        let failed = |source| PkiError::Certificate { path: self.certificate_file(), source };
        let (asked, der) = Asked::decode(pem).ok_or(PkiError::Request("it can be read in several ways, or in none"))?;
        let mut request = CertificateSigningRequestParams::from_der(&der.into()).map_err(failed)?;
        let params = &mut request.params;
        params.distinguished_name = asked.subject().ok_or(PkiError::Request("it has more than two organizations"))?;
        params.subject_alt_names = asked.alternative_names().map_err(failed)?;
        params.custom_extensions = Vec::new();
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

    fn request(names: &[(DnType, &str)]) -> String {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name = DistinguishedName::new();
        for (kind, name) in names {
            params.distinguished_name.push(kind.clone(), *name);
        }
        params.serialize_request(&KeyPair::generate().expect("a key")).expect("a request").pem().expect("PEM")
    }

    /// The subject of a certificate in PEM, as text.
    fn subject_of(certificate: &str) -> String {
        let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).expect("PEM");
        pem.parse_x509().expect("a certificate").subject().to_string()
    }

    #[test]
    fn a_request_with_two_common_names_is_none() {
        let second = DnType::CustomDnType(vec![2, 5, 4, 3]);
        let two = request(&[(DnType::CommonName, "system:node:a"), (second, "system:kube-controller-manager")]);
        assert_eq!(Asked::read(&two), None);
    }

    #[test]
    fn what_was_read_is_what_is_signed_whatever_stands_before_it() {
        let directory = tempfile::tempdir().expect("tempdir");
        let authority = Authority::ensure(directory.path(), "test-ca").expect("authority");
        let good = request(&[(DnType::CommonName, "jane"), (DnType::OrganizationName, "dev")]);
        let evil = request(&[(DnType::CommonName, "root"), (DnType::OrganizationName, "system:masters")]);
        let both = format!(" {evil}{good}");
        let asked = Asked::read(&both).expect("it reads");
        let made = authority.sign(&both, &["client auth".to_owned()], Duration::from_secs(600)).expect("signed");
        let subject = subject_of(&made);
        assert!(subject.contains(&asked.common_name) && subject.contains(&asked.organizations[0]), "{subject}");
        let foreign = good.replace("CERTIFICATE REQUEST", "NEW THING");
        assert_eq!(Asked::read(&foreign), None);
    }

    #[test]
    fn both_organizations_are_signed_and_other_parts_of_the_subject_are_not() {
        let directory = tempfile::tempdir().expect("tempdir");
        let authority = Authority::ensure(directory.path(), "test-ca").expect("authority");
        let second = DnType::CustomDnType(ORGANIZATION_NAME.to_vec());
        let names = [(DnType::CommonName, "jbeda"), (DnType::OrganizationName, "app1"), (second, "app2")];
        let pem = request(&[&names[..], &[(DnType::CountryName, "DE")]].concat());
        let made = authority.sign(&pem, &["client auth".to_owned()], Duration::from_secs(600)).expect("signed");
        let subject = subject_of(&made);
        assert!(subject.contains("app1") && subject.contains("app2") && !subject.contains("DE"), "{subject}");
    }
}
