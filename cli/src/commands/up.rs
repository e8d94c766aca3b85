//! `oarlock up`: a whole cluster on this machine. Starts server, runtime, netproxy and agent as supervised children, says
//! what it does one line a stage, and ends them in the right order.
//!
//! Any of the children may be killed at any time; it is started again and the others do not notice. When this process itself
//! is killed, the children end with it and the pods run on; the next `up` takes them over.
#![allow(unsafe_code, reason = "the detached supervisor calls setsid between fork and exec")]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::cri::{ListPodSandboxRequest, StopPodSandboxRequest};
use oarlock_supervise::{Child, ChildError, ChildState, NotifySocket, RestartPolicy, notify_ready};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::demo::{self, DemoFlags};
use super::stop::{self, Supervisor};
use super::{daemon, images};
use crate::config::{ConfigFlags, Settings};
use crate::{host, pki};

/// The plugins in our multi-call CNI program.
const CNI_PLUGINS: &[&str] = &["bandwidth", "bridge", "firewall", "host-local", "loopback", "portmap", "tuning"];
/// How long a daemon may take to say that it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

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

/// Progress lines: what was done and how long it took since the start.
pub(crate) struct Stages {
    start: Instant,
}

impl Stages {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn done(&mut self, what: &str) {
        println!("{:>7.2} s  {what}", self.start.elapsed().as_secs_f64());
        let _ = std::io::stdout().flush();
    }
}

pub(crate) fn run(settings: Settings, config: &ConfigFlags, flags: UpFlags) -> anyhow::Result<ExitCode> {
    host::require_root("oarlock up")?;
    if let Some(supervisor) = stop::running(&settings)? {
        anyhow::bail!("oarlock is already running here (pid {}); `oarlock stop` ends it", supervisor.pid);
    }
    prepare_directories(&settings)?;
    if flags.detach {
        return detach(&settings, config, &flags);
    }
    oarlock_telemetry::init("warn", oarlock_telemetry::Format::Text)?;
    check_ports(&settings)?;
    // One thread: the parent-death signal of the children is tied to the thread that starts them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(supervise(&settings, config, &flags));
    let _ = fs::remove_file(settings.layout.up_pid_file());
    result.map(|()| ExitCode::SUCCESS)
}

async fn supervise(settings: &Settings, config: &ConfigFlags, flags: &UpFlags) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    tokio::spawn(daemon::cancel_on_signal(shutdown.clone()));
    Supervisor::this()?.record(settings)?;
    let mut stages = Stages::new();
    println!(
        "starting node {} ({}) from {}",
        settings.node_name,
        settings.node_ip,
        settings.layout.data_dir().display()
    );
    pki::ensure(settings)?;
    install_plugins(settings)?;
    let mut children = Children { settings, config, running: Vec::new() };
    let outcome = tokio::select! {
        started = start(&mut children, flags, &mut stages) => started,
        () = shutdown.cancelled() => Ok(()),
    };
    let outcome = match outcome {
        Ok(()) if shutdown.is_cancelled() => Ok(()),
        Ok(()) => {
            let _ = notify_ready();
            println!("{}", how_to_go_on(settings));
            let _ = std::io::stdout().flush();
            tokio::select! {
                () = shutdown.cancelled() => Ok(()),
                failed = children.first_failure() => Err(failed),
            }
        }
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        eprintln!("oarlock: {error:#}");
    }
    let keep_pods = flags.keep_pods || fs::remove_file(settings.layout.keep_pods_marker()).is_ok();
    println!("stopping{}", if keep_pods { ", pods stay" } else { "" });
    children.stop("agent").await;
    if !keep_pods {
        stop_pods(settings).await;
    }
    for name in ["netproxy", "runtime", "server"] {
        children.stop(name).await;
    }
    outcome
}

/// Starts the four daemons in the order of their needs and waits for the node.
async fn start(children: &mut Children<'_>, flags: &UpFlags, stages: &mut Stages) -> anyhow::Result<()> {
    let server = children.spawn("server")?;
    let runtime = children.spawn("runtime")?;
    children.wait_ready("server", server).await?;
    stages.done("API server ready");
    children.wait_ready("runtime", runtime).await?;
    stages.done("runtime ready");
    let agent = children.spawn("agent")?;
    let netproxy = children.spawn("netproxy")?;
    children.wait_ready("netproxy", netproxy).await?;
    stages.done("Service proxy and cluster DNS ready");
    children.wait_ready("agent", agent).await?;
    let settings = children.settings;
    let client = demo::admin_client(settings).await?;
    tokio::time::timeout(READY_TIMEOUT, node_ready(client.clone(), &settings.node_name)).await.map_err(|_| {
        anyhow::anyhow!("node {} is not Ready after {} s", settings.node_name, READY_TIMEOUT.as_secs())
    })??;
    stages.done(&format!("node {} Ready", settings.node_name));
    if flags.demo {
        demo::show(settings, client, &flags.demo_flags, stages).await?;
    }
    Ok(())
}

