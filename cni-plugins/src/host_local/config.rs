//! The `ipam` object of `host-local`, and the addresses that a single call asks for.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use oarlock_cni::types::{Dns, Route};
use serde::Deserialize;

use super::range::{Range, RangeSet};
use crate::call::Call;
use crate::error::{PluginError, Result};

const DEFAULT_DATA_DIR: &str = "/var/lib/cni/networks";

/// What one call may give out.
#[derive(Debug)]
pub struct Config {
    pub data_dir: PathBuf,
    /// One address is given from each set.
    pub ranges: Vec<RangeSet>,
    pub routes: Vec<Route>,
    /// Addresses that the call asks for by name.
    pub requested: Vec<IpAddr>,
    resolv_conf: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Whole {
    ipam: Ipam,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    args: Args,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ipam {
    #[serde(default)]
    data_dir: Option<PathBuf>,
    #[serde(default)]
    resolv_conf: Option<PathBuf>,
    #[serde(default)]
    routes: Vec<Route>,
    #[serde(default)]
    ranges: Vec<Vec<RangeConfig>>,
    #[serde(flatten)]
    single: RangeConfig,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangeConfig {
    #[serde(default)]
    pub subnet: Option<IpNet>,
    #[serde(default)]
    pub range_start: Option<IpAddr>,
    #[serde(default)]
    pub range_end: Option<IpAddr>,
    #[serde(default)]
    pub gateway: Option<IpAddr>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    #[serde(default)]
    ip_ranges: Vec<Vec<RangeConfig>>,
    #[serde(default)]
    ips: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: ArgsCni,
}

#[derive(Debug, Default, Deserialize)]
struct ArgsCni {
    #[serde(default)]
    ips: Vec<String>,
}

impl Config {
    pub fn read(call: &Call) -> Result<Config> {
        let whole: Whole = call.config()?;
        // The runtime's own ranges come first, as the address that the container is known by is of the first.
        let mut sets = whole.runtime_config.ip_ranges;
        if whole.ipam.single.subnet.is_some() {
            sets.push(vec![whole.ipam.single]);
        }
        sets.extend(whole.ipam.ranges);
        if sets.is_empty() {
            return Err(PluginError::config("ipam.ranges", "at least one range or ipam.subnet is required"));
        }
        let ranges = sets.iter().enumerate().map(|(index, set)| range_set(index, set)).collect::<Result<Vec<_>>>()?;
        for (index, set) in ranges.iter().enumerate() {
            if let Some(other) = ranges[..index].iter().position(|other| other.overlaps(set)) {
                return Err(PluginError::config(format!("ipam.ranges[{index}]"), format!("overlaps ranges[{other}]")));
            }
        }
        let from_environment = call.argument("IP").map(|text| text.split(',').map(str::to_owned).collect::<Vec<_>>());
        let requested = from_environment
            .into_iter()
            .flatten()
            .chain(whole.args.cni.ips)
            .chain(whole.runtime_config.ips)
            .map(|text| parse_address(&text))
            .collect::<Result<Vec<_>>>()?;
        Ok(Config {
            data_dir: whole.ipam.data_dir.unwrap_or_else(|| DEFAULT_DATA_DIR.into()),
            ranges,
            routes: whole.ipam.routes,
            requested,
            resolv_conf: whole.ipam.resolv_conf,
        })
    }

    /// An address that was asked for and that no set of ranges gives, each giving one.
    pub fn requested_in_vain(&self) -> Option<IpAddr> {
        let mut left = self.requested.clone();
        for set in &self.ranges {
            if let Some(position) = left.iter().position(|address| set.contains(*address)) {
                left.remove(position);
            }
        }
        left.first().copied()
    }

    /// Name servers from the resolv.conf that the configuration names.
    pub fn dns(&self) -> Result<Dns> {
        let Some(path) = &self.resolv_conf else { return Ok(Dns::default()) };
        let text = fs::read_to_string(path).map_err(|source| PluginError::File {
            operation: "read",
            path: path.clone(),
            source,
        })?;
        let mut dns = Dns::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => dns.nameservers.extend(words.next().map(str::to_owned)),
                Some("domain") => dns.domain = words.next().map(str::to_owned),
                Some("search") => dns.search = words.map(str::to_owned).collect(),
                Some("options") => dns.options.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
        Ok(dns)
    }
}

fn range_set(index: usize, set: &[RangeConfig]) -> Result<RangeSet> {
    let field = |number: usize| format!("ipam.ranges[{index}][{number}]");
    let ranges = set
        .iter()
        .enumerate()
        .map(|(number, range)| Range::new(range).map_err(|problem| PluginError::config(field(number), problem)))
        .collect::<Result<Vec<_>>>()?;
    RangeSet::new(ranges).map_err(|problem| PluginError::config(format!("ipam.ranges[{index}]"), problem))
}

fn parse_address(text: &str) -> Result<IpAddr> {
    let bare = text.trim().split('/').next().unwrap_or_default();
    bare.parse().map_err(|_| PluginError::config("requested address", format!("{text:?} is not an IP address")))
}
