//! ConfigMaps and Secrets.

use super::metadata::{object_meta, object_meta_update};
use super::{Errors, field, names};
use crate::FieldError;
use crate::access::{boolean, entries, equal};
use base64::Engine;
use serde_json::Value;

const MOST_BYTES: usize = 1024 * 1024;
const IMMUTABLE_SET: &str = "field is immutable when `immutable` is set";

pub(crate) fn config_map(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    config_map_data(&mut errors, object);
    errors.0
}

pub(crate) fn config_map_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    frozen(&mut errors, new, old, &["data", "binaryData"]);
    config_map_data(&mut errors, new);
    errors.0
}

fn config_map_data(errors: &mut Errors, object: &Value) {
    let mut size = 0;
    for (key, value) in entries(object, "/data") {
        errors.each(&format!("data[{key}]"), key, names::config_key(key));
        if object.get("binaryData").and_then(|data| data.get(key)).is_some() {
            errors.invalid(format!("data[{key}]"), key.as_str(), "duplicate of key present in binaryData");
        }
        size += value.as_str().unwrap_or_default().len();
    }
    for (key, value) in entries(object, "/binaryData") {
        errors.each(&format!("binaryData[{key}]"), key, names::config_key(key));
        size += decoded_length(value);
    }
    if size > MOST_BYTES {
        errors.push(FieldError::too_long("", MOST_BYTES));
    }
}

fn decoded_length(value: &Value) -> usize {
    let text = value.as_str().unwrap_or_default();
    text.len() / 4 * 3 - text.bytes().rev().take(2).filter(|byte| *byte == b'=').count().min(text.len())
}

/// Once `immutable` is set, it stays set and so does the data.
fn frozen(errors: &mut Errors, new: &Value, old: &Value, fields: &[&str]) {
    if boolean(old, "/immutable") != Some(true) {
        return;
    }
    if boolean(new, "/immutable") != Some(true) {
        errors.forbidden("immutable", IMMUTABLE_SET);
    }
    for name in fields {
        if !equal(new.get(*name), old.get(*name)) {
            errors.forbidden(*name, IMMUTABLE_SET);
        }
    }
}

pub(crate) fn secret(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta(&mut errors, object, true, names::dns_subdomain);
    secret_data(&mut errors, object);
    errors.0
}

pub(crate) fn secret_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    object_meta_update(&mut errors, new, old);
    errors.immutable("type", new.get("type"), old.get("type"));
    frozen(&mut errors, new, old, &["data"]);
    secret_data(&mut errors, new);
    errors.0
}

fn secret_data(errors: &mut Errors, object: &Value) {
    let mut size = 0;
    for (key, value) in entries(object, "/data") {
        errors.each(&format!("data[{key}]"), key, names::config_key(key));
        size += decoded_length(value);
    }
    if size > MOST_BYTES {
        errors.push(FieldError::too_long("data", MOST_BYTES));
    }
    let data = |key: &str| object.get("data").and_then(|data| data.get(key)).and_then(Value::as_str);
    let needs = |errors: &mut Errors, key: &str| {
        if data(key).is_none() {
            errors.required(format!("data[{key}]"));
        }
    };
    match field(object, "type") {
        "kubernetes.io/service-account-token" => {
            const ACCOUNT: &str = "kubernetes.io/service-account.name";
            let annotations = object.pointer("/metadata/annotations");
            let account = annotations.and_then(|all| all.get(ACCOUNT)).and_then(Value::as_str);
            if account.unwrap_or_default().is_empty() {
                errors.required(format!("metadata.annotations[{ACCOUNT}]"));
            }
        }
        kind @ ("kubernetes.io/dockercfg" | "kubernetes.io/dockerconfigjson") => {
            let key = if kind == "kubernetes.io/dockercfg" { ".dockercfg" } else { ".dockerconfigjson" };
            match data(key) {
                None => errors.required(format!("data[{key}]")),
                Some(text) => {
                    let decoded = base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default();
                    if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&decoded) {
                        let detail = if error.is_eof() {
                            "unexpected end of JSON input".to_owned()
                        } else {
                            format!("invalid JSON at line {} column {}", error.line(), error.column())
                        };
                        errors.invalid(format!("data[{key}]"), "<secret contents redacted>", detail);
                    }
                }
            }
        }
        "kubernetes.io/basic-auth" if data("username").is_none() && data("password").is_none() => {
            errors.required("data[username]");
            errors.required("data[password]");
        }
        "kubernetes.io/ssh-auth" if data("ssh-privatekey").unwrap_or_default().is_empty() => {
            errors.required("data[ssh-privatekey]");
        }
        "kubernetes.io/tls" => {
            needs(errors, "tls.crt");
            needs(errors, "tls.key");
        }
        _ => {}
    }
}
