//! Unicast routes.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use crate::Result;
use crate::address::family;
use crate::connection::Connection;
use crate::error::gone_is_fine;
use crate::wire::{Received, Writer, address_bytes, attribute, attributes, flags, read_address, read_u32};

const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const TABLE_MAIN: u32 = 254;
const PROTOCOL_BOOT: u8 = 3;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const TYPE_UNICAST: u8 = 1;
const TYPE_UNREACHABLE: u8 = 7;
/// Higher than any that other software uses for its own.
const METRIC_LAST: u32 = u32::MAX - 1;
const ON_LINK: u32 = 4;
const HEADER_BYTES: usize = 12;

/// A unicast route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub destination: IpNet,
    pub gateway: Option<IpAddr>,
    /// The index of the link; 0 lets the kernel choose by the gateway.
    pub link: u32,
    /// Priority, lower wins; 0 is the kernel's default.
    pub metric: u32,
    /// 0 is the main table.
    pub table: u32,
    /// Bytes; 0 is the link's.
    pub mtu: u32,
    /// Bytes; 0 is the kernel's.
    pub advertised_mss: u32,
    /// Whether the gateway counts as reachable although no address of the link covers it.
    pub on_link: bool,
    /// Who made the route (`RTPROT_*`), to find it again; 0 is `boot`, as from a shell.
    pub protocol: u8,
    pub scope: Option<u8>,
}

impl Route {
    /// A route to `destination` through `gateway`, or directly on `link` without one.
    pub fn new(destination: IpNet, gateway: Option<IpAddr>, link: u32) -> Route {
        Route {
            destination,
            gateway,
            link,
            metric: 0,
            table: 0,
            mtu: 0,
            advertised_mss: 0,
            on_link: false,
            protocol: 0,
            scope: None,
        }
    }

    fn write(&self, w: &mut Writer) {
        self.write_as(TYPE_UNICAST, w);
    }

    fn write_as(&self, kind: u8, w: &mut Writer) {
        let table = if self.table == 0 { TABLE_MAIN } else { self.table };
        let short_table = u8::try_from(table).unwrap_or(0);
        let protocol = if self.protocol == 0 { PROTOCOL_BOOT } else { self.protocol };
        let scope = if kind == TYPE_UNICAST && self.gateway.is_none() && self.destination.addr().is_ipv4() {
            SCOPE_LINK
        } else {
            SCOPE_UNIVERSE
        };
        let header = [
            family(self.destination.addr()),
            self.destination.prefix_len(),
            0,
            0,
            short_table,
            protocol,
            self.scope.unwrap_or(scope),
            kind,
        ];
        w.raw(&header);
        w.raw(&(if self.on_link { ON_LINK } else { 0 }).to_ne_bytes());
        if self.destination.prefix_len() > 0 {
            w.attribute(RTA_DST, &address_bytes(self.destination.network()));
        }
        if let Some(gateway) = self.gateway {
            w.attribute(RTA_GATEWAY, &address_bytes(gateway));
        }
        for (kind, value) in [(RTA_OIF, self.link), (RTA_PRIORITY, self.metric), (RTA_TABLE, table)] {
            if value != 0 {
                w.u32(kind, value);
            }
        }
        if self.mtu != 0 || self.advertised_mss != 0 {
            w.nest(RTA_METRICS, |w| {
                for (kind, value) in [(RTAX_MTU, self.mtu), (RTAX_ADVMSS, self.advertised_mss)] {
                    if value != 0 {
                        w.u32(kind, value);
                    }
                }
            });
        }
    }
}

impl Connection {
    /// Adds a route.
    ///
    /// # Errors
    /// EEXIST when there is one to the same destination with the same metric.
    pub fn add_route(&mut self, route: &Route) -> Result<()> {
        self.request("add a route", NEW_ROUTE, flags::CREATE | flags::EXCL, |w| route.write(w))
    }

