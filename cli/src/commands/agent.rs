//! `oarlock agent`: the node agent.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use oarlock_agent::{Agent, Config, ImageGcConfig};

use super::{daemon, netproxy};
use crate::config::Settings;
use crate::{host, pki};

pub(crate) fn run(settings: Settings) -> anyhow::Result<ExitCode> {
    host::require_root("oarlock agent")?;
    oarlock_agent::share_one_arena();
    daemon::run(&settings.clone(), 2, |shutdown| async move {
        netproxy::hold_pods_back(&settings);
        let layout = &settings.layout;
        let mut config = Config::new(settings.node_name.clone(), settings.node_ip);
        config.kubeconfig = layout.component_kubeconfig("agent");
        if settings.joined.is_some() {
            config.bootstrap_kubeconfig = Some(layout.component_kubeconfig("bootstrap"));
            config.rotate_certificates = true;
            config.server_tls_bootstrap = true;
            config.client_ca_file = layout.joined_authority();
        } else {
            let credentials = pki::ensure(&settings)?;
            config.cert_file = credentials.agent_serving.cert_file;
            config.key_file = credentials.agent_serving.key_file;
            config.client_ca_file = credentials.ca_file;
        }
        config.runtime_endpoint = settings.runtime_socket.clone();
        config.data_dir = layout.agent_dir();
        config.kubelet_dir = layout.kubelet_dir();
        config.pod_logs_dir = layout.pod_logs_dir();
        config.container_logs_dir = Some(layout.container_logs_dir());
        config.listen = SocketAddr::new(settings.any_address(), settings.agent_port);
        config.cluster_dns = vec![settings.cluster_dns];
        if let Some(secondary) = &settings.secondary {
            config.cluster_dns.push(secondary.cluster_dns);
            config.second_node_ip = secondary.node_ip;
        }
        config.cluster_domain = settings.cluster_domain.clone();
        config.resolv_conf = upstream_resolv_conf().into();
        config.max_pods = settings.max_pods;
        config.static_pod_dir = Some(settings.static_pod_dir.clone());
        config.node_labels = settings.node_labels.clone();
        config.image_gc = ImageGcConfig::for_shared_machine();
        let providers = settings.registries.credential_providers.clone();
        config.credential_providers = providers.map(|providers| (providers.config, providers.bin_dir));
        settings.kubelet.apply(&mut config)?;
        let own = daemon::reached_at(config.listen);
        let agent = Agent::new(config, &shutdown).await.context("cannot start the agent")?;
        tokio::spawn(daemon::announce_when("agent", shutdown.clone(), move || async move {
            tokio::net::TcpStream::connect(own).await.is_ok()
        }));
        agent.run(shutdown).await.context("the agent ended")
    })
}

/// The file with the real name servers: behind systemd-resolved, `/etc/resolv.conf` names only the local stub.
pub(crate) fn upstream_resolv_conf() -> &'static str {
    const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";
    if Path::new(BEHIND_STUB).exists() { BEHIND_STUB } else { "/etc/resolv.conf" }
}
