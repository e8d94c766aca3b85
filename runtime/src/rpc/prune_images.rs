//! Prune (oarlock.v1.Images): removes images that nothing uses.

use std::sync::Arc;
use std::time::Duration;

use oarlock_images::{Image, Pruned};
use oarlock_proto::images::{ImportedImage, PruneRequest, PruneResponse};
use tonic::Status;

use crate::core::Core;
use crate::error::Error;

pub(super) async fn prune_images(core: &Arc<Core>, request: PruneRequest) -> Result<PruneResponse, Status> {
    let unused_for = Duration::from_secs(request.unused_for_seconds);
    let Pruned { images, freed_bytes } = match request.dry_run {
        true => Pruned { images: core.images.unused(unused_for).await.map_err(Error::from)?, freed_bytes: 0 },
        false => core.images.prune(unused_for).await.map_err(Error::from)?,
    };
    if !request.dry_run {
        tracing::info!(images = images.len(), freed_bytes, "unused images removed");
    }
    Ok(PruneResponse { images: images.into_iter().map(named).collect(), freed_bytes })
}

/// An image as the calls beside CRI tell of it.
pub(super) fn named(image: Image) -> ImportedImage {
    ImportedImage {
        id: image.id,
        repo_tags: image.repo_tags,
        repo_digests: image.repo_digests,
        size_bytes: image.size_bytes,
    }
}
