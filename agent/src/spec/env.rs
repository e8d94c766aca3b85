//! A container's environment: service links, envFrom, env with its references, `$(VAR)`. Pure: objects come in fetched.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVarSource, Pod, Secret, Service};

use super::expand::expand;
use super::resources::{milli_value, value};

/// What an environment file holds, None where there is no such file, or what is wrong with it.
pub(crate) type EnvFile = Result<Option<BTreeMap<String, String>>, String>;

/// Everything that references may point at.
#[derive(Default)]
pub(crate) struct Sources<'a> {
    pub pod_ips: &'a [String],
    /// The node's address, and that of the other family if it has one.
    pub host_ips: &'a [String],
    pub node_name: &'a str,
    pub service_account: &'a str,
    /// By name; None for one that does not exist.
    pub config_maps: BTreeMap<String, Option<ConfigMap>>,
    pub secrets: BTreeMap<String, Option<Secret>>,
    /// By volume and path.
    pub env_files: BTreeMap<(String, String), EnvFile>,
    /// Variables for the services that the pod links to, in order.
    pub services: Vec<(String, String)>,
    /// Thousandths of each resource that the node can give.
    pub allocatable: BTreeMap<String, i64>,
}

/// The config maps and secrets that a container's environment names.
pub(crate) fn references(container: &Container) -> (Vec<String>, Vec<String>) {
    let (mut maps, mut secrets) = (Vec::new(), Vec::new());
    for from in container.env_from.iter().flatten() {
        maps.extend(from.config_map_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(from.secret_ref.as_ref().map(|r| r.name.clone()));
    }
    for source in container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()) {
        maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.clone()));
    }
    for list in [&mut maps, &mut secrets] {
        list.sort();
        list.dedup();
    }
    (maps, secrets)
}

/// The volume and path of each environment file that a container's environment names.
pub(crate) fn file_references(container: &Container) -> Vec<(String, String)> {
    let sources = container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()?.file_key_ref.as_ref());
    let mut files: Vec<_> = sources.map(|file| (file.volume_name.clone(), file.path.clone())).collect();
    files.sort();
    files.dedup();
    files
}

/// The environment in the order in which it is set, without repeats; Err is a CreateContainerConfigError message.
pub(crate) fn environment(
    pod: &Pod,
    container: &Container,
    sources: &Sources<'_>,
) -> Result<Vec<(String, String)>, String> {
    let mut env = Environment::default();
    for (name, value) in &sources.services {
        env.set(name, value.clone());
    }
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &from.config_map_ref {
            let found = sources.config_maps.get(&reference.name).and_then(Option::as_ref);
            let map = required("configmap", &reference.name, found, reference.optional)?;
            for (key, value) in map.and_then(|map| map.data.as_ref()).into_iter().flatten() {
                env.set(&format!("{prefix}{key}"), value.clone());
            }
        }
        if let Some(reference) = &from.secret_ref {
            let found = sources.secrets.get(&reference.name).and_then(Option::as_ref);
            let secret = required("secret", &reference.name, found, reference.optional)?;
            for (key, value) in secret.and_then(|secret| secret.data.as_ref()).into_iter().flatten() {
                env.set(&format!("{prefix}{key}"), String::from_utf8_lossy(&value.0).into_owned());
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (_, Some(source)) => match referenced(pod, container, source, sources)? {
                Some(value) => value,
                None => continue,
            },
            (value, None) => expand(value.as_deref().unwrap_or_default(), |name| env.get(name)),
        };
        env.set(&variable.name, value);
    }
    Ok(env.list)
}

#[derive(Default)]
struct Environment {
    list: Vec<(String, String)>,
    places: BTreeMap<String, usize>,
}

impl Environment {
    fn set(&mut self, name: &str, value: String) {
        match self.places.get(name) {
            Some(place) => self.list[*place].1 = value,
            None => {
                self.places.insert(name.to_owned(), self.list.len());
                self.list.push((name.to_owned(), value));
            }
        }
    }