async fn node_ready(client: kube::Client, name: &str) -> anyhow::Result<()> {
    let api: Api<Node> = Api::all(client);
    let fields = format!("metadata.name={name}");
    let events = watcher(api, watcher::Config::default().fields(&fields)).default_backoff().applied_objects();
    let mut events = std::pin::pin!(events);
    while let Some(node) = events.try_next().await? {
        let ready = node
            .status
            .iter()
            .flat_map(|status| status.conditions.iter().flatten())
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        if ready {
            return Ok(());
        }
    }
    anyhow::bail!("the watch of node {name} ended")
}

/// One child under supervision.
struct Running {
    name: &'static str,
    token: CancellationToken,
    task: Option<JoinHandle<Result<(), ChildError>>>,
}

struct Children<'a> {
    settings: &'a Settings,
    config: &'a ConfigFlags,
    running: Vec<Running>,
}

impl Children<'_> {
    /// Starts `oarlock <name>` under supervision and returns the socket on which it says that it is ready.
    fn spawn(&mut self, name: &'static str) -> anyhow::Result<NotifySocket> {
        let socket = NotifySocket::bind(&self.settings.layout.run_dir().join(format!("{name}.notify")))?;
        let child = Child {
            name: name.to_owned(),
            program: std::env::current_exe().context("cannot find this program's file")?,
            arguments: config_arguments(self.config).into_iter().chain([OsString::from(name)]).collect(),
            environment: vec![("NOTIFY_SOCKET".into(), socket.path().into())],
            log: self.settings.layout.log_dir().join(format!("{name}.log")),
            policy: RestartPolicy::default(),
        };
        let token = CancellationToken::new();
        let (state, _) = watch::channel(ChildState::Waiting);
        let task = tokio::spawn(child.run(state, token.clone()));
        self.running.push(Running { name, token, task: Some(task) });
        Ok(socket)
    }

    /// Waits for readiness; a child that gives up, or takes too long, fails with where its log is.
    async fn wait_ready(&mut self, name: &'static str, socket: NotifySocket) -> anyhow::Result<()> {
        let log = self.settings.layout.log_dir().join(format!("{name}.log"));
        let outcome = tokio::select! {
            ready = socket.ready(READY_TIMEOUT) => ready.map_err(anyhow::Error::from),
            failed = self.first_failure() => Err(failed),
        };
        outcome
            .with_context(|| format!("{name} did not start; the end of {}:\n{}", log.display(), last_lines(&log, 12)))
    }

    /// Waits until a child has given up. Pending while all run. Cancel safe.
    async fn first_failure(&mut self) -> anyhow::Error {
        let tasks =
            self.running.iter_mut().filter_map(|running| running.task.as_mut().map(|task| (running.name, task)));
        let waits = tasks.map(|(name, task)| Box::pin(async move { (name, task.await) })).collect::<Vec<_>>();
        if waits.is_empty() {
            return std::future::pending().await;
        }
        let ((name, ended), index, _) = futures::future::select_all(waits).await;
        self.running.remove(index);
        match ended {
            Ok(Err(error)) => anyhow::Error::from(error),
            Ok(Ok(())) => anyhow::anyhow!("{name} ended"),
            Err(error) => anyhow::Error::from(error),
        }
    }

    /// Ends one child and waits for it.
    async fn stop(&mut self, name: &str) {
        for running in self.running.iter_mut().filter(|running| running.name == name) {
            running.token.cancel();
            if let Some(task) = running.task.take() {
                let _ = task.await;
            }
        }
    }
}

/// The flags that make a child read the same configuration.
fn config_arguments(config: &ConfigFlags) -> Vec<OsString> {
    let mut arguments = Vec::new();
    if let Some(file) = &config.config {
        arguments.extend([OsString::from("--config"), file.into()]);
    }
    if let Some(directory) = &config.data_dir {
        arguments.extend([OsString::from("--data-dir"), directory.into()]);
    }
    arguments
}

