//! `bench logs`: how fast one container's output gets into its log file, and what the process between needs for it.

use std::time::{Duration, Instant};

use anyhow::Context;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::cri::*;
use serde_json::json;
use tonic::transport::Channel;

use crate::cri::{connect, container_config, sandbox_config};
use crate::peer::{self, Containerd, Runtime};
use crate::table::{self, Row};

const PATIENCE: Duration = Duration::from_secs(300);

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct LogFlags {
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How much is written, in MB
    #[arg(long, default_value_t = 500)]
    megabytes: usize,
    /// Bytes of a line
    #[arg(long, default_value_t = 1000)]
    line: usize,
    /// Measure containerd too, where it is installed
    #[arg(long)]
    peers: bool,
}

pub(crate) fn run(flags: &LogFlags) -> anyhow::Result<()> {
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut rows = Vec::new();
    let mut rates = Vec::new();
    let mut one = |runtime: Box<dyn Runtime>| -> anyhow::Result<()> {
        let name = runtime.name();
        let mut samples = Vec::new();
        let mut peak = 0;
        for round in 0..flags.rounds {
            let (time, rss) = threads.block_on(write(&*runtime, flags, round)).with_context(|| name.clone())?;
            samples.push(time);
            peak = peak.max(rss);
        }
        let row = Row { name: name.clone(), samples };
        let rate = flags.megabytes as f64 * 1000.0 / row.percentile(0.5);
        println!("{name}: {rate:.0} MB/s; the shim's resident set was {} kB at most", peak / 1024);
        rates.push(json!({ "name": name, "mb_per_second": rate, "shim_peak_rss_bytes": peak }));
        rows.push(row);
        Ok(())
    };
    one(peer::ours()?)?;
    if flags.peers {
        for (name, program) in peer::peers().into_iter().take(1) {
            one(Box::new(Containerd::start(name, &program)?))?;
        }
    }
    table::print(&format!("{} MB in lines of {} bytes", flags.megabytes, flags.line), &rows);
    println!("{}", json!({ "bench": "log rate", "rows": rates }));
    Ok(())
}

/// The time from the start to the end of a container that does nothing but write, and its shim's peak.
async fn write(runtime: &dyn Runtime, flags: &LogFlags, round: usize) -> anyhow::Result<(f64, u64)> {
    let mut client = RuntimeServiceClient::new(connect(runtime.socket()).await?);
    let directory = tempfile::Builder::new().prefix("oarlock-perf-logs-").tempdir()?;
    let lines = flags.megabytes * 1_000_000 / flags.line.max(1);
    let mut sandbox = sandbox_config(&format!("logs-{round}"));
    sandbox.log_directory = directory.path().display().to_string();
    let mut container = container_config();
    container.log_path = "main.log".to_owned();
    // The applet's lines end with a newline of their own.
    container.command = vec!["/bin/log".to_owned(), lines.to_string(), (flags.line - 1).to_string()];
    let request = RunPodSandboxRequest { config: Some(sandbox.clone()), ..RunPodSandboxRequest::default() };
    let pod = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    let request =
        CreateContainerRequest { pod_sandbox_id: pod.clone(), config: Some(container), sandbox_config: Some(sandbox) };
    let container_id = client.create_container(request).await?.into_inner().container_id;
    let start = Instant::now();
    client.start_container(StartContainerRequest { container_id: container_id.clone() }).await?;
    let peak = ended(&mut client, runtime, &container_id, start).await?;
    let time = start.elapsed().as_secs_f64() * 1000.0;
    let written = std::fs::metadata(directory.path().join("main.log"))?.len();
    anyhow::ensure!(written as usize > flags.megabytes * 1_000_000, "only {written} bytes are in the log");
    client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    Ok((time, peak))
}

/// Waits for the container's end; the largest resident set of any shim seen meanwhile, in bytes.
async fn ended(
    client: &mut RuntimeServiceClient<Channel>,
    runtime: &dyn Runtime,
    container_id: &str,
    start: Instant,
) -> anyhow::Result<u64> {
    let mut peak = 0;
    loop {
        let request = ContainerStatusRequest { container_id: container_id.to_owned(), verbose: false };
        let status = client.container_status(request).await?.into_inner().status.context("no status")?;
        if status.state() == ContainerState::ContainerExited {
            anyhow::ensure!(status.exit_code == 0, "the container failed: {status:?}");
            return Ok(peak);
        }
        peak = peak.max(shims_peak(&runtime.marker())?);
        anyhow::ensure!(start.elapsed() < PATIENCE, "the container does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn shims_peak(marker: &str) -> anyhow::Result<u64> {
    let shims = procfs::process::all_processes()?.flatten().filter(|process| {
        process.cmdline().is_ok_and(|words| {
            words.first().is_some_and(|program| program.contains("shim")) && words.iter().any(|w| w.contains(marker))
        })
    });
    Ok(shims.filter_map(|process| process.status().ok()?.vmhwm).max().unwrap_or(0) * 1024)
}
