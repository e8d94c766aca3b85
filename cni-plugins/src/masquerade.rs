//! Masquerading of what pods send out of the cluster: one table for all pods, and one map element a pod.
//!
//! `ip oarlock-cni` (and `ip6`) has a map from pod addresses to a chain for their network's rules. An ADD is one element, so
//! it costs the same with one pod and with thousands, and so does a new connection.
//!
//! The chain's name holds a hash of its rules: pods of an older configuration keep their older chain.

use std::net::IpAddr;

use ipnet::IpNet;
use oarlock_nft::{
    Chain, ChainKind, Command, Element, Expr, Family, Field, HookPoint, Kernel, Key, Netlink, NftError, PayloadBase,
    Reg, Rule, Set, Table, Transaction, Verdict,
};

use crate::call::{Owner, stable_hash};
use crate::error::{PluginError, Result};
use crate::linger;

pub const TABLE: &str = "oarlock-cni";
// Not "masquerade": nft could not name a map that is called like one of its own words.
const MAP: &str = "pods";
const CHAIN: &str = "postrouting";
const SOURCE_NAT: i32 = 100;

pub fn table(is_ipv4: bool) -> Table {
    Table::new(if is_ipv4 { Family::Ip } else { Family::Ip6 }, TABLE)
}

pub fn address_field(is_ipv4: bool) -> Field {
    if is_ipv4 { Field::Ipv4 } else { Field::Ipv6 }
}

pub fn load_source(is_ipv4: bool, to: Reg) -> Expr {
    let (offset, len_bytes) = if is_ipv4 { (12, 4) } else { (8, 16) };
    Expr::LoadPayload { base: PayloadBase::Network, offset, len_bytes, to }
}

pub fn load_destination(is_ipv4: bool, to: Reg) -> Expr {
    let (offset, len_bytes) = if is_ipv4 { (16, 4) } else { (24, 16) };
    Expr::LoadPayload { base: PayloadBase::Network, offset, len_bytes, to }
}

/// Expressions that go on only when the destination is in `net`.
pub fn destination_in(net: IpNet) -> Vec<Expr> {
    let bytes = oarlock_netlink::wire::address_bytes;
    let mut expressions = vec![load_destination(net.addr().is_ipv4(), Reg(0))];
    let mask = bytes(net.netmask());
    let xor = vec![0; mask.len()];
    expressions.push(Expr::Bitwise { register: Reg(0), mask, xor });
    expressions.push(Expr::Compare { register: Reg(0), equal: true, value: bytes(net.network()) });
    expressions
}

fn nft(what: &'static str) -> impl Fn(NftError) -> PluginError {
    move |source| PluginError::Nft { what, source }
}

/// Where pods of a network talk without masquerading.
fn exemptions(own: IpNet, excluded: &[IpNet]) -> Vec<IpNet> {
    let multicast: IpNet = if own.addr().is_ipv4() {
        IpNet::V4(ipnet::Ipv4Net::new_assert([224, 0, 0, 0].into(), 4))
    } else {
        IpNet::V6(ipnet::Ipv6Net::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8))
    };
    let same_family = excluded.iter().filter(|net| net.addr().is_ipv4() == own.addr().is_ipv4());
    let all: Vec<IpNet> = [own.trunc(), multicast].into_iter().chain(same_family.map(IpNet::trunc)).collect();
    IpNet::aggregate(&all)
}

fn chain_name(exempt: &[IpNet]) -> String {
    let texts: Vec<String> = exempt.iter().map(ToString::to_string).collect();
    let parts: Vec<&str> = texts.iter().map(String::as_str).collect();
    format!("masquerade-{:08x}", stable_hash(&parts) as u32)
}

