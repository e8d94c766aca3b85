//! Containers of all three kinds: regular, init and ephemeral.

use super::handler::{self, Probe};
use super::volume::descending_path;
use super::{Errors, check_port, field, is_set, names, part, resources, security};
use crate::access::{boolean, integer, list};
use serde_json::Value;
use std::collections::HashSet;

/// What containers are checked against.
pub(super) struct Context<'a> {
    pub(super) spec: &'a Value,
    pub(super) grace_seconds: Option<i64>,
    /// A Pod is stricter than a template.
    pub(super) is_pod: bool,
}

pub(super) fn all(errors: &mut Errors, context: &Context<'_>, path: &str) {
    let (containers, init, ephemeral) = (
        list(context.spec, "/containers"),
        list(context.spec, "/initContainers"),
        list(context.spec, "/ephemeralContainers"),
    );
    let mut seen: HashSet<&str> = HashSet::new();
    if containers.is_empty() {
        errors.required(format!("{path}.containers"));
    }
    for (index, container) in containers.iter().enumerate() {
        let path = format!("{path}.containers[{index}]");
        common(errors, container, context, &path);
        unique_name(errors, container, &mut seen, &path);
        life(errors, container, context, &path);
        if is_set(container, "restartPolicy") && field(container, "restartPolicy") != "Always" {
            errors.not_supported(
                format!("{path}.restartPolicy"),
                field(container, "restartPolicy"),
                &["Always", "Never", "OnFailure"],
            );
        }
    }
    host_ports(errors, containers, &format!("{path}.containers"));
    for (index, container) in init.iter().enumerate() {
        let path = format!("{path}.initContainers[{index}]");
        common(errors, container, context, &path);
        unique_name(errors, container, &mut seen, &path);
        init_only(errors, container, context, &path);
        host_ports(errors, std::slice::from_ref(container), &path);
    }
    let others = seen.clone();
    for (index, container) in ephemeral.iter().enumerate() {
        let path = format!("{path}.ephemeralContainers[{index}]");
        common(errors, container, context, &path);
        unique_name(errors, container, &mut seen, &path);
        ephemeral_only(errors, container, &others, &path);
    }
}

fn unique_name<'a>(errors: &mut Errors, container: &'a Value, seen: &mut HashSet<&'a str>, path: &str) {
    let name = field(container, "name");
    if !name.is_empty() && !seen.insert(name) {
        errors.duplicate(format!("{path}.name"), name);
    }
}

fn life(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &str) {
    handler::lifecycle(errors, part(container, "lifecycle"), context.grace_seconds, &format!("{path}.lifecycle"));
    for (name, which) in
        [("livenessProbe", Probe::Liveness), ("readinessProbe", Probe::Readiness), ("startupProbe", Probe::Startup)]
    {
        handler::probe(errors, part(container, name), which, &format!("{path}.{name}"));
    }
}

fn init_only(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &str) {
    if is_set(container, "restartPolicy") && field(container, "restartPolicy") != "Always" {
        errors.not_supported(format!("{path}.restartPolicy"), field(container, "restartPolicy"), &["Always"]);
    }
    if field(container, "restartPolicy") == "Always" {
        life(errors, container, context, path);
        return;
    }
    for name in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
        if is_set(container, name) {
            let detail = "may not be set for init containers without restartPolicy=Always";
            errors.forbidden(format!("{path}.{name}"), detail);
        }
    }
}

fn ephemeral_only(errors: &mut Errors, container: &Value, others: &HashSet<&str>, path: &str) {
    let target = field(container, "targetContainerName");
    if !target.is_empty() && !others.contains(target) {
        errors.not_found(format!("{path}.targetContainerName"), target);
    }
    let detail = "cannot be set for an Ephemeral Container";
    for name in
        ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "resizePolicy", "restartPolicy"]
    {
        if is_set(container, name) {
            errors.forbidden(format!("{path}.{name}"), detail);
        }
    }
    if part(container, "resources").as_object().is_some_and(|resources| !resources.is_empty()) {
        errors.forbidden(format!("{path}.resources"), detail);
    }
    for (index, mount) in list(container, "/volumeMounts").iter().enumerate() {
        for name in ["subPath", "subPathExpr"] {
            if !field(mount, name).is_empty() {
                errors.forbidden(format!("{path}.volumeMounts[{index}].{name}"), detail);
            }
        }
    }
}

fn common(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &str) {
    let name = field(container, "name");
    if name.is_empty() {
        errors.required(format!("{path}.name"));
    } else {
        errors.each(&format!("{path}.name"), name, names::dns_label(name));
    }
    let image = field(container, "image");
    if image.is_empty() {
        errors.required(format!("{path}.image"));
    } else if context.is_pod && image.trim() != image {
        errors.invalid(format!("{path}.image"), image, "must not have leading or trailing whitespace");
    }
    errors.one_of(
        format!("{path}.terminationMessagePolicy"),
        field(container, "terminationMessagePolicy"),
        &["File", "FallbackToLogsOnError"],
    );
    ports(errors, list(container, "/ports"), &format!("{path}.ports"));
    environment(errors, container, path);
    mounts(errors, container, context, path);
    errors.one_of(
        format!("{path}.imagePullPolicy"),
        field(container, "imagePullPolicy"),
        &["Always", "IfNotPresent", "Never"],
    );
    resources::requirements(errors, part(container, "resources"), &format!("{path}.resources"));
    resize_policy(errors, container, context, &format!("{path}.resizePolicy"));
    security::container(errors, part(container, "securityContext"), context.spec, &format!("{path}.securityContext"));
}

