//! The state files, each replaced as a whole. All calls block.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oarlock_allocation::{CpuPool, CpuState, MemoryPool, MemoryState, Reserved, Topology};
use oarlock_plugins::{DeviceLedger, DevicePlugins};

use super::{AssignmentConfig, AssignmentError, Pools};
use crate::Config;

const CPU_POLICY: &str = "static";
const MEMORY_POLICY: &str = "Static";

/// Where they are.
pub(super) struct Files {
    cpus: PathBuf,
    memory: PathBuf,
    devices: PathBuf,
}

impl Files {
    pub(super) fn below(kubelet_dir: &Path) -> Self {
        Self {
            cpus: kubelet_dir.join("cpu_manager_state"),
            memory: kubelet_dir.join("memory_manager_state"),
            devices: kubelet_dir.join("device-plugins/kubelet_internal_checkpoint"),
        }
    }

    pub(super) fn cpu_pool(
        &self,
        own: &AssignmentConfig,
        config: &Config,
        topology: &Topology,
    ) -> Result<Option<CpuPool>, AssignmentError> {
        let path = self.cpus.clone();
        let policy = if own.cpu_static { CPU_POLICY } else { "none" };
        let saved = match read(&path)? {
            Some(text) => Some(CpuState::read(&text, policy).map_err(|source| AssignmentError::State {
                what: "CPU manager",
                path: path.clone(),
                source,
            })?),
            None => None,
        };
        if !own.cpu_static {
            return Ok(None);
        }
        let reserved = match &own.reserved_cpus {
            Some(cpus) => Reserved::These(cpus.clone()),
            None => Reserved::Milli(config.reserved_cpu_millis),
        };
        let pool = CpuPool::new(topology.clone(), own.cpu_options, &reserved, saved);
        pool.map(Some).map_err(|source| AssignmentError::CpuState { path, source })
    }

    pub(super) fn memory_pool(
        &self,
        own: &AssignmentConfig,
        topology: &Topology,
    ) -> Result<Option<MemoryPool>, AssignmentError> {
        let path = self.memory.clone();
        let policy = if own.memory_static { MEMORY_POLICY } else { "None" };
        let saved = match read(&path)? {
            Some(text) => Some(MemoryState::read(&text, policy).map_err(|source| AssignmentError::State {
                what: "memory manager",
                path: path.clone(),
                source,
            })?),
            None => None,
        };
        if !own.memory_static {
            return Ok(None);
        }
        let pool = MemoryPool::new(&topology.memory, &own.reserved_memory, saved);
        pool.map(Some).map_err(|source| AssignmentError::MemoryState { path, source })
    }

    /// Who has which devices. A file that cannot be read counts as none: the devices' plugins know better than nobody.
    pub(super) fn devices(&self) -> (DeviceLedger, Vec<String>) {
        let text = match read(&self.devices) {
            Ok(Some(text)) => text,
            Ok(None) => return Default::default(),
            Err(error) => {
                tracing::warn!(%error, "the checkpoint of devices cannot be read");
                return Default::default();
            }
        };
        DeviceLedger::read(&text).unwrap_or_else(|error| {
            tracing::warn!(%error, "the checkpoint of devices is not usable");
            Default::default()
        })
    }

    pub(super) fn write(&self, pools: &Pools, plugins: &DevicePlugins) -> Result<(), AssignmentError> {
        if let Some(cpus) = &pools.cpus {
            replace(&self.cpus, &cpus.state().text(CPU_POLICY))?;
        }
        if let Some(memory) = &pools.memory {
            replace(&self.memory, &memory.state().text(MEMORY_POLICY))?;
        }
        self.write_devices(&pools.devices, plugins)
    }

    pub(super) fn write_devices(&self, ledger: &DeviceLedger, plugins: &DevicePlugins) -> Result<(), AssignmentError> {
        let registered = plugins.registered();
        if registered.is_empty() && ledger.pods().next().is_none() && !self.devices.exists() {
            return Ok(());
        }
        replace(&self.devices, &ledger.text(registered))
    }
}

fn read(path: &Path) -> Result<Option<String>, AssignmentError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(AssignmentError::Io { operation: "read", path: path.to_owned(), source }),
    }
}

fn replace(path: &Path, text: &str) -> Result<(), AssignmentError> {
    let failed = |operation| move |source| AssignmentError::Io { operation, path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed("create the directory of"))?;
    }
    // Plugins watch the directory of the checkpoint for sockets; a hidden name is none.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.new"));
    let write = || -> io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    write().map_err(failed("write"))
}