/// Everything but the pods: made by the first ADD of a network, and the same however often it is made.
fn foundation(is_ipv4: bool, exempt: &[IpNet]) -> Transaction {
    let chain = chain_name(exempt);
    let mut transaction = Transaction::new(table(is_ipv4));
    transaction.push(Command::AddTable { comment: String::new(), exclusive: false });
    transaction.push(Command::AddSet(Set::verdict_map(MAP, &[address_field(is_ipv4)])));
    transaction.push(Command::AddChain(Chain::base(CHAIN, ChainKind::Nat, HookPoint::Postrouting, SOURCE_NAT)));
    transaction.push(Command::AddChain(Chain::regular(&chain)));
    transaction.push(Command::FlushChain(CHAIN.into()));
    transaction.push(Command::FlushChain(chain.clone()));
    let by_pod = vec![load_source(is_ipv4, Reg(0)), Expr::VerdictMap { map: MAP.into(), key: Reg(0) }];
    transaction.push(Command::AddRule(Rule::new(CHAIN, by_pod)));
    for net in exempt {
        let mut expressions = destination_in(*net);
        expressions.push(Expr::Verdict(Verdict::Return));
        transaction.push(Command::AddRule(Rule::new(&chain, expressions)));
    }
    transaction.push(Command::AddRule(Rule::new(&chain, vec![Expr::Masquerade])));
    transaction
}

