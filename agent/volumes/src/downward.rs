//! The downward API: a pod's own fields and resources as text. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};

use crate::error::VolumeError;
use crate::manager::Allocatable;

/// The text of a fieldRef in a volume.
pub(crate) fn field(pod: &Pod, path: &str) -> Result<String, VolumeError> {
    let metadata = &pod.metadata;
    if let Some((map_path, key)) = subscript(path) {
        let map = match map_path {
            "metadata.annotations" => metadata.annotations.as_ref(),
            "metadata.labels" => metadata.labels.as_ref(),
            _ => return Err(unsupported(path)),
        };
        return Ok(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    match path {
        "metadata.name" => Ok(metadata.name.clone().unwrap_or_default()),
        "metadata.namespace" => Ok(metadata.namespace.clone().unwrap_or_default()),
        "metadata.uid" => Ok(metadata.uid.clone().unwrap_or_default()),
        "metadata.labels" => Ok(format_map(metadata.labels.as_ref())),
        "metadata.annotations" => Ok(format_map(metadata.annotations.as_ref())),
        _ => Err(unsupported(path)),
    }
}

fn unsupported(path: &str) -> VolumeError {
    VolumeError::Invalid { message: format!("unsupported fieldPath: {path}") }
}

/// Splits `metadata.labels['key']`.
fn subscript(path: &str) -> Option<(&str, &str)> {
    path.strip_suffix("']")?.split_once("['")
}

/// `key="value"` lines in key order, without a last newline.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", quote(value))).collect();
    lines.join("\n")
}

/// Quotes as Go's `%q` does, which is what readers of these files expect.
fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x0b' => out.push_str("\\v"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_control() || is_invisible(c) => {
                let code = c as u32;
                out.push_str(&if code <= 0xffff { format!("\\u{code:04x}") } else { format!("\\U{code:08x}") });
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Separators and format characters that Go does not count as printable.
fn is_invisible(c: char) -> bool {
    (c.is_whitespace() && c != ' ')
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2064}' | '\u{feff}' | '\u{ad}')
        || matches!(c as u32, 0xe000..=0xf8ff | 0xf0000..=0x10ffff)
}

/// The text of a resourceFieldRef: the container's limit or request, divided by the divisor and rounded up.
pub(crate) fn resource(
    pod: &Pod,
    selector: &ResourceFieldSelector,
    allocatable: &Allocatable,
) -> Result<String, VolumeError> {
    let name = selector.container_name.as_deref().unwrap_or_default();
    let container = find_container(pod, name)
        .ok_or_else(|| VolumeError::Invalid { message: format!("container {name} not found") })?;
    let (kind, resource) = selector.resource.split_once('.').unwrap_or(("", ""));
    let named = match kind {
        "limits" => container.resources.as_ref().and_then(|resources| resources.limits.as_ref()),
        "requests" => container.resources.as_ref().and_then(|resources| resources.requests.as_ref()),
        _ => {
            return Err(VolumeError::Invalid {
                message: format!("unsupported container resource : {}", selector.resource),
            });
        }
    };
    let stated = named.and_then(|map| map.get(resource)).and_then(|quantity| oarlock_quantity::milli(&quantity.0));
    let capped = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let fallback = || match (kind, resource) {
        ("limits", "cpu") => capped(allocatable.cpu_millis),
        ("limits", "memory") => capped(allocatable.memory_bytes.saturating_mul(1000)),
        ("limits", "ephemeral-storage") => capped(allocatable.ephemeral_storage_bytes.saturating_mul(1000)),
        _ => 0,
    };
    let known = matches!(resource, "cpu" | "memory" | "ephemeral-storage") || resource.starts_with("hugepages-");
    if !known {
        return Err(VolumeError::Invalid {
            message: format!("unsupported container resource : {}", selector.resource),
        });
    }
    let value = stated.filter(|value| *value != 0).unwrap_or_else(fallback);
    let divisor =
        selector.divisor.as_ref().and_then(|quantity| oarlock_quantity::milli(&quantity.0)).filter(|d| *d > 0);
    let divisor = divisor.unwrap_or(1000);
    Ok((value / divisor + i64::from(value % divisor != 0)).to_string())
}

fn find_container<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    spec.containers.iter().chain(spec.init_containers.iter().flatten()).find(|container| container.name == name)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodSpec, ResourceRequirements};
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::*;

    fn pod() -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some("web".into());
        pod.metadata.labels = Some([("b".into(), "2".into()), ("a".into(), "x\"y\n\u{1}é".into())].into());
        pod.metadata.annotations = Some([("note/one".into(), "hello".into())].into());
        let resources = ResourceRequirements {
            limits: Some([("cpu".to_string(), Quantity("1500m".into()))].into()),
            requests: Some([("memory".to_string(), Quantity("65Mi".into()))].into()),
            ..Default::default()
        };
        pod.spec = Some(PodSpec {
            containers: vec![Container { name: "c".into(), resources: Some(resources), ..Default::default() }],
            ..Default::default()
        });
        pod
    }

    fn selector(resource: &str, divisor: Option<&str>) -> ResourceFieldSelector {
        ResourceFieldSelector {
            container_name: Some("c".into()),
            resource: resource.into(),
            divisor: divisor.map(|d| Quantity(d.into())),
        }
    }

    #[test]
    fn labels_are_sorted_and_quoted() {
        assert_eq!(field(&pod(), "metadata.labels").unwrap(), "a=\"x\\\"y\\n\\x01é\"\nb=\"2\"");
        assert_eq!(field(&pod(), "metadata.annotations['note/one']").unwrap(), "hello");
        assert_eq!(field(&pod(), "metadata.labels['none']").unwrap(), "");
        assert!(field(&pod(), "spec.nodeName").is_err());
    }

    #[test]
    fn resources_are_divided_and_rounded_up() {
        let none = Allocatable { cpu_millis: 4000, memory_bytes: 1 << 30, ephemeral_storage_bytes: 7 };
        let text = |resource, divisor| super::resource(&pod(), &selector(resource, divisor), &none).unwrap();
        assert_eq!(text("limits.cpu", None), "2");
        assert_eq!(text("limits.cpu", Some("1m")), "1500");
        assert_eq!(text("limits.cpu", Some("0")), "2");
        assert_eq!(text("requests.memory", Some("1Mi")), "65");
        assert_eq!(text("limits.memory", Some("1Gi")), "1");
        assert_eq!(text("requests.cpu", None), "0");
        assert!(super::resource(&pod(), &selector("limits.gpu", None), &none).is_err());
    }
}
