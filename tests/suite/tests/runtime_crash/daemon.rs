//! The daemon as a process of its own: started, told when to die, started again, and looked after.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use oarlock_cgroup::Cgroup;
use oarlock_proto::cri;
use oarlock_proto::cri::image_service_client::ImageServiceClient;
use oarlock_proto::cri::runtime_service_client::RuntimeServiceClient;
use oarlock_runtime::Runtime;
use oarlock_testkit::Snapshot;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::runtime_daemon::{LIMIT, clients, config_in, lay_out};

/// What the process says when it dies as told.
const LAST_WORDS: &str = "dies at step ";

/// The other end: serves until it is killed.
pub fn serve(directory: &Path, cgroup_root: &str) -> ExitCode {
    let threads = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let served = threads.map_err(|error| error.to_string()).and_then(|threads| {
        threads.block_on(async {
            let runtime =
                Runtime::new(config_in(directory, cgroup_root)).await.map_err(|error| error.full_message())?;
            runtime.run(CancellationToken::new()).await.map_err(|error| error.full_message())
        })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

pub struct Daemon {
    directory: tempfile::TempDir,
    cgroup_root: String,
    process: Option<Child>,
    death: Option<String>,
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
}

impl Daemon {
    pub fn new() -> Daemon {
        let directory = tempfile::Builder::new().prefix("oarlock-runtime-steps-").tempdir().expect("a directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).expect("a mode");
        lay_out(directory.path());
        let (runtime, images) = clients(&directory.path().join("run/runtime.sock"));
        let cgroup_root = format!("oarlock-test-steps-{}", std::process::id());
        Daemon { directory, cgroup_root, process: None, death: None, runtime, images }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.path().join("run/runtime.sock")
    }

    /// Starts it, to die at a step or to live. One that dies while it starts is started again to live.
    pub async fn start(&mut self, fatal: Option<u64>) {
        self.death = None;
        self.spawn(fatal);
        if !self.answers().await {
            self.note_death();
            self.spawn(None);
            assert!(self.answers().await, "the daemon does not start again: {:?}", self.last_words());
        }
    }

    fn spawn(&mut self, fatal: Option<u64>) {
        let _ = fs::remove_file(self.socket());
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.arg("--daemon").arg(self.path()).arg(&self.cgroup_root);
        command.env_remove(oarlock_failpoint::VARIABLE);
        if let Some(number) = fatal {
            command.env(oarlock_failpoint::VARIABLE, number.to_string());
        }
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        self.process = Some(process.expect("start the daemon"));
    }

    async fn answers(&mut self) -> bool {
        (self.runtime, self.images) = clients(&self.socket());
        let deadline = Instant::now() + LIMIT;
        while self.runtime.version(cri::VersionRequest::default()).await.is_err() {
            if self.has_died() {
                return false;
            }
            assert!(Instant::now() < deadline, "the daemon does not answer");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        true
    }

    fn has_died(&mut self) -> bool {
        self.process.as_mut().is_none_or(|process| process.try_wait().expect("look at the daemon").is_some())
    }

    /// After a call that failed: whether that was because the daemon died as told, which is then started again.
    pub async fn was_reborn(&mut self) -> bool {
        // A connection breaks a moment before the process can be waited for.
        let deadline = Instant::now() + LIMIT;
        while !self.has_died() {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.note_death();
        self.spawn(None);
        assert!(self.answers().await, "the daemon does not start again: {:?}", self.last_words());
        true
    }

    fn note_death(&mut self) {
        let words = self.last_words();
        let line = words.lines().find_map(|line| line.strip_prefix(LAST_WORDS)).unwrap_or_else(|| panic!("{words}"));
        let step = line.split_once(": ").map_or(line, |(_, step)| step);
        assert!(self.death.is_none(), "died twice: {:?}, {step}", self.death);
        self.death = Some(step.to_owned());
    }

    fn last_words(&mut self) -> String {
        let mut words = String::new();
        if let Some(mut pipe) = self.process.take().and_then(|process| process.stderr) {
            let _ = pipe.read_to_string(&mut words);
        }
        words
    }

    /// At which step it died in the present life.
    pub fn death(&mut self) -> Option<String> {
        self.death.clone()
    }

    /// Ends it as a crash does.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("kill the daemon");
            process.wait().expect("wait for the daemon");
        }
    }

    pub fn finish(mut self) {
        self.stop();
        // A daemon that is killed leaves the mount to the next one.
        oarlock_runtime::give_up_run_directory(&self.path().join("run")).expect("unmount the run directory");
        Cgroup::new(&self.cgroup_root).and_then(|group| group.remove()).expect("remove the control group");
    }

    /// All that pods leave behind if they leave anything: kernel objects, processes, and files of the daemon and plugins.
    pub fn traces(&self) -> BTreeSet<String> {
        let snapshot = Snapshot::take(&self.path().join("run/sandboxes").display().to_string());
        let mut traces: BTreeSet<String> =
            Snapshot::take("/no/process/has/this").leaked(&snapshot).into_iter().collect();
        traces.extend(kernel_traces(self.path(), &self.cgroup_root));
        for directory in [
            "run/sandboxes",
            "run/containers",
            "run/engine",
            "data/records/sandboxes",
            "data/records/containers",
            "data/volumes",
            "data/images/containers",
            "data/images/scratch",
            "data/images/images",
            "data/images/layers",
            "data/cni/cache/results",
            "ipam/pods",
        ] {
            for entry in fs::read_dir(self.path().join(directory)).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                // The plugin remembers the last address it gave, and compiled filters stay.
                if !name.starts_with("last_reserved_ip") && name != ".seccomp" {
                    traces.insert(format!("file {directory}/{name}"));
                }
            }
        }
        traces.extend(self.unfinished_pulls());
        traces
    }

    /// What pulls that were cut off have left, with its size.
    pub fn unfinished_pulls(&self) -> Vec<String> {
        let boots = fs::read_dir(self.path().join("data/images/unfinished")).into_iter().flatten().flatten();
        let kinds = boots.flat_map(|boot| ["parts", "layers"].map(|kind| boot.path().join(kind)));
        let entries = kinds.flat_map(|kind| fs::read_dir(kind).into_iter().flatten().flatten());
        let describe = |entry: fs::DirEntry| {
            let metadata = entry.metadata().ok()?;
            let size = if metadata.is_dir() { "a layer".to_owned() } else { format!("{} bytes", metadata.len()) };
            Some(format!("unfinished {}: {size}", entry.file_name().display()))
        };
        entries.filter_map(describe).collect()
    }
}

/// Mounts and interfaces of this namespace, and control groups below the daemon's own.
fn kernel_traces(directory: &Path, cgroup_root: &str) -> BTreeSet<String> {
    let mut traces = BTreeSet::new();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let below = directory.display().to_string();
    traces.extend(points.filter(|point| point.starts_with(&below)).map(|point| format!("mount {point}")));
    let links = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let names = links.lines().skip(2).filter_map(|line| line.split(':').next());
    traces.extend(names.map(|name| format!("interface {}", name.trim())));
    for hierarchy in oarlock_cgroup::Layout::host().expect("cgroups").hierarchies() {
        for group in fs::read_dir(hierarchy.join(cgroup_root)).into_iter().flatten().flatten() {
            if group.file_type().is_ok_and(|kind| kind.is_dir()) {
                traces.insert(format!("cgroup {}", group.path().display()));
            }
        }
    }
    traces
}
