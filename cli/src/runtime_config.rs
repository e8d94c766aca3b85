//! The parts of the configuration file that are the runtime's alone.

use std::path::PathBuf;
use std::time::Duration;

use oarlock_runtime::{ImageThresholds, PluginConfig};
use oarlock_telemetry::Export;
use serde::Deserialize;

use crate::layout::Layout;

/// The `nri` part of the configuration file: plugins of the Node Resource Interface.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct NriFile {
    /// No plugin is launched and none can connect.
    pub(crate) disable: bool,
    /// Installed plugins are launched, but none can connect.
    pub(crate) disable_connections: bool,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) plugin_dir: Option<PathBuf>,
    pub(crate) plugin_config_dir: Option<PathBuf>,
    pub(crate) registration_timeout_seconds: Option<u64>,
    pub(crate) request_timeout_seconds: Option<u64>,
}

impl NriFile {
    /// What the runtime is told, with the layout's paths where the file names none.
    pub(crate) fn config(&self, layout: &Layout) -> PluginConfig {
        let default = PluginConfig::default();
        let seconds = |own: Option<u64>, default: Duration| own.map_or(default, Duration::from_secs);
        let path = |own: &Option<PathBuf>, default: PathBuf| own.clone().unwrap_or(default);
        PluginConfig {
            enabled: !self.disable,
            socket: (!self.disable_connections).then(|| path(&self.socket, layout.nri_socket())),
            plugin_dir: path(&self.plugin_dir, layout.nri_plugin_dir()),
            plugin_config_dir: path(&self.plugin_config_dir, layout.nri_plugin_config_dir()),
            registration_timeout: seconds(self.registration_timeout_seconds, default.registration_timeout),
            request_timeout: seconds(self.request_timeout_seconds, default.request_timeout),
            ..default
        }
    }
}

/// The `imageCollection` part of the configuration file: for a runtime without a kubelet, which does this itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ImageCollectionFile {
    pub(crate) high_threshold_percent: u8,
    pub(crate) low_threshold_percent: u8,
    #[serde(default)]
    pub(crate) unused_for_seconds: u64,
}

impl ImageCollectionFile {
    pub(crate) fn thresholds(&self) -> ImageThresholds {
        ImageThresholds {
            high_percent: self.high_threshold_percent,
            low_percent: self.low_threshold_percent,
            unused_for: Duration::from_secs(self.unused_for_seconds),
        }
    }
}

/// The `tracing` part of the configuration file, with the fields that a kubelet's has.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TracingFile {
    /// `host:port` of a collector that speaks OTLP over gRPC without TLS.
    pub(crate) endpoint: String,
    /// How many of a million calls are recorded whose caller does not say.
    #[serde(default = "every_call")]
    pub(crate) sampling_rate_per_million: u32,
}

fn every_call() -> u32 {
    1_000_000
}

impl TracingFile {
    pub(crate) fn export(&self, service: &str) -> Export {
        Export {
            endpoint: self.endpoint.clone(),
            sampling_rate_per_million: self.sampling_rate_per_million,
            service: service.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_of_other_runtimes_find_the_default_installation_and_each_other_tree_has_its_own() {
        let default = NriFile::default().config(&Layout::new(None));
        assert_eq!(default.socket, PluginConfig::default().socket);
        assert_eq!(default.plugin_dir, PluginConfig::default().plugin_dir);
        assert_eq!(default.plugin_config_dir, PluginConfig::default().plugin_config_dir);
        let own = NriFile::default().config(&Layout::new(Some("/srv/node".into())));
        assert_eq!(own.socket, Some("/srv/node/run/nri.sock".into()));
        let file: NriFile = serde_yaml_ng::from_str("{disableConnections: true, requestTimeoutSeconds: 9}").unwrap();
        let config = file.config(&Layout::new(None));
        assert_eq!((config.enabled, config.socket, config.request_timeout), (true, None, Duration::from_secs(9)));
    }
}
