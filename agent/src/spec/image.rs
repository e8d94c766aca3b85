//! Image names, pull policies and registry credentials. Pure.

use base64::Engine;
use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, Pod, Secret, Volume};
use oarlock_proto::cri;

/// The name with `:latest` where it has neither tag nor digest; Err with upstream's message for what is no name.
pub(crate) fn with_default_tag(image: &str) -> Result<String, String> {
    let bad = || format!("couldn't parse image name {image:?}: invalid reference format");
    let (named, digest) = match image.split_once('@') {
        Some((named, digest)) => (named, Some(digest)),
        None => (image, None),
    };
    if let Some(digest) = digest {
        let (algorithm, hex) = digest.split_once(':').ok_or_else(bad)?;
        if algorithm.is_empty() || hex.len() < 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
    }
    let slash = named.rfind('/').map_or(0, |at| at + 1);
    let (path, tag) = match named[slash..].rfind(':') {
        Some(colon) => (&named[..slash + colon], Some(&named[slash + colon + 1..])),
        None => (named, None),
    };
    let tag_ok = |tag: &str| {
        let mut bytes = tag.bytes();
        let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
        first && tag.len() <= 128 && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    if !path_ok(path) || tag.is_some_and(|tag| !tag_ok(tag)) {
        return Err(bad());
    }
    Ok(if tag.is_none() && digest.is_none() { format!("{image}:latest") } else { image.to_owned() })
}

/// Registry host (anything a host may be) and lower-case path components.
fn path_ok(path: &str) -> bool {
    let mut components = path.split('/').peekable();
    let first_is_host = path.contains('/') && components.peek().is_some_and(|first| is_host(first));
    if first_is_host {
        let host = components.next().unwrap_or_default();
        if host.is_empty() || !host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.:[]".contains(&b)) {
            return false;
        }
    }
    let component_ok = |component: &str| {
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        edge(component.bytes().next())
            && edge(component.bytes().last())
            && component.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
    };
    components.peek().is_some() && components.all(component_ok)
}

/// The registry that Docker's rules give a name.
pub(crate) fn registry_of(image: &str) -> &str {
    match image.split_once('/') {
        Some((first, _)) if is_host(first) => first,
        _ => "docker.io",
    }
}

/// Whether the part of a name before its first slash is a registry: it has a dot or a port, or is `localhost`, or has an
/// upper-case letter, which no repository may.
pub(crate) fn is_host(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

/// When an image is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// The policy given for an image; without one, Always for `:latest` and IfNotPresent for the rest.
pub(crate) fn pull_policy(policy: Option<&str>, image: &str) -> PullPolicy {
    match policy {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        _ => {
            let image = with_default_tag(image).unwrap_or_default();
            if image.ends_with(":latest") { PullPolicy::Always } else { PullPolicy::IfNotPresent }
        }
    }
}

/// The images that a container mounts as volumes, each once.
pub(crate) fn image_volumes<'a>(pod: &'a Pod, container: &Container) -> Vec<&'a ImageVolumeSource> {
    let mounted = |volume: &&Volume| container.volume_mounts.iter().flatten().any(|mount| mount.name == volume.name);
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()).filter(mounted);
    volumes.filter_map(|volume| volume.image.as_ref()).collect()
}

/// The image behind a volume of that name, if it is one.
pub(crate) fn image_volume<'a>(pod: &'a Pod, name: &str) -> Option<&'a ImageVolumeSource> {
    let mut volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.find(|volume| volume.name == name)?.image.as_ref()
}

/// The credentials among pull secrets that fit the image, most specific first.
pub(crate) fn credentials(image: &str, secrets: &[Secret]) -> Vec<cri::AuthConfig> {
    let registry = registry_of(image);
    let path = image.strip_prefix(registry).unwrap_or(image).trim_start_matches('/');
    let full = format!("{registry}/{path}");
    let mut found: Vec<(usize, cri::AuthConfig)> = Vec::new();
    for secret in secrets {
        for (server, auth) in entries(secret) {
            let key = normalise_server(&server);
            let fits = full == key || full.starts_with(&format!("{key}/")) || wildcard_fits(&key, registry);
            if fits && let Some(config) = auth_config(&auth) {
                found.push((key.len(), config));
            }
        }
    }
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, config)| config).collect()
}

/// `*.example.org` fits one more label.
fn wildcard_fits(key: &str, registry: &str) -> bool {
    let (key_labels, labels): (Vec<_>, Vec<_>) = (key.split('.').collect(), registry.split('.').collect());
    key.contains('*')
        && key_labels.len() == labels.len()
        && key_labels.iter().zip(labels).all(|(key, label)| *key == "*" || *key == label)
}

