//! ImageStatus: no image in the answer means that there is none.

use std::collections::HashMap;
use std::sync::Arc;

use oarlock_images::Image;
use oarlock_proto::cri;
use serde_json::json;
use tonic::Status;

use crate::core::Core;
use crate::error::Error;
use crate::spec::image::Defaults;

pub(super) fn image_status(
    core: &Arc<Core>,
    request: &cri::ImageStatusRequest,
) -> Result<cri::ImageStatusResponse, Status> {
    let reference = reference(request.image.as_ref())?;
    let Some(image) = core.images.status(reference) else { return Ok(cri::ImageStatusResponse::default()) };
    let info = || {
        let info = json!({ "chainIDs": image.chain_ids, "imageSpec": image.config });
        HashMap::from([("info".to_owned(), info.to_string())])
    };
    Ok(cri::ImageStatusResponse {
        image: Some(image_of(&image)),
        info: if request.verbose { info() } else { HashMap::new() },
    })
}

/// The reference of a request, which has to have one.
pub(super) fn reference(image: Option<&cri::ImageSpec>) -> Result<&str, Error> {
    let reference = image.map(|image| image.image.as_str()).unwrap_or_default();
    if reference.is_empty() { Err(Error::Invalid("image is required".to_owned())) } else { Ok(reference) }
}

/// An image in the interface's shape.
pub(super) fn image_of(image: &Image) -> cri::Image {
    let user = Defaults::of(&image.config).user;
    let name = user.split(':').next().unwrap_or_default();
    let uid = name.parse::<i64>().ok();
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size_bytes,
        uid: uid.map(|value| cri::Int64Value { value }),
        username: if uid.is_none() { name.to_owned() } else { String::new() },
        spec: None,
        pinned: image.pinned,
    }
}
