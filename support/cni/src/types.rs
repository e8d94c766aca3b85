//! Results, errors and attachments as they travel between runtime and plugin.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::version::Version;

/// The result of ADD, in the shape of the newest version; [`CniResult::to_json`] renders it for any.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CniResult {
    #[serde(default)]
    pub cni_version: Version,
    #[serde(default, deserialize_with = "null_as_default")]
    pub interfaces: Vec<Interface>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub ips: Vec<IpConfig>,
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

impl CniResult {
    /// The result as JSON in the shape of `version`.
    pub fn to_json(&self, version: Version) -> Value {
        let mut result = self.clone();
        result.cni_version = version;
        if version < Version::V1_1_0 {
            for interface in &mut result.interfaces {
                interface.mtu = None;
                interface.socket_path = None;
                interface.pci_id = None;
            }
            for route in &mut result.routes {
                *route = Route { dst: route.dst, gw: route.gw, ..Route::default() };
            }
        }
        for ip in &mut result.ips {
            let family = if ip.address.addr().is_ipv4() { "4" } else { "6" };
            ip.version = version.addresses_name_their_family().then(|| family.to_owned());
        }
        serde_json::to_value(&result).unwrap_or_default()
    }

    /// Addresses of the interfaces inside the container; with no interface named, all addresses.
    pub fn container_ips(&self) -> Vec<IpAddr> {
        let inside =
            |ip: &&IpConfig| match ip.interface.and_then(|index| self.interfaces.get(usize::try_from(index).ok()?)) {
                Some(interface) => interface.sandbox.as_deref().is_some_and(|sandbox| !sandbox.is_empty()),
                None => true,
            };
        self.ips.iter().filter(inside).map(|ip| ip.address.addr()).collect()
    }
}

/// A link that a plugin made or took over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Bytes; from 1.1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The path of the namespace that the link is in; absent for links of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_path: Option<String>,
    #[serde(default, rename = "pciID", skip_serializing_if = "Option::is_none")]
    pub pci_id: Option<String>,
}

/// An address with its prefix length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    /// "4" or "6", only below 1.0.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    pub address: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into the result's interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<i64>,
}

impl IpConfig {
    pub fn new(address: IpNet, gateway: Option<IpAddr>) -> IpConfig {
        IpConfig { version: None, address, gateway, interface: None }
    }
}

/// A route inside the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub dst: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// Bytes; from 1.1.0, as all that follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

/// Name servers and search domains that a network brings along.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    pub fn is_empty(&self) -> bool {
        *self == Dns::default()
    }
}

/// An attachment that GC must leave alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

/// The error object that a failed plugin prints on its standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorObject {
    #[serde(default)]
    pub cni_version: String,
    pub code: u32,
    pub msg: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl fmt::Display for ErrorObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, "; {}", self.details) }
    }
}

/// The specification's error codes; plugins' own start at 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    IncompatibleVersion = 1,
    UnsupportedField = 2,
    UnknownContainer = 3,
    InvalidEnvironment = 4,
    Io = 5,
    Decode = 6,
    InvalidNetworkConfig = 7,
    TryAgainLater = 11,
    /// STATUS: ADD cannot be served now.
    PluginNotAvailable = 50,
    /// STATUS: ADD cannot be served, and running containers may have lost connectivity.
    LimitedConnectivity = 51,
    /// First of the codes that are the plugin's own.
    Internal = 999,
}

fn null_as_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sample() -> CniResult {
        serde_json::from_value(json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "oar0", "mac": "0a:00:00:00:00:01", "mtu": 1500},
                {"name": "eth0", "mac": "0a:00:00:00:00:02", "mtu": 1500, "sandbox": "/run/netns/a"}],
            "ips": [{"address": "10.42.0.5/24", "gateway": "10.42.0.1", "interface": 1}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.42.0.1", "priority": 10}],
            "dns": {}
        }))
        .unwrap()
    }

    #[test]
    fn an_older_version_sees_only_the_fields_it_knows() {
        let old = sample().to_json(Version::V0_4_0);
        assert_eq!(old["cniVersion"], "0.4.0");
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["interfaces"][1].get("mtu"), None);
        assert_eq!(old["routes"][0], json!({"dst": "0.0.0.0/0", "gw": "10.42.0.1"}));
        let new = sample().to_json(Version::V1_1_0);
        assert_eq!(new["ips"][0].get("version"), None);
        assert_eq!(new["routes"][0]["priority"], 10);
    }

    #[test]
    fn a_result_survives_the_way_to_json_and_back_in_every_version() {
        for version in Version::ALL {
            let back: CniResult = serde_json::from_value(sample().to_json(version)).unwrap();
            assert_eq!(back.cni_version, version);
            assert_eq!(back.container_ips(), sample().container_ips());
        }
    }

    #[test]
    fn explicit_nulls_of_other_plugins_are_read_as_absent() {
        let text = r#"{"cniVersion":"1.0.0","interfaces":null,"ips":null,"routes":null,"dns":null}"#;
        let result: CniResult = serde_json::from_str(text).unwrap();
        assert!(result.ips.is_empty() && result.dns.is_empty());
    }
}