/// The server of a docker configuration without scheme and API version; Docker Hub's old names are one.
fn normalise_server(server: &str) -> String {
    let bare = server.trim_start_matches("https://").trim_start_matches("http://");
    let bare = bare.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches("/v2").trim_end_matches('/');
    match bare {
        "index.docker.io" | "registry-1.docker.io" | "docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

/// Server and credential of each entry of a pull secret.
fn entries(secret: &Secret) -> Vec<(String, serde_json::Value)> {
    let data = secret.data.as_ref();
    let of = |key: &str| data.and_then(|data| data.get(key)).and_then(|v| serde_json::from_slice(&v.0).ok());
    let new: Option<serde_json::Value> = of(".dockerconfigjson");
    let auths = new.map(|json| json["auths"].clone()).or_else(|| of(".dockercfg"));
    let Some(serde_json::Value::Object(map)) = auths else { return Vec::new() };
    map.into_iter().collect()
}

/// It is for whatever the image comes from: named, the server would have runtimes hold it back from the rest.
fn auth_config(auth: &serde_json::Value) -> Option<cri::AuthConfig> {
    let text = |name: &str| auth[name].as_str().unwrap_or_default().to_owned();
    let mut config = cri::AuthConfig {
        username: text("username"),
        password: text("password"),
        identity_token: text("identitytoken"),
        registry_token: text("registrytoken"),
        ..Default::default()
    };
    if config.username.is_empty() && !text("auth").is_empty() {
        let decoded = base64::engine::general_purpose::STANDARD.decode(text("auth")).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (username, password) = decoded.trim_end_matches('\0').split_once(':')?;
        config.username = username.to_owned();
        config.password = password.to_owned();
    }
    Some(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_tagged() {
        for (name, tagged) in
            [("busybox", "busybox:latest"), ("localhost:5000/a/b", "localhost:5000/a/b:latest"), ("a/b:1.2", "a/b:1.2")]
        {
            assert_eq!(with_default_tag(name).as_deref(), Ok(tagged));
        }
        let digest = format!("a@sha256:{}", "0".repeat(64));
        assert_eq!(with_default_tag(&digest), Ok(digest.clone()));
        for bad in ["", "Bad Name", "UPPER", "a:", "a//b", "a@sha256", "-a", "a:b:c d"] {
            assert!(with_default_tag(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_registry_of_a_name_is_the_one_that_the_runtime_asks() {
        for (image, registry) in [
            ("busybox", "docker.io"),
            ("team/app", "docker.io"),
            ("localhost/app", "localhost"),
            ("r.example/app", "r.example"),
            ("Registry/app", "Registry"),
        ] {
            assert_eq!(registry_of(image), registry);
        }
    }

    #[test]
    fn a_container_needs_the_images_that_it_mounts_itself() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {
            "volumes": [{"name": "a", "image": {"reference": "one"}}, {"name": "b", "image": {"reference": "two"}},
                        {"name": "c", "emptyDir": {}}],
            "containers": [{"name": "c", "volumeMounts": [
                {"name": "b", "mountPath": "/b"}, {"name": "b", "mountPath": "/b2"}, {"name": "c", "mountPath": "/c"}]}]}}))
        .unwrap();
        let needed = image_volumes(&pod, &pod.spec.as_ref().unwrap().containers[0]);
        let names: Vec<_> = needed.iter().filter_map(|image| image.reference.as_deref()).collect();
        assert_eq!(names, ["two"]);
        assert!(image_volume(&pod, "a").is_some() && image_volume(&pod, "c").is_none());
        assert_eq!(pull_policy(None, "two"), PullPolicy::Always);
        assert_eq!(pull_policy(None, "two:1"), PullPolicy::IfNotPresent);
        assert_eq!(pull_policy(Some("Never"), "two"), PullPolicy::Never);
    }

    #[test]
    fn the_most_specific_credential_comes_first() {
        let json = serde_json::json!({"auths": {
            "https://registry.example.org/v1/": {"auth": "dTpw"},
            "registry.example.org/team": {"username": "t", "password": "q"},
            "other.example.org": {"username": "x", "password": "y"},
        }});
        let secret = Secret {
            data: Some(
                [(".dockerconfigjson".to_owned(), k8s_openapi::ByteString(json.to_string().into_bytes()))].into(),
            ),
            ..Default::default()
        };
        let found = credentials("registry.example.org/team/app:1", &[secret]);
        let names: Vec<_> = found.iter().map(|config| (config.username.as_str(), config.password.as_str())).collect();
        assert_eq!(names, [("t", "q"), ("u", "p")]);
        assert!(found.iter().all(|config| config.server_address.is_empty()), "{found:?}");
    }
}
