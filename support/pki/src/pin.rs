//! [`Pin`]: an authority known by the hash of its public key, so that it can be told over a channel that others write to.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

const PREFIX: &str = "sha256:";
const LABEL: &str = "CERTIFICATE";

/// `sha256:<64 hex digits>`: SHA-256 over the DER of a certificate's SubjectPublicKeyInfo, as `kubeadm` writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin([u8; 32]);

/// A text that is no pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not of the form sha256:<64 hex digits>")]
pub struct PinError;

impl Pin {
    /// The pin of the first certificate of a PEM text.
    pub fn of(pem: &str) -> Option<Self> {
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
        Some(Self::of_key(&block.parse_x509().ok()?))
    }

    fn of_key(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Self {
        Self(Sha256::digest(certificate.public_key().raw).into())
    }

    /// Those certificates of a PEM text whose key is the pinned one, as PEM; empty where there is none. Nothing else of the text
    /// is handed on, because others read PEM in other ways.
    pub fn only(&self, text: &str) -> String {
        let blocks = x509_parser::pem::Pem::iter_from_buffer(text.as_bytes()).map_while(Result::ok);
        let certificates = blocks.filter(|block| block.label == LABEL);
        let pinned = certificates.filter(|block| block.parse_x509().is_ok_and(|found| Self::of_key(&found) == *self));
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        pinned.map(|block| pem::encode_config(&pem::Pem::new(LABEL, block.contents), config)).collect()
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Pin {
    type Err = PinError;

    fn from_str(text: &str) -> Result<Self, PinError> {
        let digits = text.strip_prefix(PREFIX).filter(|digits| digits.len() == 64).ok_or(PinError)?;
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair =
                std::str::from_utf8(pair).ok().filter(|pair| pair.bytes().all(|digit| digit.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(pair.ok_or(PinError)?, 16).map_err(|_| PinError)?;
        }
        Ok(Self(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    fn authority() -> String {
        let directory = tempfile::tempdir().unwrap();
        Authority::ensure(directory.path(), "ca").unwrap().certificate_pem().to_owned()
    }

    #[test]
    fn only_the_pinned_authority_is_taken_from_a_bundle() {
        let (own, foreign) = (authority(), authority());
        let pin = Pin::of(&own).unwrap();
        assert_eq!(pin.to_string().parse(), Ok(pin));
        assert_eq!(pin.only(&format!("{foreign}{own}")).trim(), own.trim());
        assert_eq!(pin.only(&foreign), "");
        assert_eq!(pin.only("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"), "");
        let short = format!("sha256:{}", "a".repeat(63));
        let signed = format!("sha256:+a{}", "a".repeat(62));
        for text in ["", "abcdef", "md5:00", &short, &signed] {
            assert_eq!(text.parse::<Pin>(), Err(PinError), "{text}");
        }
    }

    #[test]
    fn a_foreign_authority_does_not_get_in_behind_the_pinned_one() {
        let (own, foreign) = (authority(), authority());
        let pin = Pin::of(&own).unwrap();
        let disguised = own.replace("CERTIFICATE", "X");
        assert_eq!(pin.only(&format!("{disguised}{foreign}")), "");
        let taken = pin.only(&format!("{disguised}{own} {foreign}"));
        assert_eq!(taken.trim(), own.trim());
    }

    #[test]
    fn the_hash_is_the_one_that_openssl_shows() {
        // openssl x509 -pubkey | openssl pkey -pubin -outform der | sha256sum
        let pem = include_str!("../tests/authority.pem");
        let expected = include_str!("../tests/authority.pin");
        assert_eq!(Pin::of(pem).unwrap().to_string(), expected.trim());
    }
}
