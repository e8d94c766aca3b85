//! The store: what callers hold. Owns the order of things: layers before records, records before memory, and garbage only
//! when nobody is adding.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use crate::archive::{self, Imported};
use crate::collect::{self, Pruned, Thresholds};
use crate::fetch::{self, Fetched, tell};
use crate::layers::Layers;
use crate::record::{self, Index, Named, Record};
use crate::rootfs::Containers;
use crate::unfinished::STALE_AFTER;
use crate::{
    Auth, Credential, Image, ImageError, Progress, ProgressSink, Reference, RegistryConfig, Rootfs, Usage, files,
    registry,
};

/// All images of a node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

type SharedPull = Shared<BoxFuture<'static, Result<Image, Arc<ImageError>>>>;

struct Inner {
    root: PathBuf,
    images: PathBuf,
    scratch: PathBuf,
    registries: RegistryConfig,
    layers: Arc<Layers>,
    containers: Containers,
    index: Mutex<Index>,
    /// Held while records are changed, so that disk and memory change in the same order.
    changing: tokio::sync::Mutex<()>,
    /// Read: adding content. Write: collecting garbage.
    content: tokio::sync::RwLock<()>,
    garbage: AtomicBool,
    pulls: Mutex<HashMap<(String, Option<Credential>), SharedPull>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore").field("root", &self.root).finish_non_exhaustive()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ImageError::Cancelled)?
}

impl ImageStore {
    /// Opens or makes the store under `root`, and clears away what an interrupted run left.
    pub async fn open(root: &Path, registries: RegistryConfig) -> Result<ImageStore, ImageError> {
        // One provider for the process; whoever set one before wins.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let root = root.to_path_buf();
        let inner = blocking(move || Inner::open(root, registries)).await?;
        Ok(ImageStore { inner: Arc::new(inner) })
    }

    /// Fetches an image unless the store already has just that; calls for the same image at the same time share the work.
    pub async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<Image, ImageError> {
        self.pull_with_progress(reference, auth.map(Credential::from), None).await
    }

    /// As [`ImageStore::pull`], telling how far it is (to the caller that began the pull).
    ///
    /// The pull goes on when the caller stops waiting: a retry finds it further along.
    pub async fn pull_with_progress(
        &self,
        reference: &str,
        credential: Option<Credential>,
        progress: Option<ProgressSink>,
    ) -> Result<Image, ImageError> {
        let parsed = Reference::parse(reference)
            .map_err(|source| ImageError::Reference { reference: reference.to_owned(), source })?;
        let key = (parsed.to_string(), credential.clone());
        let pull = {
            let mut pulls = self.inner.pulls.lock();
            match pulls.get(&key) {
                Some(pull) => pull.clone(),
                None => {
                    let inner = self.inner.clone();
                    let task = tokio::spawn({
                        let key = key.clone();
                        async move {
                            let pulled = inner.pull(parsed, credential, progress).await;
                            inner.pulls.lock().remove(&key);
                            pulled
                        }
                    });
                    let pull = task
                        .map(|joined| joined.unwrap_or(Err(ImageError::Cancelled)).map_err(Arc::new))
                        .boxed()
                        .shared();
                    pulls.insert(key, pull.clone());
                    pull
                }
            }
        };
        pull.await.map_err(|error| Arc::try_unwrap(error).unwrap_or_else(ImageError::Shared))
    }

    /// Stores every image of an OCI layout (directory or tar) or docker archive, compressed or not.
    pub async fn import(&self, archive: &Path) -> Result<Vec<Image>, ImageError> {
        self.import_with_progress(archive, None).await
    }

