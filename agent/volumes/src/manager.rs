//! [`VolumeManager`]: sets a pod's volumes up, keeps them fresh, and takes them down again.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Volume, VolumeMount};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use crate::content::Gatherer;
use crate::error::VolumeError;
use crate::external::{External, Nothing};
use crate::hostpath;
use crate::layout::{PodDir, VolumeKind, is_plain_name};
use crate::mounter::{KernelMounter, Mounter};
use crate::place::{Medium, Place, Shape};
use crate::plan;
use crate::source::ObjectSource;
use crate::subpath;
use crate::tokens::TokenCache;

/// What a volume may need to know beside the pod itself.
#[derive(Debug, Clone, Default)]
pub struct PodFacts {
    pub node_name: String,
    pub host_ip: Option<IpAddr>,
    pub pod_ip: Option<IpAddr>,
    /// What a missing limit means in a downwardAPI resourceFieldRef, and the bound of memory-backed volumes.
    pub allocatable: Allocatable,
}

/// The node's allocatable resources; zero is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allocatable {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub ephemeral_storage_bytes: u64,
}

/// Sets up, refreshes and removes the volumes of all pods under one root directory.
///
/// Calls for one pod wait for each other; calls for different pods do not.
pub struct VolumeManager {
    pods_root: PathBuf,
    source: Arc<dyn ObjectSource>,
    external: Arc<dyn External>,
    mounter: Arc<dyn Mounter>,
    tokens: TokenCache,
    clock: fn() -> Timestamp,
    locks: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
}

/// Which volumes a pass is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    All,
    /// Those whose content changes.
    Contents,
}

impl VolumeManager {
    /// `pods_root` is upstream's `<kubelet root>/pods`.
    pub fn new(pods_root: PathBuf, source: Arc<dyn ObjectSource>) -> Self {
        Self::with_mounter(pods_root, source, Arc::new(KernelMounter), Timestamp::now)
    }

    /// With volumes that come from elsewhere.
    #[must_use]
    pub fn with_external(mut self, external: Arc<dyn External>) -> Self {
        self.external = external;
        self
    }

    pub(crate) fn with_mounter(
        pods_root: PathBuf,
        source: Arc<dyn ObjectSource>,
        mounter: Arc<dyn Mounter>,
        clock: fn() -> Timestamp,
    ) -> Self {
        Self {
            pods_root,
            source,
            external: Arc::new(Nothing),
            mounter,
            tokens: TokenCache::default(),
            clock,
            locks: Mutex::default(),
        }
    }

    /// Makes every volume that the pod's containers mount ready. Idempotent; safe to repeat after a crash. Takes every
    /// volume and reports all that failed.
    pub async fn set_up(&self, pod: &Pod, facts: &PodFacts) -> Result<(), VolumeError> {
        self.pass(pod, facts, Scope::All).await
    }

    /// Brings contents up to date (API objects, labels, tokens due for rotation). Changes nothing that is current.
    pub async fn refresh(&self, pod: &Pod, facts: &PodFacts) -> Result<(), VolumeError> {
        self.pass(pod, facts, Scope::Contents).await
    }

    async fn pass(&self, pod: &Pod, facts: &PodFacts, scope: Scope) -> Result<(), VolumeError> {
        let place = self.place(PodDir::of(&self.pods_root, pod)?);
        let _guard = self.lock(&place.dir.uid).await;
        let volumes = plan::used_volumes(pod)?;
        let work = volumes.into_iter().map(|volume| {
            let place = &place;
            async move {
                self.make(place, pod, volume, facts, scope)
                    .await
                    .map_err(|source| VolumeError::SetUp { volume: volume.name.clone(), source: Box::new(source) })
            }
        });
        VolumeError::gather(join_all(work).await.into_iter().filter_map(Result::err).collect())
    }

