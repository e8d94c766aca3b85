//! Which images may go: those of no container, unpinned, unused for long enough; the longest unused first. Pure.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use crate::Image;

/// What a removal of unused images came to.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Pruned {
    pub images: Vec<Image>,
    /// Space of layers that nothing needs any more.
    pub freed_bytes: u64,
}

/// When images are collected without being asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// Collection begins at this use of the file system, in percent.
    pub high_percent: u8,
    /// And ends at this.
    pub low_percent: u8,
    /// Images used more recently stay.
    pub unused_for: Duration,
}

/// How full a file system is, in percent, as `df` counts: what root alone may use is not free.
pub(crate) fn percent(blocks: u64, free: u64, available: u64) -> u8 {
    let used = blocks.saturating_sub(free);
    let all = used.saturating_add(available);
    // Rounded up, so that a full one is 100.
    u8::try_from((used.saturating_mul(100)).div_ceil(all.max(1))).unwrap_or(100)
}

/// The images that may go, in order.
pub(crate) fn removable(
    mut images: Vec<Image>,
    used: &BTreeSet<String>,
    unused_for: Duration,
    now: SystemTime,
) -> Vec<Image> {
    let old = |image: &Image| now.duration_since(image.last_used).is_ok_and(|age| age >= unused_for);
    images.retain(|image| !image.pinned && !used.contains(&image.id) && old(image));
    images.sort_by(|one, other| one.last_used.cmp(&other.last_used).then_with(|| one.id.cmp(&other.id)));
    images
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_pinned_and_young_images_stay_and_the_oldest_goes_first() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let image = |id: &str, age: u64, pinned| Image {
            id: id.into(),
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size_bytes: 0,
            config: oci_spec::image::ImageConfiguration::default(),
            pinned,
            chain_ids: Vec::new(),
            last_used: now - Duration::from_secs(age),
        };
        let images = vec![
            image("young", 9, false),
            image("old", 500, false),
            image("older", 600, false),
            image("pinned", 700, true),
            image("used", 800, false),
        ];
        let used = ["used".to_owned()].into();
        let going = removable(images, &used, Duration::from_secs(10), now);
        assert_eq!(going.iter().map(|image| image.id.as_str()).collect::<Vec<_>>(), ["older", "old"]);
    }

    #[test]
    fn a_file_system_is_as_full_as_others_say() {
        assert_eq!(percent(100, 50, 40), 56);
        assert_eq!(percent(100, 0, 0), 100);
        assert_eq!(percent(0, 0, 0), 0);
    }
}
