//! ListContainers.

use std::sync::Arc;

use oarlock_proto::cri;

use crate::core::Core;
use crate::view;

pub(super) fn list_containers(core: &Arc<Core>, filter: Option<&cri::ContainerFilter>) -> Vec<cri::Container> {
    let containers = view::containers(core, filter);
    let mut items: Vec<_> = containers.iter().map(|container| view::container_item(&container.record())).collect();
    items.sort_by_key(|item| std::cmp::Reverse(item.created_at));
    items
}
