//! Volumes with the kernel's own mounts, in a mount namespace of each test. Needs root.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, VolumeMount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oarlock_testkit::{Snapshot, in_fresh_namespaces};
use oarlock_volumes::{IssuedToken, ObjectSource, PodFacts, SourceError, TokenOrder, VolumeManager};
use serde_json::json;

struct Objects;

#[async_trait]
impl ObjectSource for Objects {
    async fn config_map(&self, _namespace: &str, name: &str) -> Result<Option<ConfigMap>, SourceError> {
        let data = [("key".to_string(), format!("from {name}"))].into();
        Ok(Some(ConfigMap { data: Some(data), ..Default::default() }))
    }

    async fn secret(&self, _namespace: &str, _name: &str) -> Result<Option<Secret>, SourceError> {
        let data = [("password".to_string(), ByteString(b"secret".to_vec()))].into();
        Ok(Some(Secret { data: Some(data), ..Default::default() }))
    }

    async fn token(&self, order: &TokenOrder) -> Result<IssuedToken, SourceError> {
        let life = SignedDuration::from_secs(order.expiration_seconds);
        Ok(IssuedToken { token: "token".to_string(), expires_at: Timestamp::now() + life })
    }
}

fn pod() -> Pod {
    let names = ["disk", "memory", "secret", "config", "token"];
    let mounts: Vec<_> = names.iter().map(|name| json!({"name": name, "mountPath": format!("/{name}")})).collect();
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u-1"},
        "spec": {
            "securityContext": {"fsGroup": 4321, "runAsUser": 1234},
            "containers": [{"name": "c", "volumeMounts": mounts}],
            "volumes": [
                {"name": "disk", "emptyDir": {}},
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "secret", "secret": {"secretName": "s"}},
                {"name": "config", "configMap": {"name": "cfg"}},
                {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
            ],
        },
    }))
    .expect("a pod")
}

fn sub_path(volume: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: volume.to_string(),
        mount_path: format!("/{volume}"),
        sub_path: Some(path.to_string()),
        ..Default::default()
    }
}

/// A directory of pods with its manager.
struct Bench {
    dir: tempfile::TempDir,
    before: Snapshot,
    manager: VolumeManager,
}

fn host_state() -> Snapshot {
    Snapshot::take("no-process-has-this-in-its-arguments").without_cgroups()
}

/// Runs a test with a manager in fresh namespaces; everything must be gone at its end.
fn with_manager<F: Future<Output = ()>>(test: impl FnOnce(Arc<Bench>) -> F + Send + 'static) {
    in_fresh_namespaces(move || {
        let dir = tempfile::tempdir().expect("a directory");
        let manager = VolumeManager::new(dir.path().join("pods"), Arc::new(Objects));
        let before = host_state();
        let bench = Arc::new(Bench { dir, before, manager });
        // Its threads inherit this thread's namespaces.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(test(bench.clone()));
        bench.before.assert_nothing_leaked(&host_state());
        assert_eq!(fs::read_dir(bench.dir.path().join("pods")).expect("the pods directory").count(), 0);
    });
}

impl Bench {
    fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        self.dir.path().join("pods/u-1/volumes").join(format!("kubernetes.io~{plugin}")).join(name)
    }

    async fn set_up(&self) {
        self.manager.set_up(&pod(), &PodFacts::default()).await.expect("volumes");
    }
}

fn is_tmpfs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).expect("statfs").filesystem_type() == nix::sys::statfs::TMPFS_MAGIC
}

