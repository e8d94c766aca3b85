//! `oarlock up`: a whole cluster on this machine. Starts server, runtime, netproxy and agent as supervised children, says
//! what it does one line a stage, and ends them in the right order.
//!
//! Any of the children may be killed at any time; it is started again and the others do not notice. When this process itself
//! is killed, the children end with it and the pods run on; the next `up` takes them over.

use std::ffi::OsString;
use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use super::children::{self, Children};
use super::demo::{self, DemoFlags};
use super::machine::{self, Stages};
use super::stop::{self, Supervisor};
use crate::config::{ConfigFlags, Settings};
use crate::{host, pki};

/// How long a daemon may take to say that it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Clone, clap::Args)]
pub(crate) struct UpFlags {
    /// Return once the cluster is up and leave it running
    #[arg(long)]
    detach: bool,
    /// Apply the demo and fetch its page when the cluster is up
    #[arg(long)]
    demo: bool,
    /// Leave pods running when stopped
    #[arg(long)]
    keep_pods: bool,
    #[command(flatten)]
    demo_flags: DemoFlags,
}

impl UpFlags {
    /// The flags for the supervisor that stays.
    fn arguments(&self) -> Vec<OsString> {
        let demo = self.demo.then_some("--demo").into_iter();
        let switches = demo.chain(self.keep_pods.then_some("--keep-pods")).map(OsString::from);
        let image = self.demo_flags.image.iter().flat_map(|image| [OsString::from("--image"), image.into()]);
        let timeout = [OsString::from("--timeout"), self.demo_flags.timeout.to_string().into()];
        switches.chain(image).chain(timeout).collect()
    }
}

pub(crate) fn run(settings: Settings, config: &ConfigFlags, flags: UpFlags) -> anyhow::Result<ExitCode> {
    host::require_root("oarlock up")?;
    if let Some(supervisor) = stop::running(&settings)? {
        anyhow::bail!("oarlock is already running here (pid {}); `oarlock stop` ends it", supervisor.pid);
    }
    pki::refuse_joined(&settings)?;
    machine::prepare_directories(&settings)?;
    if flags.detach {
        return machine::detach(&settings, config, "up", flags.arguments());
    }
    oarlock_telemetry::init("warn", oarlock_telemetry::Format::Text)?;
    machine::check_ports(&settings)?;
    // One thread: the parent-death signal of the children is tied to the thread that starts them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(supervise(&settings, config, &flags));
    let _ = fs::remove_file(settings.layout.up_pid_file());
    result.map(|()| ExitCode::SUCCESS)
}

async fn supervise(settings: &Settings, config: &ConfigFlags, flags: &UpFlags) -> anyhow::Result<()> {
    Supervisor::this()?.record(settings)?;
    let mut stages = Stages::new();
    println!(
        "starting node {} ({}) from {}",
        settings.node_name,
        settings.node_ip,
        settings.layout.data_dir().display()
    );
    pki::ensure(settings)?;
    machine::install_plugins(settings)?;
    let start = async |children: &mut Children<'_>| {
        start(children, flags, &mut stages).await?;
        Ok(how_to_go_on(settings))
    };
    children::keep(Children::new(settings, config), flags.keep_pods, start).await
}

/// What a node without a network of ours still needs.
pub(crate) fn waits_for_network(settings: &Settings) -> String {
    let directory = settings.cni_conf_dir.display();
    format!("node {} gets Ready when a network plugin has its configuration in {directory}", settings.node_name)
}

/// Starts the four daemons in the order of their needs and waits for the node.
async fn start(children: &mut Children<'_>, flags: &UpFlags, stages: &mut Stages) -> anyhow::Result<()> {
    let server = children.spawn("server")?;
    let runtime = children.spawn_runtime()?;
    children.wait_ready("server", server, READY_TIMEOUT).await?;
    stages.done("API server ready");
    stages.done(&children.wait_runtime(runtime, READY_TIMEOUT).await?);
    let agent = children.spawn("agent")?;
    let netproxy = children.spawn("netproxy")?;
    children.wait_ready("netproxy", netproxy, READY_TIMEOUT).await?;
    stages.done("Service proxy and cluster DNS ready");
    children.wait_ready("agent", agent, READY_TIMEOUT).await?;
    let settings = children.settings;
    let client = demo::admin_client(settings).await?;
    if settings.node_tunnel == oarlock_netproxy::Tunnel::None && !flags.demo {
        stages.done(&waits_for_network(settings));
        return Ok(());
    }
    machine::node_ready(&client, &settings.node_name, READY_TIMEOUT).await?;
    stages.done(&format!("node {} Ready", settings.node_name));
    if flags.demo {
        demo::show(settings, client, &flags.demo_flags, stages).await?;
    }
    Ok(())
}

fn how_to_go_on(settings: &Settings) -> String {
    format!(
        "the cluster is up. Go on with:\n  export KUBECONFIG={}\n  kubectl get pods -A -o wide\nlogs of the daemons are in {}",
        settings.layout.admin_kubeconfig().display(),
        settings.layout.log_dir().display()
    )
}
