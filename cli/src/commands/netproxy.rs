//! `oarlock netproxy`: the Service proxy, cluster DNS and the node's network configuration.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use oarlock_netproxy::{Config, Netproxy, Network};

use super::{agent, daemon, discovery, node_identity};
use crate::config::{ConfigFlags, Settings};
use crate::{host, reload};

/// The `loadBalancerClass` that asks for addresses of the pools.
pub(crate) const BALANCER_CLASS: &str = "oarlock.io/announced";

/// The cluster's networks, the primary one first.
fn networks(settings: &Settings) -> Vec<Network> {
    let primary = Network {
        cluster_cidr: settings.cluster_cidr,
        service_cidr: settings.service_cidr,
        cluster_dns: settings.cluster_dns,
        node_ip: Some(settings.node_ip),
    };
    let secondary = settings.secondary.as_ref().map(|secondary| Network {
        cluster_cidr: secondary.cluster_cidr,
        service_cidr: secondary.service_cidr,
        cluster_dns: secondary.cluster_dns,
        node_ip: secondary.node_ip,
    });
    [primary].into_iter().chain(secondary).collect()
}

/// What netproxy is told about this node.
pub(crate) fn proxy_config(settings: &Settings) -> Config {
    Config {
        node_name: settings.node_name.clone(),
        networks: networks(settings),
        cluster_domain: settings.cluster_domain.clone(),
        node_port_range: settings.node_port_range,
        node_port_addresses: settings.node_port_addresses.clone(),
        external_ips_allowed: settings.external_ips_allowed.clone(),
        balancer_pools: settings.load_balancer_pools.clone(),
        balancer_class: BALANCER_CLASS.to_owned(),
        stub_domains: settings
            .stub_domains
            .iter()
            .map(|(domain, servers)| (domain.clone(), servers.iter().map(|server| (*server, 53).into()).collect()))
            .collect(),
        health_listen: SocketAddr::new(settings.any_address(), settings.proxy_health_port),
        metrics_listen: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), settings.proxy_metrics_port),
        cni_conf_dir: Some(settings.cni_conf_dir.clone()),
        cni_state_dir: settings.layout.data_dir().join("cni/networks"),
        tunnel: settings.node_tunnel,
        wireguard_key: Some(settings.layout.data_dir().join("netproxy/wireguard.key")),
        sysctl_record: Some(settings.layout.data_dir().join("netproxy/sysctls")),
        upstream_resolv_conf: agent::upstream_resolv_conf().into(),
        ..Config::default()
    }
}

/// Before anything that starts pods: after a boot they wait until the proxy has written the network policies.
pub(crate) fn hold_pods_back(settings: &Settings) {
    if let Err(error) = oarlock_netproxy::withdraw_stale_configuration(&proxy_config(settings)) {
        tracing::warn!(error = &error as &dyn std::error::Error, "pods may start before network policies hold");
    }
}

pub(crate) async fn client(path: &Path) -> anyhow::Result<kube::Client> {
    let kubeconfig = kube::config::Kubeconfig::read_from(path)
        .with_context(|| format!("cannot read {}; start `oarlock server` first", path.display()))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default())
        .await
        .with_context(|| format!("{} is not usable", path.display()))?;
    oarlock_credentials::client(config).context("cannot make an API client")
}

pub(crate) fn run(settings: Settings, flags: &ConfigFlags) -> anyhow::Result<ExitCode> {
    host::require_root("oarlock netproxy")?;
    let flags = flags.clone();
    daemon::run(&settings.clone(), 2, |shutdown| async move {
        let changes = reload::follow(flags.clone(), &settings, proxy_config, shutdown.clone());
        let proxy = if settings.joined.is_some() {
            let Some(identities) = node_identity::identities(&settings, &shutdown).await? else { return Ok(()) };
            tokio::spawn(discovery::follow(identities.node.clone(), settings.layout.clone(), flags, shutdown.clone()));
            Netproxy::new(proxy_config(&settings), identities.proxy).with_node_client(identities.node)
        } else {
            let client = client(&settings.layout.component_kubeconfig("netproxy")).await?;
            let proxy = Netproxy::new(proxy_config(&settings), client);
            // Only the node itself may annotate its Node.
            let own = settings.layout.component_kubeconfig("agent");
            if own.exists() { proxy.with_node_client(self::client(&own).await?) } else { proxy }
        };
        let proxy = proxy.with_changes(changes);
        let ready = proxy.ready();
        tokio::spawn(daemon::announce_when("netproxy", shutdown.clone(), move || {
            let mut ready = ready.clone();
            async move { ready.wait_for(|ready| *ready).await.is_ok() }
        }));
        proxy.run(shutdown).await.context("netproxy ended")
    })
}
