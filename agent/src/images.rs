//! Image garbage collection: which images go when the disk fills, when they grow old, or when the node is under pressure.
//!
//! Owns what is remembered of images (when each was first seen and last used). The choice is pure; pinned images and those
//! that any container was made from are never chosen.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use oarlock_proto::cri;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::node::capacity::{Disk, disk};
use crate::plan::later;
use crate::recorder::Level;
use crate::shared::{PodEntry, Shared};
use crate::spec::image::with_default_tag;

const PERIOD: Duration = Duration::from_secs(300);

/// When images are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageGcConfig {
    /// Above this use of the image file system, images are removed…
    pub high_percent: u8,
    /// …until this is reached.
    pub low_percent: u8,
    /// An image is never removed before it is this old.
    pub min_age: Duration,
    /// An image that nothing used for so long is removed even on an empty disk; None keeps it.
    pub max_age: Option<Duration>,
}

impl ImageGcConfig {
    /// For a machine whose disk others fill too.
    pub fn for_shared_machine() -> Self {
        Self { high_percent: 95, low_percent: 90, ..Self::default() }
    }
}

impl Default for ImageGcConfig {
    fn default() -> Self {
        Self { high_percent: 85, low_percent: 80, min_age: Duration::from_secs(120), max_age: None }
    }
}

/// What is remembered of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    first: Timestamp,
    /// None until a container used it.
    last_used: Option<Timestamp>,
}

/// The images of the node over time. Pure.
#[derive(Debug, Default)]
struct Catalogue {
    seen: HashMap<String, Seen>,
}

/// An image that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    id: String,
    size: u64,
    unused_since: Timestamp,
}

impl Catalogue {
    /// Takes a look in. `used` are ids and references that containers name.
    fn look(&mut self, images: &[cri::Image], used: &HashSet<String>, now: Timestamp) {
        self.seen.retain(|id, _| images.iter().any(|image| image.id == *id));
        for image in images {
            let seen = self.seen.entry(image.id.clone()).or_insert(Seen { first: now, last_used: None });
            if is_used(image, used) {
                seen.last_used = Some(now);
            }
        }
    }

    /// Images that may go, the longest unused first.
    fn candidates(
        &self,
        images: &[cri::Image],
        used: &HashSet<String>,
        min_age: Duration,
        now: Timestamp,
    ) -> Vec<Candidate> {
        let mut found: Vec<(Timestamp, Candidate)> = Vec::new();
        for image in images.iter().filter(|image| !image.pinned && !is_used(image, used)) {
            let Some(seen) = self.seen.get(&image.id) else { continue };
            if later(seen.first, min_age) > now {
                continue;
            }
            let unused_since = seen.last_used.unwrap_or(seen.first);
            // Never used sorts before used.
            let rank = seen.last_used.unwrap_or(Timestamp::MIN);
            found.push((rank, Candidate { id: image.id.clone(), size: image.size, unused_since }));
        }
        found.sort_by(|(a, x), (b, y)| a.cmp(b).then(x.unused_since.cmp(&y.unused_since)).then(x.id.cmp(&y.id)));
        found.into_iter().map(|(_, candidate)| candidate).collect()
    }
}

fn is_used(image: &cri::Image, used: &HashSet<String>) -> bool {
    used.contains(&image.id) || image.repo_tags.iter().chain(&image.repo_digests).any(|name| used.contains(name))
}

/// How many bytes must go; None while use is below the high mark.
fn to_free(config: &ImageGcConfig, room: &Disk) -> Option<u64> {
    if room.total_bytes <= 0 {
        return None;
    }
    let used_percent = 100 - i128::from(room.available_bytes) * 100 / i128::from(room.total_bytes);
    if used_percent < i128::from(config.high_percent) {
        return None;
    }
    let wanted = i128::from(room.total_bytes) * i128::from(100 - config.low_percent.min(100)) / 100;
    u64::try_from(wanted - i128::from(room.available_bytes)).ok().filter(|bytes| *bytes > 0)
}

/// Removes images. One removal run at a time.
pub(crate) struct ImageCollector {
    shared: Arc<Shared>,
    catalogue: Mutex<Catalogue>,
}

