//! CertificateSigningRequests, but for what only reading the request itself can tell.

use super::metadata::{object_meta, object_meta_update};
use super::{Errors, field, names, part};
use crate::FieldError;
use crate::access::{list, text};
use serde_json::Value;

const USAGES: &[&str] = &[
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];

fn spec_parts(errors: &mut Errors, object: &Value) {
    let spec = part(object, "spec");
    let usages = list(spec, "/usages");
    if usages.is_empty() {
        errors.required("spec.usages");
    }
    for (place, usage) in usages.iter().filter_map(Value::as_str).enumerate() {
        if !USAGES.contains(&usage) {
            errors.not_supported(format!("spec.usages[{place}]"), usage, USAGES);
        }
    }
    let signer = field(spec, "signerName");
    match signer {
        "" => errors.required("spec.signerName"),
        "kubernetes.io/legacy-unknown" => {
            errors.invalid("spec.signerName", signer, "the legacy signerName is not allowed via this API version");
        }
        _ => signer_name(errors, signer),
    }
    let seconds = spec.get("expirationSeconds").and_then(Value::as_i64);
    if seconds.is_some_and(|seconds| seconds < 600) {
        let detail = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.invalid("spec.expirationSeconds", seconds.unwrap_or(0), detail);
    }
}

fn signer_name(errors: &mut Errors, signer: &str) {
    let Some((domain, path)) = signer.split_once('/').filter(|(_, path)| !path.contains('/')) else {
        let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        return errors.invalid("spec.signerName", signer, detail);
    };
    errors.each("spec.signerName", domain, names::dns_subdomain(domain));
    if !domain.contains('.') {
        errors.invalid("spec.signerName", domain, "should be a domain with at least two segments separated by dots");
    }
    errors.each("spec.signerName", path, names::dns_subdomain(path));
}

fn conditions(errors: &mut Errors, object: &Value) {
    let all = list(object, "/status/conditions");
    let has = |kind: &str| all.iter().any(|condition| text(condition, "/type") == kind);
    for (place, condition) in all.iter().enumerate() {
        let path = format!("status.conditions[{place}]");
        if field(condition, "type").is_empty() {
            errors.required(format!("{path}.type"));
        }
        if matches!(field(condition, "type"), "Approved" | "Denied" | "Failed") && field(condition, "status") != "True"
        {
            errors.not_supported(format!("{path}.status"), field(condition, "status"), &["True"]);
        }
        let twice = all[..place].iter().any(|other| field(other, "type") == field(condition, "type"));
        if twice {
            errors.duplicate(format!("{path}.type"), field(condition, "type"));
        }
    }
    if has("Approved") && has("Denied") {
        errors.invalid("status.conditions", "Denied", "Approved and Denied conditions are mutually exclusive");
    }
}

pub(crate) fn certificate_signing_request(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, false, names::dns_subdomain);
    spec_parts(&mut errors, object);
    errors.0
}

pub(crate) fn certificate_signing_request_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    conditions(&mut errors, new);
    errors.0
}

/// A certificate is given once, and what was approved or denied stays so.
pub(crate) fn certificate_signing_request_status_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    conditions(&mut errors, new);
    let has = |object: &Value, kind: &str| {
        list(object, "/status/conditions").iter().any(|condition| text(condition, "/type") == kind)
    };
    for kind in ["Approved", "Denied", "Failed"].into_iter().filter(|kind| has(old, kind) && !has(new, kind)) {
        errors.forbidden("status.conditions", format!("updates may not remove a condition of type {kind:?}"));
    }
    let (before, now) = (text(old, "/status/certificate"), text(new, "/status/certificate"));
    if !before.is_empty() && before != now {
        errors.forbidden("status.certificate", "updates may not modify existing certificate content");
    }
    errors.0
}
