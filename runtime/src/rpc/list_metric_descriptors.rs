//! ListMetricDescriptors.

use oarlock_proto::cri;

use crate::stats;

pub(super) fn list_metric_descriptors() -> cri::ListMetricDescriptorsResponse {
    cri::ListMetricDescriptorsResponse { descriptors: stats::describe() }
}