impl ImageCollector {
    pub(crate) fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self { shared, catalogue: Mutex::default() })
    }

    /// Collects now and then until `shutdown`.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.collect() => {}
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }

    /// One round: old images, then as many as the disk's fill asks for.
    async fn collect(&self) {
        let config = self.shared.config.image_gc;
        let mut catalogue = self.catalogue.lock().await;
        let Some((images, used)) = self.look(&mut catalogue).await else { return };
        let now = Timestamp::now();
        let candidates = catalogue.candidates(&images, &used, config.min_age, now);
        let is_old = |c: &&Candidate| config.max_age.is_some_and(|age| later(c.unused_since, age) <= now);
        for old in candidates.iter().filter(is_old) {
            self.remove(old).await;
        }
        let candidates: Vec<Candidate> = candidates.iter().filter(|candidate| !is_old(candidate)).cloned().collect();
        let Some(wanted) = self.room().await.and_then(|room| to_free(&config, &room)) else { return };
        let freed = self.remove_some(&candidates, wanted).await;
        tracing::info!(wanted, freed, "the image file system is filling up; images were removed");
        if freed < wanted {
            let text = format!(
                "Failed to garbage collect required amount of images. Attempted to free {wanted} bytes, but only found {freed} bytes eligible to free."
            );
            self.shared.recorder.node(&self.shared.config.node_name, Level::Warning, "FreeDiskSpaceFailed", text);
        }
    }

    /// Removes every image that may go; gives the bytes they took.
    pub(crate) async fn remove_unused(&self) -> u64 {
        let mut catalogue = self.catalogue.lock().await;
        let Some((images, used)) = self.look(&mut catalogue).await else { return 0 };
        let min_age = self.shared.config.image_gc.min_age;
        let candidates = catalogue.candidates(&images, &used, min_age, Timestamp::now());
        self.remove_some(&candidates, u64::MAX).await
    }

    async fn look(&self, catalogue: &mut Catalogue) -> Option<(Vec<cri::Image>, HashSet<String>)> {
        // Images first: what a container begins to use in between was seen as used by then.
        let images = self.shared.runtime.list_images().await.ok()?;
        let containers = self.shared.runtime.list_containers(None).await.ok()?;
        let mut used = HashSet::new();
        for container in containers {
            let named = container.image.map(|image| image.image).unwrap_or_default();
            used.extend([container.image_ref, container.image_id, named].into_iter().filter(|name| !name.is_empty()));
        }
        for reference in self.mounted() {
            if let Ok(Some(image)) = self.shared.runtime.image_status(&reference).await {
                used.insert(image.id);
            }
        }
        catalogue.look(&images, &used, Timestamp::now());
        Some((images, used))
    }

    /// Images that pods have as volumes; no container names them.
    fn mounted(&self) -> HashSet<String> {
        let over = |entry: &PodEntry| matches!(entry.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let pods = self.shared.table.all().into_iter().filter(|entry| !over(entry));
        let volumes = pods.flat_map(|entry| entry.pod.spec.clone().and_then(|spec| spec.volumes).unwrap_or_default());
        let references = volumes.filter_map(|volume| volume.image?.reference);
        references.filter_map(|reference| with_default_tag(&reference).ok()).collect()
    }

    async fn remove_some(&self, candidates: &[Candidate], wanted: u64) -> u64 {
        let mut freed: u64 = 0;
        for candidate in candidates {
            if freed >= wanted {
                break;
            }
            if self.remove(candidate).await {
                freed = freed.saturating_add(candidate.size);
            }
        }
        freed
    }

    async fn remove(&self, candidate: &Candidate) -> bool {
        match self.shared.runtime.remove_image(&candidate.id).await {
            Ok(()) => {
                tracing::info!(image.id = candidate.id, bytes = candidate.size, "removed an unused image");
                true
            }
            Err(error) => {
                tracing::warn!(image.id = candidate.id, %error, "an unused image could not be removed");
                false
            }
        }
    }

    async fn room(&self) -> Option<Disk> {
        let info = self.shared.runtime.image_fs_info().await.ok()?;
        let mount = info.image_filesystems.first()?.fs_id.as_ref()?.mountpoint.clone();
        tokio::task::spawn_blocking(move || disk(Path::new(&mount))).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a small number")
    }

    fn image(id: &str, pinned: bool) -> cri::Image {
        cri::Image { id: id.into(), repo_tags: vec![format!("repo/{id}:1")], size: 10, pinned, ..Default::default() }
    }

    #[test]
    fn the_longest_unused_goes_first_and_pinned_used_and_young_ones_stay() {
        let images = [image("pinned", true), image("used", false), image("old", false), image("recent", false)];
        let mut catalogue = Catalogue::default();
        let used = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<HashSet<_>>();
        catalogue.look(&images, &used(&["used", "old", "recent"]), at(0));
        catalogue.look(&images, &used(&["used", "repo/recent:1"]), at(100));
        let mut all = images.to_vec();
        all.push(image("never", false));
        catalogue.look(&all, &used(&["used"]), at(150));
        all.push(image("young", false));
        catalogue.look(&all, &used(&["used"]), at(290));
        let ids = |now| -> Vec<String> {
            let found = catalogue.candidates(&all, &used(&["used"]), Duration::from_secs(120), now);
            found.into_iter().map(|candidate| candidate.id).collect()
        };
        assert_eq!(ids(at(300)), ["never", "old", "recent"]);
        assert_eq!(ids(at(410)), ["never", "young", "old", "recent"]);
    }

    #[test]
    fn the_disk_is_brought_from_the_high_to_the_low_mark() {
        let config = ImageGcConfig::default();
        let room = |available_bytes| Disk { total_bytes: 1000, available_bytes, ..Default::default() };
        assert_eq!(to_free(&config, &room(160)), None);
        assert_eq!(to_free(&config, &room(150)), Some(50));
        assert_eq!(to_free(&config, &room(0)), Some(200));
        assert_eq!(to_free(&config, &Disk::default()), None);
    }
}
