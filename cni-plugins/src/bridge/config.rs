//! The configuration of `bridge`.

use ipnet::IpNet;
use oarlock_cni::names::is_valid_interface;
use oarlock_cni::types::Dns;
use oarlock_netlink::{Mac, PortVlan};
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
    /// Whether the container may send from its own Ethernet address only.
    pub mac_spoof_check: bool,
    /// Whether the container's end stays down, for whoever brings it up later.
    pub disable_container_interface: bool,
    /// Bytes; 0 takes the bridge's.
    pub mtu: u32,
    pub mac: Option<Mac>,
    pub dns: Dns,
    /// The VLANs of the container's port; none when the bridge does not look at them.
    pub vlans: Vec<PortVlan>,
    /// Whether the port stays in the VLAN that bridges put every port into.
    pub preserve_default_vlan: bool,
    ipam_type: String,
}

/// One VLAN, or a range of them.
#[derive(Debug, Deserialize)]
struct Trunk {
    #[serde(default, rename = "minID")]
    min: Option<i64>,
    #[serde(default, rename = "maxID")]
    max: Option<i64>,
    #[serde(default)]
    id: Option<i64>,
}

const LAST_VLAN: i64 = 4094;

fn vlans(access: i64, trunks: &[Trunk]) -> Result<Vec<PortVlan>> {
    let wrong = |field: &str, problem: &str| Err(PluginError::config(field, problem));
    let valid = |id: i64| u16::try_from(id).ok().filter(|id| (1..=LAST_VLAN as u16).contains(id));
    if access != 0 && !trunks.is_empty() {
        return wrong("vlanTrunk", "cannot be used together with vlan");
    }
    if access != 0 {
        let Some(id) = valid(access) else { return wrong("vlan", "is not between 0 and 4094") };
        return Ok(vec![PortVlan { id, is_access: true }]);
    }
    let mut found = Vec::new();
    for trunk in trunks {
        let range = match (trunk.min, trunk.max, trunk.id) {
            (Some(min), Some(max), id) if min <= max => {
                found.extend(id.map(|id| (id, id)));
                (min, max)
            }
            (None, None, Some(id)) => (id, id),
            _ => return wrong("vlanTrunk", "needs id, or minID and a maxID that is not less"),
        };
        found.push(range);
    }
    let mut ids = std::collections::BTreeSet::new();
    for (min, max) in found {
        let (Some(min), Some(max)) = (valid(min), valid(max)) else {
            return wrong("vlanTrunk", "has a VLAN that is not between 1 and 4094");
        };
        ids.extend(min..=max);
    }
    Ok(ids.into_iter().map(|id| PortVlan { id, is_access: false }).collect())
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
    #[serde(default, rename = "macspoofchk")]
    mac_spoof_check: bool,
    #[serde(default)]
    disable_container_interface: bool,
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    vlan: i64,
    #[serde(default)]
    vlan_trunk: Vec<Trunk>,
    #[serde(default)]
    preserve_default_vlan: Option<bool>,
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
        if raw.disable_container_interface && !raw.ipam.kind.is_empty() {
            return Err(PluginError::config("disableContainerInterface", "cannot be used together with ipam"));
        }
        let vlans = vlans(raw.vlan, &raw.vlan_trunk)?;
        if let Some(backend) = raw.ip_masq_backend.filter(|backend| !backend.is_empty() && backend != "nftables") {
            return Err(PluginError::config(
                "ipMasqBackend",
                format!("{backend:?} is not supported, only \"nftables\""),
            ));
        }
        if raw.mtu != 0 && !(68..=65_535).contains(&raw.mtu) {
            return Err(PluginError::config("mtu", format!("{} is not between 68 and 65535", raw.mtu)));
        }
        // What is meant for this container alone comes first: the capability, then arguments, then the environment.
        let environment = call.argument("MAC").map(str::to_owned);
        let sources = [raw.runtime_config.mac, raw.args.cni.mac, environment, raw.mac];
        let mac = sources.into_iter().flatten().find(|text| !text.is_empty()).map(|text| text.parse()).transpose();
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
            mac_spoof_check: raw.mac_spoof_check,
            disable_container_interface: raw.disable_container_interface,
            mtu: raw.mtu,
            mac: mac.map_err(|error: oarlock_netlink::InvalidMac| PluginError::config("mac", error.to_string()))?,
            dns: raw.dns,
            vlans,
            preserve_default_vlan: raw.preserve_default_vlan.unwrap_or(true),
            ipam_type: raw.ipam.kind,
        })
    }

    /// The VLAN that the container is in without knowing.
    pub fn access_vlan(&self) -> Option<u16> {
        self.vlans.iter().find(|vlan| vlan.is_access).map(|vlan| vlan.id)
    }

    /// Whether containers of the network have anything in the nftables table.
    pub fn has_rules(&self) -> bool {
        self.ip_masq || self.mac_spoof_check
    }

    /// The IPAM plugin, unless the network has no addresses.
    pub fn ipam_type(&self) -> Option<&str> {
        Some(self.ipam_type.as_str()).filter(|kind| !kind.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trunk(text: &str) -> Result<Vec<u16>> {
        let trunks: Vec<Trunk> = serde_json::from_str(text).unwrap();
        vlans(0, &trunks).map(|vlans| vlans.into_iter().map(|vlan| vlan.id).collect())
    }

    #[test]
    fn vlans_are_one_or_ranges_and_never_both() {
        assert_eq!(vlans(100, &[]).unwrap(), [PortVlan { id: 100, is_access: true }]);
        assert!(vlans(0, &[]).unwrap().is_empty());
        assert!(vlans(4095, &[]).is_err() && vlans(-1, &[]).is_err());
        assert_eq!(trunk(r#"[{"id":7},{"minID":3,"maxID":5},{"id":4}]"#).unwrap(), [3, 4, 5, 7]);
        for bad in [r#"[{"minID":5,"maxID":3}]"#, r#"[{"minID":5}]"#, "[{}]", r#"[{"id":0}]"#, r#"[{"id":4095}]"#] {
            assert!(trunk(bad).is_err(), "{bad}");
        }
        let both = [Trunk { min: None, max: None, id: Some(5) }];
        assert!(vlans(5, &both).is_err());
    }
}
