//! Links: veth pairs, bridges, and what is changed on a link that exists.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::str::FromStr;

use crate::connection::Connection;
use crate::error::gone_is_fine;
use crate::wire::{Received, Writer, attribute, attributes, flags, read_string, read_u16, read_u32};
use crate::{NetlinkError, Result};

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const SET_LINK: u16 = 19;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_PROMISCUITY: u16 = 30;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const VXLAN_LOCAL: u16 = 4;
const VXLAN_LOCAL_V6: u16 = 17;

const LINK_HEADER_BYTES: usize = 16;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not six hexadecimal bytes with colons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an Ethernet address")]
pub struct InvalidMac(String);

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> std::result::Result<Mac, InvalidMac> {
        let bytes: Option<Vec<u8>> = text
            .split([':', '-'])
            .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+')))
            .collect();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Mac).ok_or_else(|| InvalidMac(text.to_owned()))
    }
}

/// A link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    pub up: bool,
    /// The bridge, or other device, that the link belongs to.
    pub master: Option<u32>,
    /// `veth`, `bridge` …; none for physical links and `lo`.
    pub kind: Option<String>,
    /// The index of the other end of a veth pair, in the other end's namespace.
    pub peer: Option<u32>,
    /// How many users asked for promiscuous mode.
    pub promiscuity: u32,
    /// Whether somebody switched promiscuous mode on by the link's flag.
    pub promiscuous: bool,
    /// Whether it takes frames for all multicast groups.
    pub all_multicast: bool,
    /// How many packets may wait to be sent.
    pub queue_length: u32,
    /// Whether a bridge looks at VLAN tags.
    pub vlan_filtering: bool,
    /// Whether this bridge port sends frames back where they came from.
    pub hairpin: bool,
    /// Whether this bridge port is kept from other ports like it.
    pub isolated: bool,
    /// The address that packets of a VXLAN device leave from.
    pub local: Option<std::net::IpAddr>,
}

/// A veth pair to be made in one step: the near end here, the far end in another namespace.
#[derive(Debug)]
pub struct VethPair<'a> {
    pub name: &'a str,
    /// The bridge that the near end is put into; it is brought up with it.
    pub master: Option<u32>,
    pub mac: Option<Mac>,
    pub peer_name: &'a str,
    pub peer_mac: Option<Mac>,
    /// The far end's namespace.
    pub peer_netns: BorrowedFd<'a>,
    /// Bytes, both ends; 0 leaves the kernel's default.
    pub mtu: u32,
}

/// A VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan<'a> {
    pub name: &'a str,
    pub mac: Mac,
    /// The network's number, 24 bits.
    pub id: u32,
    /// The address of this node that packets leave from.
    pub local: std::net::IpAddr,
    pub port: u16,
    /// Bytes.
    pub mtu: u32,
}

/// A change of a link; what is `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkChange {
    pub up: Option<bool>,
    pub promiscuous: Option<bool>,
    pub all_multicast: Option<bool>,
    pub queue_length: Option<u32>,
    pub mtu: Option<u32>,
    pub mac: Option<Mac>,
    pub name: Option<String>,
    /// `Some(0)` takes the link out of its bridge.
    pub master: Option<u32>,
}

pub(crate) fn link_header(writer: &mut Writer, family: u8, index: u32, link_flags: u32, change: u32) {
    writer.raw(&[family, 0, 0, 0]);
    writer.raw(&index.to_ne_bytes());
    writer.raw(&link_flags.to_ne_bytes());
    writer.raw(&change.to_ne_bytes());
}

const UP: u32 = libc::IFF_UP as u32;
const PROMISCUOUS: u32 = libc::IFF_PROMISC as u32;
const ALL_MULTICAST: u32 = libc::IFF_ALLMULTI as u32;

impl Connection {
    /// Makes a veth pair. The near end is up at once, the far end is not. Returns the near end as it is before it is put into
    /// its bridge, where the kernel tells it (Linux 6.2): two questions less.
    pub fn create_veth(&mut self, pair: &VethPair<'_>) -> Result<Option<Link>> {
        let mut made = None;
        let flags = flags::CREATE | flags::EXCL | flags::ECHO;
        let body = |w: &mut Writer| {
            link_header(w, 0, 0, UP, UP);
            w.string(IFLA_IFNAME, pair.name);
            common_attributes(w, pair.mac, pair.mtu);
            if let Some(master) = pair.master {
                w.u32(IFLA_MASTER, master);
            }
            w.nest(IFLA_LINKINFO, |w| {
                w.string(IFLA_INFO_KIND, "veth");
                w.nest(IFLA_INFO_DATA, |w| {
                    w.nest(VETH_INFO_PEER, |w| {
                        // Up is refused here: this end does not know the other one yet.
                        link_header(w, 0, 0, 0, 0);
                        w.string(IFLA_IFNAME, pair.peer_name);
                        common_attributes(w, pair.peer_mac, pair.mtu);
                        w.u32(IFLA_NET_NS_FD, pair.peer_netns.as_raw_fd().cast_unsigned());
                    });
                });
            });
        };
        let told = |message: Received<'_>| made = parse(&message).or(made.take());
        self.query("create a veth pair", NEW_LINK, flags, body, told)?;
        Ok(made.filter(|link| link.name == pair.name && link.peer.is_some()))
    }

