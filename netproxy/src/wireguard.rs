//! This node's WireGuard device: its key, which never leaves the machine, and its peers, which follow the nodes.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use nix::errno::Errno;
use oarlock_netlink::{Connection, NetlinkError, Wireguard, WireguardKey, WireguardPeer};

pub const DEVICE: &str = "oar-wg0";
/// Where a node's public key is, in base64 as WireGuard's own tools show it.
pub const ANNOTATION: &str = "oarlock.io/wireguard-public-key";
/// The usual one.
const PORT: u16 = 51_820;
/// Makes the kernel call a new peer at once and again until it answers, and one that has come back soon.
const KEEPALIVE_SECS: u16 = 25;
/// A peer with whom no new keys were agreed on for so long does not answer any more: with packets on their way, which
/// keepalives are too, the kernel does so every 120 s, and tries for some more.
const SILENCE: Duration = Duration::from_secs(240);
const OVERHEAD_IPV4_BYTES: u32 = 60;
const OVERHEAD_IPV6_BYTES: u32 = 80;

/// Why there is no way through WireGuard.
#[derive(Debug, thiserror::Error)]
pub enum WireguardError {
    #[error("cannot use WireGuard")]
    Netlink(#[from] NetlinkError),
    #[error("cannot keep the key in {}", path.display())]
    Key { path: PathBuf, source: io::Error },
}

/// A node that is reached through WireGuard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub key: WireguardKey,
    pub node: IpAddr,
    pub pods: Vec<IpNet>,
    /// Whether packets go this way, or it is only called yet.
    pub carries: bool,
}

pub fn read_key(text: &str) -> Option<WireguardKey> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

pub fn key_text(key: &WireguardKey) -> String {
    STANDARD.encode(key)
}

