//! The volume manager against real files, a fake mounter and a fake source of objects.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use async_trait::async_trait;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use serde_json::{Value, json};

use super::*;
use crate::mounter::fake::{FakeMounter, Mounted};
use crate::source::{IssuedToken, SourceError, TokenOrder};

#[derive(Default)]
struct FakeSource {
    config_maps: Mutex<BTreeMap<String, BTreeMap<String, String>>>,
    secrets: Mutex<BTreeMap<String, BTreeMap<String, String>>>,
    tokens_issued: AtomicU32,
    refuse_tokens: std::sync::atomic::AtomicBool,
}

#[async_trait]
impl ObjectSource for FakeSource {
    async fn config_map(&self, _namespace: &str, name: &str) -> Result<Option<ConfigMap>, SourceError> {
        let data = self.config_maps.lock().unwrap().get(name).cloned();
        Ok(data.map(|data| ConfigMap { data: Some(data), ..Default::default() }))
    }

    async fn secret(&self, _namespace: &str, name: &str) -> Result<Option<Secret>, SourceError> {
        let data = self.secrets.lock().unwrap().get(name).cloned();
        Ok(data.map(|data| Secret {
            data: Some(data.into_iter().map(|(key, value)| (key, ByteString(value.into_bytes()))).collect()),
            ..Default::default()
        }))
    }

    async fn token(&self, order: &TokenOrder) -> Result<IssuedToken, SourceError> {
        if self.refuse_tokens.load(Ordering::Relaxed) {
            return Err(SourceError::Failed { message: "no".into() });
        }
        let number = self.tokens_issued.fetch_add(1, Ordering::Relaxed) + 1;
        let expires_at = clock() + jiff::SignedDuration::from_secs(order.expiration_seconds);
        Ok(IssuedToken { token: format!("{}-{number}", order.service_account), expires_at })
    }
}

thread_local! {
    static SECONDS: AtomicI64 = const { AtomicI64::new(1_700_000_000) };
}

fn clock() -> Timestamp {
    SECONDS.with(|seconds| Timestamp::from_second(seconds.load(Ordering::Relaxed)).unwrap())
}

fn advance(by: i64) {
    SECONDS.with(|seconds| seconds.fetch_add(by, Ordering::Relaxed));
}

struct Bench {
    root: tempfile::TempDir,
    source: Arc<FakeSource>,
    mounter: Arc<FakeMounter>,
    manager: VolumeManager,
}

fn bench() -> Bench {
    let root = tempfile::tempdir().unwrap();
    let source = Arc::new(FakeSource::default());
    let mounter = Arc::new(FakeMounter::default());
    let pods = root.path().canonicalize().unwrap().join("pods");
    let manager = VolumeManager::with_mounter(pods, source.clone(), mounter.clone(), clock);
    Bench { root, source, mounter, manager }
}

impl Bench {
    fn pod_dir(&self) -> PathBuf {
        self.root.path().canonicalize().unwrap().join("pods/u-1")
    }

    fn read(&self, relative: &str) -> String {
        fs::read_to_string(self.pod_dir().join(relative)).unwrap_or_else(|e| panic!("{relative}: {e}"))
    }

    fn put_config(&self, name: &str, key: &str, value: &str) {
        let mut maps = self.source.config_maps.lock().unwrap();
        maps.entry(name.into()).or_default().insert(key.into(), value.into());
    }
}

/// A pod with the given volumes, each mounted by container `c` at `/<name>`, and more spec fields.
fn pod(volumes: Value, more: Value) -> Pod {
    let mounts: Vec<Value> = volumes
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| json!({"name": volume["name"], "mountPath": format!("/{}", volume["name"].as_str().unwrap())}))
        .collect();
    let mut spec = json!({"containers": [{"name": "c", "volumeMounts": mounts}], "volumes": volumes});
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    let metadata = json!({"name": "web", "namespace": "shop", "uid": "u-1", "labels": {"app": "web"}});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
}

fn mount(name: &str, sub_path: &str) -> VolumeMount {
    VolumeMount {
        name: name.into(),
        mount_path: format!("/{name}"),
        sub_path: Some(sub_path.into()),
        ..Default::default()
    }
}

