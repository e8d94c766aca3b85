//! Unpacked layers: `layers/<chain id>/fs`, each with a small description beside it.
//!
//! A layer is unpacked into a scratch directory and renamed into place when its digests are right and the disk has it;
//! so what is in `layers/` is whole. Overlay needs no parent to unpack, so layers are unpacked in any order, at once.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use oarlock_failpoint::step;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::files::{self, Scratch};
use crate::unfinished::{Held, Unfinished};
use crate::unpack::{self, Content, Limits};
use crate::{ImageError, Usage};

/// A layer as a manifest and a configuration name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Digest of the blob; docker archives do not name it.
    pub(crate) digest: Option<String>,
    pub(crate) size_bytes: u64,
    pub(crate) diff_id: String,
    pub(crate) chain_id: String,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Description {
    bytes: u64,
    inodes: u64,
}

/// A layer that is unpacked but not yet in place. Removed when dropped, unless another pull shall have it.
#[derive(Debug)]
pub(crate) struct Pending {
    path: PathBuf,
    chain_id: String,
    kept: bool,
    held: Held,
}

impl Pending {
    /// Leaves the layer for another pull.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.kept && self.held.is_last() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Layers {
    dir: PathBuf,
    scratch: PathBuf,
    unfinished: Unfinished,
    limits: Limits,
}

impl Layers {
    pub(crate) fn open(root: &Path, scratch: &Path) -> Result<Layers, ImageError> {
        Ok(Layers {
            dir: root.join("layers"),
            scratch: scratch.into(),
            unfinished: Unfinished::open(root)?,
            limits: Limits::default(),
        })
    }

    /// What earlier pulls left.
    pub(crate) fn unfinished(&self) -> &Unfinished {
        &self.unfinished
    }

    /// A layer that an earlier pull has unpacked.
    pub(crate) fn left(&self, chain_id: &str) -> Option<Pending> {
        let path = self.unfinished.layer(chain_id);
        let held = self.unfinished.hold(chain_id);
        path.join("layer.json").exists().then(|| Pending { path, chain_id: chain_id.to_owned(), kept: false, held })
    }

    fn home(&self, chain_id: &str) -> PathBuf {
        self.dir.join(chain_id.trim_start_matches("sha256:"))
    }

    /// The directory that overlay mounts.
    pub(crate) fn tree(&self, chain_id: &str) -> PathBuf {
        self.home(chain_id).join("fs")
    }

    pub(crate) fn has(&self, chain_id: &str) -> bool {
        self.home(chain_id).join("layer.json").exists()
    }

    /// Unpacks a blob. Blocks.
    pub(crate) fn unpack(&self, wanted: &Wanted, source: impl Read) -> Result<Pending, ImageError> {
        let scratch = Scratch::new(&self.scratch)?;
        let tree = scratch.path().join("fs");
        fs::create_dir(&tree).map_err(ImageError::io("create", &tree))?;
        let done = unpack::unpack(source, &tree, Content::Layer, self.limits)?;
        let expected = [(wanted.digest.as_ref(), &done.digest), (Some(&wanted.diff_id), &done.diff_id)];
        for (expected, actual) in expected {
            if let Some(expected) = expected.filter(|expected| *expected != actual) {
                return Err(ImageError::DigestMismatch { expected: expected.clone(), actual: actual.clone() });
            }
        }
        step("a layer is unpacked");
        let usage = files::usage(&tree);
        let description = Description { bytes: usage.bytes, inodes: usage.inodes };
        let content =
            serde_json::to_vec(&description).map_err(|error| ImageError::Damaged { what: error.to_string() })?;
        let file = scratch.path().join("layer.json");
        fs::write(&file, content).map_err(ImageError::io("write", &file))?;
        let path = self.unfinished.layer(&wanted.chain_id);
        let held = self.unfinished.hold(&wanted.chain_id);
        let pending = Pending { path, chain_id: wanted.chain_id.clone(), kept: false, held };
        match fs::rename(scratch.path(), &pending.path) {
            Ok(()) => {}
            // Somebody else was faster with the same content.
            Err(_) if pending.path.join("layer.json").exists() => {}
            Err(error) => return Err(ImageError::io("move", scratch.path())(error)),
        }
        step("a layer waits for its image");
        Ok(pending)
    }

    /// Puts layers in place: the disk has all of each before any has its name. Blocks.
    pub(crate) fn commit(&self, pending: Vec<Pending>) -> Result<(), ImageError> {
        if pending.is_empty() {
            return Ok(());
        }
        files::sync_file_system(&self.scratch)?;
        for layer in pending {
            step("before a layer is put in place");
            let home = self.home(&layer.chain_id);
            match fs::rename(&layer.path, &home) {
                Ok(()) => {}
                // Somebody else was faster with the same content.
                Err(_) if self.has(&layer.chain_id) => {}
                Err(error) => return Err(ImageError::io("move into place", &home)(error)),
            }
        }
        files::sync_parent(&self.dir.join("any"))
    }

    /// Space of all layers, from their descriptions.
    pub(crate) fn usage(&self) -> Usage {
        let mut total = Usage::default();
        for name in files::names(&self.dir) {
            let described = fs::read(self.dir.join(name).join("layer.json")).ok();
            if let Some(description) = described.and_then(|bytes| serde_json::from_slice::<Description>(&bytes).ok()) {
                total.bytes += description.bytes;
                total.inodes += description.inodes;
            }
        }
        total
    }

    /// Removes layers that nothing needs. Each is renamed away first: a crash leaves scratch, never half a layer. Blocks.
    pub(crate) fn collect(&self, needed: &BTreeSet<String>) -> Result<(), ImageError> {
        for name in files::names(&self.dir) {
            if needed.contains(&format!("sha256:{name}")) {
                continue;
            }
            let doomed = Scratch::new(&self.scratch)?;
            let home = self.dir.join(&name);
            fs::rename(&home, doomed.path().join("doomed")).map_err(ImageError::io("move away", &home))?;
            step("a layer nobody needs is moved away");
        }
        Ok(())
    }
}

/// The chain ids of a list of diff ids: each names a layer with everything below it.
pub(crate) fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let id = match chain.last() {
            None => diff_id.clone(),
            Some(parent) => {
                let mut hash = Sha256::new();
                hash.update(format!("{parent} {diff_id}"));
                unpack::digest_of(hash)
            }
        };
        chain.push(id);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_follow_the_specification() {
        let ids = ["sha256:a", "sha256:b"].map(str::to_owned);
        let chain = chain_ids(&ids);
        assert_eq!(chain[0], "sha256:a");
        let mut hash = Sha256::new();
        hash.update("sha256:a sha256:b");
        assert_eq!(chain[1], unpack::digest_of(hash));
    }
}