    /// Makes a bridge, not yet up.
    pub fn create_bridge(&mut self, name: &str, mac: Option<Mac>, mtu: u32, vlan_filtering: bool) -> Result<()> {
        self.request("create a bridge", NEW_LINK, flags::CREATE | flags::EXCL, |w| {
            link_header(w, 0, 0, 0, 0);
            w.string(IFLA_IFNAME, name);
            common_attributes(w, mac, mtu);
            w.nest(IFLA_LINKINFO, |w| {
                w.string(IFLA_INFO_KIND, "bridge");
                if vlan_filtering {
                    w.nest(IFLA_INFO_DATA, |w| w.u8(IFLA_BR_VLAN_FILTERING, 1));
                }
            });
        })
    }

    /// Makes a link of a kind that needs no more than its name, up.
    pub(crate) fn create_plain_link(&mut self, name: &str, kind: &str, mtu: u32) -> Result<()> {
        self.request("create a link", NEW_LINK, flags::CREATE | flags::EXCL, |w| {
            link_header(w, 0, 0, UP, UP);
            w.string(IFLA_IFNAME, name);
            common_attributes(w, None, mtu);
            w.nest(IFLA_LINKINFO, |w| w.string(IFLA_INFO_KIND, kind));
        })
    }

    /// Makes a VXLAN device that learns nothing by itself, up.
    pub fn create_vxlan(&mut self, vxlan: &Vxlan<'_>) -> Result<()> {
        const ID: u16 = 1;
        const LEARNING: u16 = 7;
        const PORT: u16 = 15;
        self.request("create a VXLAN device", NEW_LINK, flags::CREATE | flags::EXCL, |w| {
            link_header(w, 0, 0, UP, UP);
            w.string(IFLA_IFNAME, vxlan.name);
            common_attributes(w, Some(vxlan.mac), vxlan.mtu);
            w.nest(IFLA_LINKINFO, |w| {
                w.string(IFLA_INFO_KIND, "vxlan");
                w.nest(IFLA_INFO_DATA, |w| {
                    w.u32(ID, vxlan.id);
                    let kind = if vxlan.local.is_ipv4() { VXLAN_LOCAL } else { VXLAN_LOCAL_V6 };
                    w.attribute(kind, &crate::wire::address_bytes(vxlan.local));
                    w.u8(LEARNING, 0);
                    w.be16(PORT, vxlan.port);
                });
            });
        })
    }

    /// The link of a name.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>> {
        self.one_link(|w| {
            link_header(w, 0, 0, 0, 0);
            w.string(IFLA_IFNAME, name);
        })
    }

    /// The link of an index.
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>> {
        self.one_link(|w| link_header(w, 0, index, 0, 0))
    }

    fn one_link(&mut self, body: impl FnOnce(&mut Writer)) -> Result<Option<Link>> {
        let mut found = None;
        match self.query("look up a link", GET_LINK, 0, body, |message| found = parse(&message).or(found.take())) {
            Ok(()) => Ok(found),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links of the namespace.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let mut found = Vec::new();
        self.query(
            "list links",
            GET_LINK,
            flags::DUMP,
            |w| link_header(w, 0, 0, 0, 0),
            |message| found.extend(parse(&message)),
        )?;
        Ok(found)
    }

    /// Changes a link.
    pub fn change_link(&mut self, index: u32, change: &LinkChange) -> Result<()> {
        let (mut value, mut mask) = (0, 0);
        for (wanted, bit) in [(change.up, UP), (change.promiscuous, PROMISCUOUS), (change.all_multicast, ALL_MULTICAST)]
        {
            if let Some(on) = wanted {
                mask |= bit;
                value |= if on { bit } else { 0 };
            }
        }
        self.request("change a link", NEW_LINK, 0, |w| {
            link_header(w, 0, index, value, mask);
            common_attributes(w, change.mac, change.mtu.unwrap_or(0));
            if let Some(length) = change.queue_length {
                w.u32(IFLA_TXQLEN, length);
            }
            if let Some(name) = &change.name {
                w.string(IFLA_IFNAME, name);
            }
            if let Some(master) = change.master {
                w.u32(IFLA_MASTER, master);
            }
        })
    }

    pub fn set_up(&mut self, index: u32) -> Result<()> {
        self.change_link(index, &LinkChange { up: Some(true), ..LinkChange::default() })
    }

    /// Lets a bridge port send frames back where they came from (a pod reaching itself through a Service), and keeps
    /// isolated ports from one another.
    pub fn set_bridge_port(&mut self, index: u32, hairpin: bool, isolated: bool) -> Result<()> {
        self.request("change a bridge port", SET_LINK, 0, |w| {
            link_header(w, libc::AF_BRIDGE as u8, index, 0, 0);
            w.nest(IFLA_PROTINFO, |w| {
                w.u8(IFLA_BRPORT_MODE, u8::from(hairpin));
                w.u8(IFLA_BRPORT_ISOLATED, u8::from(isolated));
            });
        })
    }

    /// Lets a bridge look at VLAN tags.
    pub fn enable_vlan_filtering(&mut self, bridge: u32) -> Result<()> {
        self.request("let a bridge filter VLANs", NEW_LINK, 0, |w| {
            link_header(w, 0, bridge, 0, 0);
            w.nest(IFLA_LINKINFO, |w| {
                w.string(IFLA_INFO_KIND, "bridge");
                w.nest(IFLA_INFO_DATA, |w| w.u8(IFLA_BR_VLAN_FILTERING, 1));
            });
        })
    }

    /// Deletes a link; one that is gone already counts as deleted.
    pub fn delete_link(&mut self, index: u32) -> Result<()> {
        gone_is_fine(self.request("delete a link", DELETE_LINK, 0, |w| link_header(w, 0, index, 0, 0)))
    }

    /// Deletes the link of a name; one that is gone already counts as deleted.
    pub fn delete_link_by_name(&mut self, name: &str) -> Result<()> {
        gone_is_fine(self.request("delete a link", DELETE_LINK, 0, |w| {
            link_header(w, 0, 0, 0, 0);
            w.string(IFLA_IFNAME, name);
        }))
    }

    /// The link of a name, which has to be there.
    pub fn require_link(&mut self, name: &str) -> Result<Link> {
        self.link(name)?.ok_or(NetlinkError::Refused {
            operation: "look up a link",
            hint: name.to_owned(),
            source: nix::errno::Errno::ENODEV,
        })
    }
}