fn owner(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::metadata(path).expect("metadata");
    (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
}

#[test]
fn memory_volumes_are_bounded_and_secrets_are_never_on_disk() {
    with_manager(async |bench| {
        bench.set_up().await;
        let memory = bench.volume("empty-dir", "memory");
        assert!(is_tmpfs(&memory));
        let error = fs::write(memory.join("large"), vec![1; 2 << 20]).expect_err("no room for 2 MiB in 1 MiB");
        assert_eq!(error.kind(), ErrorKind::StorageFull);
        assert!(is_tmpfs(&bench.volume("secret", "secret")) && is_tmpfs(&bench.volume("projected", "token")));
        assert_eq!(fs::read(bench.volume("secret", "secret").join("password")).expect("the secret"), b"secret");
        // A second pass mounts nothing over what is there.
        fs::write(memory.join("large"), "small").expect("room for little");
        bench.set_up().await;
        assert_eq!(fs::read(memory.join("large")).expect("the file"), b"small");
        bench.manager.tear_down("u-1").await.expect("torn down");
    });
}

#[test]
fn files_belong_to_the_pods_group_and_user() {
    with_manager(async |bench| {
        bench.set_up().await;
        assert_eq!(owner(&bench.volume("empty-dir", "disk")), (0, 4321, 0o2777));
        assert_eq!(owner(&bench.volume("empty-dir", "memory")), (0, 4321, 0o2777));
        assert_eq!(owner(&bench.volume("secret", "secret").join("password")), (0, 4321, 0o644));
        assert_eq!(owner(&bench.volume("projected", "token").join("token")), (1234, 4321, 0o640));
        bench.manager.tear_down("u-1").await.expect("torn down");
    });
}

#[test]
fn a_sub_path_stays_what_it_was_when_links_are_swapped_in() {
    with_manager(async |bench| {
        bench.set_up().await;
        let disk = bench.volume("empty-dir", "disk");
        let outside = bench.dir.path().join("outside");
        fs::create_dir(&outside).expect("a directory outside");
        let bound = bench.manager.host_path(&pod(), "c", &sub_path("disk", "data")).await.expect("a subPath");
        fs::write(disk.join("data/file"), "inside").expect("a file");
        assert_eq!(fs::read(bound.join("file")).expect("the file through the bind"), b"inside");
        fs::rename(disk.join("data"), disk.join("moved")).expect("a rename");
        symlink(&outside, disk.join("data")).expect("a link");
        fs::write(bound.join("second"), "x").expect("writing through the bind");
        assert!(disk.join("moved/second").exists() && !outside.join("second").exists());
        let refused = bench.manager.host_path(&pod(), "c", &sub_path("disk", "data")).await;
        assert!(refused.expect_err("the link leads out").to_string().contains("leads out of the volume"));
        let file = bench.manager.host_path(&pod(), "c", &sub_path("config", "key")).await.expect("a file subPath");
        assert_eq!(fs::read(file).expect("the file"), b"from cfg");
        bench.manager.tear_down("u-1").await.expect("torn down");
    });
}

#[test]
fn a_manager_that_knows_nothing_takes_down_what_a_dead_one_made() {
    with_manager(async |bench| {
        bench.set_up().await;
        bench.manager.host_path(&pod(), "c", &sub_path("disk", "data")).await.expect("a subPath");
        let fresh = VolumeManager::new(bench.dir.path().join("pods"), Arc::new(Objects));
        assert_eq!(fresh.orphans(&Default::default()), ["u-1"]);
        fresh.tear_down("u-1").await.expect("torn down");
    });
}

#[test]
fn data_behind_a_foreign_mount_is_never_deleted() {
    with_manager(async |bench| {
        bench.set_up().await;
        let precious = bench.dir.path().join("precious");
        fs::create_dir(&precious).expect("a directory");
        fs::write(precious.join("file"), "x").expect("a file");
        let inner = bench.volume("empty-dir", "disk").join("inner");
        fs::create_dir(&inner).expect("a mount point");
        // The same file system: only the mount tells it apart.
        let none: Option<&str> = None;
        mount(Some(&precious), &inner, none, MsFlags::MS_BIND, none).expect("a bind mount");
        let error = bench.manager.tear_down("u-1").await.expect_err("a foreign mount is there");
        assert!(error.to_string().contains("mount point"), "{error}");
        assert!(precious.join("file").exists());
        umount2(&inner, MntFlags::empty()).expect("unmount");
        bench.manager.tear_down("u-1").await.expect("torn down");
        assert!(precious.join("file").exists());
    });
}
