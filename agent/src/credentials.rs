//! Wires the node's own certificates in: the first one where there is only a bootstrap token, the client that follows the client
//! certificate, and the serving certificate. Asking for certificates is `oarlock-credentials`' work.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use oarlock_credentials::{Current, LiveClient, Purpose, Rotation, Store};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{Config, Error};

/// The client, and what keeps its certificate fresh.
pub(crate) struct Connection {
    pub client: kube::Client,
    pub keeper: Option<(Rotation, Arc<LiveClient>)>,
}

async fn read(path: &Path) -> Result<kube::Config, Error> {
    let failed = |source| Error::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
    let kubeconfig = kube::config::Kubeconfig::read_from(path).map_err(failed)?;
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await.map_err(failed)?;
    config.connect_timeout = Some(Duration::from_secs(10));
    // A watch may rightly be silent for minutes; every other call carries its own timeout.
    config.read_timeout = Some(Duration::from_secs(295));
    Ok(config)
}

fn client_rotation(config: &Config) -> Rotation {
    Rotation {
        store: Store::new(&config.certificates_dir(), "kubelet-client"),
        node_name: config.node_name.clone(),
        purpose: Purpose::Client,
    }
}

async fn current(store: &Store) -> Option<Current> {
    let store = store.clone();
    let found = tokio::task::spawn_blocking(move || store.current()).await.ok().flatten();
    found.filter(|current| !current.expired(Timestamp::now()))
}

/// A client with the node's identity; one that has none yet gets it first, however long that takes.
pub(crate) async fn connect(config: &Config, stop: &CancellationToken) -> Result<Connection, Error> {
    let known = config.kubeconfig.exists();
    let bootstrap = config.bootstrap_kubeconfig.as_ref().filter(|_| !known);
    let path: PathBuf = bootstrap.unwrap_or(&config.kubeconfig).clone();
    let server = read(&path).await?;
    let failed = |source| Error::Client { path: path.clone(), source };
    if bootstrap.is_none() && !config.rotate_certificates {
        return Ok(Connection { client: oarlock_credentials::client(server).map_err(failed)?, keeper: None });
    }
    let rotation = client_rotation(config);
    let mut identity = current(&rotation.store).await;
    if identity.is_none() && bootstrap.is_some() {
        tracing::info!("the node has no certificate yet: asking for one with the bootstrap credentials");
        let client = oarlock_credentials::client(server.clone()).map_err(failed)?;
        identity = Some(rotation.obtain_at_last(&client, stop).await.map_err(Error::Credentials)?);
    }
    if bootstrap.is_some() {
        write_kubeconfig(&config.kubeconfig, &server, rotation.store.file())?;
    }
    let first = match &identity {
        Some(identity) => LiveClient::client_as(&server, identity),
        None => oarlock_credentials::client(server.clone()),
    };
    let live = LiveClient::new(server, first.map_err(failed)?);
    let keeper = config.rotate_certificates.then(|| (rotation, live.clone()));
    Ok(Connection { client: live.client(), keeper })
}

/// The node's kubeconfig, which names the file that its certificates are in.
fn write_kubeconfig(path: &Path, server: &kube::Config, identity: &Path) -> Result<(), Error> {
    use base64::Engine;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut cluster = json!({ "server": server.cluster_url.to_string() });
    if let Some(roots) = &server.root_cert {
        let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        let block =
            |der: &Vec<u8>| format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", encode(der));
        let pem: String = roots.iter().map(block).collect();
        cluster["certificate-authority-data"] = encode(pem.as_bytes()).into();
    }
    let document = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "default",
        "clusters": [{ "name": "default", "cluster": cluster }],
        "users": [{ "name": "default", "user": { "client-certificate": identity, "client-key": identity } }],
        "contexts": [{ "name": "default", "context": { "cluster": "default", "user": "default" } }],
    });
    let partial = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(serde_json::to_string_pretty(&document)?.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    write().map_err(|source| Error::Io { operation: "write", path: path.to_owned(), source })
}

/// Keeps the client's certificate fresh until `shutdown`.
pub(crate) async fn keep_client(rotation: Rotation, live: Arc<LiveClient>, shutdown: CancellationToken) {
    let client = live.client();
    let use_it = |fresh: &Current| {
        if let Err(error) = live.change(fresh) {
            tracing::error!(%error, "the new client certificate cannot be used; the old one stays");
        }
    };
    rotation.run(client, use_it, shutdown).await;
}

/// The serving certificate of the node, which is kept fresh; the server reads its file again by itself.
pub(crate) fn serving(config: &Config) -> Result<Rotation, Error> {
    let store = Store::new(&config.certificates_dir(), "kubelet-server");
    let mut addresses = vec![config.node_ip];
    addresses.extend(config.second_node_ip);
    let names = vec![config.node_name.clone()];
    let all = names.iter().cloned().chain(addresses.iter().map(ToString::to_string)).collect();
    let path = store.file().to_owned();
    store.ensure_self_signed(all).map_err(|source| Error::Io { operation: "make", path, source })?;
    Ok(Rotation { store, node_name: config.node_name.clone(), purpose: Purpose::Serving { names, addresses } })
}