    fn get(&self, name: &str) -> Option<String> {
        self.places.get(name).map(|place| self.list[*place].1.clone())
    }
}

fn required<'a, T>(
    kind: &str,
    name: &str,
    found: Option<&'a T>,
    optional: Option<bool>,
) -> Result<Option<&'a T>, String> {
    match found {
        None if !optional.unwrap_or(false) => Err(format!("{kind} {name:?} not found")),
        found => Ok(found),
    }
}

/// The value that a reference stands for; None leaves the variable out.
fn referenced(
    pod: &Pod,
    container: &Container,
    source: &EnvVarSource,
    sources: &Sources<'_>,
) -> Result<Option<String>, String> {
    if let Some(field) = &source.field_ref {
        return field_value(pod, &field.field_path, sources).map(Some);
    }
    if let Some(selector) = &source.resource_field_ref {
        let of = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => {
                let spec = pod.spec.as_ref();
                let found = spec.and_then(|spec| super::find_container(spec, name));
                found.ok_or_else(|| format!("container {name} not found"))?.0
            }
            None => container.clone(),
        };
        return resource_value(&of, selector, sources).map(Some);
    }
    if let Some(reference) = &source.config_map_key_ref {
        let found = sources.config_maps.get(&reference.name).and_then(Option::as_ref);
        let Some(map) = required("configmap", &reference.name, found, reference.optional)? else { return Ok(None) };
        let text = map.data.as_ref().and_then(|data| data.get(&reference.key)).cloned();
        return missing_key(text, "configmap", pod, (&reference.name, &reference.key), reference.optional);
    }
    if let Some(reference) = &source.secret_key_ref {
        let found = sources.secrets.get(&reference.name).and_then(Option::as_ref);
        let Some(secret) = required("secret", &reference.name, found, reference.optional)? else { return Ok(None) };
        let bytes = secret.data.as_ref().and_then(|data| data.get(&reference.key));
        let text = bytes.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned());
        return missing_key(text, "secret", pod, (&reference.name, &reference.key), reference.optional);
    }
    if let Some(reference) = &source.file_key_ref {
        let place = (reference.volume_name.clone(), reference.path.clone());
        let optional = reference.optional.unwrap_or(false);
        let shown = format!("env file {:?} of volume {:?}", reference.path, reference.volume_name);
        let found = match sources.env_files.get(&place) {
            Some(Ok(Some(file))) => file.get(&reference.key).cloned(),
            Some(Err(error)) => return Err(format!("couldn't parse {shown}: {error}")),
            Some(Ok(None)) | None if optional => None,
            Some(Ok(None)) | None => return Err(format!("couldn't find {shown}")),
        };
        return match found {
            None if !optional => Err(format!("couldn't find key {} in {shown}", reference.key)),
            found => Ok(found),
        };
    }
    Ok(Some(String::new()))
}

fn missing_key(
    text: Option<String>,
    kind: &str,
    pod: &Pod,
    (name, key): (&str, &str),
    optional: Option<bool>,
) -> Result<Option<String>, String> {
    match (text, optional.unwrap_or(false)) {
        (None, false) if kind == "secret" => {
            Err(format!("couldn't find key {key} in Secret {}/{name}", super::pod_namespace(pod)))
        }
        (None, false) => Err(format!("couldn't find key {key} in ConfigMap {}/{name}", super::pod_namespace(pod))),
        (text, _) => Ok(text),
    }
}

