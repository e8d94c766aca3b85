//! `oarlock join`: makes this machine a node of another machine's cluster. Gets to know the cluster, then starts runtime, agent
//! and netproxy as supervised children, as `up` does.
//!
//! The token is needed once. What was learned is kept, and the node's own certificates are; without a token the command goes
//! on with them.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use oarlock_pki::Pin;

use super::children::{self, Children};
use super::machine::{self, Stages};
use super::stop::{self, Supervisor};
use super::{discovery, netproxy, up};
use crate::config::{ConfigFlags, Settings};
use crate::joined::Joined;
use crate::{host, pki};

/// How long a machine that joins for the first time may take; one that did before waits for its cluster as long as need be.
const PATIENCE: Duration = Duration::from_secs(120);
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);

#[derive(Clone, clap::Args)]
pub(crate) struct JoinFlags {
    /// The cluster's API server, as `https://HOST:6443`
    #[arg(long, value_name = "URL", requires = "ca_hash")]
    server: Option<String>,
    /// A token from `oarlock token create`
    #[arg(long, value_name = "TOKEN", conflicts_with = "token_file")]
    token: Option<String>,
    /// A file that holds the token, so that it is in no list of processes
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The hash of the cluster's authority, as `sha256:HEX`, from `oarlock token create`
    #[arg(long, value_name = "HASH", requires = "server")]
    ca_hash: Option<Pin>,
    /// Return once the node is Ready and leave it running
    #[arg(long)]
    detach: bool,
    /// Leave pods running when stopped
    #[arg(long)]
    keep_pods: bool,
}

pub(crate) fn run(config: &ConfigFlags, flags: JoinFlags) -> anyhow::Result<ExitCode> {
    let settings = Settings::load(config)?;
    host::require_root("oarlock join")?;
    if let Some(supervisor) = stop::running(&settings)? {
        anyhow::bail!("oarlock is already running here (pid {}); `oarlock stop` ends it", supervisor.pid);
    }
    anyhow::ensure!(
        !settings.layout.server_dir().exists(),
        "this machine has a cluster of its own in {}; `oarlock reset` removes it",
        settings.layout.data_dir().display()
    );
    let known = Joined::read(&settings.layout)?.and_then(|joined| joined.node_name);
    if let Some(known) = known.filter(|known| *known != settings.node_name) {
        anyhow::bail!("this machine is the node {known} already; `oarlock reset` makes it free for another name");
    }
    machine::prepare_directories(&settings)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(get_to_know(&settings, config, &flags))?;
    // With what was learned.
    let settings = Settings::load(config)?;
    if flags.detach {
        let arguments = flags.keep_pods.then(|| OsString::from("--keep-pods"));
        return machine::detach(&settings, config, "join", arguments.into_iter().collect());
    }
    oarlock_telemetry::init("warn", oarlock_telemetry::Format::Text)?;
    machine::check_ports(&settings)?;
    // One thread: the parent-death signal of the children is tied to the thread that starts them.
    let result = runtime.block_on(supervise(&settings, config, &flags));
    let _ = fs::remove_file(settings.layout.up_pid_file());
    result.map(|()| ExitCode::SUCCESS)
}

/// Learns of the cluster where a token was given, and keeps what it learned; what is written last makes the machine a node.
async fn get_to_know(settings: &Settings, config: &ConfigFlags, flags: &JoinFlags) -> anyhow::Result<()> {
    let layout = &settings.layout;
    let token = match (&flags.token, &flags.token_file) {
        (Some(token), _) => Some(token.trim().to_owned()),
        (None, Some(path)) => {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(text.trim().to_owned())
        }
        (None, None) => None,
    };
    let (server, token, pin) = match (&flags.server, token, &flags.ca_hash) {
        (Some(server), Some(token), Some(pin)) => (server.trim_end_matches('/'), token, pin),
        (None, None, None) if settings.joined.is_some() => return Ok(()),
        _ => anyhow::bail!(
            "joining takes --server, --token and --ca-hash; `oarlock token create` on the server prints the whole command"
        ),
    };
    anyhow::ensure!(server.starts_with("https://"), "--server {server} does not begin with https://");
    if let Some(known) = settings.joined.as_deref().filter(|known| *known != server) {
        anyhow::bail!("this machine is a node of the cluster at {known}; `oarlock reset` makes it free for another");
    }
    let cluster = discovery::discover(server, &token, pin).await?;
    let joined = Joined {
        server: server.to_owned(),
        node_name: Some(settings.node_name.clone()),
        node_ip: config.node_ip.clone(),
        cluster: cluster.settings,
    };
    // Checked before it is kept, because every later command on this machine reads it.
    Settings::load_as(config, &joined).context("this machine cannot have what nodes of the cluster are told")?;
    // The agent asks with the token again where its certificate is missing or over, and goes on with it otherwise.
    let agent = layout.component_kubeconfig("agent");
    pki::write_private(&layout.component_kubeconfig("bootstrap"), &cluster.bootstrap_kubeconfig)?;
    pki::write_private(&layout.joined_authority(), &cluster.authority)?;
    match fs::remove_file(&agent) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", agent.display()));
        }
        _ => {}
    }
    joined.write(layout)
}

async fn supervise(settings: &Settings, config: &ConfigFlags, flags: &JoinFlags) -> anyhow::Result<()> {
    Supervisor::this()?.record(settings)?;
    let mut stages = Stages::new();
    let server = settings.server_url();
    println!("starting node {} ({}) of the cluster at {server}", settings.node_name, settings.node_ip);
    machine::install_plugins(settings)?;
    let start = async |children: &mut Children<'_>| start(children, &mut stages).await;
    children::keep(Children::new(settings, config), flags.keep_pods, start).await
}

async fn start(children: &mut Children<'_>, stages: &mut Stages) -> anyhow::Result<String> {
    let settings = children.settings;
    let bootstrap = settings.layout.component_kubeconfig("bootstrap");
    let patience = if bootstrap.exists() { PATIENCE } else { FOR_EVER };
    let runtime = children.spawn_runtime()?;
    let agent = children.spawn("agent")?;
    let netproxy = children.spawn("netproxy")?;
    stages.done(&children.wait_runtime(runtime, PATIENCE).await?);
    children.wait_ready("agent", agent, patience).await?;
    stages.done("the node has its certificate");
    children.wait_ready("netproxy", netproxy, patience).await?;
    stages.done("Service proxy and cluster DNS ready");
    if settings.node_tunnel == oarlock_netproxy::Tunnel::None {
        stages.done(&up::waits_for_network(settings));
    } else {
        let client = netproxy::client(&settings.layout.component_kubeconfig("agent")).await?;
        machine::node_ready(&client, &settings.node_name, patience).await?;
        stages.done(&format!("node {} Ready", settings.node_name));
    }
    let _ = fs::remove_file(bootstrap);
    Ok(format!(
        "this machine is a node of the cluster at {}. Logs of the daemons are in {}",
        settings.server_url(),
        settings.layout.log_dir().display()
    ))
}
