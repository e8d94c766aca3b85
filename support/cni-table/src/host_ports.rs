//! Ports of the host that lead to containers: elements of maps by port, and by address and port.
//!
//! A connection from the container to itself through the host is masqueraded, and so is one between pods whose answers do
//! not pass this node. 127.0.0.0/8 is never a way in, because that would take `route_localnet`.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use oarlock_nft::{
    Bytes, Chain, ChainKind, Element, Expr, FibResult, Field, HookPoint, Key, MetaKey, NatKind, PayloadBase, Reg, Set,
    Verdict,
};
use serde::{Deserialize, Serialize};

use crate::foundation::{Foundation, address_field, destination_in, load_destination, load_source, table};
use crate::part::Entry;

const BY_PORT: &str = "hostports";
const BY_ADDRESS: &str = "hostports-by-address";
const HAIRPIN: &str = "hostports-hairpin";
/// Links behind which one pod's answer to another does not pass this node.
const BRIDGED: &str = "hostports-bridged";
const PREROUTING: &str = "hostports-prerouting";
const OUTPUT: &str = "hostports-output";
const DNAT: &str = "hostports-dnat";
const POSTROUTING: &str = "hostports-postrouting";
/// Just before the Service proxy, so that a host port of a pod is its own.
const DESTINATION_NAT: i32 = -101;
const SOURCE_NAT: i32 = 99;

/// How many registers the name of a link takes.
const LINK_NAME_REGISTERS: u8 = 4;

/// Where the second field of a key with an address begins.
fn after_address(is_ipv4: bool) -> u8 {
    if is_ipv4 { 1 } else { 4 }
}

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Protocol(u8);

impl Protocol {
    pub const TCP: Protocol = Protocol(libc::IPPROTO_TCP as u8);
    pub const UDP: Protocol = Protocol(libc::IPPROTO_UDP as u8);
    pub const SCTP: Protocol = Protocol(libc::IPPROTO_SCTP as u8);

    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Protocol::TCP => "tcp",
            Protocol::UDP => "udp",
            _ => "sctp",
        })
    }
}

/// A port of the host that leads to one of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: Protocol,
    /// Only on this address of the host; on all of them without.
    pub host_ip: Option<IpAddr>,
}

impl Mapping {
    /// Whether the mapping is on addresses of a family.
    pub fn is_for(&self, is_ipv4: bool) -> bool {
        self.host_ip.is_none_or(|address| address.is_ipv4() == is_ipv4)
    }

    /// The map that the mapping is in, and its key there.
    pub fn place(&self) -> (&'static str, Bytes) {
        let rest = |key: Key| key.protocol(self.protocol.number()).port(self.host_port).bytes();
        match self.host_ip {
            Some(address) => (BY_ADDRESS, rest(Key::new().address(address))),
            None => (BY_PORT, rest(Key::new())),
        }
    }
}

/// Every map and set that has elements of single attachments.
pub const SETS: [&str; 3] = [BY_PORT, BY_ADDRESS, HAIRPIN];

/// Where the element is that lets the container reach itself through the host.
pub fn hairpin_place(address: IpAddr) -> (&'static str, Bytes) {
    (HAIRPIN, Key::new().address(address).address(address).bytes())
}

/// Host ports that lead to one address of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPorts {
    pub address: IpAddr,
    /// Those of the address's family.
    pub mappings: Vec<Mapping>,
    /// Whether a container that reaches itself through the host is masqueraded.
    pub snat: bool,
    /// The link behind which pods see each other's answers without passing this node: connections that come from there to
    /// a host port and go back there are masqueraded. It is the network's, and stays with the table.
    pub bridge: Option<String>,
}

