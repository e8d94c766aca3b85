//! Runs the proxy on this machine against the cluster of a kubeconfig: `dev <kubeconfig> <node name> <node address>`.
//!
//! For development, best in a network namespace of its own: it writes nftables rules, and its CNI configuration goes to
//! the directory `./net.d`.

use kube::Config as KubeConfig;
use kube::config::{KubeConfigOptions, Kubeconfig};
use oarlock_netproxy::{Config, Netproxy};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kubeconfig, node_name, node_ip] = arguments.as_slice() else {
        return Err("usage: dev <kubeconfig> <node name> <node address>".into());
    };
    oarlock_telemetry::init("info", oarlock_telemetry::Format::Text)?;
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let client = KubeConfig::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let config = Config {
        node_name: node_name.clone(),
        networks: vec![oarlock_netproxy::Network {
            node_ip: Some(node_ip.parse()?),
            ..Config::default().networks.remove(0)
        }],
        cni_conf_dir: Some("net.d".into()),
        cni_state_dir: "ipam".into(),
        ..Config::default()
    };
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        // Without the signal handler the process just ends, which is all the same here.
        let _ = tokio::signal::ctrl_c().await;
        stop.cancel();
    });
    let proxy = Netproxy::new(config, kube::Client::try_from(client)?);
    let mut ready = proxy.ready();
    tokio::spawn(async move {
        // Without a supervisor there is nobody to tell.
        if ready.wait_for(|ready| *ready).await.is_ok() {
            let _ = oarlock_supervise::notify_ready();
        }
    });
    Ok(proxy.run(shutdown).await?)
}