fn resize_policy(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &str) {
    let mut seen = HashSet::new();
    for (index, policy) in list(container, "/resizePolicy").iter().enumerate() {
        let (resource, restart) = (field(policy, "resourceName"), field(policy, "restartPolicy"));
        if !seen.insert(resource) {
            errors.duplicate(format!("{path}[{index}]"), resource);
        }
        errors.one_of(path.to_owned(), resource, &["cpu", "memory"]);
        errors.one_of(path.to_owned(), restart, &["NotRequired", "RestartContainer"]);
        if field(context.spec, "restartPolicy") == "Never" && restart != "NotRequired" {
            errors.invalid(path, restart, "must be 'NotRequired' when `restartPolicy` is 'Never'");
        }
    }
}

fn ports(errors: &mut Errors, ports: &[Value], path: &str) {
    let mut seen = HashSet::new();
    for (index, port) in ports.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let name = field(port, "name");
        if !name.is_empty() {
            let messages = names::port_name(name);
            if messages.is_empty() && !seen.insert(name) {
                errors.duplicate(format!("{path}.name"), name);
            }
            errors.each(&format!("{path}.name"), name, messages);
        }
        match integer(port, "/containerPort").unwrap_or(0) {
            0 => errors.required(format!("{path}.containerPort")),
            number => check_port(errors, format!("{path}.containerPort"), number),
        }
        match integer(port, "/hostPort").unwrap_or(0) {
            0 => {}
            number => check_port(errors, format!("{path}.hostPort"), number),
        }
        errors.one_of(format!("{path}.protocol"), field(port, "protocol"), &["SCTP", "TCP", "UDP"]);
    }
}

/// One port of the host goes to one container.
fn host_ports(errors: &mut Errors, containers: &[Value], path: &str) {
    let mut seen = HashSet::new();
    for (outer, container) in containers.iter().enumerate() {
        for (inner, port) in list(container, "/ports").iter().enumerate() {
            let number = integer(port, "/hostPort").unwrap_or(0);
            let key = format!("{}/{}/{number}", field(port, "protocol"), field(port, "hostIP"));
            if number != 0 && !seen.insert(key.clone()) {
                errors.duplicate(format!("{path}[{outer}].ports[{inner}].hostPort"), key);
            }
        }
    }
}

fn environment(errors: &mut Errors, container: &Value, path: &str) {
    for (index, variable) in list(container, "/env").iter().enumerate() {
        let path = format!("{path}.env[{index}]");
        let name = field(variable, "name");
        if name.is_empty() {
            errors.required(format!("{path}.name"));
        } else {
            errors.each(&format!("{path}.name"), name, names::environment_name(name));
        }
        if is_set(variable, "valueFrom") {
            value_from(errors, variable, &format!("{path}.valueFrom"));
        }
    }
    for (index, source) in list(container, "/envFrom").iter().enumerate() {
        let path = format!("{path}.envFrom[{index}]");
        let prefix = field(source, "prefix");
        if !prefix.is_empty() {
            errors.each(&format!("{path}.prefix"), prefix, names::environment_name(prefix));
        }
        let set: Vec<&str> = ["configMapRef", "secretRef"].into_iter().filter(|kind| is_set(source, kind)).collect();
        for kind in &set {
            let name = field(part(source, kind), "name");
            errors.each(&format!("{path}.{kind}.name"), name, names::dns_subdomain(name));
        }
        match set.len() {
            0 => errors.invalid(path, "", "must specify one of: `configMapRef` or `secretRef`"),
            1 => {}
            _ => errors.invalid(path, "", "may not have more than one field specified at a time"),
        }
    }
}

fn value_from(errors: &mut Errors, variable: &Value, path: &str) {
    let source = part(variable, "valueFrom");
    let mut count = 0;
    for kind in ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"] {
        if !is_set(source, kind) {
            continue;
        }
        count += 1;
        let (inner, path) = (part(source, kind), format!("{path}.{kind}"));
        match kind {
            "fieldRef" => field_reference(errors, inner, ENVIRONMENT_FIELDS, &path),
            "resourceFieldRef" => resource_reference(errors, inner, false, &path),
            "configMapKeyRef" | "secretKeyRef" => {
                let (name, key) = (field(inner, "name"), field(inner, "key"));
                errors.each(&format!("{path}.name"), name, names::dns_subdomain(name));
                if key.is_empty() {
                    errors.required(format!("{path}.key"));
                } else {
                    errors.each(&format!("{path}.key"), key, names::config_key(key));
                }
            }
            _ => {}
        }
    }
    if count == 0 {
        let detail =
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
        errors.invalid(path, "", detail);
    } else if !field(variable, "value").is_empty() {
        errors.invalid(path, "", "may not be specified when `value` is not empty");
    } else if count > 1 {
        errors.invalid(path, "", "may not have more than one field specified at a time");
    }
}

