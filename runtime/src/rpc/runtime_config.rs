//! RuntimeConfig: which cgroup driver a kubelet has to use.

use oarlock_proto::cri;

pub(super) fn runtime_config() -> cri::RuntimeConfigResponse {
    let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: cri::CgroupDriver::Cgroupfs as i32 };
    cri::RuntimeConfigResponse { linux: Some(linux) }
}
