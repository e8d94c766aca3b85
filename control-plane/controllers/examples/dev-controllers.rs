//! Runs the controllers against any API server: `cargo run -p oarlock-controllers --example dev-controllers -- KUBECONFIG`.

use anyhow::Context;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let path = std::env::args().nth(1).context("the path of a kubeconfig is wanted")?;
    let kubeconfig = Kubeconfig::read_from(&path).with_context(|| format!("reading {path}"))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = kube::Client::try_from(config)?;
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        stop.cancel();
    });
    let config = oarlock_controllers::Config {
        cluster_cidrs: vec![("10.42.0.0/16".parse()?, 24)],
        root_ca_pem: "not a certificate\n".to_owned(),
        balancer_pools: tokio::sync::watch::channel(Vec::new()).1,
        balancer_class: String::new(),
        signing_ca_dir: None,
        server_names: Vec::new(),
    };
    oarlock_controllers::Controllers::new(client, config).run(shutdown).await?;
    Ok(())
}
