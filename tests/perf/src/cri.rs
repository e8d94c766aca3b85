//! `bench runtime`: pods through the CRI socket alone, on our runtime and on its peers in the same run: one pod at a time call
//! by call, memory with twenty idle pods, and many pods started at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use hyper_util::rt::TokioIo;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::cri::*;
use serde_json::json;
use tonic::transport::{Channel, Endpoint};

use crate::peer::{self, Containerd, PAUSE_ARGUMENT, Runtime};
use crate::spans;
use crate::table::{self, Row};

const IMAGE: &str = "oarlock.local/testimage:1";
/// Pods whose memory is measured.
const IDLE_PODS: usize = 20;
/// How long one call may take.
const CALL_LIMIT: Duration = Duration::from_secs(120);

const CALLS: [&str; 9] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "create + start",
    "sandbox + create + start",
    "ExecSync true",
    "StopPodSandbox",
    "RemovePodSandbox",
    "up and down",
];

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct CriFlags {
    /// Pods, one after another
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// Pods started at once; 0 leaves this part out
    #[arg(long, default_value_t = 100)]
    burst: usize,
    /// Milliseconds between one pod and the next
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// Show where the time of each call of ours goes, step by step; logging it costs some of it
    #[arg(long)]
    spans: bool,
    /// Measure containerd with runc and with crun too, where they are installed
    #[arg(long)]
    peers: bool,
}

pub(crate) fn run(flags: &CriFlags) -> anyhow::Result<()> {
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut rows = Vec::new();
    let mut densities = Vec::new();
    let mut one = |runtime: Box<dyn Runtime>| -> anyhow::Result<()> {
        let name = runtime.name();
        let (samples, density) = threads.block_on(measure(&*runtime, flags)).with_context(|| name.clone())?;
        rows.extend(
            CALLS.iter().zip(samples).map(|(call, samples)| (*call, Row { name: format!("{call} / {name}"), samples })),
        );
        densities.push((name, density));
        Ok(())
    };
    if flags.spans {
        return steps(flags);
    }
    one(peer::ours()?)?;
    if flags.peers {
        for (name, program) in peer::peers() {
            // crun, for one, refuses hosts with hybrid control groups.
            if let Err(error) = Containerd::start(name, &program).and_then(|peer| one(Box::new(peer))) {
                println!("not measured: {error:#}");
            }
        }
    }
    // Side by side: call by call, ours first.
    rows.sort_by_key(|(call, _)| CALLS.iter().position(|name| name == call));
    let rows: Vec<Row> = rows.into_iter().map(|(_, row)| row).collect();
    table::print("one pod at a time through CRI", &rows);
    print_densities(flags, &densities);
    Ok(())
}

/// Pods one after another on ours, for what its daemon logs of each step.
fn steps(flags: &CriFlags) -> anyhow::Result<()> {
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let cluster = peer::ours_logging(spans::LOG_FILTER)?;
    threads.block_on(async {
        let client = RuntimeServiceClient::new(connect(cluster.socket()).await?);
        for round in 0..flags.rounds {
            tokio::time::sleep(Duration::from_millis(flags.pause)).await;
            one_pod(client.clone(), &format!("single-{round}")).await?;
        }
        anyhow::Ok(())
    })?;
    let log = cluster.path().join("log/runtime.log");
    let log = std::fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let rows = spans::read(&log);
    let of_pods = |row: &Row| CALLS.iter().any(|call| row.name.split(' ').next() == call.split(' ').next());
    table::print("steps of each call", &rows.into_iter().filter(of_pods).collect::<Vec<_>>());
    Ok(())
}

/// Memory and the burst of one runtime.
struct Density {
    daemon_bytes: u64,
    per_pod_bytes: u64,
    burst_ms: Option<f64>,
}

fn print_densities(flags: &CriFlags, densities: &[(String, Density)]) {
    let burst = format!("{} at once, ms", flags.burst);
    println!("\n{IDLE_PODS} idle pods\n{:<24} {:>16} {:>22} {burst:>18}", "", "daemon PSS kB", "outside it, kB a pod");
    for (name, density) in densities {
        let burst = density.burst_ms.map_or_else(|| "-".to_owned(), |time| format!("{time:.0}"));
        println!("{name:<24} {:>16} {:>22} {burst:>18}", density.daemon_bytes / 1024, density.per_pod_bytes / 1024);
    }
    let rows: Vec<_> = densities
        .iter()
        .map(|(name, density)| {
            json!({ "name": name, "daemon_pss_bytes": density.daemon_bytes, "pss_bytes_per_pod": density.per_pod_bytes, "burst": flags.burst, "burst_ms": density.burst_ms })
        })
        .collect();
    println!("{}", json!({ "bench": "idle pods", "pods": IDLE_PODS, "rows": rows }));
}

async fn measure(runtime: &dyn Runtime, flags: &CriFlags) -> anyhow::Result<([Vec<f64>; CALLS.len()], Density)> {
    let channel = connect(runtime.socket()).await?;
    let mut images = ImageServiceClient::new(channel.clone());
    let request = ImageStatusRequest { image: Some(image()), ..ImageStatusRequest::default() };
    anyhow::ensure!(images.image_status(request).await?.into_inner().image.is_some(), "{IMAGE} is not imported");
    let client = RuntimeServiceClient::new(channel);

    let mut samples: [Vec<f64>; CALLS.len()] = std::array::from_fn(|_| Vec::new());
    for round in 0..flags.rounds {
        tokio::time::sleep(Duration::from_millis(flags.pause)).await;
        let times = one_pod(client.clone(), &format!("single-{round}")).await?;
        for (sample, time) in samples.iter_mut().zip(times) {
            sample.push(time);
        }
    }

    let mut idle = Vec::new();
    for number in 0..IDLE_PODS {
        idle.push(up(client.clone(), &format!("idle-{number}")).await?);
    }
    let (daemon_bytes, others_bytes) = memory(runtime)?;
    down_all(&client, idle).await?;

    let burst_ms = match flags.burst {
        0 => None,
        pods => Some(burst(&client, pods).await?),
    };
    Ok((samples, Density { daemon_bytes, per_pod_bytes: others_bytes / IDLE_PODS as u64, burst_ms }))
}

