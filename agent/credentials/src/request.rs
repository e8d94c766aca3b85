//! What a node asks to be certified. Pure.

use std::net::IpAddr;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::ObjectMeta;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData, SanType};
use sha2::{Digest, Sha256};

/// What a certificate is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// Talking to the API server.
    Client,
    /// Serving the node's API under these names.
    Serving { names: Vec<String>, addresses: Vec<IpAddr> },
    /// Talking to the API server as the service proxy, which may less than the node, and other things.
    Proxy,
}

impl Purpose {
    fn signer(&self) -> &'static str {
        match self {
            Purpose::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Purpose::Serving { .. } => "kubernetes.io/kubelet-serving",
            Purpose::Proxy => "kubernetes.io/kube-apiserver-client",
        }
    }

    fn usages(&self) -> Vec<String> {
        let auth = match self {
            Purpose::Client | Purpose::Proxy => "client auth",
            Purpose::Serving { .. } => "server auth",
        };
        vec!["digital signature".to_owned(), auth.to_owned()]
    }

    fn prefix(&self) -> &'static str {
        match self {
            Purpose::Client => "node-csr",
            Purpose::Serving { .. } => "csr",
            Purpose::Proxy => "proxy-csr",
        }
    }
}

/// The object that asks for a certificate of the key; the same key always gives the same name.
pub(crate) fn object(node: &str, purpose: &Purpose, key: &KeyPair) -> Result<CertificateSigningRequest, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if *purpose == Purpose::Proxy {
        params.distinguished_name.push(DnType::CommonName, "system:kube-proxy");
    } else {
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
    }
    if let Purpose::Serving { names, addresses } = purpose {
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
    }
    let pem = params.serialize_request(key)?.pem()?;
    let mut digest = Sha256::new();
    digest.update(key.subject_public_key_info());
    digest.update(purpose.signer());
    digest.update(node);
    let digest: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(format!("{}-{digest}", purpose.prefix())), ..Default::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: purpose.signer().to_owned(),
            usages: Some(purpose.usages()),
            ..Default::default()
        },
        status: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_named_after_its_key() {
        let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let name = |key: &KeyPair, purpose: &Purpose| object("edge", purpose, key).unwrap().metadata.name.unwrap();
        let serving = Purpose::Serving { names: vec!["edge".into()], addresses: vec!["10.0.0.1".parse().unwrap()] };
        assert_eq!(name(&key, &Purpose::Client), name(&key, &Purpose::Client));
        assert_ne!(name(&key, &Purpose::Client), name(&other, &Purpose::Client));
        assert!(name(&key, &serving).starts_with("csr-"));
        assert_ne!(name(&key, &Purpose::Client), name(&key, &Purpose::Proxy));
        let asked = object("edge", &serving, &key).unwrap().spec;
        assert_eq!(asked.usages.unwrap(), ["digital signature", "server auth"]);
    }
}
