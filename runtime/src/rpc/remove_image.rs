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
    remove(core, reference).await.map_err(Error::from)?;
    Ok(cri::RemoveImageResponse {})
}

/// With its last name a pinned image goes as well; only the store knows which name that is.
async fn remove(core: &Core, reference: &str) -> Result<(), ImageError> {
    match core.images.remove(reference).await {
        Err(error @ ImageError::Pinned { .. }) => {
            let own =
                core.images.status(reference).is_none_or(|image| image.repo_tags.contains(&core.config.pause_image));
            if own {
                return Err(error);
            }
            core.images.set_pinned(reference, false).await?;
            core.images.remove(reference).await
        }
        other => other,
    }
}
