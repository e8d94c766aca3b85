//! Status: whether pods can be made now, and what this runtime can do.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use oarlock_proto::cri;
use serde_json::json;

use crate::core::Core;
use crate::idmap;

pub(super) async fn status(core: &Arc<Core>, request: &cri::StatusRequest) -> cri::StatusResponse {
    let mut names: Vec<&str> = vec!["", "oarlock"];
    names.extend(core.config.handlers.keys().map(String::as_str));
    let handler = |name: &str| cri::RuntimeHandler {
        name: name.to_owned(),
        features: Some(cri::RuntimeHandlerFeatures {
            recursive_read_only_mounts: recursive_read_only(),
            // Other runtimes bring their own limits; only the built-in one is known.
            user_namespaces: core.host.no_user_namespaces.is_none() && !core.config.handlers.contains_key(name),
        }),
    };
    cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions: vec![runtime_ready(core), network_ready(core).await] }),
        info: if request.verbose { info(core) } else { HashMap::new() },
        runtime_handlers: names.into_iter().map(handler).collect(),
        features: Some(cri::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: false,
            mount_options: false,
        }),
    }
}

fn runtime_ready(core: &Core) -> cri::RuntimeCondition {
    let problem = match core.config.shim_binary.is_file() {
        true => None,
        false => Some(format!("shim binary {} is missing", core.config.shim_binary.display())),
    };
    condition("RuntimeReady", "ShimMissing", problem)
}

async fn network_ready(core: &Core) -> cri::RuntimeCondition {
    let problem = core.network_status.problem(core).await;
    condition("NetworkReady", "NetworkPluginNotReady", problem)
}

fn condition(kind: &str, reason: &str, problem: Option<String>) -> cri::RuntimeCondition {
    cri::RuntimeCondition {
        r#type: kind.to_owned(),
        status: problem.is_none(),
        reason: if problem.is_some() { reason.to_owned() } else { String::new() },
        message: problem.unwrap_or_default(),
    }
}

/// mount_setattr(2) came with Linux 5.12.
fn recursive_read_only() -> bool {
    let release =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    idmap::at_least(&release, (5, 12))
}

fn info(core: &Core) -> HashMap<String, String> {
    let host = &core.host;
    let network = core.cni.default_network().ok();
    let config = json!({
        "dataDir": core.config.data_dir,
        "runDir": core.config.run_dir,
        "stateDir": core.config.run_dir,
        "cdiSpecDirs": core.config.cdi_dirs,
        "socket": core.config.socket,
        "shimBinary": core.config.shim_binary,
        "handlers": core.config.handlers.iter().map(|(name, path)| (name.clone(), json!(path))).collect::<serde_json::Map<_, _>>(),
        "cniConfDir": core.config.cni_conf_dir,
        "cniBinDirs": core.config.cni_bin_dirs,
        "network": network.map(|network| network.name),
        "cgroupDriver": if host.systemd_cgroups { "systemd" } else { "cgroupfs" },
        "cgroupVersion": if host.cgroup_v2 { "v2" } else { "v1" },
        "swapAccounting": host.swap_accounting,
        "hugetlb": host.hugetlb,
        "userNamespaces": host.no_user_namespaces.as_deref().unwrap_or("supported"),
        "appArmor": host.apparmor,
        "seLinux": host.selinux,
        "seccomp": Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
        "lowestOomScoreAdj": host.oom_score_adj_floor,
        "capabilities": host.capabilities,
        "nri": {
            "enabled": core.config.plugins.enabled,
            "socket": core.config.plugins.socket,
            "pluginDir": core.config.plugins.plugin_dir,
            "plugins": core.plugins.count(),
        },
        "sandboxes": core.index.sandboxes().len(),
        "containers": core.index.containers().len(),
    });
    HashMap::from([("config".to_owned(), config.to_string())])
}
