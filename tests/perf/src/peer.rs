//! The runtimes that are measured in one run: ours, and containerd from the distribution over runc and over crun where they
//! are installed. Each in the namespaces of the benchmark and below a temporary directory of its own.

use std::fs;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_testimage::{Image, pack};
use oarlock_testkit::{binary, image_archive, wait_for};
use procfs::process::Process;

use crate::cluster::Cluster;

/// Where Debian's package of the reference plugins puts them.
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";
/// The image of containerd's sandboxes: a program that waits. Its argument tells it from the workload.
const PAUSE_IMAGE: &str = "oarlock.local/pause:1";
pub(crate) const PAUSE_ARGUMENT: &str = "86399";
const PATIENCE: Duration = Duration::from_secs(60);

/// A CRI runtime that runs.
pub(crate) trait Runtime {
    fn name(&self) -> String;
    fn socket(&self) -> PathBuf;
    /// The daemon itself.
    fn daemon(&self) -> anyhow::Result<Process>;
    /// Text that is in the command line of every process of it.
    fn marker(&self) -> String;
}

/// Starts ours.
pub(crate) fn ours() -> anyhow::Result<Box<dyn Runtime>> {
    let cluster = Cluster::start(false)?;
    cluster.import()?;
    Ok(Box::new(cluster))
}

/// Starts ours with that log filter.
pub(crate) fn ours_logging(filter: &str) -> anyhow::Result<Cluster> {
    let cluster = Cluster::start_logging(filter)?;
    cluster.import()?;
    Ok(cluster)
}

impl Runtime for Cluster {
    fn name(&self) -> String {
        "oarlock".to_owned()
    }

    fn socket(&self) -> PathBuf {
        self.path().join("run/runtime.sock")
    }

    fn daemon(&self) -> anyhow::Result<Process> {
        let marker = self.marker();
        procfs::process::all_processes()?
            .flatten()
            .find(|process| {
                process
                    .cmdline()
                    .is_ok_and(|words| words.contains(&marker) && words.last().is_some_and(|word| word == "runtime"))
            })
            .context("the runtime is not running")
    }

    fn marker(&self) -> String {
        self.path().to_string_lossy().into_owned()
    }
}

/// Those low-level runtimes over which containerd can be measured on this machine. Empty without containerd.
pub(crate) fn peers() -> Vec<(&'static str, PathBuf)> {
    if find("containerd").is_none() || !Path::new(REFERENCE_PLUGINS).join("bridge").exists() {
        return Vec::new();
    }
    ["runc", "crun"].into_iter().filter_map(|name| Some((name, find(name)?))).collect()
}

fn find(program: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|directory| Path::new(directory).join(program))
        .find(|path| path.exists())
}

/// containerd with one low-level runtime.
pub(crate) struct Containerd {
    over: &'static str,
    directory: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    pub(crate) fn start(over: &'static str, program: &Path) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("containerd-perf-").tempdir()?;
        let below = directory.path();
        // containerd keeps the sockets of its shims and the network namespaces at fixed places.
        for place in ["/run/containerd", "/run/netns"] {
            fs::create_dir_all(place)?;
            mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), None::<&str>)
                .with_context(|| format!("cannot mount on {place}"))?;
        }
        let network = below.join("net.d");
        fs::create_dir_all(&network)?;
        fs::write(network.join("10-perf.conflist"), conflist(below))?;
        let configuration = below.join("config.toml");
        fs::write(&configuration, config(below, &network, program))?;
        let process = Command::new("containerd")
            .arg("--config")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(below.join("log"))?)
            .spawn()
            .context("cannot start containerd")?;
        let peer = Self { over, directory, process };
        wait_for("containerd", PATIENCE, || {
            UnixStream::connect(peer.socket()).ok().map(|socket| socket.shutdown(Shutdown::Both))
        })
        .ok();
        peer.import(&image_archive())?;
        let pause = below_archive(peer.directory.path())?;
        peer.import(&pause)?;
        Ok(peer)
    }

    fn import(&self, archive: &Path) -> anyhow::Result<()> {
        let output = Command::new("ctr")
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", "k8s.io", "images", "import"])
            .arg(archive)
            .output()
            .context("cannot run ctr")?;
        anyhow::ensure!(output.status.success(), "ctr images import: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Runtime for Containerd {
    fn name(&self) -> String {
        format!("containerd + {}", self.over)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("containerd.sock")
    }

    fn daemon(&self) -> anyhow::Result<Process> {
        Ok(Process::new(i32::try_from(self.process.id())?)?)
    }

    fn marker(&self) -> String {
        self.directory.path().to_string_lossy().into_owned()
    }
}

/// The pods are gone by now; what is left is the daemon and the cgroup that it made.
impl Drop for Containerd {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.process.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.process.wait();
        for place in ["/run/containerd", "/run/netns"] {
            let _ = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH);
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join("k8s.io"));
        }
        let _ = fs::remove_dir("/sys/fs/cgroup/k8s.io");
    }
}

/// Packs the image for containerd's sandboxes.
fn below_archive(directory: &Path) -> anyhow::Result<PathBuf> {
    let archive = directory.join("pause.tar");
    let image = Image { reference: PAUSE_IMAGE, entrypoint: &["/bin/sleep", PAUSE_ARGUMENT], ..Image::default() };
    pack(&binary("oarlock-testimage"), &image, &archive).context("cannot pack the pause image")?;
    Ok(archive)
}

/// A bridge with masquerade, as a node of containerd usually has it.
fn conflist(below: &Path) -> String {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "perf",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "perf0",
                "isGateway": true,
                "ipMasq": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": below.join("ipam"),
                    "ranges": [[{ "subnet": "10.44.0.0/16" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
    .to_string()
}

fn config(below: &Path, network: &Path, program: &Path) -> String {
    let below = below.display();
    format!(
        r#"version = 2
root = "{below}/root"
state = "{below}/state"
[grpc]
  address = "{below}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{REFERENCE_PLUGINS}"
    conf_dir = "{network}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "measured"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.measured]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.measured.options]
        BinaryName = "{program}"
"#,
        network = network.display(),
        program = program.display()
    )
}
