//! The configuration of `bridge`.

use ipnet::IpNet;
use oarlock_cni::names::is_valid_interface;
use oarlock_cni::types::Dns;
use oarlock_netlink::Mac;
use serde::Deserialize;

use crate::call::Call;
use crate::error::{PluginError, Result};

const DEFAULT_BRIDGE: &str = "cni0";

/// What the network wants of its bridge.
#[derive(Debug)]
pub struct Config {
    pub bridge: String,
    pub is_gateway: bool,
    pub is_default_gateway: bool,
    pub force_address: bool,
    pub ip_masq: bool,
    /// Destinations beside the container's own network that are not masqueraded: the other nodes' pods.
    pub ip_masq_exclude: Vec<IpNet>,
    pub hairpin_mode: bool,
    pub promisc_mode: bool,
    pub port_isolation: bool,
    /// Bytes; 0 takes the bridge's.
    pub mtu: u32,
    pub mac: Option<Mac>,
    pub dns: Dns,
    ipam_type: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    bridge: Option<String>,
    #[serde(default)]
    is_gateway: bool,
    #[serde(default)]
    is_default_gateway: bool,
    #[serde(default)]
    force_address: bool,
    #[serde(default)]
    ip_masq: bool,
    #[serde(default)]
    ip_masq_exclude: Vec<IpNet>,
    #[serde(default)]
    ip_masq_backend: Option<String>,
    #[serde(default)]
    hairpin_mode: bool,
    #[serde(default)]
    promisc_mode: bool,
    #[serde(default)]
    port_isolation: bool,
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    vlan: u16,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    dns: Dns,
    #[serde(default)]
    ipam: Ipam,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    args: Args,
}

#[derive(Debug, Default, Deserialize)]
struct Ipam {
    #[serde(default, rename = "type")]
    kind: String,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    mac: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: RuntimeConfig,
}

impl Config {
    pub fn read(call: &Call) -> Result<Config> {
        let raw: Raw = call.config()?;
        let bridge = raw.bridge.unwrap_or_else(|| DEFAULT_BRIDGE.to_owned());
        if !is_valid_interface(&bridge) {
            return Err(PluginError::config("bridge", format!("{bridge:?} is not an interface's name")));
        }
        if raw.hairpin_mode && raw.promisc_mode {
            return Err(PluginError::config("promiscMode", "cannot be used together with hairpinMode"));
        }
        if raw.vlan != 0 {
            return Err(PluginError::config("vlan", "is not supported"));
        }
        if let Some(backend) = raw.ip_masq_backend.filter(|backend| !backend.is_empty() && backend != "nftables") {
            return Err(PluginError::config(
                "ipMasqBackend",
                format!("{backend:?} is not supported, only \"nftables\""),
            ));
        }
        if raw.mtu != 0 && !(68..=65_535).contains(&raw.mtu) {
            return Err(PluginError::config("mtu", format!("{} is not between 68 and 65535", raw.mtu)));
        }
        let mac = call.argument("MAC").map(str::to_owned).or(raw.runtime_config.mac).or(raw.args.cni.mac).or(raw.mac);
        let mac = mac.filter(|text| !text.is_empty()).map(|text| text.parse()).transpose();
        Ok(Config {
            bridge,
            is_gateway: raw.is_gateway || raw.is_default_gateway,
            is_default_gateway: raw.is_default_gateway,
            force_address: raw.force_address,
            ip_masq: raw.ip_masq,
            ip_masq_exclude: raw.ip_masq_exclude,
            hairpin_mode: raw.hairpin_mode,
            promisc_mode: raw.promisc_mode,
            port_isolation: raw.port_isolation,
            mtu: raw.mtu,
            mac: mac.map_err(|error: oarlock_netlink::InvalidMac| PluginError::config("mac", error.to_string()))?,
            dns: raw.dns,
            ipam_type: raw.ipam.kind,
        })
    }

    /// The IPAM plugin, unless the network has no addresses.
    pub fn ipam_type(&self) -> Option<&str> {
        Some(self.ipam_type.as_str()).filter(|kind| !kind.is_empty())
    }
}