pub(crate) async fn connect(socket: PathBuf) -> anyhow::Result<Channel> {
    Endpoint::from_static("http://runtime")
        .timeout(CALL_LIMIT)
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .context("cannot reach the runtime")
}

/// Starts many pods at the same moment; the time until the last one runs.
async fn burst(client: &RuntimeServiceClient<Channel>, pods: usize) -> anyhow::Result<f64> {
    let start = Instant::now();
    let started: Vec<String> = stream::iter(0..pods)
        .map(|number| {
            let client = client.clone();
            async move { up(client, &format!("burst-{number}")).await }
        })
        .buffer_unordered(pods)
        .try_collect()
        .await?;
    let time = milliseconds(start);
    down_all(client, started).await?;
    Ok(time)
}

async fn down_all(client: &RuntimeServiceClient<Channel>, pods: Vec<String>) -> anyhow::Result<()> {
    stream::iter(pods).map(|pod| down(client.clone(), pod)).buffer_unordered(8).try_collect::<Vec<()>>().await?;
    Ok(())
}

async fn down(mut client: RuntimeServiceClient<Channel>, pod: String) -> anyhow::Result<()> {
    client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    Ok(())
}

/// PSS of the daemon, and of everything else that is there because of the pods but the workload itself.
fn memory(runtime: &dyn Runtime) -> anyhow::Result<(u64, u64)> {
    let daemon = runtime.daemon()?;
    let marker = runtime.marker();
    let mut parents = BTreeMap::new();
    let mut commands = BTreeMap::new();
    for process in procfs::process::all_processes()?.flatten() {
        let (Ok(stat), Ok(command)) = (process.stat(), process.cmdline()) else { continue };
        parents.insert(process.pid, stat.ppid);
        commands.insert(process.pid, command);
    }
    let shims: BTreeSet<i32> = commands
        .iter()
        .filter(|(_, command)| {
            command.first().is_some_and(|program| program.contains("shim"))
                && command.iter().any(|word| word.contains(&marker))
        })
        .map(|(pid, _)| *pid)
        .collect();
    let pauses = commands
        .iter()
        .filter(|(pid, command)| {
            parents.get(pid).is_some_and(|parent| shims.contains(parent))
                && command.last().is_some_and(|word| word == PAUSE_ARGUMENT)
        })
        .map(|(pid, _)| *pid);
    let mut others = 0;
    for pid in shims.iter().copied().chain(pauses) {
        others += pss(&procfs::process::Process::new(pid)?)?;
    }
    Ok((pss(&daemon)?, others))
}

fn pss(process: &procfs::process::Process) -> anyhow::Result<u64> {
    let rollup = process.smaps_rollup()?;
    let map = rollup.memory_map_rollup.0.first().context("an empty smaps_rollup")?;
    map.extension.map.get("Pss").copied().context("no Pss in smaps_rollup")
}

fn image() -> ImageSpec {
    ImageSpec { image: IMAGE.to_owned(), user_specified_image: IMAGE.to_owned(), ..ImageSpec::default() }
}

fn namespaces() -> Option<NamespaceOption> {
    Some(NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() })
}

pub(crate) fn sandbox_config(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: namespaces(),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

pub(crate) fn container_config() -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
        image: Some(image()),
        command: vec!["/bin/sleep".to_owned()],
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: namespaces(),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

/// Sandbox, container and start without looking at the clock; returns the pod's id.
async fn up(mut client: RuntimeServiceClient<Channel>, name: &str) -> anyhow::Result<String> {
    let config = sandbox_config(name);
    let request = RunPodSandboxRequest { config: Some(config.clone()), ..RunPodSandboxRequest::default() };
    let pod = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(container_config()),
        sandbox_config: Some(config),
    };
    let container_id = client.create_container(request).await?.into_inner().container_id;
    client.start_container(StartContainerRequest { container_id }).await?;
    Ok(pod)
}

/// One pod up and down, each call timed.
async fn one_pod(mut client: RuntimeServiceClient<Channel>, name: &str) -> anyhow::Result<[f64; CALLS.len()]> {
    let config = sandbox_config(name);
    let begin = Instant::now();
    let request = RunPodSandboxRequest { config: Some(config.clone()), ..RunPodSandboxRequest::default() };
    let pod = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let sandbox = milliseconds(begin);
    let start = Instant::now();
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(container_config()),
        sandbox_config: Some(config),
    };
    let container_id = client.create_container(request).await?.into_inner().container_id;
    let create = milliseconds(start);
    let start = Instant::now();
    client.start_container(StartContainerRequest { container_id: container_id.clone() }).await?;
    let started = milliseconds(start);
    let all = milliseconds(begin);
    let start = Instant::now();
    let request = ExecSyncRequest { container_id, cmd: vec!["/bin/true".to_owned()], timeout: 10 };
    client.exec_sync(request).await?;
    let exec = milliseconds(start);
    let start = Instant::now();
    client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    let stop = milliseconds(start);
    let start = Instant::now();
    client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    let remove = milliseconds(start);
    Ok([sandbox, create, started, create + started, all, exec, stop, remove, all + stop + remove])
}