impl HostPorts {
    pub(crate) fn foundation(&self) -> Foundation {
        let is_ipv4 = self.address.is_ipv4();
        let address = address_field(is_ipv4);
        let target = [address, Field::Port];
        let mut foundation = Foundation::new(table(is_ipv4));
        foundation.set(Set::map(BY_PORT, &[Field::Protocol, Field::Port], &target));
        foundation.set(Set::map(BY_ADDRESS, &[address, Field::Protocol, Field::Port], &target));
        foundation.set(Set::new(HAIRPIN, &[address, address]));
        foundation.set(Set::new(BRIDGED, &[Field::LinkName, Field::LinkName]));
        foundation.chain(Chain::regular(DNAT));
        for (name, point, priority) in [
            (PREROUTING, HookPoint::Prerouting, DESTINATION_NAT),
            (OUTPUT, HookPoint::Output, DESTINATION_NAT),
            (POSTROUTING, HookPoint::Postrouting, SOURCE_NAT),
        ] {
            foundation.chain(Chain::base(name, ChainKind::Nat, point, priority));
        }
        let jump = || [local_destination(), vec![Expr::Verdict(Verdict::Jump(DNAT.into()))]].concat();
        let loopback: IpNet = if is_ipv4 {
            IpNet::V4(ipnet::Ipv4Net::new_assert([127, 0, 0, 0].into(), 8))
        } else {
            IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128))
        };
        let mut except_loopback = destination_in(loopback);
        except_loopback.push(Expr::Verdict(Verdict::Return));
        foundation.rule(PREROUTING, jump());
        foundation.rule(OUTPUT, except_loopback);
        foundation.rule(OUTPUT, jump());
        foundation.rule(DNAT, dnat_by_address(is_ipv4));
        foundation.rule(DNAT, dnat_by_port(is_ipv4));
        foundation.rule(POSTROUTING, masquerade_hairpin(is_ipv4));
        foundation.rule(POSTROUTING, masquerade_bridged());
        foundation
    }

    pub(crate) fn entries(&self, owner: &str) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self.mappings.iter().map(|mapping| self.entry(mapping, owner)).collect();
        if self.snat {
            if let Some(bridge) = &self.bridge {
                let key = Key::new().link_name(bridge).link_name(bridge).bytes();
                entries.push(Entry::shared(BRIDGED, Element::key(key)));
            }
            let (set, key) = hairpin_place(self.address);
            entries.push(Entry::shared(set, Element::key(key).comment(owner)));
        }
        entries
    }

    fn entry(&self, mapping: &Mapping, owner: &str) -> Entry {
        let (set, key) = mapping.place();
        let target = Key::new().address(self.address).port(mapping.container_port).bytes();
        Entry::exclusive(set, Element::data(key, target).comment(owner))
    }
}

fn masquerade_hairpin(is_ipv4: bool) -> Vec<Expr> {
    vec![
        load_source(is_ipv4, Reg(0)),
        load_destination(is_ipv4, Reg(after_address(is_ipv4))),
        Expr::InSet { set: HAIRPIN.into(), key: Reg(0), inverted: false },
        Expr::Masquerade,
    ]
}

fn masquerade_bridged() -> Vec<Expr> {
    vec![
        Expr::LoadMeta { key: MetaKey::InputName, to: Reg(0) },
        Expr::LoadMeta { key: MetaKey::OutputName, to: Reg(LINK_NAME_REGISTERS) },
        Expr::InSet { set: BRIDGED.into(), key: Reg(0), inverted: false },
        Expr::Masquerade,
    ]
}

fn local_destination() -> Vec<Expr> {
    let local = u32::from(libc::RTN_LOCAL).to_ne_bytes().to_vec();
    vec![
        Expr::LoadFib { result: FibResult::AddressType, of_source: false, to: Reg(0) },
        Expr::Compare { register: Reg(0), equal: true, value: local },
    ]
}

fn load_port(to: Reg) -> Expr {
    Expr::LoadPayload { base: PayloadBase::Transport, offset: 2, len_bytes: 2, to }
}

fn dnat(map: &str, is_ipv4: bool) -> Vec<Expr> {
    let port = Reg(after_address(is_ipv4));
    vec![
        Expr::LoadMap { map: map.into(), key: Reg(0), to: Reg(0) },
        Expr::Nat { kind: NatKind::Destination, address: Reg(0), port: Some(port) },
    ]
}

fn dnat_by_address(is_ipv4: bool) -> Vec<Expr> {
    let next = after_address(is_ipv4);
    let mut expressions = vec![
        Expr::LoadMeta { key: MetaKey::L4Protocol, to: Reg(next) },
        load_destination(is_ipv4, Reg(0)),
        load_port(Reg(next + 1)),
    ];
    expressions.extend(dnat(BY_ADDRESS, is_ipv4));
    expressions
}

fn dnat_by_port(is_ipv4: bool) -> Vec<Expr> {
    let mut expressions = vec![Expr::LoadMeta { key: MetaKey::L4Protocol, to: Reg(0) }, load_port(Reg(1))];
    expressions.extend(dnat(BY_PORT, is_ipv4));
    expressions
}
