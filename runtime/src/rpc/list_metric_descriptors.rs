//! ListMetricDescriptors.

use oarlock_proto::cri;

use crate::metrics;

pub(super) fn list_metric_descriptors() -> cri::ListMetricDescriptorsResponse {
    cri::ListMetricDescriptorsResponse { descriptors: metrics::describe() }
}
