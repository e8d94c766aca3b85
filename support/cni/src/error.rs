//! What can go wrong on the runtime's side.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::ConfigError;
use crate::types::{ErrorCode, ErrorObject};

/// A CNI operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CniError {
    #[error("cannot load the CNI network configuration")]
    Config(#[source] ConfigError),
    #[error("{value:?} is not a valid CNI {what}")]
    InvalidName { what: &'static str, value: String },
    #[error("CNI plugin {plugin:?} was not found in {directories:?}")]
    PluginNotFound { plugin: String, directories: Vec<PathBuf> },
    #[error("cannot run CNI plugin {}", plugin.display())]
    Exec { plugin: PathBuf, source: io::Error },
    #[error("CNI plugin {plugin} did not finish {command} within {timeout:?}")]
    Timeout { plugin: String, command: &'static str, timeout: Duration },
    #[error("CNI plugin {plugin} printed more than {limit_bytes} bytes")]
    OutputTooLarge { plugin: String, limit_bytes: usize },
    #[error("CNI plugin {plugin} failed {command}: {error} (code {})", error.code)]
    Plugin { plugin: String, command: &'static str, error: ErrorObject },
    #[error("CNI plugin {plugin} failed {command} with {status} and without an error object: {output}")]
    PluginDied { plugin: String, command: &'static str, status: String, output: String },
    #[error("CNI plugin {plugin} returned a result that cannot be read")]
    Decode { plugin: String, source: serde_json::Error },
    #[error("no attachment of container {container_id} as {ifname} is on record")]
    NotAttached { container_id: String, ifname: String },
    #[error("CNI cache file {}", path.display())]
    Cache { path: PathBuf, source: io::Error },
    #[error("CNI GC failed for {} attachments or plugins", failures.len())]
    Gc { failures: Vec<CniError> },
}

impl CniError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        match self {
            CniError::Config(ConfigError::NoNetwork { .. }) | CniError::Timeout { .. } => true,
            CniError::Plugin { error, .. } => {
                [ErrorCode::TryAgainLater as u32, ErrorCode::PluginNotAvailable as u32].contains(&error.code)
            }
            _ => false,
        }
    }
}
