//! Runs the API server alone: `cargo run -p oarlock-apiserver --example dev -- [directory] [port]`.
//!
//! Makes certificates in the directory, writes `kubernetes-admin.kubeconfig` there and serves on loopback until Ctrl-C.

#[path = "../tests/fixture/mod.rs"]
mod fixture;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use oarlock_apiserver::ApiServer;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().unwrap_or_else(|| "oarlock-dev".into()));
    let port = arguments.next().map_or(Ok(6443), |text| text.parse()).context("the port is not a number")?;
    let config = fixture::configure(&dir, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    let started = Instant::now();
    let server = ApiServer::new(config).await?;
    println!("ready on https://{} after {} ms", server.local_addr(), started.elapsed().as_millis());
    for (user, groups) in [
        ("kubernetes-admin", &["system:masters"][..]),
        ("system:node:node1", &["system:nodes"]),
        ("system:kube-proxy", &[]),
        ("alice", &["people"]),
    ] {
        let path = fixture::write_kubeconfig(&dir, &server, user, groups)?;
        println!("export KUBECONFIG={}   # {user}", path.display());
    }
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        stop.cancel();
    });
    server.run(shutdown).await?;
    Ok(())
}
