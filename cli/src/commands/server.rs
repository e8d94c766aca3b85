//! `oarlock server`: API server, controllers and scheduler in one process.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use oarlock_apiserver::ApiServer;
use oarlock_controllers::Controllers;
use oarlock_scheduler::Scheduler;
use oarlock_supervise::Tasks;
use tokio::sync::watch;

use super::netproxy::BALANCER_CLASS;
use super::{daemon, discovery};
use crate::config::{ConfigFlags, Settings};
use crate::joined::ClusterFile;
use crate::{pki, reload};

pub(crate) fn run(settings: Settings, flags: &ConfigFlags) -> anyhow::Result<ExitCode> {
    let flags = flags.clone();
    daemon::run(&settings.clone(), 2, |shutdown| async move {
        let credentials = pki::ensure(&settings)?;
        let config = oarlock_apiserver::Config {
            listen: SocketAddr::new(settings.bind_address, settings.api_port),
            advertise_address: settings.advertise_address,
            data_dir: settings.layout.server_dir(),
            service_cidr: settings.service_cidr,
            second_service_cidr: settings.secondary.as_ref().map(|second| second.service_cidr),
            cluster_dns: Some(settings.cluster_dns),
            second_cluster_dns: settings.secondary.as_ref().map(|second| second.cluster_dns),
            cluster_domain: settings.cluster_domain.clone(),
            node_port_range: settings.node_port_range,
            cert_file: credentials.api_serving.cert_file.clone(),
            key_file: credentials.api_serving.key_file.clone(),
            client_ca_file: credentials.ca_file.clone(),
            service_account_key_file: credentials.service_account_key.clone(),
            service_account_issuer: format!("https://kubernetes.default.svc.{}", settings.cluster_domain),
            kubelet_client_cert_file: credentials.kubelet_client.cert_file.clone(),
            kubelet_client_key_file: credentials.kubelet_client.key_file.clone(),
            kubelet_ca_file: credentials.ca_file.clone(),
            node_configuration: Some(serde_yaml_ng::to_string(&ClusterFile::of(&settings))?),
            ..oarlock_apiserver::Config::default()
        };
        let server = ApiServer::new(config).await.context("cannot start the API server")?;
        let (cluster_in, cluster) = watch::channel(ClusterFile::of(&settings));
        let (pools_in, balancer_pools) = watch::channel(settings.load_balancer_pools.clone());
        let controllers = Controllers::new(
            server.client("system:kube-controller-manager", &["system:masters"]),
            oarlock_controllers::Config {
                cluster_cidrs: [settings.cluster_cidr]
                    .into_iter()
                    .chain(settings.secondary.as_ref().map(|second| second.cluster_cidr))
                    .map(|cidr| (cidr, if cidr.addr().is_ipv4() { 24 } else { 64 }))
                    .collect(),
                root_ca_pem: credentials.ca_pem.clone(),
                balancer_pools,
                balancer_class: BALANCER_CLASS.to_owned(),
                signing_ca_dir: Some(settings.layout.pki_dir()),
                server_names: pki::api_names(&settings)?,
            },
        );
        let scheduler = Scheduler::new(
            server.client("system:kube-scheduler", &["system:masters"]),
            oarlock_scheduler::Config::default(),
        );
        let probe = server.client("kubernetes-admin", &["system:masters"]);
        let own = settings.server_url();

        let changes = reload::follow(flags, &settings, ClusterFile::of, shutdown.clone());
        tokio::spawn(discovery::tell_nodes(probe.clone(), cluster));
        tokio::spawn(take_changes(changes, cluster_in, pools_in));

        let mut tasks = Tasks::new(shutdown);
        let token = tasks.token();
        tasks.spawn("api server", server.run(token.clone()));
        tasks.spawn("controllers", controllers.run(token.clone()));
        tasks.spawn("scheduler", scheduler.run(token.clone()));
        tokio::spawn(daemon::announce_when("server", token, move || {
            let (probe, own) = (probe.clone(), own.clone());
            async move { is_ready(probe, &own).await }
        }));
        tasks.join(Duration::from_secs(5)).await.context("the server ended")
    })
}

/// Takes up what can change while the cluster runs, and says what cannot.
async fn take_changes(
    mut changes: watch::Receiver<ClusterFile>,
    cluster: watch::Sender<ClusterFile>,
    pools: watch::Sender<Vec<IpNet>>,
) {
    while changes.changed().await.is_ok() {
        let told = changes.borrow_and_update().clone();
        let (now, later) = cluster.borrow().with_changes_of(&told);
        if !later.is_empty() {
            tracing::warn!(settings = later.join(", "), "changed settings that the server minds when it starts again");
        }
        if now != *cluster.borrow() {
            tracing::info!("configuration changed");
            pools.send_replace(now.pools());
            cluster.send_replace(now);
        }
    }
}

/// Whether the API answers in process and the port is open.
async fn is_ready(client: kube::Client, own: &str) -> bool {
    let Ok(request) = http::Request::get("/readyz").body(Vec::new()) else { return false };
    client.request_text(request).await.is_ok()
        && tokio::net::TcpStream::connect(own.trim_start_matches("https://")).await.is_ok()
}
