//! The store: what callers hold.

use std::path::{Path, PathBuf};

use crate::{Auth, Image, ImageError, ProgressSink, RegistryConfig, Rootfs, Usage};

/// All images of a node. Share it behind an `Arc`.
#[derive(Debug)]
pub struct ImageStore {
    root: PathBuf,
}

impl ImageStore {
    /// Opens or makes the store under `root`, and clears away what an interrupted run left.
    pub async fn open(root: &Path, _registries: RegistryConfig) -> Result<ImageStore, ImageError> {
        Ok(ImageStore { root: root.into() })
    }

    /// Fetches an image unless the store already has just that; calls for the same image at the same time share the work.
    pub async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<Image, ImageError> {
        self.pull_with_progress(reference, auth, None).await
    }

    /// As [`ImageStore::pull`], telling how far it is.
    pub async fn pull_with_progress(
        &self,
        reference: &str,
        _auth: Option<Auth>,
        _progress: Option<ProgressSink>,
    ) -> Result<Image, ImageError> {
        Err(ImageError::NotFound { reference: reference.into() })
    }

    /// Stores every image of an OCI layout (directory or tar) or docker archive, compressed or not.
    pub async fn import(&self, archive: &Path) -> Result<Vec<Image>, ImageError> {
        self.import_with_progress(archive, None).await
    }

    /// As [`ImageStore::import`], telling how far it is.
    pub async fn import_with_progress(
        &self,
        archive: &Path,
        _progress: Option<ProgressSink>,
    ) -> Result<Vec<Image>, ImageError> {
        Err(ImageError::NotAnArchive { path: archive.into(), what: String::new() })
    }

    /// Finds an image by reference, id, or the start of an id.
    pub fn status(&self, _reference_or_id: &str) -> Option<Image> {
        None
    }

    /// All images.
    pub fn list(&self) -> Vec<Image> {
        Vec::new()
    }

    /// Removes a tag or digest, and with the last one (or by id) the image and what only it needed. Succeeds if there
    /// is none.
    pub async fn remove(&self, _reference_or_id: &str) -> Result<(), ImageError> {
        Ok(())
    }

    /// Pins or unpins an image.
    pub async fn set_pinned(&self, reference_or_id: &str, _pinned: bool) -> Result<(), ImageError> {
        Err(ImageError::NotFound { reference: reference_or_id.into() })
    }

    /// Space taken by blobs and layers, container layers not counted.
    pub fn usage(&self) -> Usage {
        Usage::default()
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the layers of a container; the key names them. Idempotent.
    pub async fn prepare_rootfs(&self, image_id: &str, _key: &str) -> Result<Rootfs, ImageError> {
        Err(ImageError::NotFound { reference: image_id.into() })
    }

    /// Removes a container's own layer. Must be unmounted. Idempotent.
    pub async fn release_rootfs(&self, _key: &str) -> Result<(), ImageError> {
        Ok(())
    }

    /// Keys of all prepared root file systems, to find forgotten ones.
    pub fn rootfs_keys(&self) -> Vec<String> {
        Vec::new()
    }

    /// Space taken by a container's own layer.
    pub fn rootfs_usage(&self, _key: &str) -> Usage {
        Usage::default()
    }
}
