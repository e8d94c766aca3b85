//! RemoveImage: an image that does not exist has been removed; one that a container uses stays. A pin keeps collection away;
//! it does not withstand being named here, but for the image that the runtime itself needs.

use std::sync::Arc;

use oarlock_images::ImageError;
use oarlock_proto::cri;
use tonic::Status;

use super::image_status::reference;
use crate::core::Core;
use crate::error::Error;

pub(super) async fn remove_image(
    core: &Arc<Core>,
    request: &cri::RemoveImageRequest,
) -> Result<cri::RemoveImageResponse, Status> {
    let reference = reference(request.image.as_ref())?;
    if let Some(image) = core.images.status(reference) {
        // A tag may go while another name keeps the image.
        let last = reference == image.id || image.repo_tags.len() + image.repo_digests.len() <= 1;
        let user = core.index.containers().into_iter().find(|container| container.record().image_id == image.id);
        if let Some(user) = user.filter(|_| last) {
            let id = image.id.clone();
            tracing::debug!(image.id = %id, container.id = %user.id(), "image in use loses its names only");
        }
    }
    match core.images.remove(reference).await {
        Err(ImageError::Pinned { .. }) if !is_needed(core, reference) => {
            core.images.set_pinned(reference, false).await.map_err(Error::from)?;
            core.images.remove(reference).await.map_err(Error::from)?;
        }
        outcome => outcome.map_err(Error::from)?,
    }
    Ok(cri::RemoveImageResponse {})
}

/// Whether this is the image of sandboxes.
fn is_needed(core: &Core, reference: &str) -> bool {
    let pause = &core.config.pause_image;
    !pause.is_empty()
        && match (core.images.status(reference), core.images.status(pause)) {
            (Some(image), Some(pause)) => image.id == pause.id,
            _ => false,
        }
}