/// What a fieldRef stands for.
fn field_value(pod: &Pod, path: &str, sources: &Sources<'_>) -> Result<String, String> {
    let keyed = |map: &Option<BTreeMap<String, String>>, prefix: &str| {
        let key = path.strip_prefix(prefix)?.strip_suffix("']")?;
        Some(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default())
    };
    let text = match path {
        "metadata.name" => super::pod_name(pod).to_owned(),
        "metadata.namespace" => super::pod_namespace(pod).to_owned(),
        "metadata.uid" => super::pod_uid(pod).to_owned(),
        "spec.nodeName" => sources.node_name.to_owned(),
        "spec.serviceAccountName" => sources.service_account.to_owned(),
        "status.hostIP" => sources.host_ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => sources.host_ips.join(","),
        "status.podIP" => sources.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => sources.pod_ips.join(","),
        _ => {
            let label = keyed(&pod.metadata.labels, "metadata.labels['");
            let annotation = label.or_else(|| keyed(&pod.metadata.annotations, "metadata.annotations['"));
            annotation.ok_or_else(|| format!("unsupported fieldPath: {path}"))?
        }
    };
    Ok(text)
}

/// What a resourceFieldRef stands for: the amount divided by the divisor, rounded up.
fn resource_value(
    container: &Container,
    selector: &k8s_openapi::api::core::v1::ResourceFieldSelector,
    sources: &Sources<'_>,
) -> Result<String, String> {
    let (kind, name) = selector
        .resource
        .split_once('.')
        .filter(|(kind, _)| matches!(*kind, "limits" | "requests"))
        .ok_or_else(|| format!("unsupported container resource : {}", selector.resource))?;
    let resources = container.resources.clone().unwrap_or_default();
    let (limits, requests) = (resources.limits.unwrap_or_default(), resources.requests.unwrap_or_default());
    let own = if kind == "limits" { limits.get(name) } else { requests.get(name).or(limits.get(name)) };
    let amount_milli = match own {
        Some(quantity) => milli_value(quantity),
        None if kind == "limits" => sources.allocatable.get(name).copied().unwrap_or(0),
        None => 0,
    };
    let divisor = selector.divisor.as_ref().map_or(0, |divisor| match name {
        "cpu" => milli_value(divisor),
        _ => value(divisor).saturating_mul(1000),
    });
    let divisor = if divisor <= 0 { 1000 } else { divisor };
    Ok((amount_milli / divisor + i64::from(amount_milli % divisor != 0)).to_string())
}