/// The private key of the file, which is made with a new one if need be.
fn private_key(path: &Path) -> io::Result<WireguardKey> {
    match fs::read(path) {
        Ok(bytes) => {
            if let Ok(key) = bytes.try_into() {
                return Ok(key);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut key = [0; 32];
    fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(&key)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    Ok(key)
}

/// The device as [`ensure`] found or made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// This node's public key.
    pub key: WireguardKey,
    /// When keys were last agreed on with each of the peers that have answered.
    pub handshakes: Vec<(WireguardKey, Duration)>,
}

/// Which peers answer. New keys are agreed on every two minutes or so as long as both ends hear each other.
#[derive(Debug, Default)]
pub struct Answers {
    /// The last handshake of each peer, and when it was first seen here: the clock that it is told by may be set. Only of one
    /// that is older than this program the clock has to say how old it is.
    seen: HashMap<WireguardKey, (Duration, Instant)>,
}

impl Answers {
    /// The peers that answer, given their last handshakes.
    pub fn of(&mut self, handshakes: &[(WireguardKey, Duration)], now: Instant, clock: Duration) -> Vec<WireguardKey> {
        self.seen.retain(|key, _| handshakes.iter().any(|(one, _)| one == key));
        let mut answering = Vec::new();
        for (key, handshake) in handshakes {
            let age = clock.checked_sub(*handshake).unwrap_or_default().min(SILENCE);
            let (last, since) = self.seen.entry(*key).or_insert((*handshake, now.checked_sub(age).unwrap_or(now)));
            if last != handshake {
                (*last, *since) = (*handshake, now);
            }
            if now.duration_since(*since) < SILENCE {
                answering.push(*key);
            }
        }
        answering
    }
}

/// The device with the key of the file, made if need be. Nothing where the kernel has no WireGuard.
pub fn ensure(connection: &mut Connection, key_file: &Path) -> Result<Option<Device>, WireguardError> {
    let link = match connection.link(DEVICE)? {
        Some(link) => link,
        None => match connection.create_wireguard(DEVICE, 0) {
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => return Ok(None),
            other => {
                other?;
                connection.require_link(DEVICE)?
            }
        },
    };
    if !link.up {
        connection.set_up(link.index)?;
    }
    let failed = |source| WireguardError::Key { path: key_file.to_owned(), source };
    let private = private_key(key_file).map_err(failed)?;
    let mut wireguard = Wireguard::open()?;
    let mut device = wireguard.device(link.index)?;
    if device.key.is_none() || device.port != PORT {
        wireguard.set_identity(link.index, &private, PORT)?;
        device = wireguard.device(link.index)?;
    }
    Ok(device.key.map(|key| Device { key, handshakes: device.handshakes }))
}

/// Makes the device's peers these, its size that of the way there, and `address` its own; says its index, how large a packet
/// through it may be, and how many peers were changed.
pub fn sync(
    connection: &mut Connection,
    peers: &[Peer],
    own_addresses: &[IpNet],
    underlay_mtu: u32,
) -> oarlock_netlink::Result<(u32, u32, usize)> {
    let link = connection.require_link(DEVICE)?;
    let by_ipv6 = peers.iter().any(|peer| peer.node.is_ipv6());
    let mtu = underlay_mtu.saturating_sub(if by_ipv6 { OVERHEAD_IPV6_BYTES } else { OVERHEAD_IPV4_BYTES });
    if link.mtu != mtu {
        let change = oarlock_netlink::LinkChange { mtu: Some(mtu), ..Default::default() };
        connection.change_link(link.index, &change)?;
    }
    own_addresses.iter().try_for_each(|address| connection.ensure_address(link.index, *address))?;
    let mut wireguard = Wireguard::open()?;
    let existing = wireguard.device(link.index)?.peers;
    let wanted: Vec<WireguardPeer> = peers.iter().map(as_peer).collect();
    let stale = existing.iter().filter(|peer| !wanted.iter().any(|one| one.key == peer.key));
    let stale: Vec<WireguardKey> = stale.map(|peer| peer.key).collect();
    let new: Vec<WireguardPeer> = wanted.into_iter().filter(|one| !existing.contains(one)).collect();
    wireguard.remove_peers(link.index, &stale)?;
    wireguard.set_peers(link.index, &new)?;
    Ok((link.index, mtu, stale.len() + new.len()))
}

fn as_peer(peer: &Peer) -> WireguardPeer {
    let mut networks: Vec<IpNet> = peer.pods.iter().map(IpNet::trunc).collect();
    networks.sort();
    let endpoint = Some(SocketAddr::new(peer.node, PORT));
    WireguardPeer { key: peer.key, endpoint, keepalive_secs: KEEPALIVE_SECS, networks }
}

/// Takes the device away, with its peers.
pub fn remove(connection: &mut Connection) -> oarlock_netlink::Result<()> {
    connection.delete_link_by_name(DEVICE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_peer_answers_while_its_handshakes_are_new_whatever_the_clock_says() {
        let mut answers = Answers::default();
        let (a, b, start) = ([1; 32], [2; 32], Instant::now() + SILENCE);
        let at = Duration::from_secs;
        let clock = at(1000);
        assert_eq!(answers.of(&[(a, at(1000)), (b, at(1000))], start, clock), [a, b]);
        let later = start + SILENCE / 2;
        // The clock was set back for the handshake of the one, and the other has had none.
        assert_eq!(answers.of(&[(a, at(5)), (b, at(1000))], later, clock), [a, b]);
        assert_eq!(answers.of(&[(a, at(5)), (b, at(1000))], start + SILENCE, clock), [a]);
        assert_eq!(answers.of(&[(a, at(5)), (b, at(9000))], start + SILENCE * 2, clock), [b], "it answers again");
        assert_eq!(answers.of(&[(a, at(5))], start + SILENCE * 2, clock), Vec::<WireguardKey>::new());
        let fresh = |handshake| Answers::default().of(&[(a, handshake)], start, at(9000));
        assert_eq!(fresh(at(5000)), Vec::<WireguardKey>::new(), "silent since before this program was started");
        assert_eq!(fresh(at(8990)), [a]);
        assert_eq!(fresh(at(9999)), [a], "the clock was set back since");
    }

    #[test]
    fn a_key_is_made_once_and_only_root_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netproxy/wireguard.key");
        let key = private_key(&path).unwrap();
        assert_eq!(private_key(&path).unwrap(), key);
        assert_ne!(key, [0; 32]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, "torn").unwrap();
        assert_ne!(private_key(&path).unwrap(), key, "a torn file is replaced");
        assert_eq!(read_key(&key_text(&key)), Some(key));
        assert_eq!(read_key("short"), None);
    }
}