    /// As [`ImageStore::import`], telling how far it is.
    pub async fn import_with_progress(
        &self,
        archive: &Path,
        progress: Option<ProgressSink>,
    ) -> Result<Vec<Image>, ImageError> {
        let inner = &self.inner;
        let stored = {
            let _adding = inner.content.read().await;
            let (archive, scratch, layers) = (archive.to_path_buf(), inner.scratch.clone(), inner.layers.clone());
            let sink = progress.clone();
            let imported = blocking(move || archive::import(&archive, &scratch, &layers, sink.as_ref())).await?;
            let mut stored = Vec::with_capacity(imported.len());
            for Imported { fetched, names, has_manifest } in imported {
                let digests = names.iter().filter(|_| has_manifest).map(|name| name.with_digest(&fetched.digest));
                let digests: Vec<String> = digests.collect();
                let image = inner.store(fetched, &names, digests, inner.registries.pin_imported).await?;
                let reference = names.first().map_or_else(|| image.id.clone(), ToString::to_string);
                tell(progress.as_ref(), Progress::Stored { reference, id: image.id.clone() });
                stored.push(image);
            }
            stored
        };
        inner.collect_if_due().await?;
        Ok(stored)
    }

    /// Finds an image by reference, id, or the start of an id.
    pub fn status(&self, reference_or_id: &str) -> Option<Image> {
        self.inner.index.lock().find(reference_or_id).map(|(record, _)| record.to_image())
    }

    /// All images.
    pub fn list(&self) -> Vec<Image> {
        self.inner.index.lock().records.values().map(Record::to_image).collect()
    }

    /// Removes a tag or digest, and with the last tag (or by id) the image and what only it needed. Succeeds if there is
    /// none. What containers stand on stays until they are gone.
    pub async fn remove(&self, reference_or_id: &str) -> Result<(), ImageError> {
        self.inner.remove(reference_or_id).await?;
        self.inner.garbage.store(true, Ordering::Release);
        self.inner.collect_if_due().await
    }

    /// Images of no container that are neither pinned nor used for that long, the longest unused first.
    pub async fn unused(&self, unused_for: Duration) -> Result<Vec<Image>, ImageError> {
        let inner = self.inner.clone();
        let images = self.list();
        blocking(move || Ok(collect::removable(images, &inner.containers.images(), unused_for, SystemTime::now())))
            .await
    }

    /// Removes such images, and what only they needed.
    pub async fn prune(&self, unused_for: Duration) -> Result<Pruned, ImageError> {
        let before = self.usage().bytes;
        let mut pruned = Pruned::default();
        for image in self.unused(unused_for).await? {
            if self.remove_unused(&image).await? {
                pruned.images.push(image);
            }
        }
        pruned.freed_bytes = before.saturating_sub(self.usage().bytes);
        Ok(pruned)
    }

    /// Removes such images one after another while the store's file system is fuller than the thresholds say.
    pub async fn make_room(&self, thresholds: Thresholds) -> Result<Pruned, ImageError> {
        let mut pruned = Pruned::default();
        if self.percent_used().await? < thresholds.high_percent {
            return Ok(pruned);
        }
        let before = self.usage().bytes;
        let inner = self.inner.clone();
        blocking(move || {
            inner.layers.unfinished().collect(thresholds.unused_for.min(STALE_AFTER));
            Ok(())
        })
        .await?;
        for image in self.unused(thresholds.unused_for).await? {
            if self.percent_used().await? <= thresholds.low_percent {
                break;
            }
            if self.remove_unused(&image).await? {
                pruned.images.push(image);
            }
        }
        pruned.freed_bytes = before.saturating_sub(self.usage().bytes);
        Ok(pruned)
    }

