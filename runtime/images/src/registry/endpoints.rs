//! Which places are asked for an image, in which order, and how each is reached. Reads configuration; asks no registry.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

use super::hosts::{self, Host, Tls};
use crate::{Auth, Credential, ImageError, Reference, RegistryConfig, credentials};

/// What clients call this registry is not the name of its host.
const NAMED_OTHERWISE: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// One place.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// `https://host[:port]/v2`; a repository's name follows.
    pub(super) base: String,
    /// `host[:port]`, for messages.
    pub(super) name: String,
    /// May give content.
    pub(super) pull: bool,
    /// May say which content a tag names.
    pub(super) resolve: bool,
    pub(super) tls: Tls,
    pub(super) headers: Vec<(String, String)>,
    pub(super) dial_limit: Option<Duration>,
    /// The registry that it stands for, which it is told.
    pub(super) stands_for: Option<String>,
    pub(super) auth: Option<Auth>,
    /// Where it is configured, for messages.
    pub(super) file: Option<PathBuf>,
}

/// The places for an image: mirrors of the configuration, then what the hosts directory has for the registry, else the
/// registry itself.
pub(super) fn endpoints(
    config: &RegistryConfig,
    reference: &Reference,
    credential: Option<&Credential>,
) -> Result<Vec<Endpoint>, ImageError> {
    let mut endpoints = Vec::new();
    for rule in &config.mirrors {
        if rule.registry == reference.registry || rule.registry == "*" {
            for mirror in &rule.endpoints {
                endpoints.push(Endpoint {
                    auth: known(config, bare(mirror), &reference.repository)?,
                    ..of_mirror(config, mirror, reference)
                });
            }
        }
    }
    let own = |host: &str| match credential {
        Some(credential) => Ok(is_for(credential, host).then(|| credential.auth.clone())),
        None => known(config, &reference.registry, &reference.repository),
    };
    let mut hosts = hosts::find(&config.hosts_dirs, &reference.registry)?;
    let Some(server) = hosts.pop() else {
        endpoints.push(Endpoint { auth: own(&reference.registry)?, ..of_registry(config, &reference.registry) });
        return Ok(endpoints);
    };
    for host in hosts {
        let endpoint = of_host(&host, reference)?;
        // Whoever stands for a registry by the administrator's word is shown its password; a token is for one alone.
        let auth = match known(config, &endpoint.name, &reference.repository)? {
            None => own(&endpoint.name)?.filter(|auth| !matches!(auth, Auth::Bearer(_))),
            known => known,
        };
        endpoints.push(Endpoint { auth, ..endpoint });
    }
    let server = match server.address {
        Some(_) => of_host(&server, reference)?,
        None => {
            let plain = of_registry(config, &reference.registry);
            let base = if server.tls.is_set() { plain.base.replacen("http://", "https://", 1) } else { plain.base };
            Endpoint { base, name: plain.name, stands_for: None, ..laid_over(&server) }
        }
    };
    endpoints.push(Endpoint { auth: own(&server.name)?, ..server });
    Ok(endpoints)
}

/// Whether a credential may be shown to a host: whoever brings it may have named the only one.
fn is_for(credential: &Credential, host: &str) -> bool {
    let Some(server) = &credential.server else { return true };
    let same = |host: &str| match host {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => NAMED_OTHERWISE.0.to_owned(),
        other => other.to_ascii_lowercase(),
    };
    let server = bare(server).split('/').next().unwrap_or_default();
    same(server) == same(host)
}

fn known(config: &RegistryConfig, registry: &str, repository: &str) -> Result<Option<Auth>, ImageError> {
    config.credentials.as_deref().map_or(Ok(None), |file| credentials::find(file, registry, repository))
}

fn bare(endpoint: &str) -> &str {
    let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://")).unwrap_or(endpoint);
    host.trim_end_matches('/')
}