    async fn make(
        &self,
        place: &Place,
        pod: &Pod,
        volume: &Volume,
        facts: &PodFacts,
        scope: Scope,
    ) -> Result<(), VolumeError> {
        let kind = VolumeKind::of(volume)?;
        match kind {
            VolumeKind::External if scope == Scope::Contents => self.external.refresh(pod, volume).await,
            VolumeKind::External => self.external.set_up(pod, volume).await,
            VolumeKind::Image => Ok(()),
            VolumeKind::HostPath | VolumeKind::EmptyDir if scope == Scope::Contents => Ok(()),
            VolumeKind::HostPath => {
                let source = volume.host_path.clone().unwrap_or_default();
                blocking("checking a hostPath", move || hostpath::check(&source)).await
            }
            VolumeKind::EmptyDir => {
                let shape = shape(pod, volume, kind, plan::empty_dir_medium(pod, volume, facts)?);
                let place = place.clone();
                blocking("making an emptyDir", move || place.make(&shape).map(drop)).await
            }
            VolumeKind::ConfigMap | VolumeKind::Secret | VolumeKind::DownwardApi | VolumeKind::Projected => {
                let now = (self.clock)();
                let gatherer = Gatherer { source: &*self.source, tokens: &self.tokens, pod, facts, now };
                let payload = gatherer.gather(volume).await?;
                // Secrets and tokens never touch a disk.
                let in_memory = kind != VolumeKind::ConfigMap;
                let size_bytes = plan::memory_size_bytes(pod, volume, facts);
                let medium = if in_memory { Medium::Memory { size_bytes } } else { Medium::Disk };
                let shape = shape(pod, volume, kind, medium);
                let place = place.clone();
                let changed = blocking("publishing a volume", move || place.publish(&shape, &payload, now)).await?;
                if changed {
                    tracing::debug!(pod.uid = pod.metadata.uid, volume = volume.name, "volume content published");
                }
                Ok(())
            }
        }
    }

    /// The host path to mount at `mount.mount_path` of `container`. `mount.sub_path` is honoured (hand `subPathExpr` over
    /// expanded, as `sub_path`): such a mount gets a bind mount of its own, made anew at each call, that nothing a
    /// container does can redirect.
    pub async fn host_path(&self, pod: &Pod, container: &str, mount: &VolumeMount) -> Result<PathBuf, VolumeError> {
        let dir = PodDir::of(&self.pods_root, pod)?;
        let volume = plan::find_volume(pod, &mount.name)?;
        let kind = VolumeKind::of(volume)?;
        let base = match (&volume.host_path, kind) {
            (Some(source), VolumeKind::HostPath) => hostpath::path(source)?,
            (_, VolumeKind::External) => {
                let missing = || VolumeError::Storage { message: format!("volume {:?} is not set up", mount.name) };
                self.external.path(&dir.uid, &mount.name).ok_or_else(missing)?
            }
            (_, VolumeKind::Image) => {
                let message = format!("volume {:?} is an image and has no path on the node", mount.name);
                return Err(VolumeError::Invalid { message });
            }
            _ => dir.volume(kind, &volume.name)?,
        };
        let sub_path = mount.sub_path.clone().unwrap_or_default();
        if sub_path.is_empty() {
            return Ok(base);
        }
        let mounts = plan::mounts_of(pod, container).unwrap_or_default();
        let index = mounts.iter().position(|candidate| candidate.mount_path == mount.mount_path).ok_or_else(|| {
            VolumeError::UnknownMount { container: container.to_string(), mount_path: mount.mount_path.clone() }
        })?;
        let target = PodDir::relative_sub_path(&volume.name, container, index)?;
        let place = self.place(dir);
        let _guard = self.lock(&place.dir.uid).await;
        blocking("binding a subPath", move || place.bind_sub_path(&base, &sub_path, &target)).await
    }

