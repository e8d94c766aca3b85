//! [`Storage`]: brings persistent volumes and drivers' volumes to pods and takes them down again.
//!
//! ```text
//!   claim ─▶ volume ─▶ (attached?) ─▶ note ─▶ NodeStage ─▶ note ─▶ NodePublish ─▶ group, growth
//!   pod gone ─▶ NodeUnpublish ─▶ forget ─▶ nobody else has it? ─▶ NodeUnstage ─▶ forget
//! ```
//!
//! Every step may be repeated. What runs at one time for one volume waits for each other.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Pod, SecretReference, Volume};
use k8s_openapi::api::storage::v1::CSIDriverSpec;
use oarlock_proto::csi;
use oarlock_volumes::{External, TokenOrder, VolumeError};
use parking_lot::Mutex;
use tokio::sync::Mutex as AsyncMutex;

use crate::announce::Announcements;
use crate::client::{Abilities, Ability, Driver, text};
use crate::cluster::Cluster;
use crate::context::{self, Group};
use crate::drivers::Drivers;
use crate::error::CsiError;
use crate::ledger::{self, Ledger, Place, Record};
use crate::resolve::{self, DriverVolume, Origin};

/// What a volume takes up, as its driver says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeUse {
    /// The pod's name for the volume.
    pub volume: String,
    /// Namespace and name of the claim.
    pub claim: Option<(String, String)>,
    /// Available, total and used bytes, and the same of inodes.
    pub bytes: Option<(i64, i64, i64)>,
    pub inodes: Option<(i64, i64, i64)>,
    /// What the driver says against the volume.
    pub trouble: Option<String>,
}

/// A volume that a pod has been given.
#[derive(Clone)]
struct Ready {
    path: PathBuf,
    read_only: bool,
    /// None for directories of the node.
    volume: Option<DriverVolume>,
}

/// One volume on its way to one pod.
struct Step<'a> {
    volume: &'a DriverVolume,
    driver: &'a Driver,
    abilities: &'a Abilities,
    place: &'a Place,
    record: &'a Record,
}

/// Volumes of one node.
pub struct Storage {
    cluster: Arc<dyn Cluster>,
    drivers: Arc<Drivers>,
    ledger: Ledger,
    /// By pod UID and volume.
    ready: Mutex<HashMap<(String, String), Ready>>,
    /// One step at a time for each volume.
    turns: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
    announcements: Announcements,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CsiError> + Send + 'static,
) -> Result<T, CsiError> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|_| Err(CsiError::Refused("work on a volume was cut off".to_owned())))
}

impl Storage {
    /// `kubelet_dir` is where drivers expect a kubelet's pods and its staging directories.
    pub fn new(kubelet_dir: PathBuf, cluster: Arc<dyn Cluster>, drivers: Arc<Drivers>) -> Arc<Self> {
        let ledger = Ledger::below(kubelet_dir);
        Arc::new(Self {
            cluster,
            drivers,
            ledger,
            ready: Mutex::default(),
            turns: Mutex::default(),
            announcements: Announcements::default(),
        })
    }

    fn turn(&self, record: &Record) -> Arc<AsyncMutex<()>> {
        let key = format!("{}^{}", record.driver_name, record.volume_handle);
        let mut turns = self.turns.lock();
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(key).or_default().clone()
    }

    async fn origin(&self, pod: &Pod, volume: &Volume) -> Result<Origin, CsiError> {
        if let Some(source) = &volume.csi {
            return Ok(Origin::Driver(Box::new(resolve::inline(pod, volume, source))));
        }
        let (name, own) = resolve::claim_of(pod, volume)
            .ok_or_else(|| CsiError::Refused(format!("volume {:?} has no claim", volume.name)))?;
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let about = |problem: String| CsiError::Claim { namespace: namespace.clone(), name: name.clone(), problem };
        let failed = |what: &str, why: String| about(format!("failed to fetch {what} from API server: {why}"));
        let claim = self.cluster.claim(&namespace, &name).await.map_err(|e| failed("PVC", e.to_string()))?;
        let claim = claim.ok_or_else(|| failed("PVC", format!("persistentvolumeclaims {name:?} not found")))?;
        let volume_name = resolve::check_claim(pod, &claim, own).map_err(about)?;
        let found = self.cluster.volume(&volume_name).await.map_err(|e| failed("PV", e.to_string()))?;
        let missing = || {
            about(format!(
                "failed to fetch PV {volume_name} from API server: persistentvolumes {volume_name:?} not found"
            ))
        };
        resolve::of_volume(volume, &claim, &found.ok_or_else(missing)?).map_err(about)
    }

