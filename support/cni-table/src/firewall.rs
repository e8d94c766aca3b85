//! Keeping bridges apart whose networks ask for it.
//!
//! New connections from one of these bridges to another are dropped, others pass. The administrator's own rules go into the
//! chain `firewall-admin`, which comes first and is never touched.

use oarlock_nft::{Bytes, Chain, ChainKind, CtKey, Element, Expr, Field, HookPoint, Key, MetaKey, Reg, Set, Verdict};
use serde::{Deserialize, Serialize};

use crate::foundation::{Foundation, table};
use crate::part::Entry;

const ADMIN: &str = "firewall-admin";
const FORWARD: &str = "firewall-forward";
const BETWEEN: &str = "firewall-between-bridges";
pub const BRIDGES: &str = "firewall-bridges";
/// Each bridge with itself: inside one, everything passes.
const SAME: &str = "firewall-same-bridge";
/// Where the name of the outgoing link begins in registers.
const SECOND_NAME: Reg = Reg(4);

/// A family of addresses of a container, whose bridge may be one that is kept apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firewall {
    pub is_ipv4: bool,
    pub bridge: Option<String>,
}

/// Where a bridge that is kept apart is listed.
pub fn places(bridge: &str) -> [(&'static str, Bytes); 2] {
    [(BRIDGES, Key::new().link_name(bridge).bytes()), (SAME, Key::new().link_name(bridge).link_name(bridge).bytes())]
}

fn load_names() -> Vec<Expr> {
    vec![
        Expr::LoadMeta { key: MetaKey::InputName, to: Reg(0) },
        Expr::LoadMeta { key: MetaKey::OutputName, to: SECOND_NAME },
    ]
}

impl Firewall {
    pub(crate) fn foundation(&self) -> Foundation {
        let mut foundation = Foundation::new(table(self.is_ipv4));
        foundation.set(Set::new(BRIDGES, &[Field::LinkName]));
        foundation.set(Set::new(SAME, &[Field::LinkName, Field::LinkName]));
        foundation.foreign_chain(Chain::regular(ADMIN));
        foundation.chain(Chain::regular(BETWEEN));
        foundation.chain(Chain::base(FORWARD, ChainKind::Filter, HookPoint::Forward, 0));
        let established = (2_u32 | 4).to_ne_bytes().to_vec();
        let known = vec![
            Expr::LoadCt { key: CtKey::State, to: Reg(0) },
            Expr::Bitwise { register: Reg(0), mask: established, xor: vec![0; 4] },
            Expr::Compare { register: Reg(0), equal: false, value: vec![0; 4] },
            Expr::Verdict(Verdict::Accept),
        ];
        let in_bridges = |key| Expr::InSet { set: BRIDGES.into(), key, inverted: false };
        let mut between = load_names();
        between.extend([in_bridges(Reg(0)), in_bridges(SECOND_NAME), Expr::Verdict(Verdict::Jump(BETWEEN.into()))]);
        let mut same = load_names();
        same.push(Expr::InSet { set: SAME.into(), key: Reg(0), inverted: false });
        same.push(Expr::Verdict(Verdict::Return));
        foundation.rule(FORWARD, vec![Expr::Verdict(Verdict::Jump(ADMIN.into()))]);
        foundation.rule(FORWARD, known);
        foundation.rule(FORWARD, between);
        foundation.rule(BETWEEN, same);
        foundation.rule(BETWEEN, vec![Expr::Verdict(Verdict::Drop)]);
        foundation
    }

    pub(crate) fn entries(&self) -> Vec<Entry> {
        let places = self.bridge.iter().flat_map(|bridge| places(bridge));
        places.map(|(set, key)| Entry::shared(set, Element::key(key))).collect()
    }
}
