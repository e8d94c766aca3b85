//! `bandwidth`: how much a container may receive and send each second.
//!
//! What it receives is limited where it leaves the host's end of the pair. What it sends comes in there, so it is led to an
//! intermediate link (`bwp` and a hash of the attachment) and limited where it leaves that one.

use oarlock_cni::types::{CniResult, Interface};
use oarlock_cni_table::stable_hash;
use oarlock_netlink::{Connection, Protocol, TokenBucket};
use serde::Deserialize;

use crate::call::Call;
use crate::chained::{host_end, required_result};
use crate::error::{Context, PluginError, Result};
use crate::plugin::Plugin;

pub const PLUGIN: Plugin = Plugin { name: "bandwidth", add, del, check, status, gc };

const PREFIX: &str = "bwp";
/// How long a packet waits for tokens at most.
const LATENCY_MICROSECONDS: u64 = 25_000;

/// Bits each second, and bits that may pass at once. containerd begins these names with capitals.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Limits {
    #[serde(alias = "IngressRate")]
    ingress_rate: u64,
    #[serde(alias = "IngressBurst")]
    ingress_burst: u64,
    #[serde(alias = "EgressRate")]
    egress_rate: u64,
    #[serde(alias = "EgressBurst")]
    egress_burst: u64,
    #[serde(alias = "UnshapedSubnets")]
    unshaped_subnets: Option<Vec<String>>,
    #[serde(alias = "ShapedSubnets")]
    shaped_subnets: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RuntimeConfig {
    bandwidth: Option<Limits>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(flatten)]
    limits: Limits,
    #[serde(default)]
    runtime_config: RuntimeConfig,
}

/// The buckets of both directions; none where nothing is limited.
#[derive(Debug, PartialEq, Eq)]
struct Buckets {
    ingress: Option<TokenBucket>,
    egress: Option<TokenBucket>,
}

fn read(call: &Call) -> Result<Buckets> {
    let raw: Raw = call.config()?;
    let limits = raw.runtime_config.bandwidth.unwrap_or(raw.limits);
    for (field, subnets) in [("unshapedSubnets", &limits.unshaped_subnets), ("shapedSubnets", &limits.shaped_subnets)] {
        if subnets.as_ref().is_some_and(|subnets| !subnets.is_empty()) {
            return Err(PluginError::config(
                field,
                "is not supported: all of a container's packets are limited together",
            ));
        }
    }
    Ok(Buckets {
        ingress: bucket("ingress", limits.ingress_rate, limits.ingress_burst)?,
        egress: bucket("egress", limits.egress_rate, limits.egress_burst)?,
    })
}

fn bucket(direction: &str, rate_bits: u64, burst_bits: u64) -> Result<Option<TokenBucket>> {
    let wrong = |field: &str, problem: &str| Err(PluginError::config(format!("{direction}{field}"), problem));
    match (rate_bits, burst_bits) {
        (0, 0) => return Ok(None),
        (0, _) => return wrong("Rate", "is required with a burst"),
        (_, 0) => return wrong("Burst", "is required with a rate"),
        _ => {}
    }
    let bytes_per_second = (rate_bits / 8).max(1);
    let Ok(burst_bytes) = u32::try_from((burst_bits / 8).max(1)) else {
        return wrong("Burst", "cannot be more than 4 GB");
    };
    let waiting = bytes_per_second.saturating_mul(LATENCY_MICROSECONDS) / 1_000_000;
    let limit_bytes = u32::try_from(waiting.saturating_add(u64::from(burst_bytes))).unwrap_or(u32::MAX);
    Ok(Some(TokenBucket { bytes_per_second, burst_bytes, limit_bytes }))
}

fn intermediate(network: &str, container_id: &str, ifname: &str) -> String {
    format!("{PREFIX}{:012x}", stable_hash(&[network, container_id, ifname]) & 0xffff_ffff_ffff)
}

fn own_intermediate(call: &Call) -> String {
    intermediate(&call.network.name, &call.container_id, &call.ifname)
}

fn connection() -> Result<Connection> {
    Connection::open(Protocol::Route).context(|| "cannot talk to the kernel about links".into())
}