/// Stops every pod sandbox through the runtime, several at a time, within a bound.
async fn stop_pods(settings: &Settings) {
    let stopping = async {
        let channel = images::connect(settings).await?;
        let mut client = RuntimeServiceClient::new(channel);
        let pods =
            client.list_pod_sandbox(ListPodSandboxRequest::default()).await.map_err(images::status)?.into_inner();
        let stops = pods.items.into_iter().map(|pod| {
            let mut client = client.clone();
            async move { client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.id }).await }
        });
        for outcome in futures::future::join_all(stops).await {
            outcome.map_err(images::status)?;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(Duration::from_secs(45), stopping).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("oarlock: cannot stop every pod: {error:#}"),
        Err(_) => eprintln!("oarlock: pods did not stop within 45 s"),
    }
}

fn prepare_directories(settings: &Settings) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let layout = &settings.layout;
    for (directory, mode) in [
        (layout.data_dir().to_owned(), 0o711),
        (layout.run_dir(), 0o711),
        (layout.log_dir(), 0o700),
        (layout.static_pods(), 0o700),
        (layout.own_cni_bin_dir(), 0o755),
        (settings.cni_conf_dir.clone(), 0o755),
        (layout.pod_logs_dir(), 0o755),
        (layout.container_logs_dir(), 0o755),
    ] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(&directory)
            .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    }
    Ok(())
}

/// Fails early, and by name, when a port is taken.
fn check_ports(settings: &Settings) -> anyhow::Result<()> {
    for (key, port) in [
        ("apiPort", settings.api_port),
        ("agentPort", settings.agent_port),
        ("proxyHealthPort", settings.proxy_health_port),
    ] {
        if let Err(error) = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
            anyhow::bail!(
                "port {port} ({key}) cannot be used: {error}; `ss -ltnp 'sport = :{port}'` shows who has it, and {key} in the configuration file chooses another"
            );
        }
    }
    Ok(())
}

/// Puts our CNI plugins where the runtime looks: one program with several names, replaced by rename.
fn install_plugins(settings: &Settings) -> anyhow::Result<()> {
    let source = host::sibling_program("oarlock-cni-plugins")?;
    let directory = settings.layout.own_cni_bin_dir();
    let program = directory.join("oarlock-cni-plugins");
    let place = |from: &Path, to: &Path, link: bool| -> anyhow::Result<()> {
        let temporary = to.with_extension("new");
        let _ = fs::remove_file(&temporary);
        if link {
            fs::hard_link(from, &temporary).with_context(|| format!("cannot link {}", temporary.display()))?;
        } else {
            fs::copy(from, &temporary)
                .with_context(|| format!("cannot copy {} to {}", from.display(), temporary.display()))?;
        }
        fs::rename(&temporary, to).with_context(|| format!("cannot place {}", to.display()))
    };
    place(&source, &program, false)?;
    for name in CNI_PLUGINS {
        place(&program, &directory.join(name), true)?;
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

/// Starts the supervisor in a session of its own, shows what it prints until it is ready, and leaves it running.
fn detach(settings: &Settings, config: &ConfigFlags, flags: &UpFlags) -> anyhow::Result<ExitCode> {
    let log_path: PathBuf = settings.layout.log_dir().join("up.log");
    let log = File::create(&log_path).with_context(|| format!("cannot write {}", log_path.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _guard = runtime.enter();
    let ready = NotifySocket::bind(&settings.layout.run_dir().join("up.notify"))?;
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's file")?);
    command
        .args(config_arguments(config))
        .arg("up")
        .args(flags.demo.then_some("--demo"))
        .args(flags.keep_pods.then_some("--keep-pods"))
        .args(flags.demo_flags.image.iter().flat_map(|image| [OsString::from("--image"), image.into()]))
        .args(["--timeout".to_owned(), flags.demo_flags.timeout.to_string()])
        .env("NOTIFY_SOCKET", ready.path())
        .stdin(Stdio::null())
        .stderr(log.try_clone()?)
        .stdout(log);
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(std::io::Error::from));
    }
    let mut child = command.spawn().context("cannot start the supervisor")?;
    let mut shown = 0u64;
    let outcome = runtime.block_on(async {
        loop {
            if ready.ready(Duration::from_millis(50)).await.is_ok() {
                return Ok(());
            }
            shown = show_from(&log_path, shown)?;
            if let Some(status) = child.try_wait()? {
                return Err(anyhow::anyhow!("oarlock up ended with {status}"));
            }
        }
    });
    // What the supervisor prints after it is ready ends with the hint on how to go on.
    std::thread::park_timeout(Duration::from_millis(20));
    show_from(&log_path, shown)?;
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Prints what a file holds from `offset` on; returns the new offset.
fn show_from(path: &Path, offset: u64) -> anyhow::Result<u64> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    std::io::stdout().write_all(&text)?;
    std::io::stdout().flush()?;
    Ok(offset + text.len() as u64)
}

/// The end of a log file, for an error message.
fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
