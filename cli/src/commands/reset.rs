//! `oarlock reset`: ends everything and removes all that this installation made, in an order that can be repeated after a crash.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_agent::LoginConfig;
use oarlock_netlink::{Connection, Protocol};
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_proto::cri::{ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest};
use tonic::transport::Channel;

use super::{images, netproxy, stop};
use crate::config::Settings;
use crate::host;

/// The bridge that netproxy's CNI configuration names.
const BRIDGE: &str = "oar0";
/// Cgroups that agent and runtime make below each hierarchy's root.
const CGROUPS: &[&str] = &["kubepods", "oarlock"];
/// And the slices of systemd that they make instead where it is the cgroup driver.
const SLICES: &[&str] = &["kubepods.slice", "oarlock.slice"];

/// The label by which a kubelet's sandboxes are known.
pub(super) const POD_UID: &str = "io.kubernetes.pod.uid";
/// How long removing all pods may take.
const REMOVAL: Duration = Duration::from_secs(90);
/// How long processes that were killed may take to be gone, and their cgroups to be free.
const GOING: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(10);

#[derive(clap::Args)]
pub(crate) struct ResetFlags {
    /// Do not ask
    #[arg(long, short = 'y')]
    yes: bool,
}

pub(crate) fn run(settings: &Settings, flags: ResetFlags) -> anyhow::Result<ExitCode> {
    host::require_root("oarlock reset")?;
    if !flags.yes && !confirmed(settings)? {
        println!("nothing was changed");
        return Ok(ExitCode::FAILURE);
    }
    let mut problems = Vec::new();
    let mut step = |what: &str, outcome: anyhow::Result<()>| {
        let is_done = outcome.is_ok();
        if let Err(error) = outcome {
            problems.push(format!("{what}: {error:#}"));
        }
        is_done
    };
    if let Some(supervisor) = stop::running(settings)? {
        step("stop", stop::stop(settings, supervisor, false, Duration::from_secs(90)));
    }
    let logs = pod_log_directories(settings);
    // Which pods of another runtime are ours is known by their directories: those stay until the pods are gone.
    let may_forget = step("pods", remove_pods(settings)) || settings.has_own_runtime();
    step("processes", end_leftover_processes(settings));
    step("volumes", abandon_volumes(settings));
    if may_forget {
        step("mounts", unmount_all(settings));
    }
    step("login1", LoginConfig::default().give_back().map_err(anyhow::Error::from));
    step("slices", stop_slices());
    step("cgroups", remove_cgroups());
    step("links", remove_bridge());
    step("proxy", oarlock_netproxy::remove_everything(&netproxy::proxy_config(settings)).map_err(anyhow::Error::from));
    step("nftables", remove_tables());
    step("AppArmor", remove_profile());
    if may_forget {
        step("files", remove_files(settings, &logs));
    }
    if problems.is_empty() {
        println!("reset: nothing of {} is left", settings.layout.data_dir().display());
        if let Some(server) = &settings.joined {
            let name = &settings.node_name;
            println!("the cluster at {server} still lists the node; `kubectl delete node {name}` there takes it out");
        }
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::bail!(
        "not everything could be removed; run `oarlock reset` again after fixing:\n  {}",
        problems.join("\n  ")
    )
}

fn confirmed(settings: &Settings) -> anyhow::Result<bool> {
    println!(
        "This ends all pods and deletes {} with every object, image and volume in it. Type yes to go on:",
        settings.layout.data_dir().display()
    );
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}

/// Log directories of the pods of this installation: `<namespace>_<name>_<uid>`, known by the agent's pod directories.
fn pod_log_directories(settings: &Settings) -> Vec<PathBuf> {
    let uids = own_pod_uids(settings);
    let log_dir = settings.layout.pod_logs_dir();
    fs::read_dir(log_dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().rsplit('_').next().is_some_and(|uid| uids.contains(uid)))
        .map(|entry| entry.path())
        .collect()
}

/// The pods that this installation's agent has, by their directories.
pub(super) fn own_pod_uids(settings: &Settings) -> BTreeSet<String> {
    let entries = fs::read_dir(settings.layout.agent_dir().join("pods")).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Removes every pod: through the node's other runtime, and what ours has.
fn remove_pods(settings: &Settings) -> anyhow::Result<()> {
    if settings.has_own_runtime() || !settings.layout.agent_dir().exists() {
        return remove_own_pods(settings);
    }
    let asynchronous = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let removal = async {
        let channel = images::connect(settings).await?;
        tokio::time::timeout(REMOVAL, remove_sandboxes(channel, &own_pod_uids(settings)))
            .await
            .context("removing pods took over 90 s")?
    };
    asynchronous.block_on(removal)?;
    remove_own_pods(settings)
}

/// Stops and removes the sandboxes of our pods: another kubelet, or people, may use the same runtime.
async fn remove_sandboxes(channel: Channel, uids: &BTreeSet<String>) -> anyhow::Result<()> {
    let mut client = RuntimeServiceClient::new(channel);
    let pods = client.list_pod_sandbox(ListPodSandboxRequest::default()).await.map_err(images::status)?.into_inner();
    for pod in pods.items.into_iter().filter(|pod| pod.labels.get(POD_UID).is_some_and(|uid| uids.contains(uid))) {
        let request = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        client.stop_pod_sandbox(request).await.map_err(images::status)?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: pod.id };
        client.remove_pod_sandbox(request).await.map_err(images::status)?;
    }
    Ok(())
}

/// Removes every sandbox through a runtime daemon started for this alone, since only it knows how each was made.
fn remove_own_pods(settings: &Settings) -> anyhow::Result<()> {
    if !settings.layout.runtime_dir().exists() {
        return Ok(());
    }
    // The daemon is asked at its own place whatever the configuration says of the node's runtime.
    let settings = &Settings { runtime_socket: settings.layout.runtime_socket(), ..settings.clone() };
    let mut daemon = Command::new(std::env::current_exe()?);
    if settings.layout.data_dir() != Path::new("/var/lib/oarlock") {
        daemon.arg("--data-dir").arg(settings.layout.data_dir());
    }
    let mut daemon = daemon
        .arg("runtime")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the runtime")?;
    let asynchronous = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let removed = asynchronous.block_on(async {
        let removal = async {
            let channel = loop {
                match images::connect(settings).await {
                    Ok(channel) => break channel,
                    Err(error) => {
                        if let Some(status) = daemon.try_wait()? {
                            return Err(error.context(format!("the runtime ended with {status}")));
                        }
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            };
            let mut client = RuntimeServiceClient::new(channel);
            let pods =
                client.list_pod_sandbox(ListPodSandboxRequest::default()).await.map_err(images::status)?.into_inner();
            for pod in pods.items {
                let request = RemovePodSandboxRequest { pod_sandbox_id: pod.id };
                client.remove_pod_sandbox(request).await.map_err(images::status)?;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(REMOVAL, removal).await.context("removing pods took over 90 s")?
    });
    let _ = kill(Pid::from_raw(i32::try_from(daemon.id())?), Signal::SIGTERM);
    daemon.wait()?;
    removed
}

/// Ends shims that the runtime could not end: processes started from our shim program for this installation's directories.
fn end_leftover_processes(settings: &Settings) -> anyhow::Result<()> {
    let run_dir = settings.layout.run_dir().to_string_lossy().into_owned();
    let mut ended = Vec::new();
    for process in procfs::process::all_processes().context("cannot read /proc")?.flatten() {
        let Ok(command) = process.cmdline() else { continue };
        let is_shim = command.first().is_some_and(|program| program.ends_with("oarlock-shim"));
        if is_shim && command.iter().skip(1).any(|argument| argument.starts_with(&run_dir)) {
            match kill(Pid::from_raw(process.pid), Signal::SIGKILL) {
                Ok(()) => ended.push(process),
                Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot end shim {}", process.pid)),
            }
        }
    }
    // What they hold, and their cgroups, are free when they have gone.
    let deadline = Instant::now() + GOING;
    while let Some(process) = ended.iter().find(|process| process.is_alive()) {
        anyhow::ensure!(Instant::now() < deadline, "shim {} was killed and has not ended", process.pid);
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Gives up what CSI drivers mounted for this node, which may be outside our directories.
fn abandon_volumes(settings: &Settings) -> anyhow::Result<()> {
    let problems = oarlock_agent::abandon_volumes(&settings.layout.kubelet_dir(), &settings.node_name);
    anyhow::ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(())
}

/// Detaches every mount below our directories, deepest first, and the one by which the run directory shows itself.
fn unmount_all(settings: &Settings) -> anyhow::Result<()> {
    let roots = own_roots(settings);
    oarlock_runtime::give_up_run_directory(&settings.layout.run_dir())?;
    let mut points = mounts_below(&roots)?;
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    for point in points {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot unmount {}", point.display())),
        }
    }
    oarlock_runtime::give_up_run_directory(&settings.layout.run_dir())?;
    nothing_mounted_below(&roots)
}

/// The data and run directories as the mount table names them.
fn own_roots(settings: &Settings) -> [PathBuf; 2] {
    let resolved = |path: PathBuf| fs::canonicalize(&path).unwrap_or(path);
    [resolved(settings.layout.data_dir().to_owned()), resolved(settings.layout.run_dir())]
}

/// What is mounted below the directories. A file system that somebody gave one of them is theirs.
fn mounts_below(roots: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let points = oarlock_runtime::all_mount_points()?.into_iter();
    Ok(points.filter(|point| roots.iter().any(|root| point.starts_with(root) && point != root)).collect())
}

/// Deleting goes through mounts, into volumes that are somebody's data: it must find none.
fn nothing_mounted_below(roots: &[PathBuf]) -> anyhow::Result<()> {
    match mounts_below(roots)?.first() {
        Some(point) => anyhow::bail!("{} is mounted still", point.display()),
        None => Ok(()),
    }
}

/// Stops our slices; one that still has processes belongs to somebody else.
fn stop_slices() -> anyhow::Result<()> {
    for slice in SLICES {
        let events = fs::read_to_string(Path::new("/sys/fs/cgroup").join(slice).join("cgroup.events"));
        if events.is_ok_and(|events| events.lines().any(|line| line == "populated 0")) {
            let stopped = oarlock_systemd::Systemd::connect().and_then(|mut systemd| systemd.stop(slice));
            stopped.with_context(|| format!("cannot stop {slice}"))?;
        }
    }
    Ok(())
}

/// Removes our cgroups, innermost first, from every hierarchy; one that still has processes belongs to somebody else.
fn remove_cgroups() -> anyhow::Result<()> {
    let deadline = Instant::now() + GOING;
    let top = Path::new("/sys/fs/cgroup");
    let mut hierarchies = vec![top.to_owned()];
    hierarchies.extend(subdirectories(top));
    for hierarchy in hierarchies {
        for name in CGROUPS {
            remove_cgroup_tree(&hierarchy.join(name), deadline)?;
        }
    }
    Ok(())
}

/// One that stays in use, by another kubelet for one, is left. Processes that were killed may be in theirs for a moment.
fn remove_cgroup_tree(group: &Path, deadline: Instant) -> anyhow::Result<()> {
    if !group.is_dir() {
        return Ok(());
    }
    for child in subdirectories(group) {
        remove_cgroup_tree(&child, deadline)?;
    }
    loop {
        match fs::remove_dir(group) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(LOOK);
            }
            Ok(()) => return Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT | libc::ENOTEMPTY)) => {
                return Ok(());
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot remove the cgroup {}", group.display()));
            }
        }
    }
}

fn subdirectories(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_bridge() -> anyhow::Result<()> {
    let mut links = Connection::open(Protocol::Route).context("cannot open netlink")?;
    links.delete_link_by_name(BRIDGE).with_context(|| format!("cannot delete the link {BRIDGE}"))
}

/// Deletes our nftables tables, and only those.
fn remove_tables() -> anyhow::Result<()> {
    // What is on record is what a proxy would lay again.
    let kernel = oarlock_nft::Netlink::open()?;
    oarlock_cni_table::State::remove(Path::new(oarlock_cni_table::STATE_DIR), &kernel)?;
    let Ok(listed) = Command::new("nft").args(["list", "tables"]).output() else { return Ok(()) };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, family, name] = words[..] else { continue };
        if name == "oarlock" || name.starts_with("oarlock-") || name.starts_with("oarlock_") {
            let status =
                Command::new("nft").args(["delete", "table", family, name]).status().context("cannot run nft")?;
            anyhow::ensure!(status.success(), "nft could not delete the table {family} {name}");
        }
    }
    Ok(())
}

/// Takes the runtime's profile for containers out of the kernel.
fn remove_profile() -> anyhow::Result<()> {
    const PROFILE: &str = "oarlock-default";
    let directory = Path::new("/sys/kernel/security/apparmor");
    let loaded = fs::read_to_string(directory.join("profiles")).unwrap_or_default();
    if !loaded.lines().any(|line| line.split(' ').next() == Some(PROFILE)) {
        return Ok(());
    }
    fs::write(directory.join(".remove"), PROFILE)
        .with_context(|| format!("cannot remove the AppArmor profile {PROFILE}"))
}

fn remove_files(settings: &Settings, logs: &[PathBuf]) -> anyhow::Result<()> {
    let layout = &settings.layout;
    nothing_mounted_below(&own_roots(settings))?;
    let mut paths = vec![
        settings.cni_conf_dir.join("10-oarlock.conflist"),
        layout.admin_kubeconfig(),
        layout.run_dir(),
        layout.data_dir().to_owned(),
    ];
    paths.extend(logs.iter().cloned());
    for path in paths {
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot remove {}", path.display())),
        }
    }
    for link in fs::read_dir(layout.container_logs_dir()).into_iter().flatten().flatten() {
        let dangling = fs::read_link(link.path())
            .is_ok_and(|target| !target.exists() && logs.iter().any(|log| target.starts_with(log)));
        if dangling {
            let _ = fs::remove_file(link.path());
        }
    }
    // What the agent put where plugins look for a kubelet; others' files there stay.
    let kubelet = layout.kubelet_dir();
    for own in [
        "cpu_manager_state",
        "memory_manager_state",
        "device-plugins/kubelet.sock",
        "device-plugins/kubelet_internal_checkpoint",
        "pod-resources/kubelet.sock",
    ] {
        let _ = fs::remove_file(kubelet.join(own));
    }
    for own in ["device-plugins", "plugins_registry", "pod-resources", "plugins/kubernetes.io/csi", "pods", ""] {
        let _ = fs::remove_dir(kubelet.join(own));
    }
    // Directories that others use too go only when nothing is left in them.
    // A containerd that watches for network configuration ends when the directory goes.
    let cni_conf_dir = Some(&settings.cni_conf_dir).filter(|_| settings.has_own_runtime());
    let shared = [
        layout.admin_kubeconfig().parent().map(Path::to_owned),
        cni_conf_dir.cloned(),
        cni_conf_dir.and_then(|dir| dir.parent()).map(Path::to_owned),
        Some(layout.pod_logs_dir()),
        Some(layout.container_logs_dir()),
        layout.nri_socket().parent().map(Path::to_owned),
    ];
    for directory in shared.into_iter().flatten() {
        let _ = fs::remove_dir(directory);
    }
    Ok(())
}
