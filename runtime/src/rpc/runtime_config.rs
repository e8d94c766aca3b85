//! RuntimeConfig: which cgroup driver a kubelet has to use.

use oarlock_proto::cri;

use crate::core::Core;

pub(super) fn runtime_config(core: &Core) -> cri::RuntimeConfigResponse {
    let driver = if core.host.systemd_cgroups { cri::CgroupDriver::Systemd } else { cri::CgroupDriver::Cgroupfs };
    let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: driver as i32 };
    cri::RuntimeConfigResponse { linux: Some(linux) }
}
