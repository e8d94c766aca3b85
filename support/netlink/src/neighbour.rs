//! Neighbours: permanent entries of the ARP and NDP tables.

use std::net::IpAddr;

use crate::Result;
use crate::address::family;
use crate::connection::Connection;
use crate::error::gone_is_fine;
use crate::link::Mac;
use crate::wire::{Received, address_bytes, attributes, flags, read_address, read_u32};

const NEW_NEIGHBOUR: u16 = 28;
const DELETE_NEIGHBOUR: u16 = 29;
const GET_NEIGHBOUR: u16 = 30;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const PERMANENT: u16 = 0x80;
const HEADER_BYTES: usize = 12;

/// Which Ethernet address an IP address has on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    pub link: u32,
    pub address: IpAddr,
    pub mac: Option<Mac>,
    pub permanent: bool,
}

fn header(neighbour: &Neighbour) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[0] = family(neighbour.address);
    bytes[4..8].copy_from_slice(&neighbour.link.to_ne_bytes());
    bytes[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
    bytes
}

/// The header for entries of a device itself, not of the bridge that it is in.
fn bridge_header(link: u32) -> [u8; HEADER_BYTES] {
    const SELF: u8 = 2;
    let mut bytes = [0; HEADER_BYTES];
    bytes[0] = libc::AF_BRIDGE as u8;
    bytes[4..8].copy_from_slice(&link.to_ne_bytes());
    bytes[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
    bytes[10] = SELF;
    bytes
}

impl Connection {
    /// Writes a permanent entry, in the place of any other for the address.
    pub fn set_neighbour(&mut self, neighbour: &Neighbour) -> Result<()> {
        self.request("set a neighbour", NEW_NEIGHBOUR, flags::CREATE | flags::REPLACE, |w| {
            w.raw(&header(neighbour));
            w.attribute(NDA_DST, &address_bytes(neighbour.address));
            if let Some(mac) = neighbour.mac {
                w.attribute(NDA_LLADDR, &mac.0);
            }
        })
    }

    /// Deletes an entry; one that is gone already counts as deleted.
    pub fn delete_neighbour(&mut self, neighbour: &Neighbour) -> Result<()> {
        gone_is_fine(self.request("delete a neighbour", DELETE_NEIGHBOUR, 0, |w| {
            w.raw(&header(neighbour));
            w.attribute(NDA_DST, &address_bytes(neighbour.address));
        }))
    }

    /// The addresses behind the Ethernet addresses of a VXLAN device.
    pub fn forwarding(&mut self, link: u32) -> Result<Vec<(Mac, IpAddr)>> {
        let mut found = Vec::new();
        self.query(
            "list forwarding entries",
            GET_NEIGHBOUR,
            flags::DUMP,
            |w| w.raw(&bridge_header(0)),
            |message| found.extend(parse(&message)),
        )?;
        let of_link = found.into_iter().filter(|entry| entry.link == link);
        Ok(of_link.filter_map(|entry| Some((entry.mac?, entry.address))).collect())
    }

    /// Sends what goes to an Ethernet address of a VXLAN device to an address; in the place of any other.
    pub fn set_forwarding(&mut self, link: u32, mac: Mac, address: IpAddr) -> Result<()> {
        self.request("set a forwarding entry", NEW_NEIGHBOUR, flags::CREATE | flags::REPLACE, |w| {
            w.raw(&bridge_header(link));
            w.attribute(NDA_LLADDR, &mac.0);
            w.attribute(NDA_DST, &address_bytes(address));
        })
    }

    /// Deletes a forwarding entry; one that is gone already counts as deleted.
    pub fn delete_forwarding(&mut self, link: u32, mac: Mac, address: IpAddr) -> Result<()> {
        gone_is_fine(self.request("delete a forwarding entry", DELETE_NEIGHBOUR, 0, |w| {
            w.raw(&bridge_header(link));
            w.attribute(NDA_LLADDR, &mac.0);
            w.attribute(NDA_DST, &address_bytes(address));
        }))
    }

    /// All neighbours of the namespace.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>> {
        let mut found = Vec::new();
        self.query(
            "list neighbours",
            GET_NEIGHBOUR,
            flags::DUMP,
            |w| w.raw(&[0; HEADER_BYTES]),
            |message| {
                found.extend(parse(&message));
            },
        )?;
        Ok(found)
    }
}

pub(crate) fn parse(message: &Received<'_>) -> Option<Neighbour> {
    if message.kind != NEW_NEIGHBOUR {
        return None;
    }
    let (header, rest) = message.payload.split_at_checked(HEADER_BYTES)?;
    let (mut address, mut mac) = (None, None);
    for (kind, value) in attributes(rest) {
        match kind {
            NDA_DST => address = read_address(value),
            NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            _ => {}
        }
    }
    let state = crate::wire::read_u16(&header[8..])?;
    Some(Neighbour { link: read_u32(&header[4..])?, address: address?, mac, permanent: state & PERMANENT != 0 })
}
