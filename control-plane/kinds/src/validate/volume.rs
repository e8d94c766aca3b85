//! Volumes of a pod.

use super::container::{field_reference, resource_reference};
use super::{Errors, field, is_set, names, part};
use crate::access::{integer, list};
use oarlock_schema::quantity::Quantity;
use serde_json::Value;
use std::collections::HashSet;

pub(super) fn all(errors: &mut Errors, spec: &Value, path: &str) {
    let mut seen = HashSet::new();
    for (index, volume) in list(spec, "/volumes").iter().enumerate() {
        let path = format!("{path}.volumes[{index}]");
        let name = field(volume, "name");
        if name.is_empty() {
            errors.required(format!("{path}.name"));
        } else if !seen.insert(name) {
            errors.duplicate(format!("{path}.name"), name);
        } else {
            errors.each(&format!("{path}.name"), name, names::dns_label(name));
        }
        let sources = volume.as_object().into_iter().flatten();
        let mut sources = sources.filter(|(key, value)| *key != "name" && !value.is_null());
        match sources.next() {
            None => errors.required_as(&path, "must specify a volume type"),
            Some((kind, inner)) => source(errors, kind, inner, &format!("{path}.{kind}")),
        }
        for (kind, _) in sources {
            errors.forbidden(format!("{path}.{kind}"), "may not specify more than 1 volume type");
        }
    }
}

fn needs(errors: &mut Errors, source: &Value, fields: &[&str], path: &str) {
    for name in fields {
        if field(source, name).is_empty() {
            errors.required(format!("{path}.{name}"));
        }
    }
}

fn source(errors: &mut Errors, kind: &str, source: &Value, path: &str) {
    match kind {
        "emptyDir" => {
            let limit = source.get("sizeLimit").and_then(|limit| Quantity::from_json(limit).ok());
            if limit.is_some_and(|limit| limit.sign() < 0) {
                errors.forbidden(format!("{path}.sizeLimit"), "SizeLimit field must be a valid resource quantity");
            }
        }
        "hostPath" => host_path(errors, source, path),
        "secret" => {
            needs(errors, source, &["secretName"], path);
            files(errors, source, path);
        }
        "configMap" => {
            needs(errors, source, &["name"], path);
            files(errors, source, path);
        }
        "downwardAPI" => {
            mode(errors, source, "defaultMode", path);
            downward_files(errors, source, path);
        }
        "projected" => projected(errors, source, path),
        "persistentVolumeClaim" => needs(errors, source, &["claimName"], path),
        "nfs" => {
            needs(errors, source, &["server", "path"], path);
            let target = field(source, "path");
            if !target.is_empty() && !target.starts_with('/') {
                errors.invalid(format!("{path}.path"), target, "must be an absolute path");
            }
        }
        "csi" => needs(errors, source, &["driver"], path),
        "ephemeral" if !is_set(source, "volumeClaimTemplate") => {
            errors.required(format!("{path}.volumeClaimTemplate"));
        }
        "image" => errors.one_of(
            format!("{path}.pullPolicy"),
            field(source, "pullPolicy"),
            &["Always", "IfNotPresent", "Never"],
        ),
        _ => {}
    }
}