fn add(call: &Call) -> Result<CniResult> {
    let buckets = read(call)?;
    let mut result = required_result(call, "bandwidth")?;
    if buckets == (Buckets { ingress: None, egress: None }) {
        return Ok(result);
    }
    let mut connection = connection()?;
    let host = host_end(call, &mut connection)?;
    if let Some(bucket) = &buckets.ingress {
        connection.set_token_bucket(host.index, bucket).context(|| format!("limit {}", host.name))?;
    }
    if let Some(bucket) = &buckets.egress {
        let name = own_intermediate(call);
        let failed = || format!("limit what comes in through {}", host.name);
        // One that is there was left by a call that was killed.
        connection.delete_link_by_name(&name).context(failed)?;
        connection.create_ifb(&name, host.mtu).context(failed)?;
        let link = connection.require_link(&name).context(failed)?;
        let limited = connection
            .set_token_bucket(link.index, bucket)
            .and_then(|()| connection.redirect_ingress(host.index, link.index));
        if let Err(error) = limited {
            let _ = connection.delete_link(link.index);
            return Err(error).context(failed);
        }
        result.interfaces.push(Interface {
            name,
            mac: link.mac.map(|mac| mac.to_string()),
            mtu: Some(link.mtu),
            ..Interface::default()
        });
    }
    Ok(result)
}

/// The limit of the host's end goes with it.
fn del(call: &Call) -> Result<()> {
    let name = own_intermediate(call);
    connection()?.delete_link_by_name(&name).context(|| format!("delete {name}"))
}

fn check(call: &Call) -> Result<()> {
    let buckets = read(call)?;
    required_result(call, "bandwidth")?;
    let mut connection = connection()?;
    let host = host_end(call, &mut connection)?;
    if let Some(bucket) = &buckets.ingress {
        expect_rate(&mut connection, host.index, &host.name, bucket)?;
    }
    if let Some(bucket) = &buckets.egress {
        let name = own_intermediate(call);
        let link = connection.link(&name).context(|| format!("look up {name}"))?;
        let link = link.ok_or_else(|| PluginError::Drift(format!("{name} is missing")))?;
        expect_rate(&mut connection, link.index, &name, bucket)?;
    }
    Ok(())
}

fn expect_rate(connection: &mut Connection, link: u32, name: &str, bucket: &TokenBucket) -> Result<()> {
    match connection.token_bucket_rate(link).context(|| format!("read the limit of {name}"))? {
        Some(rate) if rate == bucket.bytes_per_second => Ok(()),
        Some(rate) => Err(PluginError::Drift(format!(
            "{name} is limited to {rate} bytes each second, not {}",
            bucket.bytes_per_second
        ))),
        None => Err(PluginError::Drift(format!("{name} is not limited"))),
    }
}

fn status(call: &Call) -> Result<()> {
    read(call).and_then(|_| connection()).map(drop)
}

/// Deletes intermediate links that nothing is led to any more. Which network a link belongs to cannot be told from its
/// name, so those of valid attachments and those that belong to some living pair stay.
fn gc(call: &Call) -> Result<()> {
    read(call)?;
    let mut connection = connection()?;
    let name = |one: &oarlock_cni::ValidAttachment| intermediate(&call.network.name, &one.container_id, &one.ifname);
    let valid: Vec<String> = call.valid_attachments().iter().map(name).collect();
    let links = connection.links().context(|| "list links".into())?;
    let targets: Vec<u32> = connection.redirect_targets().context(|| "list redirections".into())?;
    let is_stray = |link: &&oarlock_netlink::Link| {
        link.name.len() == PREFIX.len() + 12
            && link.name.starts_with(PREFIX)
            && link.kind.as_deref() == Some("ifb")
            && !valid.contains(&link.name)
            && !targets.contains(&link.index)
    };
    for link in links.iter().filter(is_stray) {
        connection.delete_link(link.index).context(|| format!("delete {}", link.name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_become_bytes_and_both_numbers_are_needed() {
        let found = bucket("ingress", 8_000_000, 800_000).unwrap().unwrap();
        assert_eq!(found, TokenBucket { bytes_per_second: 1_000_000, burst_bytes: 100_000, limit_bytes: 125_000 });
        assert_eq!(bucket("ingress", 0, 0).unwrap(), None);
        assert!(bucket("ingress", 1, 0).unwrap_err().to_string().contains("ingressBurst"));
        assert!(bucket("egress", 0, 1).unwrap_err().to_string().contains("egressRate"));
        assert!(bucket("egress", 1, u64::MAX).is_err());
        assert!(bucket("egress", u64::MAX, 8 * u64::from(u32::MAX)).is_ok(), "what containerd asks for");
        assert_eq!(intermediate("n", &"f".repeat(64), "eth0").len(), 15);
    }
}