    async fn bring(&self, pod: &Pod, volume: &Volume, again: bool) -> Result<(), CsiError> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let key = (uid.clone(), volume.name.clone());
        let origin = self.origin(pod, volume).await?;
        origin.refuse_wrong_use(pod, &volume.name)?;
        let ready = match origin {
            Origin::Device { path, read_only } => {
                let there = tokio::fs::metadata(&path).await.map_err(|error| CsiError::io("use", &path, error))?;
                if !there.file_type().is_block_device() {
                    return Err(CsiError::Refused(format!("{} is not a block device", path.display())));
                }
                Ready { path, read_only, volume: None }
            }
            Origin::Directory { path, read_only, group } => {
                let there = tokio::fs::metadata(&path).await.map_err(|error| CsiError::io("use", &path, error))?;
                if !there.is_dir() {
                    return Err(CsiError::Refused(format!("{} is not a directory", path.display())));
                }
                if group && !read_only && !again {
                    self.give_to_group(pod, &path).await?;
                }
                Ready { path, read_only, volume: None }
            }
            Origin::Driver(found) => self.bring_drivers(pod, &uid, *found, again).await?,
        };
        self.ready.lock().insert(key, ready);
        Ok(())
    }

    async fn give_to_group(&self, pod: &Pod, path: &std::path::Path) -> Result<(), CsiError> {
        let (pod, path) = (pod.clone(), path.to_owned());
        blocking(move || oarlock_volumes::give_to_group(&pod, &path).map_err(|error| CsiError::Volume(Box::new(error))))
            .await
    }

    async fn bring_drivers(&self, pod: &Pod, uid: &str, volume: DriverVolume, again: bool) -> Result<Ready, CsiError> {
        let (driver, abilities) = self.drivers.get(&volume.driver)?;
        let spec = self.cluster.driver(&volume.driver).await?.map(|object| object.spec).unwrap_or_default();
        let record = Record::of(&volume, self.cluster.node_name());
        let turn = self.turn(&record);
        let _turn = turn.lock().await;
        let place = match volume.block {
            true => self.ledger.published_device(uid, &volume.name),
            false => self.ledger.published(uid, &volume.name),
        };
        let republish = spec.requires_republish == Some(true);
        let (target, there) = (place.target.clone(), again);
        let mounted = blocking(move || {
            let mounted = oarlock_volumes::is_mount_point(&target);
            mounted.map_err(|error| CsiError::io("look at", &target, error))
        });
        // A mount outlives the agent; a volume that is no mount is made sure of once.
        let done = mounted.await? || (there && self.known(uid, &volume));
        let step = Step { volume: &volume, driver: &driver, abilities: &abilities, place: &place, record: &record };
        if !done || republish {
            self.publish(pod, &spec, &step, !done).await?;
        }
        self.grow(&step).await;
        Ok(Ready { path: place.target, read_only: volume.read_only, volume: Some(volume) })
    }

    fn known(&self, uid: &str, volume: &DriverVolume) -> bool {
        let ready = self.ready.lock();
        ready.iter().any(|((pod, _), known)| pod == uid && known.volume.as_ref().is_some_and(|v| v.name == volume.name))
    }

    async fn publish(&self, pod: &Pod, spec: &CSIDriverSpec, step: &Step<'_>, first: bool) -> Result<(), CsiError> {
        let Step { volume, driver, abilities, place, record } = step;
        volume.refuse_wrong_lifecycle(spec.volume_lifecycle_modes.as_deref().unwrap_or_default())?;
        let group = context::group(pod, volume, spec, abilities);
        let capability = context::capability(volume, abilities, group);
        let mut secrets = self.secrets(volume.publish_secret.as_ref()).await?;
        let mut told = context::context(pod, volume, spec);
        if let Some(tokens) = self.tokens(pod, spec).await? {
            let in_secrets = spec.service_account_token_in_secrets == Some(true);
            let to = if in_secrets { &mut secrets } else { &mut told };
            to.insert(context::TOKENS.to_owned(), tokens);
        }
        // The pod's record comes first: it keeps the staged volume from being taken down meanwhile.
        let (own, kept) = ((*place).clone(), (*record).clone());
        blocking(move || {
            ledger::note(&own, &kept)?;
            // The driver makes the last part of the path itself.
            let above = own.target.parent().unwrap_or(&own.dir).to_owned();
            std::fs::create_dir_all(&above).map_err(|error| CsiError::io("create", &above, error))
        })
        .await?;
        let attached = match !volume.ephemeral && spec.attach_required != Some(false) {
            true => {
                // First what is said, then a look: it is not detached after both.
                self.announcements.wait(&record.in_status()).await?;
                self.attached(volume).await?
            }
            false => HashMap::new(),
        };
        let mut staging = String::new();
        if !volume.ephemeral && abilities.can(Ability::StageUnstageVolume) {
            let staged = self.ledger.staged(record);
            staging = text(&staged.target);
            if first {
                self.stage(step, &staged, &capability, &attached).await?;
            }
        }
        let request = csi::NodePublishVolumeRequest {
            volume_id: volume.handle.clone(),
            publish_context: attached,
            staging_target_path: staging,
            target_path: text(&place.target),
            volume_capability: Some(capability),
            readonly: volume.read_only,
            secrets,
            volume_context: told,
        };
        driver.publish(request).await?;
        if let (Group::Given(_), true) = (group, first) {
            self.give_to_group(pod, &place.target).await?;
        }
        Ok(())
    }

    async fn stage(
        &self,
        step: &Step<'_>,
        staged: &Place,
        capability: &csi::VolumeCapability,
        attached: &HashMap<String, String>,
    ) -> Result<(), CsiError> {
        let volume = step.volume;
        let (place, kept) = (staged.clone(), step.record.clone());
        blocking(move || {
            ledger::note(&place, &kept)?;
            std::fs::create_dir_all(&place.target).map_err(|error| CsiError::io("create", &place.target, error))
        })
        .await?;
        let request = csi::NodeStageVolumeRequest {
            volume_id: volume.handle.clone(),
            publish_context: attached.clone(),
            staging_target_path: text(&staged.target),
            volume_capability: Some(capability.clone()),
            secrets: self.secrets(volume.stage_secret.as_ref()).await?,
            volume_context: volume.attributes.clone().into_iter().collect(),
        };
        step.driver.stage(request).await
    }

    /// What the attacher says of the volume, once it is attached.
    async fn attached(&self, volume: &DriverVolume) -> Result<HashMap<String, String>, CsiError> {
        let name = resolve::attachment_name(&volume.handle, &volume.driver, self.cluster.node_name());
        let Some(attachment) = self.cluster.attachment(&name).await? else {
            let message = format!("volumeattachments.storage.k8s.io {name:?} not found");
            return Err(CsiError::Refused(message));
        };
        if attachment.metadata.deletion_timestamp.is_some() {
            return Err(CsiError::Refused("volume attachment is being deleted".to_owned()));
        }
        let status = attachment.status.unwrap_or_default();
        if status.attached {
            return Ok(status.attachment_metadata.unwrap_or_default().into_iter().collect());
        }
        let why = status.attach_error.and_then(|error| error.message);
        Err(CsiError::Refused(match why {
            Some(why) => format!("AttachVolume.Attach failed for volume {:?} : {why}", volume.name),
            None => format!(
                "waiting for external-attacher of {} CSI driver to attach volume {}",
                volume.driver, volume.handle
            ),
        }))
    }

    async fn secrets(&self, reference: Option<&SecretReference>) -> Result<HashMap<String, String>, CsiError> {
        let Some(reference) = reference else { return Ok(HashMap::new()) };
        let (namespace, name) = (reference.namespace.clone(), reference.name.clone());
        let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
        let found = self.cluster.secret(&namespace, &name).await?;
        let missing = || CsiError::Refused(format!("failed to find the secret {name} in the namespace {namespace}"));
        let data = found.ok_or_else(missing)?.data.unwrap_or_default();
        Ok(data.into_iter().map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned())).collect())
    }

    async fn tokens(&self, pod: &Pod, spec: &CSIDriverSpec) -> Result<Option<String>, CsiError> {
        let requests = spec.token_requests.as_deref().unwrap_or_default();
        if requests.is_empty() {
            return Ok(None);
        }
        let of = |text: &Option<String>| text.clone().unwrap_or_default();
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let mut issued = BTreeMap::new();
        for request in requests {
            let order = TokenOrder {
                namespace: of(&pod.metadata.namespace),
                service_account: account.clone().unwrap_or_else(|| "default".to_owned()),
                audience: Some(request.audience.clone()).filter(|audience| !audience.is_empty()),
                expiration_seconds: request.expiration_seconds.unwrap_or(3600),
                pod_name: of(&pod.metadata.name),
                pod_uid: of(&pod.metadata.uid),
            };
            issued.insert(request.audience.clone(), self.cluster.token(&order).await?);
        }
        Ok(Some(context::tokens(&issued)))
    }

    /// Has the driver grow the file system where the volume has grown. A failure is tried again at the next refresh.
    async fn grow(&self, step: &Step<'_>) {
        let Step { volume, driver, abilities, place, record } = step;
        let Some(bytes) = resolve::to_grow(volume).filter(|_| abilities.can(Ability::ExpandVolume)) else { return };
        let grown = async {
            let staged = abilities.can(Ability::StageUnstageVolume);
            let request = csi::NodeExpandVolumeRequest {
                volume_id: volume.handle.clone(),
                volume_path: text(&place.target),
                capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
                staging_target_path: if staged { text(&self.ledger.staged(record).target) } else { String::new() },
                volume_capability: Some(context::capability(volume, abilities, Group::None)),
                secrets: self.secrets(volume.expand_secret.as_ref()).await?,
            };
            driver.expand(request).await?;
            if let (Some((namespace, claim)), Some(capacity)) = (&volume.claim, &volume.volume_capacity) {
                self.cluster.resized(namespace, claim, capacity).await?;
            }
            Ok::<(), CsiError>(())
        };
        match grown.await {
            Ok(()) => tracing::info!(volume = volume.name, bytes, "file system of a volume was grown"),
            Err(error) => {
                tracing::warn!(volume = volume.name, %error, "file system of a volume could not be grown yet")
            }
        }
    }

    async fn take_down(&self, uid: &str) -> Result<(), CsiError> {
        let (ledger, pod) = (self.ledger.clone(), uid.to_owned());
        let volumes = blocking(move || Ok(ledger.of_pod(&pod))).await?;
        for (place, record) in volumes {
            if let Some(record) = record {
                let turn = self.turn(&record);
                let _turn = turn.lock().await;
                self.unpublish(&place, &record).await?;
            } else {
                blocking(move || ledger::forget(&place)).await?;
            }
        }
        self.ready.lock().retain(|(pod, _), _| pod != uid);
        let (ledger, pod) = (self.ledger.clone(), uid.to_owned());
        blocking(move || {
            ledger.tidy(&pod);
            Ok(())
        })
        .await
    }

    /// The record goes last, once nobody needs it; a volume that nobody else has is given back to its driver.
    async fn unpublish(&self, place: &Place, record: &Record) -> Result<(), CsiError> {
        let (driver, abilities) = self.drivers.get(&record.driver_name)?;
        match driver.unpublish(&record.volume_handle, &place.target).await {
            Err(error) if !error.not_found() => return Err(error),
            _ => {}
        }
        let own = place.clone();
        blocking(move || {
            ledger::forget(&own)?;
            // Of a device, the directory that it shared with those of other pods.
            let above = own.target.parent().filter(|above| **above != own.dir);
            let _ = above.map(std::fs::remove_dir);
            Ok(())
        })
        .await?;
        if record.volume_lifecycle_mode != "Ephemeral" && abilities.can(Ability::StageUnstageVolume) {
            self.unstage_unused(&driver, record).await?;
        }
        Ok(())
    }

    async fn unstage_unused(&self, driver: &Driver, record: &Record) -> Result<(), CsiError> {
        let (ledger, of) = (self.ledger.clone(), record.clone());
        let staged = self.ledger.staged(record);
        let own = staged.clone();
        if blocking(move || Ok(ledger.in_use(&of) || !own.dir.exists())).await? {
            return Ok(());
        }
        match driver.unstage(&record.volume_handle, &staged.target).await {
            Err(error) if !error.not_found() => return Err(error),
            _ => {}
        }
        blocking(move || ledger::forget(&staged)).await
    }

    /// Gives back volumes that no pod has, as a crash may leave them. Those of drivers that are not there wait.
    pub async fn unstage_leftovers(&self) {
        let ledger = self.ledger.clone();
        let staged = blocking(move || Ok(ledger.staged_all())).await.unwrap_or_default();
        for (_, record) in staged {
            let Ok((driver, _)) = self.drivers.get(&record.driver_name) else { continue };
            let turn = self.turn(&record);
            let _turn = turn.lock().await;
            if let Err(error) = self.unstage_unused(&driver, &record).await {
                tracing::debug!(volume = record.name, %error, "a volume that no pod has could not be given back yet");
            }
        }
    }

    /// What the node's status is to name as in use. Blocks.
    pub fn volumes_in_use(&self) -> Vec<String> {
        self.ledger.in_status()
    }

    /// The API has taken a status that names these as in use.
    pub fn in_use_is_known(&self, volumes: &[String]) {
        self.announcements.said(volumes);
    }

    /// Returns when a volume waits for being named as in use.
    pub async fn in_use_has_news(&self) {
        self.announcements.asked().await;
    }

    /// What the pod's volumes take up, where their drivers tell.
    pub async fn usage(&self, uid: &str) -> Vec<VolumeUse> {
        let ready: Vec<(String, Ready)> = {
            let ready = self.ready.lock();
            ready
                .iter()
                .filter(|((pod, _), _)| pod == uid)
                .map(|((_, name), one)| (name.clone(), one.clone()))
                .collect()
        };
        let mut found = Vec::new();
        for (name, ready) in ready {
            let Some(volume) = ready.volume else { continue };
            let Ok((driver, abilities)) = self.drivers.get(&volume.driver) else { continue };
            if !abilities.can(Ability::GetVolumeStats) {
                continue;
            }
            let Ok(stats) = driver.stats(&volume.handle, &ready.path).await else { continue };
            let of = |unit: csi::volume_usage::Unit| {
                let usage = stats.usage.iter().find(|usage| usage.unit == unit as i32);
                usage.map(|usage| (usage.available, usage.total, usage.used))
            };
            let condition = stats.volume_condition.clone().filter(|condition| condition.abnormal);
            found.push(VolumeUse {
                volume: name,
                claim: volume.claim.clone(),
                bytes: of(csi::volume_usage::Unit::Bytes),
                inodes: of(csi::volume_usage::Unit::Inodes),
                trouble: condition.map(|condition| condition.message),
            });
        }
        found
    }
}

#[async_trait]
impl External for Storage {
    async fn set_up(&self, pod: &Pod, volume: &Volume) -> Result<(), VolumeError> {
        Ok(self.bring(pod, volume, false).await?)
    }

    async fn refresh(&self, pod: &Pod, volume: &Volume) -> Result<(), VolumeError> {
        Ok(self.bring(pod, volume, true).await?)
    }

    fn path(&self, pod_uid: &str, volume: &str) -> Option<PathBuf> {
        self.ready.lock().get(&(pod_uid.to_owned(), volume.to_owned())).map(|ready| ready.path.clone())
    }

    fn read_only(&self, pod_uid: &str, volume: &str) -> bool {
        self.ready.lock().get(&(pod_uid.to_owned(), volume.to_owned())).is_some_and(|ready| ready.read_only)
    }

    async fn tear_down(&self, pod_uid: &str) -> Result<(), VolumeError> {
        Ok(self.take_down(pod_uid).await?)
    }

    fn leftovers(&self) -> Vec<String> {
        self.ledger.pods()
    }
}
