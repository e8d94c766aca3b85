//! VLANs of bridge ports.

use crate::Result;
use crate::connection::Connection;
use crate::error::gone_is_fine;
use crate::link::link_header;
use crate::wire::{Received, Writer, attribute, attributes, flags, read_u16, read_u32};

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const SET_LINK: u16 = 19;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_EXT_MASK: u16 = 29;
const BRIDGE_VLAN_INFO: u16 = 2;
const WANT_VLANS: u32 = 2;
const IS_DEFAULT: u16 = 2;
const IS_UNTAGGED: u16 = 4;
const LINK_HEADER_BYTES: usize = 16;

/// A VLAN that a port belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortVlan {
    pub id: u16,
    /// Frames that come in without a tag belong to it, and its frames leave without one.
    pub is_access: bool,
}

fn write(w: &mut Writer, link: u32, vlan: &PortVlan) {
    link_header(w, libc::AF_BRIDGE as u8, link, 0, 0);
    w.nest(IFLA_AF_SPEC, |w| {
        let flags = if vlan.is_access { IS_DEFAULT | IS_UNTAGGED } else { 0 };
        w.attribute(BRIDGE_VLAN_INFO, &[flags.to_ne_bytes(), vlan.id.to_ne_bytes()].concat());
    });
}

impl Connection {
    /// Puts a bridge port into a VLAN.
    pub fn add_port_vlan(&mut self, link: u32, vlan: &PortVlan) -> Result<()> {
        self.request("put a bridge port into a VLAN", SET_LINK, 0, |w| write(w, link, vlan))
    }

    /// Takes a bridge port out of a VLAN; one that is not in it is fine.
    pub fn remove_port_vlan(&mut self, link: u32, id: u16) -> Result<()> {
        let vlan = PortVlan { id, is_access: false };
        gone_is_fine(self.request("take a bridge port out of a VLAN", DELETE_LINK, 0, |w| write(w, link, &vlan)))
    }

    /// The VLANs of a bridge port.
    pub fn port_vlans(&mut self, link: u32) -> Result<Vec<PortVlan>> {
        let mut found = Vec::new();
        self.query(
            "list the VLANs of bridge ports",
            GET_LINK,
            flags::DUMP,
            |w| {
                link_header(w, libc::AF_BRIDGE as u8, 0, 0, 0);
                w.u32(IFLA_EXT_MASK, WANT_VLANS);
            },
            |message| found.extend(parse(&message, link).unwrap_or_default()),
        )?;
        Ok(found)
    }
}

pub(crate) fn parse(message: &Received<'_>, link: u32) -> Option<Vec<PortVlan>> {
    let (header, rest) = message.payload.split_at_checked(LINK_HEADER_BYTES)?;
    if message.kind != NEW_LINK || read_u32(&header[4..])? != link {
        return None;
    }
    let infos = attributes(attribute(rest, IFLA_AF_SPEC)?).filter(|(kind, _)| *kind == BRIDGE_VLAN_INFO);
    let vlan = |(_, value): (u16, &[u8])| {
        let flags = read_u16(value)?;
        Some(PortVlan { id: read_u16(value.get(2..)?)?, is_access: flags & IS_DEFAULT != 0 })
    };
    Some(infos.filter_map(vlan).collect())
}
