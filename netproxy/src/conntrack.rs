//! Tracked flows of protocols without connections that lead where no Service leads any more.
//!
//! A UDP client that goes on sending keeps its flow, and so its old endpoint, for ever. After every change that concerns
//! such protocols all their flows are compared with what is right now: level-based, so nothing has to be remembered.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;
use oarlock_netlink::conntrack::Flow;
use oarlock_netlink::{Connection, Protocol as NetlinkProtocol};

use crate::element::{ElementKey, Map, Target};
use crate::host;
use crate::ledger::Ledger;
use crate::service::Protocol;
use crate::sync::has_endpoint;

/// Which flows can be ours.
#[derive(Debug, Clone)]
pub struct Scope {
    pub service_cidr: IpNet,
    pub cluster_cidr: IpNet,
    pub dns_address: Option<IpAddr>,
    /// First and last node port.
    pub node_ports: (u16, u16),
    /// Networks in which every address is a Service's or nobody's.
    pub external: Vec<IpNet>,
}

/// Frontends that went away since flows were last looked through. This is what finds flows to addresses that other
/// balancers gave; those in networks of ours are found without it. With each, when it went.
pub type Retired = HashMap<ElementKey, Instant>;

/// Whether a flow goes somewhere that the ledger does not lead to (any more). `node` are the addresses of this node.
pub fn is_stale(flow: &Flow, ledger: &Ledger, scope: &Scope, retired: &Retired, node: &[IpAddr]) -> bool {
    let (wanted, actual) = (flow.original.destination, flow.reply.source);
    let protocol = Protocol(flow.original.protocol);
    let by_address = |map| ElementKey::by_address(map, wanted.ip(), protocol, wanted.port());
    let by_port = |map| ElementKey::by_port(map, protocol, wanted.port());
    let leads = |key| has_endpoint(ledger, key, |endpoint| endpoint == actual);
    let is_frontend = |key| matches!(ledger.target(&key), Some(Target::Balance(_)));
    if scope.dns_address == Some(wanted.ip()) && actual == wanted && !is_frontend(by_address(Map::Services)) {
        return false;
    }
    // An answer of this node's DNS that was under way as its flow was forgotten begins a new one, in which the client's next
    // question is the answer: such a flow keeps the client from the DNS that took over.
    let source = flow.original.source;
    if scope.dns_address == Some(source.ip())
        && is_frontend(ElementKey::by_address(Map::Services, source.ip(), protocol, source.port()))
    {
        return true;
    }
    if is_frontend(by_address(Map::Services)) {
        return !leads(by_address(Map::Services)) && !leads(by_address(Map::LocalServices));
    }
    if scope.service_cidr.contains(&wanted.ip()) {
        return true;
    }
    // Whoever calls somebody else at a port of that number is none of ours.
    let is_here = actual != wanted || node.contains(&wanted.ip());
    if is_here && is_frontend(by_port(Map::NodePorts)) {
        return !leads(by_port(Map::NodePorts)) && !leads(by_port(Map::LocalNodePorts));
    }
    let was_frontend = || {
        retired.contains_key(&by_address(Map::Services))
            || retired.contains_key(&by_port(Map::NodePorts))
            || scope.external.iter().any(|net| net.contains(&wanted.ip()))
    };
    if actual != wanted && was_frontend() {
        return true;
    }
    // What once went through a node port that is gone.
    let in_range = (scope.node_ports.0..=scope.node_ports.1).contains(&wanted.port());
    in_range && actual != wanted && scope.cluster_cidr.contains(&actual.ip())
}

/// Forgets the stale flows, and says how many there were.
pub fn clean(ledger: &Ledger, scope: &Scope, retired: &Retired) -> oarlock_netlink::Result<usize> {
    let mut connection = Connection::open(NetlinkProtocol::Netfilter)?;
    let is_ipv4 = scope.service_cidr.addr().is_ipv4();
    let node = host::addresses();
    let mut stale = Vec::new();
    connection.each_flow(is_ipv4, &[Protocol::UDP.0, Protocol::SCTP.0], |flow| {
        if is_stale(&flow, ledger, scope, retired, &node) {
            stale.push(flow);
        }
    })?;
    connection.delete_flows(&stale)?;
    Ok(stale.len())
}
