//! Frames from a container's port pass only when they come from the container's own Ethernet address.

use oarlock_netlink::Mac;
use oarlock_nft::{
    Chain, ChainKind, Element, Expr, Family, Field, HookPoint, Key, MetaKey, PayloadBase, Reg, Set, Table, Verdict,
};
use serde::{Deserialize, Serialize};

use crate::foundation::{Foundation, TABLE};
use crate::part::Entry;

const PORTS: &str = "checked-ports";
const SOURCES: &str = "own-addresses";
const CHAIN: &str = "spoof-check";
/// Before everything that other tables look at in bridges.
const PRIORITY: i32 = -300;
/// Where the Ethernet address begins in registers, after the name of a link.
const SECOND: Reg = Reg(4);
const ETHERNET_SOURCE: u32 = 6;

/// Every set that has elements of single attachments.
pub const SETS: [&str; 2] = [PORTS, SOURCES];

/// A port of a bridge, and the only Ethernet address that frames may come from there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoofCheck {
    pub port: String,
    #[serde(with = "text")]
    pub mac: Mac,
}

/// The table of what passes bridges.
pub fn table() -> Table {
    Table::new(Family::Bridge, TABLE)
}

impl SpoofCheck {
    pub(crate) fn foundation() -> Foundation {
        let mut foundation = Foundation::new(table());
        foundation.set(Set::new(PORTS, &[Field::LinkName]));
        foundation.set(Set::new(SOURCES, &[Field::LinkName, Field::Ethernet]));
        foundation.chain(Chain::base(CHAIN, ChainKind::Filter, HookPoint::Prerouting, PRIORITY));
        let foreign = vec![
            Expr::LoadMeta { key: MetaKey::InputName, to: Reg(0) },
            Expr::InSet { set: PORTS.into(), key: Reg(0), inverted: false },
            Expr::LoadPayload { base: PayloadBase::Link, offset: ETHERNET_SOURCE, len_bytes: 6, to: SECOND },
            Expr::InSet { set: SOURCES.into(), key: Reg(0), inverted: true },
            Expr::Verdict(Verdict::Drop),
        ];
        foundation.rule(CHAIN, foreign);
        foundation
    }

    pub(crate) fn entries(&self, owner: &str) -> Vec<Entry> {
        let port = Key::new().link_name(&self.port);
        let element = |key: Key| Element::key(key.bytes()).comment(owner);
        vec![Entry::own(SOURCES, element(port.ethernet(self.mac.0))), Entry::own(PORTS, element(port))]
    }
}

/// As people write it.
mod text {
    use super::{Deserialize, Mac};

    pub fn serialize<S: serde::Serializer>(mac: &Mac, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(mac)
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
