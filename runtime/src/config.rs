//! Owns what the daemon is told at start: paths, addresses and limits. Holds no behaviour but defaults.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oarlock_images::Thresholds;
use oarlock_nri::Config as PluginConfig;

/// Everything the runtime daemon is told. Relative paths are refused by [`crate::Runtime::new`].
#[derive(Clone, Debug)]
pub struct Config {
    /// The CRI socket (unix, mode 0600).
    pub socket: PathBuf,
    /// What outlives a reboot: images, writable layers, records.
    pub data_dir: PathBuf,
    /// What does not: namespace pins, shim sockets, bundles, root file system mounts.
    pub run_dir: PathBuf,
    /// The `oarlock-shim` binary.
    pub shim_binary: PathBuf,
    /// Where CNI network configuration lists are read from; changes are seen without a restart.
    pub cni_conf_dir: PathBuf,
    /// Where CNI plugin executables are looked for, in order.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Where results of CNI ADD are kept for DEL and CHECK.
    pub cni_cache_dir: PathBuf,
    /// Where exec, attach and port-forward streams are served. Keep it on loopback.
    pub streaming_listen: SocketAddr,
    /// How registries are reached.
    pub registries: Registries,
    /// OCI runtimes by handler name; the built-in one is the handler "" and "oarlock".
    pub handlers: BTreeMap<String, PathBuf>,
    /// CRIU, which other OCI runtimes make checkpoints with.
    pub criu_binary: PathBuf,
    /// Where files of the Container Device Interface are looked for; later directories win.
    pub cdi_dirs: Vec<PathBuf>,
    /// When images are collected without a client's asking; None leaves that to a kubelet, which does it by its own settings.
    pub image_thresholds: Option<Thresholds>,
    /// Plugins of the Node Resource Interface.
    pub plugins: PluginConfig,
    /// Who makes control groups.
    pub cgroup_driver: CgroupDriver,
    /// Cgroup (below each hierarchy's root) for shims, and for pods that name no parent; with systemd the slice of that name.
    pub cgroup_root: String,
    /// The image reported as the sandbox image, pinned against collection; no container is made of it.
    pub pause_image: String,
    /// How long one CNI operation may take.
    pub cni_timeout: Duration,
    /// How long one shim request may take.
    pub shim_timeout: Duration,
    /// Longest ExecSync output kept for each of stdout and stderr, in bytes; what comes after is dropped.
    pub exec_output_limit_bytes: usize,
}

/// Who makes control groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The runtime, by files alone.
    #[default]
    Cgroupfs,
    /// systemd, as slices and scopes. Needs a host with version 2.
    Systemd,
    /// systemd where that works, and else the runtime.
    Auto,
}

/// How registries are reached.
#[derive(Clone, Debug)]
pub struct Registries {
    /// Registry host to the base URLs that are tried before it, in order. They come first; what `hosts_dirs` have for the
    /// registry follows, and takes the place of the registry itself.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Directories with `<host[:port]>/hosts.toml` for each registry, in containerd's form, or `_default` for all others;
    /// the first directory that has one decides. Read at each pull.
    pub hosts_dirs: Vec<PathBuf>,
    /// Hosts spoken to in plain HTTP besides loopback.
    pub plain_http: Vec<String>,
    /// PEM files of certificate authorities beside the system's.
    pub certificate_authorities: Vec<PathBuf>,
    /// A file of credentials in docker's form (`auths`), for pulls that bring none; read at each pull.
    pub credentials: Option<PathBuf>,
}

impl Default for Registries {
    fn default() -> Registries {
        Registries {
            mirrors: BTreeMap::new(),
            hosts_dirs: vec!["/etc/oarlock/certs.d".into(), "/etc/containerd/certs.d".into()],
            plain_http: Vec::new(),
            certificate_authorities: Vec::new(),
            credentials: None,
        }
    }
}

impl Config {
    /// The configuration of a daemon that keeps everything under `data_dir` and `run_dir`.
    pub fn in_dirs(data_dir: &Path, run_dir: &Path) -> Config {
        Config {
            socket: run_dir.join("runtime.sock"),
            data_dir: data_dir.to_owned(),
            run_dir: run_dir.to_owned(),
            cni_cache_dir: data_dir.join("cni/cache"),
            plugins: PluginConfig {
                socket: Some(run_dir.join("nri.sock")),
                plugin_dir: data_dir.join("nri/plugins"),
                plugin_config_dir: data_dir.join("nri/conf.d"),
                ..PluginConfig::default()
            },
            ..Config::default()
        }
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            socket: "/run/oarlock/runtime.sock".into(),
            data_dir: "/var/lib/oarlock".into(),
            run_dir: "/run/oarlock".into(),
            shim_binary: "/usr/local/bin/oarlock-shim".into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into()],
            cni_cache_dir: "/var/lib/oarlock/cni/cache".into(),
            streaming_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            registries: Registries::default(),
            handlers: BTreeMap::new(),
            criu_binary: "/usr/sbin/criu".into(),
            cdi_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            image_thresholds: None,
            plugins: PluginConfig::default(),
            cgroup_driver: CgroupDriver::default(),
            cgroup_root: "oarlock".to_owned(),
            pause_image: String::new(),
            cni_timeout: Duration::from_secs(60),
            shim_timeout: Duration::from_secs(60),
            exec_output_limit_bytes: 16 << 20,
        }
    }
}
