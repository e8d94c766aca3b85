//! The configuration of `tuning`, and which sysctls the administrator allows.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oarlock_netlink::{LinkChange, Mac};
use regex_lite::Regex;
use serde::Deserialize;

use crate::call::Call;
use crate::error::{PluginError, Result};

const DATA_DIR: &str = "/run/cni/tuning";
const ALLOW_LIST: &str = "/etc/cni/tuning/allowlist.conf";

/// What is to be set.
#[derive(Debug)]
pub struct Config {
    pub sysctls: Vec<Sysctl>,
    pub mac: Option<Mac>,
    pub mtu: Option<u32>,
    pub promisc: Option<bool>,
    pub allmulti: Option<bool>,
    pub tx_queue_length: Option<u32>,
    pub data_dir: PathBuf,
}

/// A setting of the network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    /// As configured.
    pub name: String,
    pub path: PathBuf,
    pub value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    sysctl: BTreeMap<String, String>,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    promisc: bool,
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    allmulti: Option<bool>,
    #[serde(default)]
    tx_q_len: Option<u32>,
    #[serde(default)]
    data_dir: Option<PathBuf>,
    #[serde(default)]
    runtime_config: Overrides,
    #[serde(default)]
    args: Args,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Overrides {
    mac: Option<String>,
    sysctl: BTreeMap<String, String>,
    promisc: Option<bool>,
    mtu: Option<u32>,
    allmulti: Option<bool>,
    tx_q_len: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: Overrides,
}

impl Config {
    pub fn read(call: &Call) -> Result<Config> {
        let raw: Raw = call.config()?;
        let (arguments, runtime) = (raw.args.cni, raw.runtime_config);
        let mac = call.argument("MAC").map(str::to_owned).or(arguments.mac).or(runtime.mac).or(raw.mac);
        let mac = mac.filter(|text| !text.is_empty()).map(|text| text.parse()).transpose();
        let mut sysctls = raw.sysctl;
        sysctls.extend(runtime.sysctl);
        sysctls.extend(arguments.sysctl);
        let sysctls = sysctls.into_iter().map(|(name, value)| sysctl(name, value, &call.ifname));
        Ok(Config {
            sysctls: sysctls.collect::<Result<_>>()?,
            mac: mac.map_err(|error: oarlock_netlink::InvalidMac| PluginError::config("mac", error.to_string()))?,
            mtu: arguments.mtu.or(Some(raw.mtu)).filter(|mtu| *mtu != 0),
            promisc: arguments.promisc.or(Some(raw.promisc).filter(|on| *on)),
            allmulti: arguments.allmulti.or(raw.allmulti),
            tx_queue_length: arguments.tx_q_len.or(raw.tx_q_len),
            data_dir: raw.data_dir.unwrap_or_else(|| DATA_DIR.into()),
        })
    }

    /// What is to be different about the link.
    pub fn change(&self) -> LinkChange {
        LinkChange {
            mac: self.mac,
            mtu: self.mtu,
            promiscuous: self.promisc,
            all_multicast: self.allmulti,
            queue_length: self.tx_queue_length,
            ..LinkChange::default()
        }
    }
}

/// A sysctl by its name, with dots or slashes, and `IFNAME` for the container's link.
fn sysctl(name: String, value: String, ifname: &str) -> Result<Sysctl> {
    let wrong = |problem: &str| PluginError::config(format!("sysctl {name:?}"), problem);
    // A name with slashes may have dots in its parts, as links' names have.
    let separator = if name.contains('/') { '/' } else { '.' };
    let parts: Vec<&str> = name.split(separator).collect();
    if parts.first() != Some(&"net") || parts.len() < 2 {
        return Err(wrong("is not one of a network namespace"));
    }
    if parts.iter().any(|part| part.is_empty() || *part == "." || *part == ".." || part.contains(['/', '\0'])) {
        return Err(wrong("is not a sysctl's name"));
    }
    let relative: PathBuf = parts.iter().map(|part| if *part == "IFNAME" { ifname } else { part }).collect();
    Ok(Sysctl { path: Path::new("/proc/sys").join(relative), name, value })
}

/// Refuses what the administrator's list does not allow.
pub fn check_allowed(sysctls: &[Sysctl]) -> Result<()> {
    if sysctls.is_empty() {
        return Ok(());
    }
    match fs::read_to_string(ALLOW_LIST) {
        Ok(text) => allowed_by(&text, sysctls),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(PluginError::File { operation: "read", path: ALLOW_LIST.into(), source }),
    }
}

fn allowed_by(list: &str, sysctls: &[Sysctl]) -> Result<()> {
    let lines = list.lines().map(str::trim).filter(|line| !line.is_empty());
    let patterns: Vec<Regex> = lines
        .map(|line| Regex::new(line).map_err(|error| PluginError::config(ALLOW_LIST, format!("{line:?}: {error}"))))
        .collect::<Result<_>>()?;
    match sysctls.iter().find(|sysctl| !patterns.iter().any(|pattern| pattern.is_match(&sysctl.name))) {
        Some(sysctl) => {
            Err(PluginError::config(format!("sysctl {:?}", sysctl.name), format!("is not allowed by {ALLOW_LIST}")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Result<Sysctl> {
        sysctl(name.to_owned(), "1".to_owned(), "eth0.5")
    }

    #[test]
    fn names_lead_to_files_of_the_network_namespace_only() {
        let path = |name| named(name).unwrap().path.display().to_string();
        assert_eq!(path("net.core.somaxconn"), "/proc/sys/net/core/somaxconn");
        assert_eq!(path("net.ipv4.conf.IFNAME.arp_notify"), "/proc/sys/net/ipv4/conf/eth0.5/arp_notify");
        assert_eq!(path("net/ipv4/conf/eth0.5/arp_notify"), "/proc/sys/net/ipv4/conf/eth0.5/arp_notify");
        for bad in ["kernel.shmmax", "net", "net..x", "net/../kernel/shmmax", "/net/core", "", "net/./x"] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_administrators_list_decides() {
        let list = "^net.core.[a-z]*$\n\nsomething\n";
        assert!(allowed_by(list, &[named("net.core.somaxconn").unwrap()]).is_ok());
        let refused = allowed_by(list, &[named("net.ipv4.ip_forward").unwrap()]).unwrap_err();
        assert!(refused.to_string().contains("net.ipv4.ip_forward"), "{refused}");
        assert!(allowed_by("", &[named("net.core.somaxconn").unwrap()]).is_err(), "an empty list allows nothing");
        assert!(allowed_by("(", &[named("net.core.somaxconn").unwrap()]).is_err());
    }
}