/// A mirror of the configuration, which may say how it is spoken to.
fn of_mirror(config: &RegistryConfig, endpoint: &str, reference: &Reference) -> Endpoint {
    let host = bare(endpoint).trim_end_matches("/v2");
    let explicit = endpoint.starts_with("http://").then_some(true);
    let explicit = explicit.or_else(|| endpoint.starts_with("https://").then_some(false));
    let stands_for = (!is_of(reference, host)).then(|| reference.registry.clone());
    Endpoint { stands_for, ..plain(host, host, explicit.unwrap_or_else(|| may_be_plain(config, host))) }
}

/// Whether a host is the registry's own.
fn is_of(reference: &Reference, host: &str) -> bool {
    host == reference.registry || (reference.registry.as_str(), host) == NAMED_OTHERWISE
}

fn of_registry(config: &RegistryConfig, registry: &str) -> Endpoint {
    let host = if registry == NAMED_OTHERWISE.0 { NAMED_OTHERWISE.1 } else { registry };
    plain(host, registry, may_be_plain(config, registry))
}

fn plain(host: &str, name: &str, http: bool) -> Endpoint {
    let scheme = if http { "http" } else { "https" };
    Endpoint {
        base: format!("{scheme}://{host}/v2"),
        name: name.to_owned(),
        pull: true,
        resolve: true,
        tls: Tls::default(),
        headers: Vec::new(),
        dial_limit: None,
        stands_for: None,
        auth: None,
        file: None,
    }
}

fn laid_over(host: &Host) -> Endpoint {
    Endpoint {
        pull: host.pull,
        resolve: host.resolve,
        tls: host.tls.clone(),
        headers: host.headers.clone(),
        dial_limit: host.dial_limit,
        file: Some(host.file.clone()),
        ..plain("", "", false)
    }
}

fn of_host(host: &Host, reference: &Reference) -> Result<Endpoint, ImageError> {
    let address = host.address.as_deref().unwrap_or_default();
    let wrong = |problem: &str| hosts::invalid(&host.file, &format!("{address:?}"), problem);
    let whole = if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
    let url = Url::parse(&whole).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("must be an http or https address without a query"));
    }
    let name = match (url.host_str(), url.port()) {
        (None, _) => return Err(wrong("names no host")),
        (Some(host), None) => host.to_owned(),
        (Some(host), Some(port)) => format!("{host}:{port}"),
    };
    let path = url.path().trim_end_matches('/');
    let version = if host.override_path || path.ends_with("/v2") { "" } else { "/v2" };
    let same = is_of(reference, &name);
    Ok(Endpoint {
        base: format!("{}://{name}{path}{version}", url.scheme()),
        stands_for: (!same).then(|| reference.registry.clone()),
        name,
        ..laid_over(host)
    })
}

fn may_be_plain(config: &RegistryConfig, host: &str) -> bool {
    is_plain(&config.plain_http, host)
}

pub(super) fn is_plain(configured: &[String], host: &str) -> bool {
    is_loopback(host) || configured.iter().any(|known| known == host)
}