    /// Adds a route in the place of one to the same destination with the same metric.
    pub fn replace_route(&mut self, route: &Route) -> Result<()> {
        self.request("replace a route", NEW_ROUTE, flags::CREATE | flags::REPLACE, |w| route.write(w))
    }

    /// Deletes a route; one that is gone already counts as deleted.
    pub fn delete_route(&mut self, route: &Route) -> Result<()> {
        gone_is_fine(self.request("delete a route", DELETE_ROUTE, 0, |w| route.write(w)))
    }

    /// Says that there is no way to a network, where no other route knows one; one that is there already is fine. `protocol` is
    /// who says so (`RTPROT_*`).
    pub fn ensure_unreachable(&mut self, net: IpNet, protocol: u8) -> Result<()> {
        let route = Route { protocol, metric: METRIC_LAST, ..Route::new(net, None, 0) };
        let added = self.request("add an unreachable route", NEW_ROUTE, flags::CREATE | flags::EXCL, |w| {
            route.write_as(TYPE_UNREACHABLE, w);
        });
        match added {
            Err(error) if error.errno() == Some(Errno::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Takes back what [`Connection::ensure_unreachable`] said.
    pub fn remove_unreachable(&mut self, net: IpNet, protocol: u8) -> Result<()> {
        let route = Route { protocol, metric: METRIC_LAST, ..Route::new(net, None, 0) };
        gone_is_fine(self.request("delete an unreachable route", DELETE_ROUTE, 0, |w| {
            route.write_as(TYPE_UNREACHABLE, w);
        }))
    }

    /// Networks that somebody, by protocol, said there is no way to.
    pub fn unreachable(&mut self, protocol: u8) -> Result<Vec<IpNet>> {
        let routes = self.routes_of(TYPE_UNREACHABLE)?;
        Ok(routes.into_iter().filter(|route| route.protocol == protocol).map(|route| route.destination).collect())
    }

    /// The unicast routes of the main table.
    pub fn routes(&mut self) -> Result<Vec<Route>> {
        self.routes_of(TYPE_UNICAST)
    }

    fn routes_of(&mut self, kind: u8) -> Result<Vec<Route>> {
        let mut found = Vec::new();
        self.query(
            "list routes",
            GET_ROUTE,
            flags::DUMP,
            |w| w.raw(&[0; HEADER_BYTES]),
            |message| found.extend(parse(&message, kind)),
        )?;
        Ok(found)
    }
}

pub(crate) fn parse(message: &Received<'_>, wanted: u8) -> Option<Route> {
    if message.kind != NEW_ROUTE {
        return None;
    }
    let (header, rest) = message.payload.split_at_checked(HEADER_BYTES)?;
    let [address_family, length, .., kind] = *header.first_chunk::<8>()?;
    let table = attribute(rest, RTA_TABLE).and_then(read_u32).unwrap_or(u32::from(header[4]));
    if kind != wanted || table != TABLE_MAIN || read_u32(&header[8..])? & libc::RTM_F_CLONED != 0 {
        return None;
    }
    let any: IpAddr = match i32::from(address_family) {
        libc::AF_INET => IpAddr::from([0; 4]),
        libc::AF_INET6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut route = Route::new(IpNet::new(any, length).ok()?, None, 0);
    route.protocol = header[5];
    route.scope = Some(header[6]);
    route.on_link = read_u32(&header[8..])? & ON_LINK != 0;
    for (kind, value) in attributes(rest) {
        match kind {
            RTA_DST => route.destination = IpNet::new(read_address(value)?, length).ok()?,
            RTA_GATEWAY => route.gateway = read_address(value),
            RTA_OIF => route.link = read_u32(value)?,
            RTA_PRIORITY => route.metric = read_u32(value)?,
            RTA_METRICS => route.mtu = attribute(value, RTAX_MTU).and_then(read_u32).unwrap_or(0),
            _ => {}
        }
    }
    Some(route)
}
