//! Container layers: `containers/<key>/{upper,work}` and a record of the image layers below, which these keep alive even
//! if the image is removed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use oarlock_failpoint::step;
use serde::{Deserialize, Serialize};

use crate::layers::Layers;
use crate::{ImageError, Rootfs, Usage, changes, files};

#[derive(Debug, Serialize, Deserialize)]
struct Prepared {
    image_id: String,
    chain_ids: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Containers {
    dir: PathBuf,
}

impl Containers {
    pub(crate) fn new(root: &Path) -> Containers {
        Containers { dir: root.join("containers") }
    }

    fn home(&self, key: &str) -> Result<PathBuf, ImageError> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if key.is_empty() || key.len() > 200 || key.starts_with('.') || !key.chars().all(fits) {
            return Err(ImageError::Damaged { what: format!("{key:?} cannot name a container's layer") });
        }
        Ok(self.dir.join(key))
    }

    /// Makes (or finds) a container's layer. The record is first: it holds the layers below before anything uses them.
    pub(crate) fn prepare(
        &self,
        layers: &Layers,
        image_id: &str,
        chain_ids: &[String],
        key: &str,
    ) -> Result<Rootfs, ImageError> {
        let home = self.home(key)?;
        fs::create_dir_all(&home).map_err(ImageError::io("create", &home))?;
        let prepared = Prepared { image_id: image_id.to_owned(), chain_ids: chain_ids.to_vec() };
        let content = serde_json::to_vec(&prepared).map_err(|error| ImageError::Damaged { what: error.to_string() })?;
        let record = home.join("record.json");
        fs::write(&record, content).map_err(ImageError::io("write", &record))?;
        step("a container's layer is on record");
        let (upper, work) = (home.join("upper"), home.join("work"));
        for dir in [&upper, &work] {
            fs::create_dir_all(dir).map_err(ImageError::io("create", dir))?;
        }
        // The upper directory becomes the container's root: any user of it must get in.
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o755)).map_err(ImageError::io("open up", &upper))?;
        let lower = chain_ids.iter().rev().map(|chain_id| layers.tree(chain_id)).collect();
        Ok(Rootfs { lower, upper, work })
    }

    /// Removes a container's layer; tells which image it stood on.
    pub(crate) fn release(&self, key: &str) -> Result<Option<String>, ImageError> {
        let home = self.home(key)?;
        let record = fs::read(home.join("record.json")).ok();
        files::remove_dir(&home)?;
        Ok(record.and_then(|bytes| serde_json::from_slice::<Prepared>(&bytes).ok()).map(|prepared| prepared.image_id))
    }

    /// Writes what the container changed of its image to a file of its own. Blocks.
    pub(crate) fn changes(&self, key: &str, target: &Path) -> Result<(), ImageError> {
        let upper = self.home(key)?.join("upper");
        let open = || fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(target);
        let written = open().and_then(|file| changes::write(&upper, file));
        written.map(drop).map_err(ImageError::io("write", target))
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        files::names(&self.dir)
    }

    pub(crate) fn usage(&self, key: &str) -> Usage {
        self.home(key).map(|home| files::usage(&home.join("upper"))).unwrap_or_default()
    }

    /// Images that containers stand on.
    pub(crate) fn images(&self) -> BTreeSet<String> {
        let read = |key: String| fs::read(self.dir.join(key).join("record.json")).ok();
        let records = self.keys().into_iter().filter_map(read);
        let prepared = records.filter_map(|bytes| serde_json::from_slice::<Prepared>(&bytes).ok());
        prepared.map(|prepared| prepared.image_id).collect()
    }

    /// Layers below containers. One whose record cannot be read (cut off by a crash) uses none: it never got further.
    pub(crate) fn chains(&self) -> BTreeSet<String> {
        let read = |key: String| fs::read(self.dir.join(key).join("record.json")).ok();
        let records = self.keys().into_iter().filter_map(read);
        let prepared = records.filter_map(|bytes| serde_json::from_slice::<Prepared>(&bytes).ok());
        prepared.flat_map(|prepared| prepared.chain_ids).collect()
    }
}
