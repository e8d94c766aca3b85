//! What the interface is told at start. Holds no behaviour but defaults, which are those of other runtimes, so that plugins
//! made for them find this one.

use std::path::PathBuf;
use std::time::Duration;

/// How plugins are found and how long they may take.
#[derive(Clone, Debug)]
pub struct Config {
    /// Without it no plugin is launched, nobody can connect, and nothing is asked of anybody.
    pub enabled: bool,
    /// Where plugins connect; None takes only those that are launched.
    pub socket: Option<PathBuf>,
    /// Where plugins that the runtime launches are installed, as `NN-name`.
    pub plugin_dir: PathBuf,
    /// Where their configuration is, as `NN-name.conf` or `name.conf`.
    pub plugin_config_dir: PathBuf,
    /// How long a plugin may take to register once it is connected, and how long to take in the state of the runtime.
    pub registration_timeout: Duration,
    /// How long a plugin may take over one request.
    pub request_timeout: Duration,
    /// What plugins are told of the runtime.
    pub runtime_name: String,
    pub runtime_version: String,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            enabled: true,
            socket: Some("/var/run/nri/nri.sock".into()),
            plugin_dir: "/opt/nri/plugins".into(),
            plugin_config_dir: "/etc/nri/conf.d".into(),
            registration_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(2),
            runtime_name: "oarlock".to_owned(),
            runtime_version: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}
