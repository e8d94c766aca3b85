//! Where everything is: the file contract that scripts rely on, in one place.

use std::path::{Path, PathBuf};

const DEFAULT_DATA_DIR: &str = "/var/lib/oarlock";

/// The paths of one installation. With a data directory of its own, an installation keeps everything below it, sockets
/// included, so that several fit on one host.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    data_dir: PathBuf,
    own_tree: bool,
}

impl Layout {
    /// The default layout, or everything below `data_dir`.
    pub(crate) fn new(data_dir: Option<PathBuf>) -> Self {
        match data_dir {
            Some(data_dir) if data_dir != Path::new(DEFAULT_DATA_DIR) => Self { data_dir, own_tree: true },
            _ => Self { data_dir: DEFAULT_DATA_DIR.into(), own_tree: false },
        }
    }

    fn either(&self, below: &str, default: &str) -> PathBuf {
        if self.own_tree { self.data_dir.join(below) } else { default.into() }
    }

    pub(crate) fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Sockets, namespace pins, pid files: gone after a reboot.
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.either("run", "/run/oarlock")
    }

    /// The CRI endpoint.
    pub(crate) fn runtime_socket(&self) -> PathBuf {
        self.run_dir().join("runtime.sock")
    }

    pub(crate) fn pki_dir(&self) -> PathBuf {
        self.data_dir.join("pki")
    }

    pub(crate) fn server_dir(&self) -> PathBuf {
        self.data_dir.join("server")
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.data_dir.join("runtime")
    }

    pub(crate) fn agent_dir(&self) -> PathBuf {
        self.data_dir.join("agent")
    }

    /// Where plugins look for a kubelet: their sockets, and what they share with pods.
    pub(crate) fn kubelet_dir(&self) -> PathBuf {
        self.either("kubelet", "/var/lib/kubelet")
    }

    /// Logs of the daemons under `oarlock up`.
    pub(crate) fn log_dir(&self) -> PathBuf {
        self.data_dir.join("log")
    }

    /// Container logs, in the layout that log collectors expect.
    pub(crate) fn pod_logs_dir(&self) -> PathBuf {
        self.either("log/pods", "/var/log/pods")
    }

    pub(crate) fn container_logs_dir(&self) -> PathBuf {
        self.either("log/containers", "/var/log/containers")
    }

    pub(crate) fn static_pods(&self) -> PathBuf {
        self.data_dir.join("manifests")
    }

    pub(crate) fn admin_kubeconfig(&self) -> PathBuf {
        self.either("admin.kubeconfig", "/etc/oarlock/admin.kubeconfig")
    }

    /// The kubeconfig of a component of this node.
    pub(crate) fn component_kubeconfig(&self, component: &str) -> PathBuf {
        self.data_dir.join(format!("{component}.kubeconfig"))
    }

    /// What a node that joined was told of its cluster.
    pub(crate) fn joined_file(&self) -> PathBuf {
        self.data_dir.join("joined.yaml")
    }

    /// The authority of the cluster that this node joined.
    pub(crate) fn joined_authority(&self) -> PathBuf {
        self.data_dir.join("cluster-ca.crt")
    }

    pub(crate) fn cni_conf_dir(&self) -> PathBuf {
        self.either("cni/net.d", "/etc/cni/net.d")
    }

    /// Our own plugins.
    pub(crate) fn own_cni_bin_dir(&self) -> PathBuf {
        self.data_dir.join("cni/bin")
    }

    /// Where plugins are looked for: ours first, then those that an administrator or a network add-on installed.
    pub(crate) fn cni_bin_dirs(&self) -> Vec<PathBuf> {
        vec![self.own_cni_bin_dir(), "/opt/cni/bin".into()]
    }

    /// Where NRI plugins connect; by default where they look for it.
    pub(crate) fn nri_socket(&self) -> PathBuf {
        self.either("run/nri.sock", "/var/run/nri/nri.sock")
    }

    pub(crate) fn nri_plugin_dir(&self) -> PathBuf {
        self.either("nri/plugins", "/opt/nri/plugins")
    }

    pub(crate) fn nri_plugin_config_dir(&self) -> PathBuf {
        self.either("nri/conf.d", "/etc/nri/conf.d")
    }

    /// The pid file of `oarlock up`.
    pub(crate) fn up_pid_file(&self) -> PathBuf {
        self.run_dir().join("up.pid")
    }

    /// Its presence tells a stopping `oarlock up` to leave pods running.
    pub(crate) fn keep_pods_marker(&self) -> PathBuf {
        self.run_dir().join("keep-pods")
    }
}
