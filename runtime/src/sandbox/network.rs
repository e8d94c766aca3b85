//! Attaches sandboxes to the network by CNI, and detaches them.

use std::path::Path;
use std::sync::Arc;

use oarlock_cni::{Attachment, PortMapping};
use oarlock_failpoint::step;
use serde_json::{Value, json};

use crate::core::Core;
use crate::error::Error;
use crate::record::SandboxRecord;
use crate::spec::sandbox::Decision;

/// The network of the configuration that Oarlock's proxy writes.
const OWN_NETWORK: &str = "oarlock";
/// Annotations that limit a pod's traffic, in bits a second (`10M`, `1Gi`).
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// The attachment of a sandbox, without capability arguments: enough for DEL and CHECK.
pub(crate) fn attachment(core: &Core, record: &SandboxRecord) -> Attachment {
    let metadata = record.metadata();
    let netns = core.paths.sandbox(&record.id).namespaces().join("net");
    Attachment::for_pod(&record.id, &netns, &metadata.namespace, &metadata.name, &metadata.uid)
}

/// A sandbox's place in a network.
#[derive(Debug, Default)]
pub(super) struct Joined {
    pub(super) network: String,
    /// The primary one first.
    pub(super) ips: Vec<String>,
}

/// Runs CNI ADD.
pub(super) async fn attach(core: &Arc<Core>, record: &SandboxRecord, decision: &Decision) -> Result<Joined, Error> {
    let mappings: Vec<PortMapping> = decision
        .port_mappings
        .iter()
        .map(|mapping| PortMapping {
            host_port: mapping.host_port,
            container_port: mapping.container_port,
            protocol: mapping.protocol.to_owned(),
            host_ip: mapping.host_ip,
        })
        .collect();
    let mut attachment = attachment(core, record).with_port_mappings(&mappings);
    if let Some(bandwidth) = bandwidth(record)? {
        attachment.capability_args.insert("bandwidth".to_owned(), bandwidth);
    }
    if let Some(dns) = &record.config.dns_config {
        let dns = json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
        attachment.capability_args.insert("dns".to_owned(), dns);
    }
    let _no_collection = core.network_gate.read().await;
    let limit = core.config.cni_timeout;
    let failed = |source| Error::Network { sandbox: record.id.clone(), source: Box::new(source) };
    let network = core.cni.default_network().map_err(failed)?.name;
    let result = tokio::time::timeout(limit, core.cni.add(&attachment))
        .await
        .map_err(|_| Error::TimedOut { operation: format!("CNI ADD for sandbox {}", record.id), limit })?
        .map_err(failed)?;
    Ok(Joined { network, ips: result.container_ips().iter().map(ToString::to_string).collect() })
}

/// Whether the sandbox's network is the one that Oarlock's own proxy configures. Its plugins free everything without the
/// namespace, and the kernel takes a pair of interfaces away by itself once the namespace is gone, which is thirty
/// times faster than deleting the pair and waiting. Plugins of others may leave rules behind without it.
pub(super) fn is_own(record: &SandboxRecord) -> bool {
    record.network == OWN_NETWORK
}

/// Runs CNI DEL, which may be repeated and may find nothing.
pub(super) async fn detach(core: &Arc<Core>, record: &SandboxRecord) -> Result<(), Error> {
    if record.host_network {
        return Ok(());
    }
    let mut attachment = attachment(core, record);
    attachment.netns = attachment.netns.filter(|path: &std::path::PathBuf| Path::exists(path));
    let limit = core.config.cni_timeout;
    tokio::time::timeout(limit, core.cni.del(&attachment))
        .await
        .map_err(|_| Error::TimedOut { operation: format!("CNI DEL for sandbox {}", record.id), limit })?
        .map_err(|source| Error::Network { sandbox: record.id.clone(), source: Box::new(source) })?;
    step("the network is left");
    Ok(())
}

fn bandwidth(record: &SandboxRecord) -> Result<Option<Value>, Error> {
    let mut limits = serde_json::Map::new();
    for (annotation, direction) in [(INGRESS, "ingress"), (EGRESS, "egress")] {
        let Some(text) = record.config.annotations.get(annotation) else { continue };
        let rate =
            bits(text).ok_or_else(|| Error::Invalid(format!("annotation {annotation}: {text:?} is not a rate")))?;
        limits.insert(format!("{direction}Rate"), rate.into());
        // Bursts are not limited beyond what the token bucket can count.
        limits.insert(format!("{direction}Burst"), i32::MAX.into());
    }
    Ok((!limits.is_empty()).then_some(Value::Object(limits)))
}

/// A quantity as Kubernetes writes it, in whole bits a second.
fn bits(text: &str) -> Option<u64> {
    let split = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor).filter(|rate| *rate > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_decimal_and_binary_suffixes() {
        assert_eq!(bits("10M"), Some(10_000_000));
        assert_eq!(bits("1Ki"), Some(1024));
        assert_eq!(bits("512"), Some(512));
        for bad in ["", "M", "-1", "1.5M", "1X", "0"] {
            assert_eq!(bits(bad), None, "{bad}");
        }
    }
}