    /// Unless a container has come to use the image since.
    async fn remove_unused(&self, image: &Image) -> Result<bool, ImageError> {
        let (inner, id) = (self.inner.clone(), image.id.clone());
        if blocking(move || Ok(inner.containers.images().contains(&id))).await? {
            return Ok(false);
        }
        match self.remove(&image.id).await {
            Ok(()) => Ok(true),
            Err(ImageError::Pinned { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn percent_used(&self) -> Result<u8, ImageError> {
        let root = self.inner.root.clone();
        blocking(move || {
            let stat = nix::sys::statvfs::statvfs(&root)
                .map_err(|errno| ImageError::io("look at the space of", &root)(errno.into()))?;
            Ok(collect::percent(stat.blocks(), stat.blocks_free(), stat.blocks_available()))
        })
        .await
    }

    /// Pins or unpins an image.
    pub async fn set_pinned(&self, reference_or_id: &str, pinned: bool) -> Result<(), ImageError> {
        let _changing = self.inner.changing.lock().await;
        let found = self.inner.index.lock().find(reference_or_id).map(|(record, _)| record.clone());
        let mut record = found.ok_or_else(|| ImageError::NotFound { reference: reference_or_id.to_owned() })?;
        record.pinned = pinned;
        self.inner.save(vec![record.clone()]).await?;
        self.inner.index.lock().records.insert(record.id.clone(), record);
        Ok(())
    }

    /// Space taken by layers, container layers not counted.
    pub fn usage(&self) -> Usage {
        self.inner.layers.usage()
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Makes the layers of a container; the key names them. Idempotent.
    pub async fn prepare_rootfs(&self, image_id: &str, key: &str) -> Result<Rootfs, ImageError> {
        let _adding = self.inner.content.read().await;
        let record = self.inner.index.lock().find(image_id).map(|(record, _)| record.clone());
        let record = record.ok_or_else(|| ImageError::NotFound { reference: image_id.to_owned() })?;
        let (inner, key) = (self.inner.clone(), key.to_owned());
        blocking(move || {
            inner.note_use(&record.id);
            inner.containers.prepare(&inner.layers, &record.id, &record.chain_ids, &key)
        })
        .await
    }

    /// Removes a container's own layer. Must be unmounted. Idempotent.
    pub async fn release_rootfs(&self, key: &str) -> Result<(), ImageError> {
        let (inner, key) = (self.inner.clone(), key.to_owned());
        let image_id = blocking(move || {
            let image_id = inner.containers.release(&key)?;
            image_id.iter().for_each(|id| inner.note_use(id));
            Ok(image_id)
        })
        .await?;
        // It may have been the last to stand on the layers of an image that is gone.
        if image_id.is_some_and(|id| !self.inner.index.lock().records.contains_key(&id)) {
            self.inner.garbage.store(true, Ordering::Release);
        }
        self.inner.collect_if_due().await
    }

    /// Keys of all prepared root file systems, to find forgotten ones.
    pub fn rootfs_keys(&self) -> Vec<String> {
        self.inner.containers.keys()
    }

    /// Writes what a container changed of its image, as a layer in tar form.
    pub async fn rootfs_changes(&self, key: &str, target: &Path) -> Result<(), ImageError> {
        let (inner, key, target) = (self.inner.clone(), key.to_owned(), target.to_owned());
        blocking(move || inner.containers.changes(&key, &target)).await
    }

    /// Space taken by a container's own layer. Walks it: not for the async threads.
    pub fn rootfs_usage(&self, key: &str) -> Usage {
        self.inner.containers.usage(key)
    }
}

impl Inner {
    fn open(root: PathBuf, registries: RegistryConfig) -> Result<Inner, ImageError> {
        let (images, scratch) = (root.join("images"), root.join("scratch"));
        files::remove_dir(&scratch)?;
        for dir in [&images, &scratch, &root.join("layers"), &root.join("containers")] {
            std::fs::create_dir_all(dir).map_err(ImageError::io("create", dir))?;
        }
        private(&root)?;
        let layers = Layers::open(&root, &scratch)?;
        let mut index = record::load(&images)?;
        let broken: Vec<String> = index
            .records
            .values()
            .filter(|record| !record.chain_ids.iter().all(|chain_id| layers.has(chain_id)))
            .map(|record| record.id.clone())
            .collect();
        for id in broken {
            tracing::warn!(image.id = id, "image lacks a layer and has to be pulled again");
            files::remove_file(&record::path(&images, &id))?;
            index.records.remove(&id);
        }
        let containers = Containers::new(&root);
        let mut needed = index.chains();
        needed.extend(containers.chains());
        layers.collect(&needed)?;
        Ok(Inner {
            images,
            scratch,
            registries,
            layers: Arc::new(layers),
            containers,
            index: Mutex::new(index),
            changing: tokio::sync::Mutex::default(),
            content: tokio::sync::RwLock::default(),
            garbage: AtomicBool::new(false),
            pulls: Mutex::default(),
            root,
        })
    }

    /// A container comes to use an image, or leaves it. Blocks.
    fn note_use(&self, id: &str) {
        let now = SystemTime::now();
        if let Some(record) = self.index.lock().records.get_mut(id) {
            record.last_used = now;
        } else {
            return;
        }
        record::touch(&self.images, id, now);
    }

    async fn pull(
        &self,
        reference: Reference,
        credential: Option<Credential>,
        progress: Option<ProgressSink>,
    ) -> Result<Image, ImageError> {
        let image = {
            let _adding = self.content.read().await;
            let sources = registry::sources(&self.registries, &reference, credential.as_ref())?;
            let fetched = fetch::fetch(&sources, &reference, &self.layers, progress.as_ref()).await?;
            let digest = reference.with_digest(&fetched.digest);
            self.store(fetched, std::slice::from_ref(&reference), vec![digest], false).await?
        };
        tell(progress.as_ref(), Progress::Stored { reference: reference.to_string(), id: image.id.clone() });
        self.collect_if_due().await?;
        Ok(image)
    }

    /// Layers into place, then the record, then memory.
    async fn store(
        &self,
        fetched: Fetched,
        names: &[Reference],
        digests: Vec<String>,
        pinned: bool,
    ) -> Result<Image, ImageError> {
        let Fetched { id, config, size_bytes, chain_ids, pending, .. } = fetched;
        let layers = self.layers.clone();
        blocking(move || layers.commit(pending)).await?;
        // A reference by digest is no tag, even if it has one: the tag may mean something else by now.
        let tags = names.iter().filter(|name| name.digest.is_none()).filter_map(Reference::tagged).collect();
        let wanted_pinned = |name: &Reference| {
            self.registries.pinned.iter().any(|text| Reference::parse(text).is_ok_and(|pinned| pinned == *name))
        };
        let pinned = pinned || names.iter().any(wanted_pinned);
        let record = Record {
            id: id.clone(),
            tags,
            digests: digests.into_iter().collect(),
            size_bytes,
            pinned,
            chain_ids,
            config,
            last_used: SystemTime::now(),
        };
        let _changing = self.changing.lock().await;
        let mut next = Index { records: self.index.lock().records.clone() };
        let changed = next.insert(record);
        self.save(changed).await?;
        let image = next.records.get(&id).map(Record::to_image).ok_or(ImageError::Cancelled)?;
        *self.index.lock() = next;
        Ok(image)
    }

    async fn save(&self, records: Vec<Record>) -> Result<(), ImageError> {
        let images = self.images.clone();
        blocking(move || records.iter().try_for_each(|record| record::save(&images, record))).await
    }

    async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let _changing = self.changing.lock().await;
        let found = self.index.lock().find(name).map(|(record, named)| (record.clone(), named));
        let Some((mut record, named)) = found else { return Ok(()) };
        match named {
            Named::Id => {
                record.tags.clear();
                record.digests.clear();
            }
            Named::Tag(tag) => {
                record.tags.remove(&tag);
                if record.tags.is_empty() {
                    record.digests.clear();
                }
            }
            Named::Digest(digest) => drop(record.digests.remove(&digest)),
        }
        if !record.tags.is_empty() || !record.digests.is_empty() {
            self.save(vec![record.clone()]).await?;
            self.index.lock().records.insert(record.id.clone(), record);
            return Ok(());
        }
        if record.pinned {
            return Err(ImageError::Pinned { reference: name.to_owned() });
        }
        let file = record::path(&self.images, &record.id);
        blocking(move || files::remove_file(&file).and_then(|()| files::sync_parent(&file))).await?;
        self.index.lock().records.remove(&record.id);
        Ok(())
    }

    /// Collects garbage if there may be some and nobody is adding; who is adding does it afterwards.
    async fn collect_if_due(&self) -> Result<(), ImageError> {
        if !self.garbage.load(Ordering::Acquire) {
            return Ok(());
        }
        let Ok(_alone) = self.content.try_write() else { return Ok(()) };
        self.garbage.store(false, Ordering::Release);
        let mut needed = self.index.lock().chains();
        needed.extend(self.containers.chains());
        let layers = self.layers.clone();
        blocking(move || {
            layers.unfinished().collect(STALE_AFTER);
            layers.collect(&needed)
        })
        .await
    }
}

/// Images hold set-user-id programs and other people's secrets: nobody but root gets to them by path.
fn private(root: &Path) -> Result<(), ImageError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o700)).map_err(ImageError::io("protect", root))
}
