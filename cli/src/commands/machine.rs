//! What a machine needs before its daemons start: directories, free ports, CNI plugins; and leaving the terminal.
#![allow(unsafe_code, reason = "the detached supervisor calls setsid between fork and exec")]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};
use oarlock_supervise::NotifySocket;

use super::reasons;
use crate::config::{ConfigFlags, Settings};
use crate::host;

/// The plugins in our multi-call CNI program.
const CNI_PLUGINS: &[&str] = &["bandwidth", "bridge", "firewall", "host-local", "loopback", "portmap", "tuning"];

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

pub(crate) fn prepare_directories(settings: &Settings) -> anyhow::Result<()> {
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
pub(crate) fn check_ports(settings: &Settings) -> anyhow::Result<()> {
    let any = settings.any_address();
    let server = [("apiPort", settings.bind_address, settings.api_port)];
    let node = [
        ("agentPort", any, settings.agent_port),
        ("proxyHealthPort", any, settings.proxy_health_port),
        ("proxyMetricsPort", Ipv4Addr::LOCALHOST.into(), settings.proxy_metrics_port),
    ];
    for (key, address, port) in server.into_iter().filter(|_| settings.joined.is_none()).chain(node) {
        if let Err(error) = oarlock_listen::tcp((address, port).into()) {
            anyhow::bail!(
                "port {port} ({key}) cannot be used: {error}; `ss -ltnp 'sport = :{port}'` shows who has it, and {key} in the configuration file chooses another"
            );
        }
    }
    Ok(())
}

/// Puts our CNI plugins where the runtime looks: one program with several names, replaced by rename.
pub(crate) fn install_plugins(settings: &Settings) -> anyhow::Result<()> {
    let source = host::sibling_program("oarlock-cni-plugins")?;
    let directory = settings.layout.own_cni_bin_dir();
    let program = directory.join("oarlock-cni-plugins");
    let is_there = CNI_PLUGINS.iter().all(|name| directory.join(name).exists());
    if is_there && fs::read(&program).is_ok_and(|there| fs::read(&source).is_ok_and(|ours| ours == there)) {
        return Ok(());
    }
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

/// Waits until the node is Ready; the error says what keeps it.
pub(crate) async fn node_ready(client: &kube::Client, name: &str, patience: Duration) -> anyhow::Result<()> {
    match tokio::time::timeout(patience, watch_for_ready(client, name)).await {
        Ok(ready) => ready,
        Err(_) => {
            let reasons = reasons::of_nodes(client, Some(name)).await;
            anyhow::bail!("node {name} is not Ready after {} s{reasons}", patience.as_secs());
        }
    }
}

async fn watch_for_ready(client: &kube::Client, name: &str) -> anyhow::Result<()> {
    let api: Api<Node> = Api::all(client.clone());
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

/// Starts the supervisor in a session of its own, shows what it prints until it is ready, and leaves it running.
pub(crate) fn detach(
    settings: &Settings,
    config: &ConfigFlags,
    command_name: &str,
    arguments: Vec<OsString>,
) -> anyhow::Result<ExitCode> {
    let log_path: PathBuf = settings.layout.log_dir().join(format!("{command_name}.log"));
    let log = File::create(&log_path).with_context(|| format!("cannot write {}", log_path.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _guard = runtime.enter();
    let ready = NotifySocket::bind(&settings.layout.run_dir().join(format!("{command_name}.notify")))?;
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's file")?);
    command
        .args(config.arguments())
        .arg(command_name)
        .args(arguments)
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
                return Err(anyhow::anyhow!("oarlock {command_name} ended with {status}"));
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