pub(super) const ENVIRONMENT_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

pub(super) fn field_reference(errors: &mut Errors, reference: &Value, supported: &[&str], path: &str) {
    if field(reference, "apiVersion").is_empty() {
        errors.required(format!("{path}.apiVersion"));
        return;
    }
    let found = field(reference, "fieldPath");
    let path = format!("{path}.fieldPath");
    let subscript = |prefix: &str| {
        found.strip_prefix(prefix).and_then(|rest| rest.strip_prefix("['")).and_then(|rest| rest.strip_suffix("']"))
    };
    if found.is_empty() {
        errors.required(path);
    } else if let Some(key) = subscript("metadata.labels").or_else(|| subscript("metadata.annotations")) {
        errors.each(&path, key, names::qualified_name(key));
    } else if !supported.contains(&found) {
        let known = ENVIRONMENT_FIELDS.contains(&found) || matches!(found, "metadata.labels" | "metadata.annotations");
        if known {
            errors.not_supported(path, found, supported);
        } else {
            errors.invalid(path, found, format!("error converting fieldPath: field label not supported: {found}"));
        }
    }
}

pub(super) fn resource_reference(errors: &mut Errors, reference: &Value, of_volume: bool, path: &str) {
    const RESOURCES: &[&str] = &[
        "limits.cpu",
        "limits.ephemeral-storage",
        "limits.memory",
        "requests.cpu",
        "requests.ephemeral-storage",
        "requests.memory",
    ];
    if of_volume && field(reference, "containerName").is_empty() {
        errors.required(format!("{path}.containerName"));
    }
    let resource = field(reference, "resource");
    let huge = resource.starts_with("limits.hugepages-") || resource.starts_with("requests.hugepages-");
    if resource.is_empty() {
        errors.required(format!("{path}.resource"));
    } else if !RESOURCES.contains(&resource) && !huge {
        errors.not_supported(format!("{path}.resource"), resource, RESOURCES);
    }
}

fn mounts(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &str) {
    let volumes = list(context.spec, "/volumes");
    let devices = list(container, "/volumeDevices");
    let find = |name: &str| volumes.iter().find(|volume| field(volume, "name") == name);
    let mut seen = HashSet::new();
    for (index, mount) in list(container, "/volumeMounts").iter().enumerate() {
        let lists = format!("{path}.volumeMounts");
        let path = format!("{lists}[{index}]");
        let (name, target) = (field(mount, "name"), field(mount, "mountPath"));
        if name.is_empty() {
            errors.required(format!("{path}.name"));
        }
        if find(name).is_none() {
            errors.not_found(format!("{path}.name"), name);
        }
        if target.is_empty() {
            errors.required(format!("{path}.mountPath"));
        }
        if !seen.insert(target) {
            errors.invalid(format!("{path}.mountPath"), target, "must be unique");
        }
        if devices.iter().any(|device| field(device, "name") == name) {
            errors.invalid(format!("{path}.name"), name, "must not already exist in volumeDevices");
        }
        if devices.iter().any(|device| field(device, "devicePath") == target) {
            errors.invalid(format!("{path}.mountPath"), target, "must not already exist as a path in volumeDevices");
        }
        let (sub_path, expression) = (field(mount, "subPath"), field(mount, "subPathExpr"));
        if !sub_path.is_empty() {
            descending_path(errors, sub_path, &format!("{lists}.subPath"));
        }
        if !expression.is_empty() {
            if !sub_path.is_empty() {
                let detail = "subPathExpr and subPath are mutually exclusive";
                errors.invalid(format!("{path}.subPathExpr"), expression, detail);
            }
            descending_path(errors, expression, &format!("{lists}.subPathExpr"));
        }
        propagation(errors, mount, container, &format!("{lists}.mountPropagation"));
    }
    for (index, device) in devices.iter().enumerate() {
        let path = format!("{path}.volumeDevices[{index}]");
        let name = field(device, "name");
        match find(name) {
            None => errors.not_found(format!("{path}.name"), name),
            Some(volume) if !is_set(volume, "persistentVolumeClaim") && !is_set(volume, "ephemeral") => {
                let detail = "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode";
                errors.invalid(format!("{path}.name"), name, detail);
            }
            Some(_) => {}
        }
        if field(device, "devicePath").is_empty() {
            errors.required(format!("{path}.devicePath"));
        }
    }
}

fn propagation(errors: &mut Errors, mount: &Value, container: &Value, path: &str) {
    let mode = field(mount, "mountPropagation");
    if mode.is_empty() {
        return;
    }
    if !matches!(mode, "Bidirectional" | "HostToContainer" | "None") {
        errors.not_supported(path, mode, &["Bidirectional", "HostToContainer", "None"]);
    }
    if mode == "Bidirectional" && boolean(container, "/securityContext/privileged") != Some(true) {
        errors.forbidden(path, "Bidirectional mount propagation is available only to privileged containers");
    }
}
