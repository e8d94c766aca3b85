//! The maps and chains of port mappings, and the elements of one container.

use std::net::IpAddr;

use ipnet::IpNet;
use oarlock_nft::{
    Bytes, Chain, ChainKind, Command, Element, Expr, FibResult, Field, HookPoint, Kernel, Key, MetaKey, NatKind,
    PayloadBase, Reg, Result, Rule, Set, Transaction, Verdict,
};

use super::config::Mapping;
use crate::masquerade::{address_field, destination_in, load_destination, load_source, table};

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

/// Chains, maps and rules: the same however often they are made.
pub fn foundation(is_ipv4: bool) -> Transaction {
    let address = address_field(is_ipv4);
    let target = [address, Field::Port];
    let mut transaction = Transaction::new(table(is_ipv4));
    transaction.push(Command::AddTable { comment: String::new(), exclusive: false });
    transaction.push(Command::AddSet(Set::map(BY_PORT, &[Field::Protocol, Field::Port], &target)));
    transaction.push(Command::AddSet(Set::map(BY_ADDRESS, &[address, Field::Protocol, Field::Port], &target)));
    transaction.push(Command::AddSet(Set::new(HAIRPIN, &[address, address])));
    transaction.push(Command::AddSet(Set::new(BRIDGED, &[Field::LinkName, Field::LinkName])));
    transaction.push(Command::AddChain(Chain::regular(DNAT)));
    for (name, point, priority) in [
        (PREROUTING, HookPoint::Prerouting, DESTINATION_NAT),
        (OUTPUT, HookPoint::Output, DESTINATION_NAT),
        (POSTROUTING, HookPoint::Postrouting, SOURCE_NAT),
    ] {
        transaction.push(Command::AddChain(Chain::base(name, ChainKind::Nat, point, priority)));
    }
    for name in [PREROUTING, OUTPUT, DNAT, POSTROUTING] {
        transaction.push(Command::FlushChain(name.into()));
    }
    let jump =
        |chain: &str| Rule::new(chain, [local_destination(), vec![Expr::Verdict(Verdict::Jump(DNAT.into()))]].concat());
    let loopback: IpNet = if is_ipv4 {
        IpNet::V4(ipnet::Ipv4Net::new_assert([127, 0, 0, 0].into(), 8))
    } else {
        IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128))
    };
    let mut except_loopback = destination_in(loopback);
    except_loopback.push(Expr::Verdict(Verdict::Return));
    transaction.push(Command::AddRule(jump(PREROUTING)));
    transaction.push(Command::AddRule(Rule::new(OUTPUT, except_loopback)));
    transaction.push(Command::AddRule(jump(OUTPUT)));
    transaction.push(Command::AddRule(dnat_by_address(is_ipv4)));
    transaction.push(Command::AddRule(dnat_by_port(is_ipv4)));
    let hairpin = vec![
        load_source(is_ipv4, Reg(0)),
        load_destination(is_ipv4, Reg(after_address(is_ipv4))),
        Expr::InSet { set: HAIRPIN.into(), key: Reg(0), inverted: false },
        Expr::Masquerade,
    ];
    transaction.push(Command::AddRule(Rule::new(POSTROUTING, hairpin)));
    let bridged = vec![
        Expr::LoadMeta { key: MetaKey::InputName, to: Reg(0) },
        Expr::LoadMeta { key: MetaKey::OutputName, to: Reg(LINK_NAME_REGISTERS) },
        Expr::InSet { set: BRIDGED.into(), key: Reg(0), inverted: false },
        Expr::Masquerade,
    ];
    transaction.push(Command::AddRule(Rule::new(POSTROUTING, bridged)));
    transaction
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

fn dnat_by_address(is_ipv4: bool) -> Rule {
    let next = after_address(is_ipv4);
    let mut expressions = vec![
        Expr::LoadMeta { key: MetaKey::L4Protocol, to: Reg(next) },
        load_destination(is_ipv4, Reg(0)),
        load_port(Reg(next + 1)),
    ];
    expressions.extend(dnat(BY_ADDRESS, is_ipv4));
    Rule::new(DNAT, expressions)
}

fn dnat_by_port(is_ipv4: bool) -> Rule {
    let mut expressions = vec![Expr::LoadMeta { key: MetaKey::L4Protocol, to: Reg(0) }, load_port(Reg(1))];
    expressions.extend(dnat(BY_PORT, is_ipv4));
    Rule::new(DNAT, expressions)
}

