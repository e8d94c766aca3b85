//! Owns where everything lies below the data and run directories. Every path follows from an id, so that what a crash
//! left behind can be found and undone without being remembered.

use std::path::{Path, PathBuf};

/// The daemon's directories.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    data_dir: PathBuf,
    run_dir: PathBuf,
}

impl Paths {
    pub(crate) fn new(data_dir: &Path, run_dir: &Path) -> Paths {
        Paths { data_dir: data_dir.to_owned(), run_dir: run_dir.to_owned() }
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.data_dir.join("images")
    }

    pub(crate) fn records(&self) -> PathBuf {
        self.data_dir.join("records")
    }

    /// Volumes that images declare, by container.
    pub(crate) fn volumes(&self) -> PathBuf {
        self.data_dir.join("volumes")
    }

    pub(crate) fn container_volumes(&self, container: &str) -> PathBuf {
        self.volumes().join(container)
    }

    /// Checkpoints while they are being made.
    pub(crate) fn checkpoints(&self) -> PathBuf {
        self.data_dir.join("checkpoints")
    }

    pub(crate) fn sandboxes(&self) -> PathBuf {
        self.run_dir.join("sandboxes")
    }

    pub(crate) fn containers(&self) -> PathBuf {
        self.run_dir.join("containers")
    }

    /// Where the container engine keeps its own state.
    pub(crate) fn engine(&self) -> PathBuf {
        self.run_dir.join("engine")
    }

    pub(crate) fn sandbox(&self, id: &str) -> SandboxPaths {
        SandboxPaths { root: self.sandboxes().join(id) }
    }

    pub(crate) fn bundle(&self, container: &str) -> BundlePaths {
        BundlePaths { root: self.containers().join(container) }
    }
}

/// What belongs to one sandbox.
#[derive(Clone, Debug)]
pub(crate) struct SandboxPaths {
    pub(crate) root: PathBuf,
}

impl SandboxPaths {
    /// Pinned namespaces.
    pub(crate) fn namespaces(&self) -> PathBuf {
        self.root.join("ns")
    }

    /// The shared PID namespace's pin.
    pub(crate) fn pid_namespace(&self) -> PathBuf {
        self.root.join("pid-ns")
    }

    pub(crate) fn shm(&self) -> PathBuf {
        self.root.join("shm")
    }

    pub(crate) fn resolv_conf(&self) -> PathBuf {
        self.root.join("resolv.conf")
    }

    pub(crate) fn hostname(&self) -> PathBuf {
        self.root.join("hostname")
    }

    /// The shim's state directory.
    pub(crate) fn shim(&self) -> PathBuf {
        self.root.join("shim")
    }
}

/// What belongs to one container.
#[derive(Clone, Debug)]
pub(crate) struct BundlePaths {
    pub(crate) root: PathBuf,
}

impl BundlePaths {
    pub(crate) fn config(&self) -> PathBuf {
        self.root.join("config.json")
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.root.join("rootfs")
    }

    /// Views of volumes in a user namespace, by position.
    pub(crate) fn volume(&self, name: &str) -> PathBuf {
        self.root.join("volumes").join(name)
    }

    /// Mounts of images used as volumes, by position.
    pub(crate) fn image_mount(&self, index: usize) -> PathBuf {
        self.root.join("images").join(index.to_string())
    }
}