fn common_attributes(writer: &mut Writer, mac: Option<Mac>, mtu: u32) {
    if let Some(mac) = mac {
        writer.attribute(IFLA_ADDRESS, &mac.0);
    }
    if mtu != 0 {
        writer.u32(IFLA_MTU, mtu);
    }
}

pub(crate) fn parse(message: &Received<'_>) -> Option<Link> {
    if message.kind != NEW_LINK {
        return None;
    }
    let (header, rest) = message.payload.split_at_checked(LINK_HEADER_BYTES)?;
    let mut link = Link {
        index: read_u32(&header[4..])?,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: read_u32(&header[8..])? & UP != 0,
        master: None,
        kind: None,
        peer: None,
        promiscuity: 0,
        promiscuous: read_u32(&header[8..])? & PROMISCUOUS != 0,
        all_multicast: read_u32(&header[8..])? & ALL_MULTICAST != 0,
        queue_length: 0,
        vlan_filtering: false,
        hairpin: false,
        isolated: false,
        local: None,
    };
    let is_ethernet = read_u16(&header[2..])? == libc::ARPHRD_ETHER;
    for (kind, value) in attributes(rest) {
        match kind {
            IFLA_IFNAME => link.name = read_string(value),
            IFLA_ADDRESS if is_ethernet => link.mac = value.try_into().ok().map(Mac),
            IFLA_MTU => link.mtu = read_u32(value)?,
            IFLA_LINK => link.peer = read_u32(value),
            IFLA_MASTER => link.master = read_u32(value).filter(|master| *master != 0),
            IFLA_TXQLEN => link.queue_length = read_u32(value)?,
            IFLA_PROMISCUITY => link.promiscuity = read_u32(value)?,
            IFLA_LINKINFO => {
                link.kind = attribute(value, IFLA_INFO_KIND).map(read_string);
                let port = attribute(value, IFLA_INFO_SLAVE_DATA);
                let data_of = |kind| attribute(value, IFLA_INFO_DATA).filter(|_| link.kind.as_deref() == Some(kind));
                let filtering = data_of("bridge").and_then(|data| attribute(data, IFLA_BR_VLAN_FILTERING));
                link.vlan_filtering = filtering == Some(&[1]);
                let local = data_of("vxlan")
                    .and_then(|data| attribute(data, VXLAN_LOCAL).or_else(|| attribute(data, VXLAN_LOCAL_V6)));
                link.local = local.and_then(crate::wire::read_address);
                link.isolated = port.and_then(|port| attribute(port, IFLA_BRPORT_ISOLATED)) == Some(&[1]);
                link.hairpin = port.and_then(|port| attribute(port, IFLA_BRPORT_MODE)) == Some(&[1]);
            }
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethernet_addresses_are_read_and_written() {
        let mac: Mac = "0a:58:0A:2a:00:05".parse().unwrap();
        assert_eq!(mac.to_string(), "0a:58:0a:2a:00:05");
        for bad in ["", "0a:58", "0a:58:0a:2a:00:5", "0a:58:0a:2a:00:0g", "0a:58:0a:2a:00:05:06"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