fn key(mapping: &Mapping) -> (&'static str, Bytes) {
    let rest = |key: Key| key.protocol(mapping.protocol.number()).port(mapping.host_port).bytes();
    match mapping.host_ip {
        Some(address) => (BY_ADDRESS, rest(Key::new().address(address))),
        None => (BY_PORT, rest(Key::new())),
    }
}

/// The elements of one container, which all have to be new.
///
/// `bridge` is the link behind which pods see each other's answers without passing this node: connections that come from
/// there to a host port and go back there are masqueraded. It is the network's, and stays with the table.
pub fn elements(owner: &str, mappings: &[&Mapping], address: IpAddr, snat: bool, bridge: Option<&str>) -> Transaction {
    let mut transaction = Transaction::new(table(address.is_ipv4()));
    for mapping in mappings {
        let (set, key) = key(mapping);
        let target = Key::new().address(address).port(mapping.container_port).bytes();
        let element = Element::data(key, target).comment(owner);
        transaction.push(Command::AddElements { set: set.into(), elements: vec![element], exclusive: true });
    }
    if let Some(bridge) = bridge.filter(|_| snat) {
        let key = Key::new().link_name(bridge).link_name(bridge).bytes();
        transaction.push(Command::AddElements {
            set: BRIDGED.into(),
            elements: vec![Element::key(key)],
            exclusive: false,
        });
    }
    if snat {
        let element = Element::key(Key::new().address(address).address(address).bytes()).comment(owner);
        transaction.push(Command::AddElements { set: HAIRPIN.into(), elements: vec![element], exclusive: false });
    }
    transaction
}

/// What takes the elements of one owner away, looked for at its own ports and addresses only.
pub fn own_removal(
    kernel: &mut dyn Kernel,
    is_ipv4: bool,
    owner: &str,
    mappings: &[Mapping],
    addresses: &[IpAddr],
) -> Result<Transaction> {
    let table = table(is_ipv4);
    let mut transaction = Transaction::new(table.clone());
    let hairpin = |address: &IpAddr| (HAIRPIN, Key::new().address(*address).address(*address).bytes());
    let ports = mappings.iter().filter(|mapping| mapping.is_for(is_ipv4)).map(key);
    let all = ports.chain(addresses.iter().filter(|address| address.is_ipv4() == is_ipv4).map(hairpin));
    for (set, key) in all {
        let found = kernel.element(&table, set, &key)?;
        if found.is_some_and(|element| element.comment.as_deref() == Some(owner)) {
            transaction.push(Command::DeleteElements { set: set.into(), keys: vec![key] });
        }
    }
    Ok(transaction)
}

/// What takes the elements of stale owners away.
pub fn removal(kernel: &mut dyn Kernel, is_ipv4: bool, is_stale: impl Fn(&str) -> bool) -> Result<Transaction> {
    let table = table(is_ipv4);
    let mut transaction = Transaction::new(table.clone());
    for set in [BY_PORT, BY_ADDRESS, HAIRPIN] {
        let elements = kernel.elements(&table, set)?.unwrap_or_default();
        let stale = elements.iter().filter(|element| element.comment.as_deref().is_some_and(&is_stale));
        let keys: Vec<Bytes> = stale.map(|element| element.key).collect();
        if !keys.is_empty() {
            transaction.push(Command::DeleteElements { set: set.into(), keys });
        }
    }
    Ok(transaction)
}

/// The first mapping whose port somebody has.
pub fn taken<'a>(kernel: &mut dyn Kernel, mappings: &[&'a Mapping], is_ipv4: bool) -> Result<Option<&'a Mapping>> {
    for mapping in mappings {
        let (set, key) = key(mapping);
        if kernel.element(&table(is_ipv4), set, &key)?.is_some() {
            return Ok(Some(mapping));
        }
    }
    Ok(None)
}

/// The first mapping that is not in the kernel as `owner`'s, leading to `address`.
pub fn missing<'a>(
    kernel: &mut dyn Kernel,
    owner: &str,
    mappings: &[&'a Mapping],
    address: IpAddr,
) -> Result<Option<&'a Mapping>> {
    for mapping in mappings {
        let (set, key) = key(mapping);
        let target = Key::new().address(address).port(mapping.container_port).bytes();
        let wanted = Element::data(key, target).comment(owner);
        let found = kernel.element(&table(address.is_ipv4()), set, &key)?;
        if !found.is_some_and(|element| element.value == wanted.value && element.comment == wanted.comment) {
            return Ok(Some(mapping));
        }
    }
    Ok(None)
}