/// Masquerades what `address` sends to anywhere but its own network and `excluded`.
pub fn add(owner: &Owner, address: IpNet, excluded: &[IpNet]) -> Result<()> {
    let failed = nft("cannot masquerade the container's address");
    let mut kernel = Netlink::open().map_err(&failed)?;
    let is_ipv4 = address.addr().is_ipv4();
    let exempt = exemptions(address, excluded);
    let verdict = Verdict::Goto(chain_name(&exempt));
    let element = Element::verdict(Key::single(address.addr()), verdict).comment(owner.as_str());
    let mut pod = Transaction::new(table(is_ipv4));
    pod.push(Command::AddElements { set: MAP.into(), elements: vec![element], exclusive: true });
    match kernel.commit(&pod) {
        Ok(()) => Ok(()),
        Err(error) if error.is_not_found() => {
            let mut whole = foundation(is_ipv4, &exempt);
            whole.commands.append(&mut pod.commands);
            kernel.commit(&whole).map_err(failed)
        }
        // A former holder of the address was not cleaned up after: the address store says who has it now.
        Err(error) if error.is_exists() => {
            let keys = vec![Key::single(address.addr())];
            pod.commands.insert(0, Command::DeleteElements { set: MAP.into(), keys });
            kernel.commit(&pod).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Takes away the elements of which `is_stale` says so, given their owner; also fine when there is no table.
fn remove_where(kernel: &mut Netlink, is_ipv4: bool, is_stale: impl Fn(&str) -> bool) -> Result<()> {
    let failed = nft("cannot remove masquerading");
    let table = table(is_ipv4);
    let elements = kernel.elements(&table, MAP).map_err(&failed)?.unwrap_or_default();
    let stale = elements.iter().filter(|element| element.comment.as_deref().is_some_and(&is_stale));
    let keys: Vec<_> = stale.map(|element| element.key).collect();
    if keys.is_empty() {
        return Ok(());
    }
    let mut transaction = Transaction::new(table);
    transaction.push(Command::DeleteElements { set: MAP.into(), keys });
    match kernel.commit(&transaction) {
        Err(error) if error.is_not_found() => Ok(()),
        other => other.map_err(failed),
    }
}

/// Takes away what belongs to `owner`: looked for at its addresses where they are known, which costs the same with any
/// number of pods, and else among all.
pub fn remove(owner: &Owner, addresses: &[IpAddr]) -> Result<()> {
    let mut kernel = Netlink::open().map_err(nft("cannot remove masquerading"))?;
    let removed = if addresses.is_empty() {
        let mine = |found: &str| found == owner.as_str();
        [true, false].into_iter().try_for_each(|is_ipv4| remove_where(&mut kernel, is_ipv4, mine))
    } else {
        addresses.iter().try_for_each(|address| remove_at(&mut kernel, owner, *address))
    };
    linger::keep_open(kernel);
    removed
}

fn remove_at(kernel: &mut Netlink, owner: &Owner, address: IpAddr) -> Result<()> {
    let failed = nft("cannot remove masquerading");
    let (table, key) = (table(address.is_ipv4()), Key::single(address));
    let found = kernel.element(&table, MAP, &key).map_err(&failed)?;
    if found.and_then(|element| element.comment).as_deref() != Some(owner.as_str()) {
        return Ok(());
    }
    let mut transaction = Transaction::new(table);
    transaction.push(Command::DeleteElements { set: MAP.into(), keys: vec![key] });
    match kernel.commit(&transaction) {
        Err(error) if error.is_not_found() => Ok(()),
        other => other.map_err(failed),
    }
}

/// Takes away what belongs to attachments to `network` that are none of `valid`.
pub fn keep_only(network: &str, valid: &[Owner]) -> Result<()> {
    let mut kernel = Netlink::open().map_err(nft("cannot remove masquerading"))?;
    let stale = |found: &str| Owner::is_stale(found, network, valid);
    let removed = [true, false].into_iter().try_for_each(|is_ipv4| remove_where(&mut kernel, is_ipv4, stale));
    linger::keep_open(kernel);
    removed
}

/// Whether `address` is masqueraded for `owner`.
pub fn check(owner: &Owner, address: IpAddr) -> Result<()> {
    let mut kernel = Netlink::open().map_err(nft("cannot read masquerading"))?;
    let found = kernel.element(&table(address.is_ipv4()), MAP, &Key::single(address));
    let found = found.map_err(nft("cannot read masquerading"))?;
    if found.is_some_and(|element| element.comment.as_deref() == Some(owner.as_str())) {
        Ok(())
    } else {
        Err(PluginError::Drift(format!("address {address} is not masqueraded")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oarlock_nft::Fake;
    use oarlock_nft::trace::{Outcome, Packet, trace};

    fn outcome(fake: &mut Fake, source: [u8; 4], destination: [u8; 4]) -> Outcome {
        let packet = Packet {
            protocol: 6,
            source: source.into(),
            source_port: 40_000,
            destination: destination.into(),
            destination_port: 80,
            from_node: false,
        };
        trace(fake, &[[10, 42, 0, 1].into()], packet, |_| 0)
    }

    #[test]
    fn only_what_a_pod_sends_out_of_the_cluster_is_masqueraded() {
        let exempt = exemptions(
            "10.42.0.5/24".parse().unwrap(),
            &["10.42.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()],
        );
        let mut transaction = foundation(true, &exempt);
        let element = Element::verdict(Key::single([10, 42, 0, 5].into()), Verdict::Goto(chain_name(&exempt)));
        transaction.push(Command::AddElements { set: MAP.into(), elements: vec![element], exclusive: true });
        let mut fake = Fake::new();
        fake.commit(&transaction).unwrap();
        let masqueraded = |outcome| matches!(outcome, Outcome::Delivered { masqueraded: true, .. });
        assert!(masqueraded(outcome(&mut fake, [10, 42, 0, 5], [192, 0, 2, 1])));
        assert!(!masqueraded(outcome(&mut fake, [10, 42, 0, 5], [10, 42, 7, 9])));
        assert!(!masqueraded(outcome(&mut fake, [10, 42, 0, 5], [224, 0, 0, 5])));
        assert!(!masqueraded(outcome(&mut fake, [10, 42, 0, 6], [192, 0, 2, 1])));
    }

    #[test]
    fn the_foundation_can_be_laid_again() {
        let exempt = exemptions("10.42.0.5/24".parse().unwrap(), &[]);
        let mut fake = Fake::new();
        fake.commit(&foundation(true, &exempt)).unwrap();
        fake.commit(&foundation(true, &exempt)).unwrap();
        assert_eq!(fake.chains(&table(true)).unwrap().len(), 2);
    }
}
