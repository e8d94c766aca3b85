//! What every call works with: configuration, facts about the host, records, index, images, network, events.
//!
//! Owns no behaviour beyond putting these together.

use std::sync::{Arc, OnceLock};

use oarlock_cni::CniClient;
use oarlock_images::ImageStore;
use oarlock_nri::Plugins;
use oarlock_shim_api::SpawnOptions;
use oarlock_streaming::StreamingServer;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::Error;
use crate::events::Events;
use crate::joins::Joins;
use crate::moves::Moves;
use crate::network_status::NetworkStatus;
use crate::paths::Paths;
use crate::prometheus::Calls;
use crate::record::Store;
use crate::spec::HostFacts;
use crate::spec::namespace::SandboxModes;
use crate::state::Index;

/// Shared by all calls.
pub(crate) struct Core {
    pub config: Config,
    pub paths: Paths,
    /// The run directory where it is a mount of its own, for [`SpawnOptions::mounts_below`].
    pub mounts_below: Option<std::path::PathBuf>,
    pub host: HostFacts,
    pub boot_id: String,
    pub records: Arc<Store>,
    pub index: Index,
    pub joins: Joins,
    pub moves: Moves,
    pub network_status: NetworkStatus,
    pub events: Events,
    pub calls: Calls,
    pub images: ImageStore,
    pub cni: CniClient,
    /// Taken for writing while CNI frees what belongs to nobody: no sandbox may join the network in the middle.
    pub network_gate: tokio::sync::RwLock<()>,
    pub plugins: Arc<Plugins>,
    pub streaming: OnceLock<Arc<StreamingServer>>,
    /// Cancelled when the daemon stops serving.
    pub shutdown: CancellationToken,
}

impl Core {
    /// The OCI runtime binary of a handler; None is the built-in engine.
    pub(crate) fn handler(&self, name: &str) -> Result<Option<std::path::PathBuf>, Error> {
        match (name, self.config.handlers.get(name)) {
            (_, Some(binary)) if !binary.is_file() => {
                Err(Error::Invalid(format!("runtime_handler: {} of handler {name:?} does not exist", binary.display())))
            }
            (_, Some(binary)) => Ok(Some(binary.clone())),
            ("" | "oarlock", None) => Ok(None),
            (unknown, None) => {
                let known = self.config.handlers.keys().map(String::as_str).chain(["oarlock"]).collect::<Vec<_>>();
                Err(Error::Invalid(format!(
                    "runtime_handler: no handler is called {unknown:?} (known: {})",
                    known.join(", ")
                )))
            }
        }
    }

    /// How a sandbox's shim is started.
    pub(crate) fn shim_options(&self, sandbox_id: &str, modes: SandboxModes) -> SpawnOptions {
        let paths = self.paths.sandbox(sandbox_id);
        SpawnOptions {
            shim_binary: self.config.shim_binary.clone(),
            sandbox_id: sandbox_id.to_owned(),
            state_dir: paths.shim(),
            container_root: self.paths.engine(),
            mounts_below: self.mounts_below.clone(),
            shared_pid_namespace: modes.shared_pid.then(|| paths.pid_namespace()),
            user_namespace: modes.user.map(|_| paths.namespaces().join("user")),
            cgroup: Some(self.shim_group()),
        }
    }

    /// The control group of all shims: with systemd one scope, as the shim names it.
    pub(crate) fn shim_group(&self) -> String {
        let root = self.config.cgroup_root.trim_matches('/');
        if !self.host.systemd_cgroups {
            return format!("{root}/shims");
        }
        let slice = oarlock_cgroup::slice_name(&root.split('/').collect::<Vec<_>>());
        let prefix = slice.trim_end_matches(".slice").to_owned();
        format!("{slice}:{prefix}:shims")
    }

    /// The streaming server, once it is bound.
    pub(crate) fn streaming(&self) -> Result<&Arc<StreamingServer>, Error> {
        self.streaming.get().ok_or_else(|| Error::Invalid("the streaming server is not running".to_owned()))
    }
}
