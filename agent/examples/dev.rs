//! Runs the agent by hand: `cargo run -p oarlock-agent --example dev -- <dir> <pki-dir> <kubeconfig> <runtime.sock> [node]`.
//! Pods, logs and records go under `<dir>`; the serving certificate is made by the authority in `<pki-dir>`. Ctrl-C stops the
//! agent and leaves containers running.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use oarlock_agent::{Agent, Config};
use oarlock_pki::{Authority, Request, Usage};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, pki, kubeconfig, socket, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: dev <dir> <pki-dir> <kubeconfig> <runtime.sock> [node-name]");
        std::process::exit(64);
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let node_name = rest.first().map_or("node1", String::as_str);
    let config = match configure(dir.into(), pki.into(), kubeconfig.into(), socket.into(), node_name) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(64);
        }
    };
    let stop = CancellationToken::new();
    let on_signal = stop.clone();
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        on_signal.cancel();
    });
    let ended = match Agent::new(config, &stop).await {
        Ok(agent) => agent.run(stop).await,
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn configure(
    dir: PathBuf,
    pki: PathBuf,
    kubeconfig: PathBuf,
    runtime_endpoint: PathBuf,
    node_name: &str,
) -> Result<Config, oarlock_pki::PkiError> {
    let authority = Authority::ensure(&pki, "dev-ca")?;
    let request = Request {
        common_name: format!("system:node:{node_name}"),
        organizations: vec!["system:nodes".into()],
        dns_names: vec![node_name.into()],
        addresses: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
        usage: Usage::Server,
    };
    let identity = authority.ensure_identity("agent-serving", &request)?;
    let mut config = Config::new(node_name, IpAddr::V4(Ipv4Addr::LOCALHOST));
    config.kubeconfig = kubeconfig;
    config.runtime_endpoint = runtime_endpoint;
    config.pod_logs_dir = dir.join("logs/pods");
    config.container_logs_dir = Some(dir.join("logs/containers"));
    config.listen = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10250);
    config.cert_file = identity.cert_file;
    config.key_file = identity.key_file;
    config.client_ca_file = authority.certificate_file();
    config.cgroup_root = std::env::var("OARLOCK_CGROUP_ROOT").unwrap_or_else(|_| "oarlock-dev".to_owned());
    config.data_dir = dir;
    Ok(config)
}