/// The variables of the services that a pod sees: those of its namespace, and the cluster's own `kubernetes` service.
pub(crate) fn service_variables(services: &[Service], namespace: &str, links: bool) -> Vec<(String, String)> {
    let name = |service: &Service| service.metadata.name.clone().unwrap_or_default();
    let master =
        |service: &&Service| service.metadata.namespace.as_deref() == Some("default") && name(service) == "kubernetes";
    let mut visible: BTreeMap<String, &Service> = BTreeMap::new();
    for service in services.iter().filter(master) {
        visible.insert(name(service), service);
    }
    if links {
        for service in services.iter().filter(|s| s.metadata.namespace.as_deref() == Some(namespace)) {
            visible.insert(name(service), service);
        }
    }
    let mut variables = Vec::new();
    for (name, service) in visible {
        let Some(spec) = &service.spec else { continue };
        let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") else { continue };
        let ports = spec.ports.clone().unwrap_or_default();
        let Some(first) = ports.first() else { continue };
        let prefix = name.to_uppercase().replace('-', "_");
        let shown = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        variables.push((format!("{prefix}_SERVICE_HOST"), ip.to_owned()));
        variables.push((format!("{prefix}_SERVICE_PORT"), first.port.to_string()));
        for port in ports.iter().filter(|port| port.name.as_deref().is_some_and(|name| !name.is_empty())) {
            let port_name = port.name.as_deref().unwrap_or_default().to_uppercase().replace('-', "_");
            variables.push((format!("{prefix}_SERVICE_PORT_{port_name}"), port.port.to_string()));
        }
        for (index, port) in ports.iter().enumerate() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let url = format!("{}://{shown}:{}", protocol.to_lowercase(), port.port);
            let base = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
            if index == 0 {
                variables.push((format!("{prefix}_PORT"), url.clone()));
            }
            variables.push((base.clone(), url));
            variables.push((format!("{base}_PROTO"), protocol.to_lowercase()));
            variables.push((format!("{base}_PORT"), port.port.to_string()));
            variables.push((format!("{base}_ADDR"), ip.to_owned()));
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"app": "web"}},
            "spec": {"containers": []},
        }))
        .expect("a pod")
    }

    fn env(container: serde_json::Value, sources: &Sources<'_>) -> Result<Vec<(String, String)>, String> {
        let container: Container = serde_json::from_value(container).expect("a container");
        environment(&pod(), &container, sources)
    }

    #[test]
    fn later_definitions_win_and_references_expand() {
        let host_ips = ["192.0.2.1".to_owned(), "2001:db8::1".to_owned()];
        let mut sources = Sources { pod_ips: &["10.42.0.2".to_owned()], host_ips: &host_ips, ..Default::default() };
        let map: ConfigMap = serde_json::from_value(serde_json::json!({"data": {"A": "1", "B": "2"}})).unwrap();
        sources.config_maps.insert("m".into(), Some(map));
        let list = env(
            serde_json::json!({"name": "c",
                "envFrom": [{"prefix": "P_", "configMapRef": {"name": "m"}}],
                "env": [{"name": "X", "value": "$(P_A)/$(NO)"}, {"name": "P_B", "value": "3"},
                        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                        {"name": "H", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
                        {"name": "HS", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIPs"}}},
                        {"name": "L", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}}]}),
            &sources,
        )
        .expect("an environment");
        let text: Vec<String> = list.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            text,
            ["P_A=1", "P_B=3", "X=1/$(NO)", "IP=10.42.0.2", "H=192.0.2.1", "HS=192.0.2.1,2001:db8::1", "L=web"]
        );
    }

    #[test]
    fn a_missing_object_is_an_error_unless_optional() {
        let mut sources = Sources::default();
        sources.secrets.insert("s".into(), None);
        let with = |optional: bool| {
            serde_json::json!({"name": "c", "env": [{"name": "X", "valueFrom":
                {"secretKeyRef": {"name": "s", "key": "k", "optional": optional}}}]})
        };
        assert_eq!(env(with(false), &sources), Err("secret \"s\" not found".to_owned()));
        assert_eq!(env(with(true), &sources), Ok(Vec::new()));
    }

    #[test]
    fn resources_are_divided_and_fall_back_to_the_node() {
        let sources = Sources { allocatable: [("memory".to_owned(), 8_000_000)].into(), ..Default::default() };
        let list = env(
            serde_json::json!({"name": "c", "resources": {"limits": {"cpu": "1500m"}},
                "env": [{"name": "C", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                        {"name": "M", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
                        {"name": "N", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1k"}}}]}),
            &sources,
        )
        .expect("an environment");
        assert_eq!(list.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>(), ["2", "1500", "8"]);
    }

    #[test]
    fn service_links_cover_own_namespace_and_the_api() {
        let service = |ns: &str, name: &str| -> Service {
            serde_json::from_value(serde_json::json!({"metadata": {"name": name, "namespace": ns},
                "spec": {"clusterIP": "10.43.0.5", "ports": [{"port": 80, "name": "http"}]}}))
            .expect("a service")
        };
        let services = [service("default", "kubernetes"), service("ns", "my-web"), service("other", "hidden")];
        let names: Vec<String> = service_variables(&services, "ns", true).into_iter().map(|(name, _)| name).collect();
        assert!(names.contains(&"KUBERNETES_SERVICE_HOST".to_owned()));
        assert!(names.contains(&"MY_WEB_SERVICE_PORT_HTTP".to_owned()));
        assert!(names.contains(&"MY_WEB_PORT_80_TCP_ADDR".to_owned()));
        assert!(!names.iter().any(|name| name.starts_with("HIDDEN")));
        assert!(!service_variables(&services, "ns", false).iter().any(|(name, _)| name.starts_with("MY_WEB")));
    }
}