fn host_path(errors: &mut Errors, source: &Value, path: &str) {
    const TYPES: &[&str] =
        &["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
    let target = field(source, "path");
    if target.is_empty() {
        errors.required(format!("{path}.path"));
        return;
    }
    no_backsteps(errors, target, &format!("{path}.path"));
    let kind = field(source, "type");
    if !TYPES.contains(&kind) {
        errors.not_supported(format!("{path}.type"), kind, TYPES);
    }
}

fn mode(errors: &mut Errors, source: &Value, name: &str, path: &str) {
    if let Some(mode) = integer(source, &format!("/{name}")).filter(|mode| !(0..=0o777).contains(mode)) {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.invalid(format!("{path}.{name}"), mode, detail);
    }
}

/// `defaultMode` and `items` of secrets and config maps.
fn files(errors: &mut Errors, source: &Value, path: &str) {
    mode(errors, source, "defaultMode", path);
    for (index, item) in list(source, "/items").iter().enumerate() {
        let path = format!("{path}.items[{index}]");
        needs(errors, item, &["key"], &path);
        file_path(errors, item, &path);
        mode(errors, item, "mode", &path);
    }
}

fn file_path(errors: &mut Errors, item: &Value, path: &str) {
    let target = field(item, "path");
    let path = format!("{path}.path");
    if target.is_empty() {
        errors.required(path);
        return;
    }
    descending_path(errors, target, &path);
    // Longer forms than the bare parent are the caller's own names, reserved for atomic updates.
    if target.starts_with("..") && !target.starts_with("../") {
        errors.invalid(path, target, "must not start with '..'");
    }
}

/// A relative path that stays below where it starts.
pub(super) fn descending_path(errors: &mut Errors, target: &str, path: &str) {
    if target.starts_with('/') {
        errors.invalid(path, target, "must be a relative path");
    }
    no_backsteps(errors, target, path);
}

fn no_backsteps(errors: &mut Errors, target: &str, path: &str) {
    if target.split('/').any(|part| part == "..") {
        errors.invalid(path, target, "must not contain '..'");
    }
}

fn downward_files(errors: &mut Errors, source: &Value, path: &str) {
    const FIELDS: &[&str] =
        &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
    for (index, item) in list(source, "/items").iter().enumerate() {
        let path = format!("{path}.items[{index}]");
        file_path(errors, item, &path);
        match (is_set(item, "fieldRef"), is_set(item, "resourceFieldRef")) {
            (true, true) => {
                errors.invalid(&path, "resource", "fieldRef and resourceFieldRef can not be specified simultaneously");
            }
            (true, false) => field_reference(errors, part(item, "fieldRef"), FIELDS, &format!("{path}.fieldRef")),
            (false, true) => {
                let reference = part(item, "resourceFieldRef");
                resource_reference(errors, reference, true, &format!("{path}.resourceFieldRef"));
            }
            (false, false) => errors.required_as(&path, "one of fieldRef and resourceFieldRef is required"),
        }
        mode(errors, item, "mode", &path);
    }
}

fn projected(errors: &mut Errors, source: &Value, path: &str) {
    mode(errors, source, "defaultMode", path);
    let mut seen: HashSet<String> = HashSet::new();
    for (index, projection) in list(source, "/sources").iter().enumerate() {
        let path = format!("{path}.sources[{index}]");
        let kinds: Vec<&str> =
            ["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"]
                .into_iter()
                .filter(|kind| is_set(projection, kind))
                .collect();
        let Some((first, rest)) = kinds.split_first() else {
            errors.required_as(path, "must specify at least one source");
            continue;
        };
        for kind in rest {
            errors.forbidden(format!("{path}.{kind}"), "may not specify more than 1 volume type");
        }
        let (inner, path) = (part(projection, first), format!("{path}.{first}"));
        match *first {
            "secret" | "configMap" => {
                needs(errors, inner, &["name"], &path);
                files(errors, inner, &path);
            }
            "downwardAPI" => downward_files(errors, inner, &path),
            "serviceAccountToken" => {
                let seconds = integer(inner, "/expirationSeconds").unwrap_or(0);
                if seconds < 600 {
                    let detail = "may not specify a duration less than 10 minutes";
                    errors.invalid(format!("{path}.expirationSeconds"), seconds, detail);
                }
                if seconds > 1 << 32 {
                    let detail = "may not specify a duration larger than 2^32 seconds";
                    errors.invalid(format!("{path}.expirationSeconds"), seconds, detail);
                }
                needs(errors, inner, &["path"], &path);
            }
            _ => {}
        }
        let own =
            [field(inner, "path")].into_iter().chain(list(inner, "/items").iter().map(|item| field(item, "path")));
        for target in own.filter(|target| !target.is_empty()) {
            if !seen.insert(target.to_owned()) {
                errors.invalid(&path, target, "conflicting duplicate paths");
            }
        }
    }
}
