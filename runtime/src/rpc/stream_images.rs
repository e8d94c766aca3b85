//! StreamImages: the whole list in messages of bounded size.

use std::sync::Arc;

use oarlock_proto::cri;

use super::list_images::list_images;
use super::{Responses, chunks};
use crate::core::Core;

pub(super) fn stream_images(
    core: &Arc<Core>,
    filter: Option<&cri::ImageFilter>,
) -> Responses<cri::StreamImagesResponse> {
    chunks(list_images(core, filter), |images| cri::StreamImagesResponse { images })
}