#[tokio::test]
async fn config_map_follows_its_object() {
    let bench = bench();
    bench.put_config("cfg", "key", "one");
    let pod = pod(json!([{"name": "v", "configMap": {"name": "cfg"}}]), json!({}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    let path = "volumes/kubernetes.io~configmap/v/key";
    assert_eq!(bench.read(path), "one");
    bench.put_config("cfg", "key", "two");
    bench.put_config("cfg", "more", "x");
    bench.manager.refresh(&pod, &PodFacts::default()).await.unwrap();
    assert_eq!(bench.read(path), "two");
    assert_eq!(bench.read("volumes/kubernetes.io~configmap/v/more"), "x");
    assert!(bench.mounter.mounts.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_missing_object_is_told_as_upstream_does() {
    let bench = bench();
    let volumes =
        json!([{"name": "v", "configMap": {"name": "nope"}}, {"name": "w", "secret": {"secretName": "none"}}]);
    let error = bench.manager.set_up(&pod(volumes, json!({})), &PodFacts::default()).await.unwrap_err();
    let message = error.full_message();
    assert!(message.contains("MountVolume.SetUp failed for volume \"v\" : configmap \"nope\" not found"), "{message}");
    assert!(message.contains("MountVolume.SetUp failed for volume \"w\" : secret \"none\" not found"), "{message}");
    assert!(error.is_retryable());
    let optional = json!([{"name": "v", "configMap": {"name": "nope", "optional": true}}]);
    bench.manager.set_up(&pod(optional, json!({})), &PodFacts::default()).await.unwrap();
}

#[tokio::test]
async fn unsupported_kind_is_refused_by_name_and_not_retried() {
    let bench = bench();
    let trust = json!({"projected": {"sources": [{"clusterTrustBundle": {"path": "p", "name": "n"}}]}, "name": "v"});
    for (volume, kind) in [
        (json!({"name": "v", "nfs": {"server": "s", "path": "/"}}), "nfs"),
        (json!({"name": "v", "gitRepo": {"repository": "r"}}), "gitRepo"),
        (trust, "projected clusterTrustBundle"),
    ] {
        let error = bench.manager.set_up(&pod(json!([volume]), json!({})), &PodFacts::default()).await.unwrap_err();
        assert!(error.full_message().contains(&format!("of kind {kind}")), "{}", error.full_message());
        assert!(!error.is_retryable());
    }
}

#[tokio::test]
async fn secrets_live_in_memory_with_the_groups_rights() {
    let bench = bench();
    bench.source.secrets.lock().unwrap().insert("s".into(), [("password".to_string(), "p".to_string())].into());
    let gid = nix::unistd::getegid().as_raw();
    let volumes = json!([{"name": "v", "secret": {"secretName": "s", "defaultMode": 0o400}}]);
    let pod = pod(volumes, json!({"securityContext": {"fsGroup": gid}}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    let path = bench.pod_dir().join("volumes/kubernetes.io~secret/v");
    let mounts = bench.mounter.mounts.lock().unwrap().clone();
    assert!(matches!(mounts[&path], Mounted::Tmpfs(tmpfs) if tmpfs.gid == Some(gid)));
    assert_eq!(fs::metadata(path.join("password")).unwrap().mode() & 0o777, 0o440);
}

#[tokio::test]
async fn projected_volume_gathers_all_its_sources() {
    let bench = bench();
    bench.put_config("kube-root-ca.crt", "ca.crt", "PEM");
    let volumes = json!([{"name": "kube-api-access", "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
    ]}}]);
    let pod = pod(volumes, json!({"serviceAccountName": "robot"}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    let base = "volumes/kubernetes.io~projected/kube-api-access";
    assert_eq!(bench.read(&format!("{base}/token")), "robot-1");
    assert_eq!(bench.read(&format!("{base}/ca.crt")), "PEM");
    assert_eq!(bench.read(&format!("{base}/namespace")), "shop");
    let token = bench.pod_dir().join(base).join("token");
    assert_eq!(fs::metadata(token).unwrap().mode() & 0o777, 0o644);
    assert!(forces_read_only(&pod, &mount("kube-api-access", "")));
}

fn token_pod(more: Value) -> Pod {
    pod(json!([{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}]), more)
}

#[tokio::test]
async fn tokens_rotate_at_four_fifths_and_outlive_a_failing_server() {
    let bench = bench();
    let pod = token_pod(json!({}));
    let path = "volumes/kubernetes.io~projected/t/token";
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    advance(2800);
    bench.manager.refresh(&pod, &PodFacts::default()).await.unwrap();
    assert_eq!(bench.read(path), "default-1");
    bench.source.refuse_tokens.store(true, Ordering::Relaxed);
    advance(100);
    bench.manager.refresh(&pod, &PodFacts::default()).await.unwrap();
    assert_eq!(bench.read(path), "default-1");
    bench.source.refuse_tokens.store(false, Ordering::Relaxed);
    bench.manager.refresh(&pod, &PodFacts::default()).await.unwrap();
    assert_eq!(bench.read(path), "default-2");
    bench.source.refuse_tokens.store(true, Ordering::Relaxed);
    advance(4000);
    assert!(bench.manager.refresh(&pod, &PodFacts::default()).await.is_err());
}

#[tokio::test]
async fn token_files_belong_to_the_pods_user_or_group() {
    let bench = bench();
    let path = bench.pod_dir().join("volumes/kubernetes.io~projected/t/token");
    let own = nix::unistd::geteuid().as_raw();
    let of_user = token_pod(json!({"securityContext": {"runAsUser": own}}));
    bench.manager.set_up(&of_user, &PodFacts::default()).await.unwrap();
    assert_eq!((fs::metadata(&path).unwrap().mode() & 0o777, fs::metadata(&path).unwrap().uid()), (0o600, own));
    bench.manager.tear_down("u-1").await.unwrap();
    let gid = nix::unistd::getegid().as_raw();
    let of_group = token_pod(json!({"securityContext": {"fsGroup": gid}}));
    bench.manager.set_up(&of_group, &PodFacts::default()).await.unwrap();
    assert_eq!((fs::metadata(&path).unwrap().mode() & 0o777, fs::metadata(&path).unwrap().gid()), (0o640, gid));
}

#[tokio::test]
async fn empty_dir_is_open_to_all_and_kept_on_repetition() {
    let bench = bench();
    let volumes = json!([{"name": "e", "emptyDir": {}},
        {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]);
    let pod = pod(volumes, json!({}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    let base = bench.pod_dir().join("volumes/kubernetes.io~empty-dir");
    assert_eq!(fs::metadata(base.join("e")).unwrap().mode() & 0o7777, 0o777);
    fs::write(base.join("e/kept"), "x").unwrap();
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    assert!(base.join("e/kept").exists());
    let mounts = bench.mounter.mounts.lock().unwrap().clone();
    assert!(matches!(mounts[&base.join("m")], Mounted::Tmpfs(tmpfs) if tmpfs.size_bytes == Some(1 << 20)));
    assert_eq!(mounts.len(), 1);
}

#[tokio::test]
async fn sub_path_gets_a_bind_of_its_own_and_goes_with_the_pod() {
    let bench = bench();
    bench.put_config("cfg", "app.conf", "x");
    let volumes = json!([{"name": "e", "emptyDir": {}}, {"name": "v", "configMap": {"name": "cfg"}}]);
    let pod = pod(volumes, json!({}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    let directory = bench.manager.host_path(&pod, "c", &mount("e", "data/inner")).await.unwrap();
    assert_eq!(directory, bench.pod_dir().join("volume-subpaths/e/c/0"));
    let file = bench.manager.host_path(&pod, "c", &mount("v", "app.conf")).await.unwrap();
    assert!(directory.is_dir() && file.is_file());
    {
        let mounts = bench.mounter.mounts.lock().unwrap();
        let inner = bench.pod_dir().join("volumes/kubernetes.io~empty-dir/e/data/inner");
        assert_eq!(mounts[&directory], Mounted::Bind(inner));
        assert!(matches!(&mounts[&file], Mounted::Bind(path) if path.ends_with("app.conf")));
    }
    assert!(bench.manager.host_path(&pod, "c", &mount("e", "../x")).await.is_err());
    bench.manager.host_path(&pod, "c", &mount("e", "data/inner")).await.unwrap();
    bench.manager.tear_down("u-1").await.unwrap();
    assert!(bench.mounter.mounts.lock().unwrap().is_empty());
    assert!(!bench.pod_dir().exists());
}

#[tokio::test]
async fn tear_down_needs_no_memory_of_the_pod() {
    let bench = bench();
    let pod = pod(json!([{"name": "m", "emptyDir": {"medium": "Memory"}}]), json!({}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    let pods = bench.root.path().canonicalize().unwrap().join("pods");
    let fresh = VolumeManager::with_mounter(pods, bench.source.clone(), bench.mounter.clone(), clock);
    assert_eq!(fresh.orphans(&HashSet::new()), ["u-1"]);
    assert!(fresh.orphans(&HashSet::from(["u-1".to_string()])).is_empty());
    fresh.tear_down("u-1").await.unwrap();
    assert!(bench.mounter.mounts.lock().unwrap().is_empty() && !bench.pod_dir().exists());
    fresh.tear_down("u-1").await.unwrap();
    assert!(fresh.tear_down("../pods").await.is_err());
}

#[tokio::test]
async fn nothing_is_deleted_while_a_foreign_mount_is_there() {
    let bench = bench();
    let pod = pod(json!([{"name": "e", "emptyDir": {}}]), json!({}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    let inner = bench.pod_dir().join("volumes/kubernetes.io~empty-dir/e/inner");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("precious"), "x").unwrap();
    bench.mounter.mounts.lock().unwrap().insert(inner.clone(), Mounted::Bind("/elsewhere".into()));
    let error = bench.manager.tear_down("u-1").await.unwrap_err();
    assert!(error.to_string().contains("refusing to delete across the mount point"), "{error}");
    assert!(inner.join("precious").exists());
    bench.mounter.mounts.lock().unwrap().clear();
    bench.manager.tear_down("u-1").await.unwrap();
    assert!(!bench.pod_dir().exists());
}

#[tokio::test]
async fn host_path_is_the_path_itself() {
    let bench = bench();
    let dir = bench.root.path().join("data");
    let volumes = json!([{"name": "h", "hostPath": {"path": dir.to_str().unwrap(), "type": "DirectoryOrCreate"}}]);
    let pod = pod(volumes, json!({}));
    bench.manager.set_up(&pod, &PodFacts::default()).await.unwrap();
    assert_eq!(bench.manager.host_path(&pod, "c", &mount("h", "")).await.unwrap(), dir);
    fs::write(dir.join("kept"), "x").unwrap();
    bench.manager.host_path(&pod, "c", &mount("h", "sub")).await.unwrap();
    bench.manager.tear_down("u-1").await.unwrap();
    assert!(dir.join("kept").exists() && Path::new(&dir.join("sub")).is_dir());
}