    /// The block device of the node behind a volume that is one, and whether it may only be read.
    pub fn device(&self, pod: &Pod, volume: &str) -> Result<(PathBuf, bool), VolumeError> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let missing = || VolumeError::Storage { message: format!("volume {volume:?} is not set up") };
        let path = self.external.path(uid, volume).ok_or_else(missing)?;
        Ok((path, self.external.read_only(uid, volume)))
    }

    /// Reads a file that a container may have left in an emptyDir, without following it anywhere else. None when there is none.
    pub async fn read_file(
        &self,
        pod: &Pod,
        volume: &str,
        path: &str,
        most_bytes: usize,
    ) -> Result<Option<Vec<u8>>, VolumeError> {
        let found = plan::find_volume(pod, volume)?;
        let kind = VolumeKind::of(found)?;
        if kind != VolumeKind::EmptyDir {
            return Err(VolumeError::Invalid { message: format!("volume {volume:?} is not an emptyDir") });
        }
        let root = PodDir::of(&self.pods_root, pod)?.volume(kind, volume)?;
        let (volume, path) = (volume.to_owned(), path.to_owned());
        let failed = |error: subpath::SubPathError, volume, sub_path| VolumeError::SubPath {
            volume,
            sub_path,
            reason: error.to_string(),
        };
        blocking("reading a file in a volume", move || {
            subpath::read(&root, &path, most_bytes).map_err(|error| failed(error, volume, path))
        })
        .await
    }

    /// Unmounts and removes everything that was made for the pod, the pod's directory included. Takes every step and
    /// reports all that failed; a pod that has nothing is success.
    pub async fn tear_down(&self, pod_uid: &str) -> Result<(), VolumeError> {
        let place = self.place(PodDir::new(&self.pods_root, pod_uid)?);
        let guard = self.lock(pod_uid).await;
        let root = self.pods_root.clone();
        // Subpaths of external volumes are bound below the pod's directory: they go first.
        blocking("tearing a pod down", move || place.tear_down(&root)).await?;
        self.external.tear_down(pod_uid).await?;
        self.tokens.forget(pod_uid);
        drop(guard);
        self.drop_lock(pod_uid);
        Ok(())
    }

    /// Whether the volume behind `mount` may only be read, whatever the mount says.
    pub fn read_only(&self, pod: &Pod, mount: &VolumeMount) -> bool {
        forces_read_only(pod, mount)
            || self.external.read_only(pod.metadata.uid.as_deref().unwrap_or_default(), &mount.name)
    }

    /// Names and paths of the pod's volumes that take room on the node's own disk.
    pub fn disk_volumes(&self, pod: &Pod) -> Vec<(String, PathBuf)> {
        let Ok(dir) = PodDir::of(&self.pods_root, pod) else { return Vec::new() };
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let on_disk = volumes.filter_map(|volume| {
            let kind = VolumeKind::of(volume).ok()?;
            let disk = match kind {
                VolumeKind::EmptyDir => {
                    volume.empty_dir.as_ref().and_then(|source| source.medium.as_deref()).unwrap_or_default().is_empty()
                }
                kind => kind == VolumeKind::ConfigMap,
            };
            disk.then(|| Some((volume.name.clone(), dir.volume(kind, &volume.name).ok()?))).flatten()
        });
        on_disk.collect()
    }

    /// UIDs that have a directory here and are not `known`.
    pub fn orphans(&self, known: &HashSet<String>) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.pods_root) else { return Vec::new() };
        let mut orphans: Vec<String> = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|uid| is_plain_name(uid) && !known.contains(uid))
            .collect();
        orphans.extend(self.external.leftovers().into_iter().filter(|uid| is_plain_name(uid) && !known.contains(uid)));
        orphans.sort();
        orphans.dedup();
        orphans
    }

    fn place(&self, dir: PodDir) -> Place {
        Place { dir, mounter: self.mounter.clone() }
    }

    async fn lock(&self, uid: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.entry(uid.to_string()).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Forgets a pod's lock unless somebody waits for it.
    fn drop_lock(&self, uid: &str) {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        if locks.get(uid).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(uid);
        }
    }
}

/// How a volume's directory is to be.
fn shape(pod: &Pod, volume: &Volume, kind: VolumeKind, medium: Medium) -> Shape {
    Shape {
        kind,
        name: volume.name.clone(),
        mode: if kind == VolumeKind::EmptyDir { 0o777 } else { 0o755 },
        medium,
        group: plan::fs_group(pod, kind),
        policy: plan::change_policy(pod),
    }
}

async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(VolumeError::Interrupted { operation }))
}

/// Whether the kind of volume behind `mount` is always mounted read-only (configMap, secret, downwardAPI, projected).
pub fn forces_read_only(pod: &Pod, mount: &VolumeMount) -> bool {
    let kind = plan::find_volume(pod, &mount.name).and_then(VolumeKind::of);
    kind.is_ok_and(|kind| !matches!(kind, VolumeKind::EmptyDir | VolumeKind::HostPath | VolumeKind::External))
}

/// Gives what is at `root` to the pod's fsGroup as its change policy says, if it has one. Blocks.
pub fn give_to_group(pod: &Pod, root: &std::path::Path) -> Result<(), VolumeError> {
    match plan::fs_group(pod, VolumeKind::EmptyDir) {
        Some(group) => crate::ownership::apply(root, group, plan::change_policy(pod)),
        None => Ok(()),
    }
}

/// Whether something is mounted at `path`. Blocks.
pub fn is_mount_point(path: &std::path::Path) -> std::io::Result<bool> {
    KernelMounter.is_mount_point(path)
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
