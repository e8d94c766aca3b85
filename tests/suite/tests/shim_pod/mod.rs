//! A pod directory with a shim and containers made of the test image, for the shim's tests.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oarlock_shim_api::{CreateRequest, Event, ExecRequest, Shim, SpawnOptions, read_exit_record};
use oarlock_testkit::{Snapshot, binary, require_root};
use oci_spec::runtime::Process;
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;

/// Long enough for a machine under load; reached only when something is broken.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A running shim in a directory of its own; everything it made must be gone at the end.
pub struct Pod {
    pub shim: Shim,
    pub events: Receiver<Event>,
    pub dir: tempfile::TempDir,
    pub name: String,
    before: Snapshot,
}

/// How a container differs from the plainest one.
pub struct Wish<'a> {
    pub args: &'a [&'a str],
    pub tty: bool,
    pub stdin: bool,
    pub patch: fn(&mut Value),
}

impl<'a> Wish<'a> {
    pub fn new(args: &'a [&'a str]) -> Self {
        Wish { args, tty: false, stdin: false, patch: |_| {} }
    }
}

impl Pod {
    pub async fn start(name: &str) -> Pod {
        Self::start_with(name, false).await
    }

    pub async fn start_with(name: &str, shared_pids: bool) -> Pod {
        let dir = tempfile::Builder::new().prefix(&format!("oarlock-{name}-")).tempdir().unwrap();
        let options = options(dir.path(), name, shared_pids);
        Self::start_in(dir, name, options).await
    }

    pub async fn start_in(dir: tempfile::TempDir, name: &str, options: SpawnOptions) -> Pod {
        require_root();
        let before = Snapshot::take(&dir.path().to_string_lossy());
        let shim = Shim::spawn(options).await.unwrap();
        let events = shim.subscribe();
        Pod { shim, events, dir, name: name.to_owned(), before }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn cgroup_of(&self, id: &str) -> String {
        format!("oarlock-test-{}-{}/burstable/{id}", std::process::id(), self.name)
    }

    /// Makes a container with a log at `<id>.log`.
    pub async fn create(&self, id: &str, wish: &Wish<'_>) -> Result<i32, oarlock_shim_api::ShimError> {
        let bundle = self.bundle(id, wish);
        let request = CreateRequest {
            container_id: id.into(),
            bundle,
            log_path: Some(self.log_path(id)),
            tty: wish.tty,
            stdin: wish.stdin,
            stdin_once: wish.stdin,
            oci_runtime: None,
        };
        self.shim.create(request).await.map(|reply| reply.pid)
    }

    pub async fn run(&self, id: &str, wish: &Wish<'_>) -> i32 {
        let pid = self.create(id, wish).await.unwrap();
        self.shim.start(id).await.unwrap();
        pid
    }

    pub fn bundle(&self, id: &str, wish: &Wish<'_>) -> PathBuf {
        let bundle = self.dir.path().join("bundles").join(id);
        make_rootfs(&bundle.join("rootfs"));
        let mut spec = spec(wish, &self.cgroup_of(id));
        (wish.patch)(&mut spec);
        fs::write(bundle.join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        bundle
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("{id}.log"))
    }

    /// The log's lines as (stream, tag, text).
    pub fn log(&self, id: &str) -> Vec<(String, String, String)> {
        parse_log(&self.log_path(id))
    }

    /// Waits for a container's end; the record on disk says the same as the event.
    pub async fn exited(&mut self, id: &str) -> oarlock_shim_api::ExitRecord {
        loop {
            match self.next_event().await {
                Event::Exited { id: ended, record } if ended == id => {
                    assert_eq!(read_exit_record(&self.state_dir(), id).unwrap(), Some(record));
                    return record;
                }
                _ => {}
            }
        }
    }

    pub async fn exec_exited(&mut self, wanted: &str) -> i32 {
        loop {
            if let Event::ExecExited { exec_id, exit_code, .. } = self.next_event().await
                && exec_id == wanted
            {
                return exit_code;
            }
        }
    }

    pub async fn next_event(&mut self) -> Event {
        tokio::time::timeout(LIMIT, self.events.recv()).await.expect("an event in time").unwrap()
    }

    /// Runs a command in a container and returns its output and exit code.
    pub async fn exec(&mut self, id: &str, exec_id: &str, process: Process) -> (String, i32) {
        let request =
            ExecRequest { container_id: id.into(), exec_id: exec_id.into(), process, tty: false, stdin: false };
        let reply = self.shim.exec(request).await.unwrap();
        let output = read_all(reply.stdout.unwrap()).await;
        let code = self.exec_exited(exec_id).await;
        (output, code)
    }

    /// Ends the shim and checks that nothing it made is left.
    pub async fn finish(self) {
        self.finish_after(|| ()).await;
    }

    /// The same, with something to clear away once the shim has ended.
    pub async fn finish_after(self, clear: impl FnOnce()) {
        let Pod { shim, events, dir, before, name } = self;
        shim.shutdown().await.unwrap();
        let record = shim.record().clone();
        oarlock_testkit::wait_for("the shim to end", LIMIT, || (!record.is_alive()).then_some(()));
        clear();
        drop((shim, events));
        for hierarchy in oarlock_cgroup::Layout::host().unwrap().hierarchies() {
            let _ = fs::remove_dir(hierarchy.join(format!("oarlock-test-{}-{name}/burstable", std::process::id())));
            let _ = fs::remove_dir(hierarchy.join(format!("oarlock-test-{}-{name}", std::process::id())));
        }
        let after = Snapshot::take(&dir.path().to_string_lossy());
        // Other tests run at the same time: only what has this pod's name counts.
        let own = format!("-{name}");
        let leaked: Vec<String> = before.leaked(&after).into_iter().filter(|line| line.contains(&own)).collect();
        assert!(leaked.is_empty(), "left behind:\n{}", leaked.join("\n"));
        // Compiled filters stay for the next pod.
        let left: Vec<_> = fs::read_dir(dir.path().join("containers"))
            .unwrap()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| !path.ends_with(".seccomp"))
            .collect();
        assert!(left.is_empty(), "engine state left: {left:?}");
    }
}

