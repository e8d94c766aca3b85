//! Service-account tokens: ES256 JSON web tokens, signed and checked with one key.
//!
//! Only the cryptography and the time claims are checked here; whether the account and the bound object still exist is
//! the authenticator's question.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::Error;

/// An object a token names: the account itself, the pod or secret it is bound to, the node it was made on.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct NamedUid {
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// The `kubernetes.io` claim.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Bound {
    pub(crate) namespace: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<NamedUid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pod: Option<NamedUid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) secret: Option<NamedUid>,
    pub(crate) serviceaccount: NamedUid,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) warnafter: Option<i64>,
}

/// The claims of a token, in upstream's names.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Claims {
    pub(crate) aud: Vec<String>,
    pub(crate) exp: i64,
    pub(crate) iat: i64,
    pub(crate) iss: String,
    pub(crate) jti: String,
    #[serde(rename = "kubernetes.io")]
    pub(crate) bound: Bound,
    pub(crate) nbf: i64,
    pub(crate) sub: String,
}

/// Signs and checks tokens.
pub(crate) struct Tokens {
    key: EcdsaKeyPair,
    random: SystemRandom,
    key_id: String,
    pub(crate) issuer: String,
}

/// Why a token was not accepted. Never shown to the client.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum TokenError {
    #[error("the token is malformed")]
    Malformed,
    #[error("the token was signed by another key or not at all")]
    Signature,
    #[error("the token's issuer is not this server")]
    Issuer,
    #[error("the token has expired or is not valid yet")]
    Time,
}

impl Tokens {
    pub(crate) fn load(path: &Path, issuer: &str) -> Result<Tokens, Error> {
        let bad = |detail: String| Error::Key { path: path.to_owned(), detail };
        let der = PrivatePkcs8KeyDer::from_pem_file(path).map_err(|error| bad(error.to_string()))?;
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der(), &random)
            .map_err(|error| bad(format!("it is not a P-256 key in PKCS#8: {error}")))?;
        let key_id = URL_SAFE_NO_PAD.encode(Sha256::digest(key.public_key().as_ref()));
        Ok(Tokens { key, random, key_id, issuer: issuer.to_owned() })
    }

    pub(crate) fn sign(&self, claims: &Claims) -> Option<String> {
        let header = json!({"alg": "ES256", "kid": self.key_id});
        let mut token = URL_SAFE_NO_PAD.encode(header.to_string());
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(serde_json::to_vec(claims).ok()?));
        let signature = self.key.sign(&self.random, token.as_bytes()).ok()?;
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(signature));
        Some(token)
    }

    /// The claims of a token that this server signed and that is valid at `now` (seconds since the epoch).
    pub(crate) fn verify(&self, token: &str, now: i64) -> Result<Claims, TokenError> {
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed);
        let header: Value = serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::Malformed)?;
        if header["alg"] != "ES256" {
            return Err(TokenError::Signature);
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref())
            .verify(signed.as_bytes(), &decode(signature)?)
            .map_err(|_| TokenError::Signature)?;
        let claims: Claims = serde_json::from_slice(&decode(payload)?).map_err(|_| TokenError::Malformed)?;
        if claims.iss != self.issuer {
            return Err(TokenError::Issuer);
        }
        if now >= claims.exp || now + 60 < claims.nbf {
            return Err(TokenError::Time);
        }
        Ok(claims)
    }

    /// The public key as a JSON web key set.
    pub(crate) fn key_set(&self) -> Value {
        let point = self.key.public_key().as_ref();
        let coordinate = |range: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(point.get(range).unwrap_or_default());
        json!({"keys": [{
            "use": "sig", "kty": "EC", "kid": self.key_id, "crv": "P-256", "alg": "ES256",
            "x": coordinate(1..33), "y": coordinate(33..65),
        }]})
    }

    /// The OpenID provider document.
    pub(crate) fn provider(&self, jwks_uri: &str) -> Value {
        json!({
            "issuer": self.issuer, "jwks_uri": jwks_uri, "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["ES256"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(dir: &Path) -> Tokens {
        let path = dir.join("sa.key");
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).expect("a key");
        let body = base64::engine::general_purpose::STANDARD.encode(key);
        std::fs::write(&path, format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"))
            .expect("written");
        Tokens::load(&path, "https://issuer").expect("loads")
    }

    fn claims() -> Claims {
        let account = NamedUid { name: "a".into(), uid: "u".into() };
        Claims {
            aud: vec!["x".into()],
            exp: 100,
            iat: 10,
            iss: "https://issuer".into(),
            jti: "j".into(),
            bound: Bound {
                namespace: "n".into(),
                node: None,
                pod: None,
                secret: None,
                serviceaccount: account,
                warnafter: None,
            },
            nbf: 10,
            sub: "system:serviceaccount:n:a".into(),
        }
    }

    #[test]
    fn a_token_is_accepted_until_it_expires_and_never_when_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let tokens = tokens(dir.path());
        let token = tokens.sign(&claims()).expect("signs");
        assert_eq!(tokens.verify(&token, 50).expect("valid").sub, "system:serviceaccount:n:a");
        assert_eq!(tokens.verify(&token, 100).unwrap_err(), TokenError::Time);
        let (signed, _) = token.rsplit_once('.').expect("three parts");
        let forged = format!("{signed}.{}", URL_SAFE_NO_PAD.encode([0u8; 64]));
        assert_eq!(tokens.verify(&forged, 50).unwrap_err(), TokenError::Signature);
        let none =
            format!("{}.{}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#), token.split('.').nth(1).expect("claims"));
        assert_eq!(tokens.verify(&none, 50).unwrap_err(), TokenError::Signature);
    }
}