/// Nobody else can listen in or answer there.
pub(super) fn is_loopback(host: &str) -> bool {
    let host = host.split('/').next().unwrap_or(host);
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MirrorRule;

    fn bases(config: &RegistryConfig, image: &str) -> Vec<String> {
        let found = endpoints(config, &Reference::parse(image).unwrap(), None).unwrap();
        found.into_iter().map(|endpoint| endpoint.base).collect()
    }

    #[test]
    fn plain_http_is_for_loopback_and_configured_hosts_only() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.8.0.1", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example.org", "10.0.0.1:5000", "example.org:80", "127.0.0.1.example.org"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn mirrors_come_before_the_hosts_directory_and_it_in_place_of_the_registry() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("r.example");
        std::fs::create_dir(&own).unwrap();
        let content = "server = \"https://up.example/base\"\n[host.\"http://m.example:5000\"]\n\
                       [host.\"https://p.example/api/proxy\"]\noverride_path = true\n";
        std::fs::write(own.join("hosts.toml"), content).unwrap();
        let config = RegistryConfig {
            mirrors: vec![MirrorRule {
                registry: "r.example".into(),
                endpoints: vec!["first.example".into(), "http://second.example/v2/".into()],
            }],
            hosts_dirs: vec![directory.path().into()],
            ..RegistryConfig::default()
        };
        let expected = [
            "https://first.example/v2",
            "http://second.example/v2",
            "http://m.example:5000/v2",
            "https://p.example/api/proxy",
            "https://up.example/base/v2",
        ];
        assert_eq!(bases(&config, "r.example/a/b:1"), expected);
        assert_eq!(bases(&config, "other.example/a"), ["https://other.example/v2"]);
        assert_eq!(bases(&config, "busybox"), ["https://registry-1.docker.io/v2"]);
        let found = endpoints(&config, &Reference::parse("r.example/a").unwrap(), None).unwrap();
        assert_eq!(found[0].stands_for.as_deref(), Some("r.example"));
        assert_eq!(found[2].stands_for.as_deref(), Some("r.example"));

        assert_eq!(found[4].stands_for.as_deref(), Some("r.example"));

        std::fs::write(own.join("hosts.toml"), "server = \"ftp://a\"").unwrap();
        let error = endpoints(&config, &Reference::parse("r.example/a").unwrap(), None).unwrap_err().to_string();
        assert!(error.contains("hosts.toml: \"ftp://a\": must be an http or https address"), "{error}");
    }

    #[test]
    fn a_mirror_of_everything_is_told_the_registry_unless_it_is_the_registry() {
        let endpoints_of = vec!["m.example".into(), "https://r.example/v2".into(), "registry-1.docker.io".into()];
        let mirrors = vec![MirrorRule { registry: "*".into(), endpoints: endpoints_of }];
        let config = RegistryConfig { mirrors, ..RegistryConfig::default() };
        let told = |image: &str| -> Vec<Option<String>> {
            let found = endpoints(&config, &Reference::parse(image).unwrap(), None).unwrap();
            found.into_iter().map(|endpoint| endpoint.stands_for).collect()
        };
        let of = |registry: &str| Some(registry.to_owned());
        assert_eq!(told("r.example/a"), [of("r.example"), None, of("r.example"), None]);
        assert_eq!(told("a"), [of("docker.io"), of("docker.io"), None, None]);
    }

    #[test]
    fn a_credential_for_a_named_server_is_shown_to_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("r.example");
        std::fs::create_dir(&own).unwrap();
        std::fs::write(own.join("hosts.toml"), "[host.\"https://m.example\"]\n").unwrap();
        let config = RegistryConfig { hosts_dirs: vec![directory.path().into()], ..RegistryConfig::default() };
        let shown = |image: &str, server: Option<&str>| -> Vec<bool> {
            let auth = Auth::Basic { username: "u".into(), password: "p".into() };
            let credential = Credential { auth, server: server.map(str::to_owned) };
            let found = endpoints(&config, &Reference::parse(image).unwrap(), Some(&credential)).unwrap();
            found.iter().map(|endpoint| endpoint.auth.is_some()).collect()
        };
        assert_eq!(shown("r.example/a", None), [true, true]);
        assert_eq!(shown("r.example/a", Some("https://r.example/v1/")), [false, true]);
        assert_eq!(shown("r.example/a", Some("M.example")), [true, false]);
        assert_eq!(shown("r.example/a", Some("r.example:444")), [false, false]);
        assert_eq!(shown("busybox", Some("https://index.docker.io/v1/")), [true]);
    }

    #[test]
    fn certificates_for_a_loopback_registry_mean_tls() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("localhost:5000");
        std::fs::create_dir(&own).unwrap();
        let config = RegistryConfig { hosts_dirs: vec![directory.path().into()], ..RegistryConfig::default() };
        assert_eq!(bases(&config, "localhost:5000/a"), ["http://localhost:5000/v2"]);
        std::fs::write(own.join("hosts.toml"), "ca = \"ca.pem\"").unwrap();
        assert_eq!(bases(&config, "localhost:5000/a"), ["https://localhost:5000/v2"]);
    }
}