pub fn options(dir: &Path, name: &str, shared_pids: bool) -> SpawnOptions {
    SpawnOptions {
        shim_binary: binary("oarlock-shim"),
        sandbox_id: format!("sandbox-{name}"),
        state_dir: dir.join("state"),
        container_root: dir.join("containers"),
        mounts_below: None,
        shared_pid_namespace: shared_pids.then(|| dir.join("pidns")),
        user_namespace: None,
        cgroup: None,
    }
}

fn make_rootfs(rootfs: &Path) {
    for dir in ["bin", "proc", "dev", "sys", "etc", "tmp"] {
        fs::create_dir_all(rootfs.join(dir)).unwrap();
    }
    let program = rootfs.join("bin/testimage");
    fs::copy(binary("oarlock-testimage"), &program).unwrap();
    for applet in APPLETS {
        let _ = symlink("testimage", rootfs.join("bin").join(applet));
    }
    fs::write(rootfs.join("bin/not-a-program"), "#!/no/such/interpreter\n").unwrap();
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n").unwrap();
}

const APPLETS: &[&str] =
    &["sleep", "exit", "signal", "oom", "log", "echo", "cat", "ls", "env", "id", "true", "false", "tty-size", "write"];

const CAPABILITIES: &[&str] = &["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"];

fn spec(wish: &Wish<'_>, cgroup: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "hostname": "shim-test",
        "process": process_json(wish.args, wish.tty),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=64k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
        }
    })
}

pub fn process_json(args: &[&str], tty: bool) -> Value {
    json!({
        "terminal": tty, "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": args, "env": ["PATH=/bin"],
        "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
    })
}

pub fn process(args: &[&str]) -> Process {
    serde_json::from_value(process_json(args, false)).unwrap()
}

pub async fn read_all(fd: OwnedFd) -> String {
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        // A terminal ends in EIO.
        let _ = std::io::Read::read_to_end(&mut fs::File::from(fd), &mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    tokio::time::timeout(LIMIT, read).await.expect("the end of output in time").unwrap()
}

pub fn parse_log(path: &Path) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let parse = |line: &str| {
        let mut fields = line.splitn(4, ' ').skip(1).map(str::to_owned);
        (fields.next().unwrap(), fields.next().unwrap(), fields.next().unwrap_or_default())
    };
    text.lines().map(parse).collect()
}
