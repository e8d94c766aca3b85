//! ListImages.

use std::sync::Arc;

use oarlock_proto::cri;

use super::image_status::image_of;
use crate::core::Core;

pub(super) fn list_images(core: &Arc<Core>, filter: Option<&cri::ImageFilter>) -> Vec<cri::Image> {
    let wanted = filter.and_then(|filter| filter.image.as_ref()).map(|image| image.image.as_str()).unwrap_or_default();
    match wanted {
        "" => core.images.list().iter().map(image_of).collect(),
        reference => core.images.status(reference).iter().map(image_of).collect(),
    }
}
