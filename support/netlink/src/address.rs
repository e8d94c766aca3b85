//! Addresses of links.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::Result;
use crate::connection::Connection;
use crate::error::gone_is_fine;
use crate::wire::{Received, address_bytes, attributes, flags, read_address, read_u32};

const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 2;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_HOST: u8 = 254;
const HEADER_BYTES: usize = 8;

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub link: u32,
    pub net: IpNet,
}

pub(crate) fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

impl Connection {
    /// Gives a link an address. IPv6 addresses are usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// EEXIST (see [`crate::NetlinkError::is_exists`]) when the link has it already.
    pub fn add_address(&mut self, link: u32, net: IpNet) -> Result<()> {
        self.add_scoped_address(link, net, SCOPE_UNIVERSE)
    }

    /// Gives `lo` an address that only this node itself has and that is never chosen as a source for anything else. Fine
    /// when it is there already.
    pub fn ensure_node_address(&mut self, address: IpAddr) -> Result<()> {
        let lo = self.require_link("lo")?;
        match self.add_scoped_address(lo.index, IpNet::from(address), SCOPE_HOST) {
            Err(error) if error.is_exists() => Ok(()),
            other => other,
        }
    }

    fn add_scoped_address(&mut self, link: u32, net: IpNet, scope: u8) -> Result<()> {
        self.request("add an address", NEW_ADDRESS, flags::CREATE | flags::EXCL, |w| {
            let no_detection = if net.addr().is_ipv6() { IFA_F_NODAD } else { 0 };
            w.raw(&[family(net.addr()), net.prefix_len(), no_detection, scope]);
            w.raw(&link.to_ne_bytes());
            let bytes = address_bytes(net.addr());
            w.attribute(IFA_LOCAL, &bytes);
            w.attribute(IFA_ADDRESS, &bytes);
            if let (IpNet::V4(net), true) = (net, net.prefix_len() < 31) {
                w.attribute(IFA_BROADCAST, &net.broadcast().octets());
            }
        })
    }

    /// As [`Connection::add_address`], and fine when the link has it already.
    pub fn ensure_address(&mut self, link: u32, net: IpNet) -> Result<()> {
        match self.add_address(link, net) {
            Err(error) if error.is_exists() => Ok(()),
            other => other,
        }
    }

    /// Takes an address away; one that is gone already counts as removed.
    pub fn delete_address(&mut self, link: u32, net: IpNet) -> Result<()> {
        gone_is_fine(self.request("delete an address", DELETE_ADDRESS, 0, |w| {
            w.raw(&[family(net.addr()), net.prefix_len(), 0, 0]);
            w.raw(&link.to_ne_bytes());
            w.attribute(IFA_LOCAL, &address_bytes(net.addr()));
        }))
    }

    /// All addresses of the namespace.
    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        let mut found = Vec::new();
        self.query(
            "list addresses",
            GET_ADDRESS,
            flags::DUMP,
            |w| w.raw(&[0; HEADER_BYTES]),
            |message| {
                found.extend(parse(&message));
            },
        )?;
        Ok(found)
    }
}

pub(crate) fn parse(message: &Received<'_>) -> Option<Address> {
    if message.kind != NEW_ADDRESS {
        return None;
    }
    let (header, rest) = message.payload.split_at_checked(HEADER_BYTES)?;
    let mut address = None;
    for (kind, value) in attributes(rest) {
        match kind {
            IFA_LOCAL => address = read_address(value),
            IFA_ADDRESS => address = address.or_else(|| read_address(value)),
            _ => {}
        }
    }
    Some(Address { link: read_u32(&header[4..])?, net: IpNet::new(address?, header[1]).ok()? })
}
