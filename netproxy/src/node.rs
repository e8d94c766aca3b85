//! Nodes: what they are, the CNI configuration of this one, and its route to Service addresses.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use oarlock_netlink::{Connection, Protocol, Route, WireguardKey};
use serde_json::json;

use crate::wireguard;

/// Marks our routes in the kernel's tables, so that stale ones are found after a crash.
pub const ROUTE_PROTOCOL: u8 = 79;
pub const CONFLIST: &str = "10-oarlock.conflist";
const BRIDGE: &str = "oar0";

/// Whether a link is one of those that the cluster's own networks are made of.
pub fn is_cluster_link(name: &str) -> bool {
    name == BRIDGE || name == wireguard::DEVICE || crate::overlay::DEVICES.contains(&name)
}

/// A node as far as its pods' network is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub pod_cidrs: Vec<IpNet>,
    pub internal: Vec<IpAddr>,
    pub zone: Option<String>,
    /// Whether balancers may send to it.
    pub takes_traffic: bool,
    /// The key that it says others can send to it with.
    pub wireguard_key: Option<WireguardKey>,
    /// It is being deleted, or an autoscaler is about to: balancers had better send elsewhere.
    pub leaving: bool,
}

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
const EXCLUDE_LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

impl Node {
    pub fn read(object: &core::Node) -> Node {
        let spec = object.spec.as_ref();
        let many = spec.and_then(|spec| spec.pod_cidrs.as_ref()).filter(|all| !all.is_empty());
        let one = spec.and_then(|spec| spec.pod_cidr.as_ref());
        let texts: Vec<&String> = many.map_or_else(|| one.into_iter().collect(), |all| all.iter().collect());
        let addresses = object.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let internal = addresses.filter(|address| address.type_ == "InternalIP");
        let conditions = object.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let is_ready = conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True");
        let labels = object.metadata.labels.as_ref();
        Node {
            pod_cidrs: texts.into_iter().filter_map(|text| text.parse().ok()).collect(),
            internal: internal.filter_map(|address| address.address.parse().ok()).collect(),
            zone: labels.and_then(|labels| labels.get(ZONE_LABEL)).cloned(),
            wireguard_key: object
                .metadata
                .annotations
                .as_ref()
                .and_then(|annotations| wireguard::read_key(annotations.get(wireguard::ANNOTATION)?)),
            leaving: object.metadata.deletion_timestamp.is_some()
                || spec.is_some_and(|spec| spec.taints.iter().flatten().any(|taint| taint.key == LEAVING_TAINT)),
            takes_traffic: is_ready && !labels.is_some_and(|labels| labels.contains_key(EXCLUDE_LABEL)),
        }
    }
}

/// The CNI configuration for pods of this node. Runtimes that know no list of versions take it as 1.0.0.
/// `mtu` is that of pods' links, 0 for the usual one.
pub fn conflist(pod_cidrs: &[IpNet], cluster_cidrs: &[IpNet], ipam_dir: &Path, mtu: u32) -> String {
    let ranges: Vec<_> = pod_cidrs.iter().map(|net| json!([{"subnet": net.trunc().to_string()}])).collect();
    let routes: Vec<_> =
        pod_cidrs.iter().map(|net| json!({"dst": if net.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" }})).collect();
    let mut list = json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "oarlock",
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": true,
                "ipMasq": true,
                "ipMasqExclude": cluster_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "hairpinMode": true,
                "ipam": {"type": "host-local", "dataDir": ipam_dir, "ranges": ranges, "routes": routes},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        ],
    });
    if mtu != 0 {
        list["plugins"][0]["mtu"] = mtu.into();
    }
    format!("{list:#}\n")
}

/// A configuration that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write CNI configuration {}", path.display())]
pub struct WriteError {
    path: PathBuf,
    source: io::Error,
}

/// Writes the configuration so that a reader sees the old file or the new one; says whether it had to.
pub fn write_conflist(directory: &Path, content: &str) -> Result<bool, WriteError> {
    let path = directory.join(CONFLIST);
    if fs::read_to_string(&path).is_ok_and(|existing| existing == content) {
        return Ok(false);
    }
    let write = || -> io::Result<()> {
        fs::create_dir_all(directory)?;
        // The extension keeps the unfinished file from being taken for a network.
        let temporary = directory.join(".10-oarlock.conflist.tmp");
        let mut file = fs::File::create(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    write().map(|()| true).map_err(|source| WriteError { path, source })
}

/// Removes the configuration of an earlier start, so that only the other plugin's is there.
pub fn remove_conflist(directory: &Path) -> Result<(), WriteError> {
    let path = directory.join(CONFLIST);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(WriteError { path, source }),
        _ => Ok(()),
    }
}

/// How the node itself comes to Service addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceRoute {
    /// By a route that there was, as a default route.
    Covered,
    /// By a route of ours, made now.
    Added,
    /// Not at all: no link has the node's address yet.
    NoLink,
}

/// Lets the node itself reach Service addresses when no other route covers them, as on hosts without a default route: the
/// packets need some route before they are given another destination. It leads out of the node's own link, where our
/// table lets nothing of it pass; through `lo`, refusals would not find back.
pub fn ensure_service_route(service_cidr: IpNet, node_ip: IpAddr) -> oarlock_netlink::Result<ServiceRoute> {
    let mut connection = Connection::open(Protocol::Route)?;
    if connection.routes()?.iter().any(|route| route.destination.contains(&service_cidr)) {
        return Ok(ServiceRoute::Covered);
    }
    let lo = connection.require_link("lo")?.index;
    let addresses = connection.addresses()?;
    let Some(own) = addresses.iter().find(|address| address.net.addr() == node_ip && address.link != lo) else {
        return Ok(ServiceRoute::NoLink);
    };
    let route = Route { protocol: ROUTE_PROTOCOL, ..Route::new(service_cidr.trunc(), None, own.link) };
    connection.replace_route(&route)?;
    Ok(ServiceRoute::Added)
}

/// Takes away what this module and the DNS address left on the node's links. For a reset.
pub fn remove_leftovers(dns_addresses: &[IpAddr]) -> oarlock_netlink::Result<()> {
    let mut connection = Connection::open(Protocol::Route)?;
    for route in connection.routes()?.iter().filter(|route| route.protocol == ROUTE_PROTOCOL) {
        connection.delete_route(route)?;
    }
    crate::overlay::remove(&mut connection)?;
    if let Some(lo) = connection.link("lo")? {
        dns_addresses.iter().try_for_each(|address| connection.delete_address(lo.index, IpNet::from(*address)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_configuration_appears_whole_and_is_written_only_when_it_changes() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("net.d");
        let content = conflist(&[net("10.42.0.0/24")], &[net("10.42.0.0/16")], Path::new("/data/ipam"), 0);
        assert!(write_conflist(&target, &content).unwrap());
        assert!(!write_conflist(&target, &content).unwrap());
        let read: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(target.join(CONFLIST)).unwrap()).unwrap();
        assert_eq!(read["plugins"][0]["ipam"]["ranges"][0][0]["subnet"], "10.42.0.0/24");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    }
}
