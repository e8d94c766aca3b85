//! Masquerading of what pods send out of the cluster: one map element a pod.
//!
//! A map leads from pod addresses to a chain for their network's rules. An ADD is one element, so it costs the same with one
//! pod and with thousands, and so does a new connection. The chain's name holds a hash of its rules: pods of an older
//! configuration keep their older chain.

use ipnet::IpNet;
use oarlock_nft::{Chain, ChainKind, Element, Expr, HookPoint, Key, Reg, Set, Verdict};
use serde::{Deserialize, Serialize};

use crate::foundation::{Foundation, address_field, destination_in, load_source, table};
use crate::owner::stable_hash;
use crate::part::Entry;

// Not "masquerade": nft could not name a map that is called like one of its own words.
pub const MAP: &str = "pods";
const CHAIN: &str = "postrouting";
const SOURCE_NAT: i32 = 100;

/// An address whose packets to anywhere but its own network and `excluded` are masqueraded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Masquerade {
    pub address: IpNet,
    pub excluded: Vec<IpNet>,
}

impl Masquerade {
    pub(crate) fn is_ipv4(&self) -> bool {
        self.address.addr().is_ipv4()
    }

    /// Where the pod talks without masquerading.
    fn exemptions(&self) -> Vec<IpNet> {
        let is_ipv4 = self.is_ipv4();
        let multicast: IpNet = if is_ipv4 {
            IpNet::V4(ipnet::Ipv4Net::new_assert([224, 0, 0, 0].into(), 4))
        } else {
            IpNet::V6(ipnet::Ipv6Net::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8))
        };
        let same_family = self.excluded.iter().filter(|net| net.addr().is_ipv4() == is_ipv4);
        let all: Vec<IpNet> =
            [self.address.trunc(), multicast].into_iter().chain(same_family.map(IpNet::trunc)).collect();
        IpNet::aggregate(&all)
    }

    pub(crate) fn foundation(&self) -> Foundation {
        let is_ipv4 = self.is_ipv4();
        let exempt = self.exemptions();
        let chain = chain_name(&exempt);
        let mut foundation = Foundation::new(table(is_ipv4));
        foundation.set(Set::verdict_map(MAP, &[address_field(is_ipv4)]));
        foundation.chain(Chain::base(CHAIN, ChainKind::Nat, HookPoint::Postrouting, SOURCE_NAT));
        foundation.chain(Chain::regular(&chain));
        foundation.rule(CHAIN, vec![load_source(is_ipv4, Reg(0)), Expr::VerdictMap { map: MAP.into(), key: Reg(0) }]);
        for net in exempt {
            let mut expressions = destination_in(net);
            expressions.push(Expr::Verdict(Verdict::Return));
            foundation.rule(&chain, expressions);
        }
        foundation.rule(&chain, vec![Expr::Masquerade]);
        foundation
    }

    pub(crate) fn entries(&self, owner: &str) -> Vec<Entry> {
        let verdict = Verdict::Goto(chain_name(&self.exemptions()));
        vec![Entry::own(MAP, Element::verdict(Key::single(self.address.addr()), verdict).comment(owner))]
    }
}

fn chain_name(exempt: &[IpNet]) -> String {
    let texts: Vec<String> = exempt.iter().map(ToString::to_string).collect();
    let parts: Vec<&str> = texts.iter().map(String::as_str).collect();
    format!("masquerade-{:08x}", stable_hash(&parts) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oarlock_nft::trace::{Outcome, Packet, trace};
    use oarlock_nft::{Command, Fake, Kernel};

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
        let part = Masquerade {
            address: "10.42.0.5/24".parse().unwrap(),
            excluded: vec!["10.42.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()],
        };
        let mut transaction = part.foundation().transaction();
        let elements = part.entries("x").into_iter().map(|entry| entry.element).collect();
        transaction.push(Command::AddElements { set: MAP.into(), elements, exclusive: true });
        let mut fake = Fake::new();
        fake.commit(&transaction).unwrap();
        let masqueraded = |outcome| matches!(outcome, Outcome::Delivered { masqueraded: true, .. });
        assert!(masqueraded(outcome(&mut fake, [10, 42, 0, 5], [192, 0, 2, 1])));
        assert!(!masqueraded(outcome(&mut fake, [10, 42, 0, 5], [10, 42, 7, 9])));
        assert!(!masqueraded(outcome(&mut fake, [10, 42, 0, 5], [224, 0, 0, 5])));
        assert!(!masqueraded(outcome(&mut fake, [10, 42, 0, 6], [192, 0, 2, 1])));
    }

    #[test]
    fn the_foundation_can_be_laid_again_and_knows_whether_it_is_there() {
        let part = Masquerade { address: "10.42.0.5/24".parse().unwrap(), excluded: Vec::new() };
        let foundation = part.foundation();
        let mut fake = Fake::new();
        assert!(foundation.broken_chain(&fake.rules(&foundation.table).unwrap()).is_some());
        fake.commit(&foundation.transaction()).unwrap();
        fake.commit(&foundation.transaction()).unwrap();
        assert_eq!(fake.chains(&table(true)).unwrap().len(), 2);
        assert_eq!(foundation.broken_chain(&fake.rules(&foundation.table).unwrap()), None);
        fake.flush_rules();
        assert_eq!(foundation.broken_chain(&fake.rules(&foundation.table).unwrap()), Some(CHAIN));
    }
}
