//! UpdateRuntimeConfig: the pod address range belongs to whoever writes the CNI configuration, so it is only noted.

use oarlock_proto::cri;

pub(super) fn update_runtime_config(request: &cri::UpdateRuntimeConfigRequest) -> cri::UpdateRuntimeConfigResponse {
    let network = request.runtime_config.as_ref().and_then(|config| config.network_config.as_ref());
    if let Some(network) = network.filter(|network| !network.pod_cidr.is_empty()) {
        tracing::info!(pod_cidr = %network.pod_cidr, "pod address range was told; CNI configuration decides");
    }
    cri::UpdateRuntimeConfigResponse {}
}
