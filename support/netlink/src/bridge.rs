//! Bridges, as far as their packets are shown to the rules of IPv4 and IPv6 (`br_netfilter`).

use crate::Result;
use crate::connection::Connection;
use crate::link::link_header;
use crate::wire::{Received, attribute, flags, read_string, read_u32};

const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const LINK_HEADER_BYTES: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_NF_CALL_IPTABLES: u16 = 36;
const IFLA_BR_NF_CALL_IP6TABLES: u16 = 37;

/// A bridge, and what it was told about its packets, whatever holds for all bridges of the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    pub index: u32,
    pub name: String,
    pub shows_ipv4: bool,
    pub shows_ipv6: bool,
}

impl Connection {
    /// All bridges of the namespace.
    pub fn bridges(&mut self) -> Result<Vec<Bridge>> {
        let mut found = Vec::new();
        let only_bridges = |w: &mut crate::wire::Writer| {
            link_header(w, 0, 0, 0, 0);
            w.nest(IFLA_LINKINFO, |w| w.string(IFLA_INFO_KIND, "bridge"));
        };
        self.query("list bridges", GET_LINK, flags::DUMP, only_bridges, |message| found.extend(parse(&message)))?;
        Ok(found)
    }

    /// Has a bridge show the packets of a family to its rules, where the kernel has `br_netfilter`.
    pub fn show_bridged(&mut self, bridge: u32, is_ipv4: bool) -> Result<()> {
        self.request("let a bridge show its packets", NEW_LINK, 0, |w| {
            link_header(w, 0, bridge, 0, 0);
            w.nest(IFLA_LINKINFO, |w| {
                w.string(IFLA_INFO_KIND, "bridge");
                let kind = if is_ipv4 { IFLA_BR_NF_CALL_IPTABLES } else { IFLA_BR_NF_CALL_IP6TABLES };
                w.nest(IFLA_INFO_DATA, |w| w.u8(kind, 1));
            });
        })
    }
}

pub(crate) fn parse(message: &Received<'_>) -> Option<Bridge> {
    let (header, rest) = message.payload.split_at_checked(LINK_HEADER_BYTES)?;
    let information = attribute(rest, IFLA_LINKINFO)?;
    let kind = attribute(information, IFLA_INFO_KIND).map(read_string);
    if message.kind != NEW_LINK || kind.as_deref() != Some("bridge") {
        return None;
    }
    let data = attribute(information, IFLA_INFO_DATA).unwrap_or_default();
    let is_set = |kind| attribute(data, kind).is_some_and(|value| value.first() == Some(&1));
    Some(Bridge {
        index: read_u32(&header[4..])?,
        name: read_string(attribute(rest, IFLA_IFNAME)?),
        shows_ipv4: is_set(IFLA_BR_NF_CALL_IPTABLES),
        shows_ipv6: is_set(IFLA_BR_NF_CALL_IP6TABLES),
    })
}
