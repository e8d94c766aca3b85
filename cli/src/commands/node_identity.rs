//! Who netproxy is on a node that joined: the service proxy, by a certificate of its own, and the node where only the node may
//! write. The node's certificate is the agent's to keep; here it is followed.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use oarlock_credentials::{Current, LiveClient, Purpose, Rotation, Store};
use tokio_util::sync::CancellationToken;

use crate::config::Settings;

/// How often it is looked whether the agent has a new certificate: those of a node last a year.
const FOLLOW: Duration = Duration::from_secs(60);
const FIRST_LOOK: Duration = Duration::from_millis(50);

/// The clients of netproxy.
pub(crate) struct Identities {
    pub(crate) proxy: kube::Client,
    pub(crate) node: kube::Client,
}

async fn current(store: &Store) -> Option<Current> {
    let store = store.clone();
    let found = tokio::task::spawn_blocking(move || store.current()).await.ok().flatten();
    found.filter(|current| !current.expired(jiff::Timestamp::now()))
}

/// Waits for the node's identity, gets the proxy's by it, and keeps both fresh until `shutdown`, which is when there is None.
pub(crate) async fn identities(
    settings: &Settings,
    shutdown: &CancellationToken,
) -> anyhow::Result<Option<Identities>> {
    let layout = &settings.layout;
    let kubeconfig = layout.component_kubeconfig("agent");
    let node_store = Store::new(&layout.agent_dir().join("certificates"), "kubelet-client");
    let node = loop {
        if let Some(node) = current(&node_store).await
            && kubeconfig.exists()
        {
            break node;
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(None),
            () = tokio::time::sleep(FIRST_LOOK) => {}
        }
    };
    let read = kube::config::Kubeconfig::read_from(&kubeconfig)
        .with_context(|| format!("cannot read {}", kubeconfig.display()))?;
    let mut server = kube::Config::from_custom_kubeconfig(read, &Default::default()).await?;
    server.connect_timeout = Some(Duration::from_secs(10));
    let live_node = LiveClient::new(server.clone(), LiveClient::client_as(&server, &node)?);
    tokio::spawn(follow(node_store, live_node.clone(), node.not_after, shutdown.clone()));

    let rotation = Rotation {
        store: Store::new(&layout.data_dir().join("netproxy/certificates"), "netproxy-client"),
        node_name: settings.node_name.clone(),
        purpose: Purpose::Proxy,
    };
    let own = match current(&rotation.store).await {
        Some(own) => own,
        None => match rotation.obtain_at_last(&live_node.client(), shutdown).await {
            Err(oarlock_credentials::CredentialsError::Stopped) => return Ok(None),
            other => other?,
        },
    };
    let live = LiveClient::new(server.clone(), LiveClient::client_as(&server, &own)?);
    let identities = Identities { proxy: live.client(), node: live_node.client() };
    tokio::spawn(keep(rotation, live, live_node, shutdown.clone()));
    Ok(Some(identities))
}

/// Replaces the proxy's certificate in time. The proxy itself may not ask for one: the node does.
async fn keep(rotation: Rotation, live: Arc<LiveClient>, node: Arc<LiveClient>, shutdown: CancellationToken) {
    let use_it = |fresh: &Current| {
        if let Err(error) = live.change(fresh) {
            tracing::error!(%error, "the new client certificate cannot be used; the old one stays");
        }
    };
    rotation.run(node.client(), use_it, shutdown).await;
}

/// Takes up the certificates that the agent gets.
async fn follow(store: Store, live: Arc<LiveClient>, mut until: jiff::Timestamp, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(FOLLOW) => {}
        }
        let Some(fresh) = current(&store).await.filter(|fresh| fresh.not_after != until) else { continue };
        match live.change(&fresh) {
            Ok(()) => until = fresh.not_after,
            Err(error) => tracing::error!(%error, "the node's new certificate cannot be used; the old one stays"),
        }
    }
}
