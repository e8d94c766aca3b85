//! WireGuard devices: keys, ports and peers, by generic netlink.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use crate::connection::{Connection, Protocol};
use crate::wire::{Writer, address_bytes, attribute, attributes, flags, read_address, read_u16};
use crate::{NetlinkError, Result};

const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const GET_DEVICE: u8 = 0;
const SET_DEVICE: u8 = 1;
const VERSION: u8 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_PRIVATE_KEY: u16 = 3;
const DEVICE_PUBLIC_KEY: u16 = 4;
const DEVICE_PORT: u16 = 6;
const DEVICE_PEERS: u16 = 8;
const PEER_KEY: u16 = 1;
const PEER_FLAGS: u16 = 3;
const PEER_ENDPOINT: u16 = 4;
const PEER_KEEPALIVE: u16 = 5;
const PEER_LAST_HANDSHAKE: u16 = 6;
const PEER_NETWORKS: u16 = 9;
const NETWORK_FAMILY: u16 = 1;
const NETWORK_ADDRESS: u16 = 2;
const NETWORK_LENGTH: u16 = 3;
const REMOVE: u32 = 1;
const REPLACE_NETWORKS: u32 = 2;
const HEADER_BYTES: usize = 4;
/// As many as surely fit into one attribute.
const PEERS_A_MESSAGE: usize = 64;

/// A key, public or private.
pub type Key = [u8; 32];

/// Somebody at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardPeer {
    pub key: Key,
    pub endpoint: Option<SocketAddr>,
    /// How often something is sent to the peer even if there is nothing to say; 0 for never. A peer that is set with it is
    /// called at once.
    pub keepalive_secs: u16,
    /// What is sent to the peer, and what may come from it; sorted.
    pub networks: Vec<IpNet>,
}

/// A device as the kernel has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WireguardDevice {
    /// Made by the kernel of the private key; none without one.
    pub key: Option<Key>,
    pub port: u16,
    pub peers: Vec<WireguardPeer>,
    /// Those of the peers with whom keys were agreed on since they were set, and when that was done last, by this machine's
    /// clock since 1970.
    pub handshakes: Vec<(Key, Duration)>,
}

impl Connection {
    /// Makes a WireGuard device, up. It needs a key before it does anything.
    ///
    /// # Errors
    /// EOPNOTSUPP where the kernel has no WireGuard.
    pub fn create_wireguard(&mut self, name: &str, mtu: u32) -> Result<()> {
        self.create_plain_link(name, "wireguard", mtu)
    }
}

/// A connection to the kernel's WireGuard.
#[derive(Debug)]
pub struct Wireguard {
    connection: Connection,
    family: u16,
}

impl Wireguard {
    /// Of the calling thread's network namespace.
    pub fn open() -> Result<Wireguard> {
        const OPERATION: &str = "look up WireGuard";
        let mut connection = Connection::open(Protocol::Generic)?;
        let mut family = None;
        let body = |w: &mut Writer| {
            w.raw(&[GET_FAMILY, VERSION, 0, 0]);
            w.string(FAMILY_NAME, "wireguard");
        };
        connection.query(OPERATION, CONTROL, 0, body, |message| {
            let rest = message.payload.get(HEADER_BYTES..).unwrap_or_default();
            family = family.or_else(|| attribute(rest, FAMILY_ID).and_then(read_u16));
        })?;
        Ok(Wireguard { family: family.ok_or(NetlinkError::Malformed { operation: OPERATION })?, connection })
    }

    /// The device of a link.
    pub fn device(&mut self, link: u32) -> Result<WireguardDevice> {
        let mut device = WireguardDevice::default();
        let body = |w: &mut Writer| {
            w.raw(&[GET_DEVICE, VERSION, 0, 0]);
            w.u32(DEVICE_INDEX, link);
        };
        self.connection.query("read a WireGuard device", self.family, flags::DUMP, body, |message| {
            for (kind, value) in attributes(message.payload.get(HEADER_BYTES..).unwrap_or_default()) {
                match kind {
                    DEVICE_PUBLIC_KEY => device.key = value.try_into().ok(),
                    DEVICE_PORT => device.port = read_u16(value).unwrap_or(0),
                    DEVICE_PEERS => add_peers(&mut device, value),
                    _ => {}
                }
            }
        })?;
        device.peers.iter_mut().for_each(|peer| peer.networks.sort());
        Ok(device)
    }

    /// Gives a device its private key and port.
    pub fn set_identity(&mut self, link: u32, private: &Key, port: u16) -> Result<()> {
        self.set("set up a WireGuard device", link, |w| {
            w.attribute(DEVICE_PRIVATE_KEY, private);
            w.u16(DEVICE_PORT, port);
        })
    }

    /// Adds peers, or changes those that are there. Nothing else is touched.
    pub fn set_peers(&mut self, link: u32, peers: &[WireguardPeer]) -> Result<()> {
        peers.chunks(PEERS_A_MESSAGE).try_for_each(|part| {
            self.set("set WireGuard peers", link, |w| {
                w.nest(DEVICE_PEERS, |w| part.iter().for_each(|peer| w.nest(0, |w| write_peer(w, peer))));
            })
        })
    }

