//! StreamContainers: the whole list in messages of bounded size.

use std::sync::Arc;

use oarlock_proto::cri;

use super::list_containers::list_containers;
use super::{Responses, chunks};
use crate::core::Core;

pub(super) fn stream_containers(
    core: &Arc<Core>,
    filter: Option<&cri::ContainerFilter>,
) -> Responses<cri::StreamContainersResponse> {
    chunks(list_containers(core, filter), |containers| cri::StreamContainersResponse { containers })
}
