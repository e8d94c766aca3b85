//! Connection tracking entries: listing the flows of a protocol and deleting single ones.

use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use crate::address::family;
use crate::connection::Connection;
use crate::wire::{Writer, address_bytes, attribute, flags, read_address, read_be16};
use crate::{NetlinkError, Result};

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4_SOURCE: u16 = 1;
const IP_V4_DESTINATION: u16 = 2;
const IP_V6_SOURCE: u16 = 3;
const IP_V6_DESTINATION: u16 = 4;
const PROTO_NUMBER: u16 = 1;
const PROTO_SOURCE_PORT: u16 = 2;
const PROTO_DESTINATION_PORT: u16 = 3;
const NFGEN_BYTES: usize = 4;
const FLOWS_AT_ONCE: usize = 256;

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub protocol: u8,
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// A tracked flow: as the first packet came, and as answers are expected. With destination NAT the reply's source is
/// the true server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    pub original: Tuple,
    pub reply: Tuple,
}

impl Connection {
    /// Hands every flow of these protocols (`libc::IPPROTO_UDP` …) in one address family to `each`. Nothing is kept, so any
    /// number of entries is fine; they are read once, whatever the number of protocols.
    pub fn each_flow(&mut self, is_ipv4: bool, protocols: &[u8], mut each: impl FnMut(Flow)) -> Result<()> {
        let family = if is_ipv4 { libc::AF_INET } else { libc::AF_INET6 };
        self.query(
            "list connections",
            GET,
            flags::DUMP,
            |w| w.raw(&[family as u8, 0, 0, 0]),
            |message| {
                let body = message.payload.get(NFGEN_BYTES..).unwrap_or_default();
                let direction = |kind| attribute(body, kind).and_then(parse);
                if let Some(original) = direction(TUPLE_ORIGINAL).filter(|one| protocols.contains(&one.protocol))
                    && let Some(reply) = direction(TUPLE_REPLY)
                {
                    each(Flow { original, reply });
                }
            },
        )
    }

    /// Forgets flows, many with each message to the kernel; those that are gone already count as forgotten.
    pub fn delete_flows(&mut self, flows: &[Flow]) -> Result<()> {
        const OPERATION: &str = "delete connections";
        for part in flows.chunks(FLOWS_AT_ONCE) {
            let mut writer = Writer::new();
            let mut sequence = 0;
            for (index, flow) in part.iter().enumerate() {
                sequence = self.next_sequence();
                let acknowledge = if index + 1 == part.len() { flags::ACK } else { 0 };
                writer.message(DELETE, flags::REQUEST | acknowledge, sequence, |w| {
                    w.raw(&[family(flow.original.source.ip()), 0, 0, 0]);
                    w.nest(TUPLE_ORIGINAL, |w| write(w, &flow.original));
                });
            }
            let bytes = writer.finish().ok_or(NetlinkError::TooLarge { operation: OPERATION })?;
            let refusals = self.batch(OPERATION, &bytes, sequence)?;
            if let Some(refusal) = refusals.into_iter().find(|refusal| refusal.errno != Errno::ENOENT) {
                return Err(NetlinkError::Refused { operation: OPERATION, hint: refusal.hint, source: refusal.errno });
            }
        }
        Ok(())
    }
}

fn write(w: &mut Writer, tuple: &Tuple) {
    let (source, destination) =
        if tuple.source.is_ipv4() { (IP_V4_SOURCE, IP_V4_DESTINATION) } else { (IP_V6_SOURCE, IP_V6_DESTINATION) };
    w.nest(TUPLE_IP, |w| {
        w.attribute(source, &address_bytes(tuple.source.ip()));
        w.attribute(destination, &address_bytes(tuple.destination.ip()));
    });
    w.nest(TUPLE_PROTO, |w| {
        w.u8(PROTO_NUMBER, tuple.protocol);
        w.be16(PROTO_SOURCE_PORT, tuple.source.port());
        w.be16(PROTO_DESTINATION_PORT, tuple.destination.port());
    });
}

pub(crate) fn parse(tuple: &[u8]) -> Option<Tuple> {
    let ip = attribute(tuple, TUPLE_IP)?;
    let proto = attribute(tuple, TUPLE_PROTO)?;
    let address = |v4, v6| -> Option<IpAddr> { read_address(attribute(ip, v4).or_else(|| attribute(ip, v6))?) };
    let port = |kind| attribute(proto, kind).and_then(read_be16).unwrap_or(0);
    Some(Tuple {
        protocol: *attribute(proto, PROTO_NUMBER)?.first()?,
        source: SocketAddr::new(address(IP_V4_SOURCE, IP_V6_SOURCE)?, port(PROTO_SOURCE_PORT)),
        destination: SocketAddr::new(address(IP_V4_DESTINATION, IP_V6_DESTINATION)?, port(PROTO_DESTINATION_PORT)),
    })
}
