//! Which certificates and kubeconfigs a single-server cluster has, and making them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::Context;
use oarlock_pki::{Authority, Identity, Request, Usage, ensure_signing_key};
use serde_json::json;

use crate::config::Settings;

/// Every credential of the cluster, as files.
pub(crate) struct Credentials {
    pub(crate) ca_file: PathBuf,
    pub(crate) ca_pem: String,
    pub(crate) api_serving: Identity,
    pub(crate) kubelet_client: Identity,
    pub(crate) agent_serving: Identity,
    pub(crate) service_account_key: PathBuf,
}

/// Fails on a machine that is a node of another's cluster.
pub(crate) fn refuse_joined(settings: &Settings) -> anyhow::Result<()> {
    if let Some(server) = &settings.joined {
        anyhow::bail!(
            "this machine is a node of the cluster at {server}, which `oarlock join` keeps running; `oarlock reset` makes it free for a cluster of its own"
        );
    }
    Ok(())
}

/// Makes what is missing or outdated; keeps what is good.
pub(crate) fn ensure(settings: &Settings) -> anyhow::Result<Credentials> {
    refuse_joined(settings)?;
    let directory = settings.layout.pki_dir();
    let authority = Authority::ensure(&directory, "oarlock-ca").context("certificate authority")?;
    let client = |name: &str, common_name: &str, organizations: &[&str]| -> anyhow::Result<Identity> {
        let request = Request {
            common_name: common_name.to_owned(),
            organizations: organizations.iter().map(|name| (*name).to_owned()).collect(),
            dns_names: Vec::new(),
            addresses: Vec::new(),
            usage: Usage::Client,
        };
        authority.ensure_identity(name, &request).with_context(|| format!("client certificate {name}"))
    };
    let admin = client("admin", "kubernetes-admin", &["system:masters"])?;
    let node_user = format!("system:node:{}", settings.node_name);
    let agent = client("agent", &node_user, &["system:nodes"])?;
    let netproxy = client("netproxy", "system:kube-proxy", &[])?;
    let controllers = client("controllers", "system:kube-controller-manager", &[])?;
    let scheduler = client("scheduler", "system:kube-scheduler", &[])?;
    let kubelet_client = client("kubelet-client", "kube-apiserver-kubelet-client", &["oarlock:kubelet-api-admin"])?;
    let api_serving = authority.ensure_identity("apiserver", &api_request(settings)?).context("API certificate")?;
    let agent_serving =
        authority.ensure_identity("agent-serving", &agent_request(settings)).context("agent certificate")?;
    let service_account_key = directory.join("service-account.key");
    ensure_signing_key(&service_account_key).context("service account key")?;

    for (path, name, identity) in [
        (settings.layout.admin_kubeconfig(), "admin", &admin),
        (settings.layout.component_kubeconfig("agent"), "agent", &agent),
        (settings.layout.component_kubeconfig("netproxy"), "netproxy", &netproxy),
        (settings.layout.component_kubeconfig("controllers"), "controllers", &controllers),
        (settings.layout.component_kubeconfig("scheduler"), "scheduler", &scheduler),
    ] {
        let text = kubeconfig(&authority, settings, name, identity)?;
        write_private(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if settings.layout.admin_kubeconfig().parent() != Some(settings.layout.data_dir()) {
        let copy = settings.layout.data_dir().join("admin.kubeconfig");
        write_private(&copy, &kubeconfig(&authority, settings, "admin", &admin)?)
            .with_context(|| format!("cannot write {}", copy.display()))?;
    }
    Ok(Credentials {
        ca_file: authority.certificate_file(),
        ca_pem: authority.certificate_pem().to_owned(),
        api_serving,
        kubelet_client,
        agent_serving,
        service_account_key,
    })
}

/// The names and addresses that the API server's certificate is good for.
pub(crate) fn api_names(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let request = api_request(settings)?;
    Ok(request.dns_names.into_iter().chain(request.addresses.iter().map(ToString::to_string)).collect())
}

fn api_request(settings: &Settings) -> anyhow::Result<Request> {
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST), settings.node_ip];
    addresses.push(settings.advertise_address);
    addresses.extend(Some(settings.bind_address).filter(|address| !address.is_unspecified()));
    let second = settings.secondary.as_ref();
    for cidr in [Some(settings.service_cidr), second.map(|second| second.service_cidr)].into_iter().flatten() {
        // An IPv6 network counts its own address among its hosts.
        let first = cidr.hosts().find(|address| *address != cidr.network());
        addresses.push(first.context("the service CIDR has no address")?);
    }
    addresses.extend(second.and_then(|second| second.node_ip));
    addresses.extend(settings.tls_sans.iter().filter_map(|name| name.parse::<IpAddr>().ok()));
    addresses.sort();
    addresses.dedup();
    let own = settings.tls_sans.iter().filter(|name| name.parse::<IpAddr>().is_err()).cloned();
    Ok(Request {
        common_name: "kube-apiserver".to_owned(),
        organizations: Vec::new(),
        dns_names: [
            "kubernetes".to_owned(),
            "kubernetes.default".to_owned(),
            "kubernetes.default.svc".to_owned(),
            format!("kubernetes.default.svc.{}", settings.cluster_domain),
            "localhost".to_owned(),
            settings.node_name.clone(),
        ]
        .into_iter()
        .chain(own)
        .collect(),
        addresses,
        usage: Usage::Server,
    })
}

fn agent_request(settings: &Settings) -> Request {
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST), settings.node_ip];
    addresses.extend(settings.secondary.as_ref().and_then(|second| second.node_ip));
    addresses.sort();
    addresses.dedup();
    Request {
        common_name: format!("system:node:{}", settings.node_name),
        organizations: vec!["system:nodes".to_owned()],
        dns_names: vec![settings.node_name.clone()],
        addresses,
        usage: Usage::Server,
    }
}

/// A kubeconfig with everything inline. It is JSON, which is YAML too.
fn kubeconfig(authority: &Authority, settings: &Settings, user: &str, identity: &Identity) -> anyhow::Result<String> {
    let encode = |path: &Path| -> anyhow::Result<String> {
        let contents = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(base64(&contents))
    };
    let document = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "oarlock",
            "cluster": {
                "server": settings.server_url(),
                "certificate-authority-data": base64(authority.certificate_pem().as_bytes()),
            },
        }],
        "users": [{
            "name": user,
            "user": {
                "client-certificate-data": encode(&identity.cert_file)?,
                "client-key-data": encode(&identity.key_file)?,
            },
        }],
        "contexts": [{ "name": "oarlock", "context": { "cluster": "oarlock", "user": user } }],
        "current-context": "oarlock",
    });
    Ok(serde_yaml_ng::to_string(&document)?)
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Writes a file of mode 0600, whole or not at all; an unchanged one is left alone.
pub(crate) fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let temporary = path.with_extension("tmp");
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
