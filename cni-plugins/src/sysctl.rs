//! Sysctls of the calling thread's network namespace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{PluginError, Result};

/// Writes a value unless it is there already. A sysctl that this kernel does not have (IPv6 switched off) is passed over.
pub fn ensure(name: &str, value: &str) -> Result<()> {
    let path: PathBuf = Path::new("/proc/sys").join(name);
    let current = match fs::read_to_string(&path) {
        Ok(current) => current,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(PluginError::File { operation: "read", path, source }),
    };
    if current.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| PluginError::File { operation: "write", path, source })
}
