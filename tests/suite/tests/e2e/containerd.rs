//! containerd of the distribution below a directory of its own, as the runtime of a cluster's node; and which cases it cannot run.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oarlock_testimage::{Image, pack};
use oarlock_testkit::{Snapshot, binary, image_archive, wait_for};

use super::cluster::{PATIENCE, text};

/// Cases that containerd 1.6 and 1.7 cannot pass by what they are, with the reason. Everything else is to pass.
pub(crate) const NOT_RUN: &[(&str, &str)] = &[
    ("root_of_a_pod_without_host_users_is_nobody_on_the_node", "it has no user namespaces before 2.0"),
    ("an_image_is_a_volume", "it mounts no images before 2.1"),
    ("exec_on_a_terminal_has_its_size_from_the_start", "it starts the program first and sets the size then"),
];

/// What of all cases every test run has over containerd: those in which the runtime takes part, in the time there is.
pub(crate) const BRIEF: &[&str] = &[
    "logs_in_every_way",
    "exec_piped_and_with_exit_codes",
    "port_forward_carries_requests",
    "names_resolve_in_pods",
    "limits_are_enforced_in_cgroups",
    "a_container_beyond_its_memory_is_oom_killed",
    "resize_changes_the_cgroup_and_not_the_container",
    "a_mounted_config_map_follows_its_object",
    "a_manifest_on_the_node_runs_without_the_api",
    "the_end_of_the_log_stands_in_for_last_words",
    "top_shows_what_pods_and_nodes_use",
    "a_pod_pulls_its_image_from_a_registry",
    "a_missing_command_is_an_event",
    "killed_agent_comes_back",
    "killed_runtime_comes_back",
];

const SANDBOX_IMAGE: &str = "oarlock.local/sandbox:1";
/// containerd keeps the sockets of its shims and the namespaces of its pods there, whatever it is told.
const PLACES: [&str; 2] = ["/run/containerd", "/run/netns"];

pub(crate) struct Containerd {
    directory: tempfile::TempDir,
    process: Child,
    before: Snapshot,
}

impl Containerd {
    /// Starts it with what the cases need: their image, one for sandboxes, and plugins from `plugins`.
    pub(crate) fn start(plugins: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("oarlock-containerd-").tempdir().expect("tempdir");
        let before = Snapshot::take(&directory.path().to_string_lossy());
        for place in PLACES {
            fs::create_dir_all(place).expect("create a directory");
            mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("tmpfs");
        }
        fs::create_dir(directory.path().join("net.d")).expect("create a directory");
        fs::write(directory.path().join("config.toml"), config(directory.path(), plugins)).expect("write");
        let process = spawn(directory.path());
        let containerd = Self { directory, process, before };
        containerd.wait();
        let sandbox = containerd.directory.path().join("sandbox.tar");
        let image = Image { reference: SANDBOX_IMAGE, entrypoint: &["/bin/sleep"], ..Image::default() };
        pack(&binary("oarlock-testimage"), &image, &sandbox).expect("pack an image");
        for archive in [sandbox, image_archive()] {
            let imported = Command::new("ctr")
                .arg("--address")
                .arg(containerd.socket())
                .args(["--namespace", "k8s.io", "images", "import"])
                .arg(archive)
                .output()
                .expect("ctr");
            assert!(imported.status.success(), "{}", text(&imported.stderr));
        }
        containerd
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("containerd.sock")
    }

    /// Where it looks for network configuration.
    pub(crate) fn network_directory(&self) -> PathBuf {
        self.directory.path().join("net.d")
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }

    /// The end of what it logged.
    pub(crate) fn last_lines(&self, count: usize) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Kills the daemon, which its shims and containers outlive, and does for it what systemd would.
    pub(crate) fn kill_and_start_again(&mut self) {
        self.process.kill().expect("kill containerd");
        self.process.wait().expect("containerd");
        self.process = spawn(self.directory.path());
    }

    /// Ends it; nothing of it or of its pods may be left.
    pub(crate) fn end_and_check(mut self) {
        let networks: Vec<_> = fs::read_dir(self.network_directory()).expect("read").flatten().collect();
        assert!(networks.is_empty(), "left in the directory of networks: {networks:?}");
        self.end();
        self.before.assert_nothing_leaked(&Snapshot::take(&self.directory.path().to_string_lossy()));
    }

    fn wait(&self) {
        wait_for("containerd", PATIENCE, || UnixStream::connect(self.socket()).ok());
    }

    /// Ends the daemon and unmounts what it was given. Does nothing the second time.
    fn end(&mut self) {
        if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
        }
        let _ = self.process.wait();
        for place in PLACES {
            let _ = umount2(place, MntFlags::MNT_DETACH);
        }
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]) {
            let _ = fs::remove_dir(hierarchy.join("k8s.io"));
        }
    }
}

/// After a failed case there may be shims, which outlive their daemon.
impl Drop for Containerd {
    fn drop(&mut self) {
        self.end();
        let marker = self.directory.path().to_string_lossy().into_owned();
        for process in procfs::process::all_processes().into_iter().flatten().flatten() {
            if process.cmdline().is_ok_and(|words| words.join(" ").contains(&marker)) {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
        }
    }
}

fn spawn(directory: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(directory.join("log")).expect("a log");
    Command::new("containerd")
        .arg("--config")
        .arg(directory.join("config.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("containerd is installed (Debian: containerd)")
}

fn config(directory: &Path, plugins: &Path) -> String {
    let (below, plugins) = (directory.display(), plugins.display());
    format!(
        r#"version = 2
root = "{below}/root"
state = "{below}/state"
[grpc]
  address = "{below}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{SANDBOX_IMAGE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{below}/net.d"
"#
    )
}
