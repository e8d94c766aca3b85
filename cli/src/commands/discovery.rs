//! How a machine that knows an address, a token and the hash of an authority's key gets to know its cluster.
//!
//! The first request is made without knowing whom it reaches, and carries no secret: it fetches what anybody may read. Of the
//! answer only the authority with the right hash is believed; all that follows, the token first of all, is said to servers that
//! this authority vouches for.

use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use oarlock_pki::Pin;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigFlags, Settings};
use crate::joined::{ClusterFile, Joined};
use crate::layout::Layout;
use crate::pki;

const CALL: Duration = Duration::from_secs(15);
const NODE_CONFIGURATION: &str = "oarlock-node-configuration";
const KEY: &str = "config.yaml";
/// How long it is at least from one look at what nodes are told to the next.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known of a cluster.
pub(crate) struct Cluster {
    /// PEM of its authority.
    pub(crate) authority: String,
    pub(crate) settings: ClusterFile,
    /// A kubeconfig with the token.
    pub(crate) bootstrap_kubeconfig: String,
}

fn configuration(server: &str) -> anyhow::Result<kube::Config> {
    let mut config = kube::Config::new(server.parse().with_context(|| format!("{server} is not a URL"))?);
    config.connect_timeout = Some(Duration::from_secs(10));
    config.read_timeout = Some(CALL);
    Ok(config)
}

/// What nodes are told, to a watch.
fn node_configuration() -> watcher::Config {
    watcher::Config::default().fields(&format!("metadata.name={NODE_CONFIGURATION}"))
}

/// Keeps what nodes are told as this node's own, until `shutdown`: the daemons of the machine read it as they read their
/// configuration file.
pub(crate) async fn follow(client: kube::Client, layout: Layout, flags: ConfigFlags, shutdown: CancellationToken) {
    let api: Api<ConfigMap> = Api::namespaced(client, "kube-system");
    let mut told = watcher(api, node_configuration()).default_backoff().applied_objects().boxed();
    loop {
        let next = tokio::select! {
            next = told.next() => next,
            () = shutdown.cancelled() => return,
        };
        let map = match next {
            None => return,
            // Tried again by itself, and as long as the API is away other watches say so.
            Some(Err(error)) => {
                tracing::debug!(%error, "what nodes are told cannot be watched");
                continue;
            }
            Some(Ok(map)) => map,
        };
        let Some(text) = map.data.and_then(|mut data| data.remove(KEY)) else { continue };
        let (layout, flags) = (layout.clone(), flags.clone());
        match tokio::task::spawn_blocking(move || keep(&text, &layout, &flags)).await {
            Ok(Ok(true)) => tracing::info!("the cluster's settings changed"),
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(error)) => {
                tracing::error!(problem = format!("{error:#}"), "the cluster's changed settings are not used")
            }
        }
    }
}

/// Takes up what nodes are told, if this machine can have it; says whether that is anything new.
fn keep(text: &str, layout: &Layout, flags: &ConfigFlags) -> anyhow::Result<bool> {
    let cluster: ClusterFile = serde_yaml_ng::from_str(text).context("what nodes are told is of another version")?;
    let Some(joined) = Joined::read(layout)?.filter(|joined| joined.cluster != cluster) else { return Ok(false) };
    let (cluster, later) = joined.cluster.with_changes_of(&cluster);
    if !later.is_empty() {
        tracing::warn!(
            settings = later.join(", "),
            "the cluster has other settings than when this machine joined: join again"
        );
    }
    if cluster == joined.cluster {
        return Ok(false);
    }
    let joined = Joined { cluster, ..joined };
    Settings::load_as(flags, &joined).context("this machine cannot have what nodes are told")?;
    joined.write(layout)?;
    Ok(true)
}

/// Tells the nodes whenever the settings change, and again when somebody has edited or deleted what they are told: that is the
/// server's to say alone.
pub(crate) async fn tell_nodes(client: kube::Client, mut settings: watch::Receiver<ClusterFile>) {
    let api: Api<ConfigMap> = Api::namespaced(client, "kube-system");
    let mut seen = watcher(api.clone(), node_configuration()).default_backoff().boxed();
    // Somebody who goes on writing is answered once in a while.
    let (mut is_due, mut earliest) = (false, Instant::now());
    loop {
        tokio::select! {
            changed = settings.changed() => match changed {
                Ok(()) => is_due = true,
                Err(_) => return,
            },
            event = seen.next() => match event {
                Some(Ok(Event::Apply(_) | Event::Delete(_) | Event::InitDone)) => is_due = true,
                Some(Ok(Event::Init | Event::InitApply(_))) => {}
                // Tried again by itself.
                Some(Err(error)) => tracing::debug!(%error, "what nodes are told cannot be watched"),
                None => return,
            },
            () = tokio::time::sleep_until(earliest), if is_due => {
                let now = settings.borrow_and_update().clone();
                let told = tokio::time::timeout(CALL, ensure_told(&api, &now)).await.context("no answer in time").flatten();
                match &told {
                    Ok(true) => tracing::info!("nodes are told of the cluster's settings"),
                    Ok(false) => {}
                    Err(error) => {
                        let problem = format!("{error:#}");
                        tracing::warn!(problem, "nodes cannot be told of the cluster's settings; trying again");
                    }
                }
                (is_due, earliest) = (told.is_err(), Instant::now() + PAUSE);
            }
        }
    }
}

