//! The configuration of `portmap`, and the mappings that a call asks for.

use std::net::IpAddr;

use oarlock_cni_table::host_ports::{Mapping, Protocol};
use serde::Deserialize;

use crate::call::Call;
use crate::error::{PluginError, Result};

/// What one call wants mapped.
#[derive(Debug)]
pub struct Config {
    pub mappings: Vec<Mapping>,
    /// Whether a container that reaches itself through the host is masqueraded.
    pub snat: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    snat: Option<bool>,
    #[serde(default)]
    backend: Option<String>,
    #[serde(default, rename = "conditionsV4")]
    conditions_v4: Option<Vec<String>>,
    #[serde(default, rename = "conditionsV6")]
    conditions_v6: Option<Vec<String>>,
    #[serde(default)]
    runtime_config: RuntimeConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    #[serde(default)]
    port_mappings: Vec<RawMapping>,
}

/// containerd begins these names with capitals, which does not matter to plugins written in Go.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMapping {
    #[serde(default, alias = "HostPort")]
    host_port: i64,
    #[serde(default, alias = "ContainerPort")]
    container_port: i64,
    #[serde(default, alias = "Protocol")]
    protocol: Option<String>,
    #[serde(default, rename = "hostIP", alias = "HostIP")]
    host_ip: Option<String>,
}

impl Config {
    pub fn read(call: &Call) -> Result<Config> {
        let raw: Raw = call.config()?;
        if let Some(backend) = raw.backend.filter(|backend| !backend.is_empty() && backend != "nftables") {
            return Err(PluginError::config("backend", format!("{backend:?} is not supported, only \"nftables\"")));
        }
        for (field, conditions) in [("conditionsV4", &raw.conditions_v4), ("conditionsV6", &raw.conditions_v6)] {
            if conditions.as_ref().is_some_and(|conditions| !conditions.is_empty()) {
                return Err(PluginError::config(field, "is not supported: its words are those of iptables"));
            }
        }
        let mappings =
            raw.runtime_config.port_mappings.into_iter().enumerate().map(mapping).collect::<Result<Vec<_>>>()?;
        Ok(Config { mappings: mappings.into_iter().flatten().collect(), snat: raw.snat.unwrap_or(true) })
    }
}

/// Port 0 of the host means that none was asked for.
fn mapping((index, raw): (usize, RawMapping)) -> Result<Option<Mapping>> {
    let field = |name: &str| format!("runtimeConfig.portMappings[{index}].{name}");
    let port = |name: &str, value: i64| {
        u16::try_from(value).map_err(|_| PluginError::config(field(name), format!("{value} is not a port")))
    };
    let protocol = match raw.protocol.as_deref().unwrap_or("tcp").to_ascii_lowercase().as_str() {
        "tcp" => Protocol::TCP,
        "udp" => Protocol::UDP,
        "sctp" => Protocol::SCTP,
        other => return Err(PluginError::config(field("protocol"), format!("{other:?} is not tcp, udp or sctp"))),
    };
    let host_ip = match raw.host_ip.filter(|text| !text.is_empty()) {
        Some(text) => Some(
            text.parse::<IpAddr>()
                .map_err(|_| PluginError::config(field("hostIP"), format!("{text:?} is not an IP address")))?,
        ),
        None => None,
    };
    let mapping = Mapping {
        host_port: port("hostPort", raw.host_port)?,
        container_port: port("containerPort", raw.container_port)?,
        protocol,
        host_ip: host_ip.filter(|address| !address.is_unspecified()),
    };
    if mapping.host_port != 0 && mapping.container_port == 0 {
        return Err(PluginError::config(field("containerPort"), "is required"));
    }
    Ok(Some(mapping).filter(|mapping| mapping.host_port != 0))
}
