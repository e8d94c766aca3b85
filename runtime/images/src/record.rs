//! What is known of an image on disk: one JSON file each, in memory as a whole. Pure but for reading and writing a file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use crate::{Image, ImageError, Reference, files};

/// A complete image. Written only when all its layers are in place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) tags: BTreeSet<String>,
    #[serde(default)]
    pub(crate) digests: BTreeSet<String>,
    pub(crate) size_bytes: u64,
    #[serde(default)]
    pub(crate) pinned: bool,
    pub(crate) chain_ids: Vec<String>,
    pub(crate) config: ImageConfiguration,
    /// The time of change of the record's file, which costs nothing to write and is right within a reboot.
    #[serde(skip, default = "SystemTime::now")]
    pub(crate) last_used: SystemTime,
}

impl Record {
    pub(crate) fn to_image(&self) -> Image {
        Image {
            last_used: self.last_used,
            id: self.id.clone(),
            repo_tags: self.tags.iter().cloned().collect(),
            repo_digests: self.digests.iter().cloned().collect(),
            size_bytes: self.size_bytes,
            config: self.config.clone(),
            pinned: self.pinned,
            chain_ids: self.chain_ids.clone(),
        }
    }
}

/// All images by id.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) records: BTreeMap<String, Record>,
}

/// What an image is called by: everything but the id may move to another image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Named {
    Tag(String),
    Digest(String),
    Id,
}

impl Index {
    /// Finds by id, by the start of an id (at least 4 digits, if only one fits), by tag, or by digest.
    pub(crate) fn find(&self, text: &str) -> Option<(&Record, Named)> {
        if let Some(record) = self.records.get(text) {
            return Some((record, Named::Id));
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.len() >= 4 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let prefix = format!("sha256:{hex}");
            let mut fitting = self.records.range(prefix.clone()..).take_while(|(id, _)| id.starts_with(&prefix));
            if let (Some((_, record)), None) = (fitting.next(), fitting.next()) {
                return Some((record, Named::Id));
            }
        }
        self.find_reference(&Reference::parse(text).ok()?)
    }

    fn find_reference(&self, reference: &Reference) -> Option<(&Record, Named)> {
        // A digest says more than the tag beside it.
        if let Some(digest) = &reference.digest {
            let wanted = reference.with_digest(digest);
            let record = self.records.values().find(|record| record.digests.contains(&wanted))?;
            return Some((record, Named::Digest(wanted)));
        }
        let tag = reference.tagged()?;
        let record = self.records.values().find(|record| record.tags.contains(&tag))?;
        Some((record, Named::Tag(tag)))
    }

    /// Puts an image in and takes its tags away from others; returns the records that changed.
    pub(crate) fn insert(&mut self, mut record: Record) -> Vec<Record> {
        let mut changed = Vec::new();
        for other in self.records.values_mut().filter(|other| other.id != record.id) {
            let before = other.tags.len();
            other.tags.retain(|tag| !record.tags.contains(tag));
            if other.tags.len() != before {
                changed.push(other.clone());
            }
        }
        if let Some(known) = self.records.get(&record.id) {
            record.tags.extend(known.tags.iter().cloned());
            record.digests.extend(known.digests.iter().cloned());
            record.pinned |= known.pinned;
        }
        self.records.insert(record.id.clone(), record.clone());
        changed.push(record);
        changed
    }

    /// Layers that an image needs.
    pub(crate) fn chains(&self) -> BTreeSet<String> {
        self.records.values().flat_map(|record| record.chain_ids.iter().cloned()).collect()
    }
}

/// The file of an image's record.
pub(crate) fn path(images: &Path, id: &str) -> PathBuf {
    images.join(format!("{}.json", id.trim_start_matches("sha256:")))
}

/// Reads all records. One that cannot be read (a version to come, damage) is set aside, its image pulled anew.
pub(crate) fn load(images: &Path) -> Result<Index, ImageError> {
    let mut index = Index::default();
    for name in files::names(images).into_iter().filter(|name| name.ends_with(".json")) {
        let file = images.join(&name);
        let bytes = std::fs::read(&file).map_err(ImageError::io("read", &file))?;
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(mut record) => {
                let changed = std::fs::metadata(&file).and_then(|metadata| metadata.modified());
                record.last_used = changed.unwrap_or(record.last_used);
                index.records.insert(record.id.clone(), record);
            }
            Err(error) => {
                tracing::warn!(file = %file.display(), %error, "image record is unreadable, image forgotten");
                files::remove_file(&file)?;
            }
        }
    }
    Ok(index)
}

/// Notes on the record's file that the image is used now.
pub(crate) fn touch(images: &Path, id: &str, now: SystemTime) {
    let touched = std::fs::File::options().write(true).open(path(images, id)).and_then(|file| file.set_modified(now));
    if let Err(error) = touched {
        tracing::debug!(image.id = id, %error, "use of an image could not be noted");
    }
}

/// Makes a record last.
pub(crate) fn save(images: &Path, record: &Record) -> Result<(), ImageError> {
    let content = serde_json::to_vec(record).map_err(|error| ImageError::Damaged { what: error.to_string() })?;
    files::write_atomically(&path(images, &record.id), &content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(digit: char, tag: &str) -> Record {
        Record {
            id: format!("sha256:{}", digit.to_string().repeat(64)),
            tags: [tag.to_owned()].into(),
            digests: [format!("docker.io/library/a@sha256:{}", digit.to_string().repeat(64))].into(),
            size_bytes: 1,
            pinned: false,
            chain_ids: vec![],
            config: ImageConfiguration::default(),
            last_used: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn images_are_found_by_every_name_they_have() {
        let mut index = Index::default();
        index.insert(record('a', "docker.io/library/a:latest"));
        let id = format!("sha256:{}", "a".repeat(64));
        for name in [id.as_str(), "aaaa", "sha256:aaaaaa", "a", "a:latest", "docker.io/library/a", &format!("a@{id}")] {
            assert_eq!(index.find(name).map(|(found, _)| found.id.as_str()), Some(id.as_str()), "{name}");
        }
        for name in ["aab", "b", "a:1", "Nonsense"] {
            assert!(index.find(name).is_none(), "{name}");
        }
    }

    #[test]
    fn a_tag_moves_to_the_image_that_came_last() {
        let mut index = Index::default();
        index.insert(record('a', "docker.io/library/a:latest"));
        let changed = index.insert(record('b', "docker.io/library/a:latest"));
        assert_eq!(changed.len(), 2);
        assert!(index.find("a").unwrap().0.id.ends_with('b'));
        assert!(index.records.values().any(|record| record.tags.is_empty()));
    }
}
