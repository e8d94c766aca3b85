//! The daemons that `up` and `join` keep running, as supervised children, and pods' end.
//!
//! Any of the children may be killed at any time; it is started again and the others do not notice.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::cri::{ListPodSandboxRequest, StopPodSandboxRequest};
use oarlock_supervise::{Child, ChildError, ChildState, NotifySocket, RestartPolicy, notify_ready};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::reset::{self, POD_UID};
use super::{daemon, images};
use crate::config::{ConfigFlags, Settings};

/// How long a runtime of others may take to say its version, and when it is asked again.
const ANSWER: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

/// One child under supervision.
struct Running {
    name: &'static str,
    token: CancellationToken,
    task: Option<JoinHandle<Result<(), ChildError>>>,
}

/// The daemons of one machine.
pub(crate) struct Children<'a> {
    pub(crate) settings: &'a Settings,
    config: &'a ConfigFlags,
    running: Vec<Running>,
}

impl<'a> Children<'a> {
    pub(crate) fn new(settings: &'a Settings, config: &'a ConfigFlags) -> Self {
        Self { settings, config, running: Vec::new() }
    }

    /// Starts `oarlock <name>` under supervision and returns the socket on which it says that it is ready.
    pub(crate) fn spawn(&mut self, name: &'static str) -> anyhow::Result<NotifySocket> {
        let socket = NotifySocket::bind(&self.settings.layout.run_dir().join(format!("{name}.notify")))?;
        let child = Child {
            name: name.to_owned(),
            program: std::env::current_exe().context("cannot find this program's file")?,
            arguments: self.config.arguments().into_iter().chain([OsString::from(name)]).collect(),
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

    /// Starts our runtime, unless the node has another.
    pub(crate) fn spawn_runtime(&mut self) -> anyhow::Result<Option<NotifySocket>> {
        self.settings.has_own_runtime().then(|| self.spawn("runtime")).transpose()
    }

    /// Waits for the runtime that was started, or until the other one answers; gives what to say then.
    pub(crate) async fn wait_runtime(
        &mut self,
        own: Option<NotifySocket>,
        patience: Duration,
    ) -> anyhow::Result<String> {
        if let Some(socket) = own {
            self.wait_ready("runtime", socket, patience).await?;
            return Ok("runtime ready".to_owned());
        }
        let settings = self.settings;
        let answers = async {
            loop {
                let asked = async { images::version(images::connect(settings).await?).await };
                match tokio::time::timeout(ANSWER, asked).await {
                    Ok(Ok(version)) => return version,
                    _ => tokio::time::sleep(PAUSE).await,
                }
            }
        };
        let answered = tokio::select! {
            answered = tokio::time::timeout(patience, answers) => answered,
            failed = self.first_failure() => return Err(failed),
        };
        let version = answered.with_context(|| {
            format!("no runtime answers at {} (containerRuntimeEndpoint)", settings.runtime_socket.display())
        })?;
        Ok(format!("runtime ready: {version}"))
    }

    /// Waits for readiness; a child that gives up, or takes too long, fails with where its log is.
    pub(crate) async fn wait_ready(
        &mut self,
        name: &'static str,
        socket: NotifySocket,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let log = self.settings.layout.log_dir().join(format!("{name}.log"));
        let outcome = tokio::select! {
            ready = socket.ready(patience) => ready.map_err(anyhow::Error::from),
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

/// Starts children by `start`, says what it returns, and keeps them until this process is asked to end or one of them gives up;
/// then ends them in an order that lets pods end first.
pub(crate) async fn keep(
    mut children: Children<'_>,
    keep_pods: bool,
    start: impl AsyncFnOnce(&mut Children<'_>) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let settings = children.settings;
    let shutdown = CancellationToken::new();
    tokio::spawn(daemon::cancel_on_signal(shutdown.clone()));
    let started = tokio::select! {
        started = start(&mut children) => started.map(Some),
        () = shutdown.cancelled() => Ok(None),
    };
    let outcome = match started {
        Ok(None) => Ok(()),
        Ok(Some(how_to_go_on)) => {
            let _ = notify_ready();
            println!("{how_to_go_on}");
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
    let keep_pods = keep_pods || fs::remove_file(settings.layout.keep_pods_marker()).is_ok();
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

/// Stops every pod sandbox of ours through the runtime, several at a time, within a bound.
async fn stop_pods(settings: &Settings) {
    let stopping = async {
        let channel = images::connect(settings).await?;
        let mut client = RuntimeServiceClient::new(channel);
        let pods =
            client.list_pod_sandbox(ListPodSandboxRequest::default()).await.map_err(images::status)?.into_inner();
        // In a runtime that is not ours others may have pods too.
        let uids = reset::own_pod_uids(settings);
        let is_ours = |labels: &HashMap<String, String>| labels.get(POD_UID).is_some_and(|uid| uids.contains(uid));
        let ours = pods.items.into_iter().filter(|pod| settings.has_own_runtime() || is_ours(&pod.labels));
        let stops = ours.map(|pod| {
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

/// The end of a log file, for an error message.
fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