/// Says whether they had been told something else.
async fn ensure_told(api: &Api<ConfigMap>, settings: &ClusterFile) -> anyhow::Result<bool> {
    let text = serde_yaml_ng::to_string(settings)?;
    let found = api.get_opt(NODE_CONFIGURATION).await?;
    if let Some(data) = found.as_ref().and_then(|map| map.data.as_ref())
        && data.get(KEY) == Some(&text)
    {
        return Ok(false);
    }
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NODE_CONFIGURATION}, "data": {KEY: text},
    });
    if found.is_some() {
        api.patch(NODE_CONFIGURATION, &PatchParams::default(), &Patch::Merge(map)).await?;
    } else {
        api.create(&PostParams::default(), &serde_json::from_value(map)?).await?;
    }
    Ok(true)
}

/// Reads a ConfigMap's key.
async fn read(client: kube::Client, namespace: &str, name: &str, key: &str) -> anyhow::Result<String> {
    let api: Api<ConfigMap> = Api::namespaced(client, namespace);
    let map = tokio::time::timeout(CALL, api.get(name)).await.context("no answer in time")??;
    map.data.and_then(|mut data| data.remove(key)).with_context(|| format!("the ConfigMap {name} has no {key}"))
}

/// What `cluster-info` says: the server's URL and the authorities, in PEM.
pub(crate) async fn cluster_info(client: kube::Client) -> anyhow::Result<(String, String)> {
    let text = read(client, "kube-public", "cluster-info", "kubeconfig").await?;
    let kubeconfig: Value = serde_yaml_ng::from_str(&text).context("cluster-info holds no kubeconfig")?;
    let cluster = kubeconfig.pointer("/clusters/0/cluster").context("cluster-info names no cluster")?;
    let field = |name: &str| cluster.get(name).and_then(Value::as_str).with_context(|| format!("it has no {name}"));
    let authorities = STANDARD.decode(field("certificate-authority-data")?).context("its authority is not base64")?;
    Ok((field("server")?.to_owned(), String::from_utf8(authorities).context("its authority is not PEM")?))
}

/// Gets to know the cluster at `server`.
pub(crate) async fn discover(server: &str, token: &str, pin: &Pin) -> anyhow::Result<Cluster> {
    let mut unknown = configuration(server)?;
    unknown.accept_invalid_certs = true;
    let (_, offered) = cluster_info(kube::Client::try_from(unknown)?)
        .await
        .with_context(|| format!("cannot read who the cluster at {server} is"))?;
    let authority = pin.only(&offered);
    anyhow::ensure!(
        !authority.is_empty(),
        "the authority of the cluster at {server} is not the one with {pin}: either --ca-hash is of another cluster, or somebody is in between"
    );
    let bootstrap_kubeconfig = kubeconfig(server, &authority, token);
    let read_back = kube::config::Kubeconfig::from_yaml(&bootstrap_kubeconfig)?;
    let mut known = kube::Config::from_custom_kubeconfig(read_back, &Default::default()).await?;
    known.connect_timeout = Some(Duration::from_secs(10));
    known.read_timeout = Some(CALL);
    let told = read(kube::Client::try_from(known)?, "kube-system", NODE_CONFIGURATION, KEY).await;
    let text = told.map_err(|error| match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) if status.code == 401 => {
            anyhow::anyhow!(
                "the token is not good, or not any more: `oarlock token create` on the server makes another"
            )
        }
        _ => error.context(format!("cannot read what nodes of the cluster at {server} are told")),
    })?;
    let settings = serde_yaml_ng::from_str(&text).context("what nodes are told is of another version")?;
    Ok(Cluster { authority, settings, bootstrap_kubeconfig })
}

fn kubeconfig(server: &str, authority: &str, token: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bootstrap",
        "clusters": [{ "name": "bootstrap", "cluster": {
            "server": server, "certificate-authority-data": pki::base64(authority.as_bytes()),
        } }],
        "users": [{ "name": "bootstrap", "user": { "token": token } }],
        "contexts": [{ "name": "bootstrap", "context": { "cluster": "bootstrap", "user": "bootstrap" } }],
    })
    .to_string()
}