    /// Takes peers away; those that are gone are fine.
    pub fn remove_peers(&mut self, link: u32, keys: &[Key]) -> Result<()> {
        keys.chunks(PEERS_A_MESSAGE).try_for_each(|part| {
            self.set("remove WireGuard peers", link, |w| {
                let remove = |w: &mut Writer, key: &Key| {
                    w.attribute(PEER_KEY, key);
                    w.u32(PEER_FLAGS, REMOVE);
                };
                w.nest(DEVICE_PEERS, |w| part.iter().for_each(|key| w.nest(0, |w| remove(w, key))));
            })
        })
    }

    fn set(&mut self, operation: &'static str, link: u32, body: impl FnOnce(&mut Writer)) -> Result<()> {
        self.connection.request(operation, self.family, 0, |w| {
            w.raw(&[SET_DEVICE, VERSION, 0, 0]);
            w.u32(DEVICE_INDEX, link);
            body(w);
        })
    }
}

fn write_peer(w: &mut Writer, peer: &WireguardPeer) {
    w.attribute(PEER_KEY, &peer.key);
    w.u32(PEER_FLAGS, REPLACE_NETWORKS);
    if let Some(endpoint) = peer.endpoint {
        w.attribute(PEER_ENDPOINT, &socket_bytes(endpoint));
    }
    w.u16(PEER_KEEPALIVE, peer.keepalive_secs);
    w.nest(PEER_NETWORKS, |w| {
        for net in &peer.networks {
            w.nest(0, |w| {
                let family = if net.addr().is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
                w.u16(NETWORK_FAMILY, family as u16);
                w.attribute(NETWORK_ADDRESS, &address_bytes(net.network()));
                w.u8(NETWORK_LENGTH, net.prefix_len());
            });
        }
    });
}

/// The peers of one message. A peer with many networks goes on in the next one.
fn add_peers(device: &mut WireguardDevice, list: &[u8]) {
    for (_, value) in attributes(list) {
        let Some(key) = attribute(value, PEER_KEY).and_then(|key| key.try_into().ok()) else { continue };
        let endpoint = attribute(value, PEER_ENDPOINT).and_then(read_socket);
        let networks = attributes(attribute(value, PEER_NETWORKS).unwrap_or_default());
        let networks: Vec<IpNet> = networks.filter_map(|(_, value)| read_network(value)).collect();
        // Only the first part of a peer has it.
        if let Some(time) = attribute(value, PEER_LAST_HANDSHAKE).and_then(read_time).filter(|time| !time.is_zero()) {
            device.handshakes.push((key, time));
        }
        match device.peers.iter_mut().find(|peer| peer.key == key) {
            Some(known) => known.networks.extend(networks),
            None => {
                let keepalive_secs = attribute(value, PEER_KEEPALIVE).and_then(read_u16).unwrap_or(0);
                device.peers.push(WireguardPeer { key, endpoint, keepalive_secs, networks });
            }
        }
    }
}

/// Seconds and nanoseconds, each of 64 bits.
fn read_time(bytes: &[u8]) -> Option<Duration> {
    let seconds = u64::from_ne_bytes(*bytes.first_chunk()?);
    let nanoseconds = u64::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    Some(Duration::new(seconds, u32::try_from(nanoseconds).ok().filter(|nanoseconds| *nanoseconds < 1_000_000_000)?))
}

fn read_network(value: &[u8]) -> Option<IpNet> {
    let address = read_address(attribute(value, NETWORK_ADDRESS)?)?;
    IpNet::new(address, *attribute(value, NETWORK_LENGTH)?.first()?).ok()
}

/// A socket's address as the kernel's structures have it.
fn socket_bytes(socket: SocketAddr) -> Vec<u8> {
    let family = if socket.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u16;
    let mut bytes = [family.to_ne_bytes(), socket.port().to_be_bytes()].concat();
    match socket.ip() {
        IpAddr::V4(address) => {
            bytes.extend(address.octets());
            bytes.extend([0; 8]);
        }
        IpAddr::V6(address) => {
            bytes.extend([0; 4]);
            bytes.extend(address.octets());
            bytes.extend([0; 4]);
        }
    }
    bytes
}

fn read_socket(bytes: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
    let address = match i32::from(read_u16(bytes)?) {
        libc::AF_INET => read_address(bytes.get(4..8)?)?,
        libc::AF_INET6 => read_address(bytes.get(8..24)?)?,
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::messages;

    #[test]
    fn peers_are_read_as_they_were_written_also_in_parts() {
        let peer = |last: u8, networks: &[&str]| WireguardPeer {
            key: [last; 32],
            endpoint: Some(if last == 1 { "192.0.2.1:51820" } else { "[2001:db8::2]:7" }.parse().unwrap()),
            keepalive_secs: 25,
            networks: networks.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let mut found = WireguardDevice::default();
        for part in [peer(1, &["10.42.1.0/24"]), peer(2, &["10.42.2.0/24", "fd42:2::/64"]), peer(1, &["fd42:1::/64"])] {
            let mut writer = Writer::new();
            writer.message(20, 0, 1, |w| w.nest(DEVICE_PEERS, |w| w.nest(0, |w| write_peer(w, &part))));
            let bytes = writer.finish().unwrap();
            let message = messages(&bytes).next().unwrap();
            add_peers(&mut found, attribute(message.payload, DEVICE_PEERS).unwrap());
        }
        let expected = [peer(1, &["10.42.1.0/24", "fd42:1::/64"]), peer(2, &["10.42.2.0/24", "fd42:2::/64"])];
        assert_eq!(found.peers, expected);
    }
}
