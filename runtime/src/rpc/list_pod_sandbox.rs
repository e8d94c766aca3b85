//! ListPodSandbox.

use std::sync::Arc;

use oarlock_proto::cri;

use crate::core::Core;
use crate::view;

pub(super) fn list_pod_sandbox(core: &Arc<Core>, filter: Option<&cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
    let mut items: Vec<_> = view::sandboxes(core, filter).iter().map(|record| view::sandbox_item(record)).collect();
    items.sort_by_key(|item| std::cmp::Reverse(item.created_at));
    items
}
