//! `bridge`: a veth pair between the container and a bridge of the host.
//!
//! ADD makes the bridge if need be, lets `host-local` give addresses, makes the pair in one message (the container's end
//! is born in its namespace with its Ethernet address), then addresses and routes inside. The Ethernet address is made
//! of the IPv4 address, so a neighbour's cache is right when another pod gets the address. Router advertisements are
//! refused before the link exists, and IPv6 addresses are usable without detection of duplicates. An IPAM plugin of others
//! has its turn when the link is there and up, as in the reference plugins: a DHCP client asks through it, and under its
//! Ethernet address, which is random then.

mod config;
mod container;
mod host;

use std::net::IpAddr;

use nix::errno::Errno;
use oarlock_cni::types::{CniResult, Interface, IpConfig};
use oarlock_cni_table::masquerade::{self, Masquerade};
use oarlock_cni_table::spoof_check::{self, SpoofCheck};
use oarlock_cni_table::{Part, Place, TableError, stable_hash};
use oarlock_netlink::{Connection, Link, Mac, Protocol};
use oarlock_nft::Key;

use crate::call::Call;
use crate::error::{Context, PluginError, Result};
use crate::plugin::Plugin;
use crate::{delegate, host_local, table};
use config::Config;
use container::Inside;

pub const PLUGIN: Plugin = Plugin { name: "bridge", add, del, check, status, gc };

/// The host's end of an attachment: 4 letters and 44 bits, as long as a name may be.
fn veth_name(network: &str, container_id: &str, ifname: &str) -> String {
    format!("veth{:011x}", stable_hash(&[network, container_id, ifname]) & 0xfff_ffff_ffff)
}

fn own_veth(call: &Call) -> String {
    veth_name(&call.network.name, &call.container_id, &call.ifname)
}

fn route_connection() -> Result<Connection> {
    Connection::open(Protocol::Route).context(|| "cannot talk to the kernel about links".into())
}

fn add(call: &Call) -> Result<CniResult> {
    let config = Config::read(call)?;
    let netns = call.existing_netns()?;
    let mut connection = route_connection()?;
    let bridge = host::ensure_bridge(&mut connection, &config)?;
    let inside = container::prepare(netns, &call.ifname)?;
    let addresses = match config.ipam_type() {
        Some(kind) if kind == host_local::PLUGIN.name => Addresses::Given(with_addresses(kind, &config, call)?),
        Some(kind) => Addresses::From(kind),
        None => Addresses::Given(CniResult::default()),
    };
    let attached = Attach { call, config: &config, bridge: &bridge }.run(&mut connection, inside, addresses);
    if attached.is_err() {
        // The first error is the one to tell; the runtime's DEL repeats what fails here.
        if let Some(kind) = config.ipam_type() {
            let _ = delegate::del(kind, call);
        }
        let _ = connection.delete_link_by_name(&own_veth(call));
        let _ = table::remove(call, PLUGIN.name, &SETS, Some(&[]));
    }
    attached
}

/// The container's addresses.
enum Addresses<'a> {
    /// Known before it has a link.
    Given(CniResult),
    /// Of an IPAM plugin that may need the link.
    From(&'a str),
}

/// The IPAM plugin's result, with gateways and the default route filled in.
fn with_addresses(kind: &str, config: &Config, call: &Call) -> Result<CniResult> {
    let mut result = delegate::add(kind, call)?;
    if result.ips.is_empty() {
        let _ = delegate::del(kind, call);
        return Err(PluginError::NoAddress { plugin: kind.to_owned() });
    }
    for ip in &mut result.ips {
        ip.interface = Some(2);
        if ip.gateway.is_none() && config.is_gateway {
            ip.gateway = ip.address.hosts().next();
        }
    }
    if config.is_default_gateway {
        result.routes.extend(container::default_routes(&result));
    }
    Ok(result)
}

/// What an attachment is made of.
struct Attach<'a> {
    call: &'a Call,
    config: &'a Config,
    bridge: &'a Link,
}

impl Attach<'_> {
    fn run(&self, connection: &mut Connection, mut inside: Inside, addresses: Addresses<'_>) -> Result<CniResult> {
        let (call, config, bridge) = (self.call, self.config, self.bridge);
        let mtu = if config.mtu != 0 { config.mtu } else { bridge.mtu };
        let known: &[IpConfig] = if let Addresses::Given(result) = &addresses { &result.ips } else { &[] };
        let mac = config.mac.unwrap_or_else(|| address_of(known));
        let veth = own_veth(call);
        // Before the container can send anything.
        self.lay(known, mac)?;
        let port = host::create_pair(
            connection,
            &host::Pair { veth: &veth, bridge: bridge.index, call, mac, mtu },
            inside.netns(),
        )?;
        if config.hairpin_mode || config.port_isolation {
            connection
                .set_bridge_port(port.index, config.hairpin_mode, config.port_isolation)
                .context(|| format!("set up bridge port {veth}"))?;
        }
        host::join_own_vlans(connection, config, &port)?;
        let link = inside.find(&call.ifname, port.peer)?;
        if !config.disable_container_interface {
            inside.set_up(&call.ifname, link)?;
        }
        let mut result = match addresses {
            Addresses::Given(result) => result,
            Addresses::From(kind) => {
                let result = with_addresses(kind, config, call)?;
                self.lay(&result.ips, mac)?;
                result
            }
        };
        inside.configure(&call.ifname, link, &result)?;
        let mut vlan_link = None;
        if config.is_gateway {
            if let Some(vlan) = config.access_vlan() {
                vlan_link = Some(host::ensure_vlan_link(connection, config, bridge, vlan)?);
            }
            host::ensure_gateways(connection, config, vlan_link.as_ref().unwrap_or(bridge), &result.ips)?;
        }
        let container_link = Interface {
            name: call.ifname.clone(),
            mac: Some(mac.to_string()),
            mtu: Some(mtu),
            sandbox: call.netns.as_ref().map(|path| path.display().to_string()),
            ..Interface::default()
        };
        let bridge = host::adjust_mtu(connection, config, bridge.clone())?;
        result.interfaces = vec![host_link(&bridge), host_link(&port), container_link];
        result.interfaces.extend(vlan_link.as_ref().map(host_link));
        if result.dns.is_empty() {
            result.dns = config.dns.clone();
        }
        Ok(result)
    }
}

impl Attach<'_> {
    /// The attachment's part of the nftables table.
    fn lay(&self, ips: &[IpConfig], mac: Mac) -> Result<()> {
        let laid = table::add(self.call, PLUGIN.name, &parts(self.call, self.config, ips, mac));
        let kernel_lacks = |error: &PluginError| match error {
            PluginError::Table(TableError::Nft { source, .. }) => {
                matches!(source.errno(), Some(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT))
                    || source.is_not_found()
            }
            _ => false,
        };
        match laid {
            Err(error) if self.config.mac_spoof_check && kernel_lacks(&error) => {
                Err(PluginError::NoSpoofCheck { source: Box::new(error) })
            }
            other => other,
        }
    }
}

fn host_link(link: &Link) -> Interface {
    Interface {
        name: link.name.clone(),
        mac: link.mac.map(|mac| mac.to_string()),
        mtu: Some(link.mtu),
        ..Interface::default()
    }
}

/// The Ethernet address for a container: of its IPv4 address, or of the last bytes of its IPv6 address.
fn address_of(ips: &[IpConfig]) -> Mac {
    let first = ips.iter().find(|ip| ip.address.addr().is_ipv4()).or(ips.first());
    let bytes = first.map(|ip| oarlock_netlink::wire::address_bytes(ip.address.addr())).unwrap_or_default();
    match bytes.last_chunk::<4>() {
        Some([a, b, c, d]) => Mac([0x0a, 0x58, *a, *b, *c, *d]),
        None => host::random_mac(),
    }
}

fn del(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let addresses = own_addresses(call, &config);
    // Without the namespace the pair is gone with it, or will be as soon as the kernel gets to it.
    let netns = call.netns.as_deref().filter(|path| path.exists());
    let begin = || netns.map(|netns| container::begin_removal(netns, &call.ifname)).transpose();
    // Every step is taken, and the first failure is told. The link goes while the rest is done, unless somebody else's IPAM
    // plugin may need it still: a DHCP client gives its address back through it.
    let is_needed = config.ipam_type().is_some_and(|kind| kind != host_local::PLUGIN.name);
    let early = (!is_needed).then(begin);
    let released = config.ipam_type().map_or(Ok(()), |kind| delegate::del(kind, call));
    let place = |address: &IpAddr| Place {
        table: oarlock_cni_table::table(address.is_ipv4()),
        set: masquerade::MAP,
        key: Key::single(*address),
    };
    let unlinking = early.unwrap_or_else(begin);
    let places: Vec<Place> = addresses.iter().map(place).collect();
    let places = Some(places.as_slice()).filter(|places| !places.is_empty() && !config.mac_spoof_check);
    let removed = if config.has_rules() { table::remove(call, PLUGIN.name, &SETS, places) } else { Ok(()) };
    let unlinked = unlinking.and_then(|removal| removal.map_or(Ok(()), container::Removal::finish));
    released.and(removed).and(unlinked)
}

/// The container's addresses as far as anybody knows: the runtime, from its record of ADD, and `host-local`.
fn own_addresses(call: &Call, config: &Config) -> Vec<IpAddr> {
    let previous = call.prev_result().ok().flatten().unwrap_or_default();
    let mut addresses: Vec<IpAddr> = previous.ips.iter().map(|ip| ip.address.addr()).collect();
    if config.ipam_type() == Some(host_local::PLUGIN.name) {
        addresses.extend(host_local::recorded(call).unwrap_or_default());
    }
    addresses.sort();
    addresses.dedup();
    addresses
}

fn check(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let previous = call.prev_result()?.ok_or_else(|| PluginError::config("prevResult", "is required for CHECK"))?;
    if let Some(kind) = config.ipam_type() {
        delegate::check(kind, call)?;
    }
    let mut connection = route_connection()?;
    host::check(&mut connection, &config, &own_veth(call), &previous)?;
    container::check(call.existing_netns()?, &call.ifname, &previous, !config.disable_container_interface)?;
    let mine = previous.ips.iter().filter(|ip| ip.interface.is_none_or(|index| index == 2));
    let mine: Vec<IpConfig> = mine.cloned().collect();
    let own = previous.interfaces.iter().find(|one| one.name == call.ifname && one.sandbox.is_some());
    let mac = own.and_then(|one| one.mac.as_ref()?.parse().ok()).or(config.mac).unwrap_or_else(|| address_of(&mine));
    let parts = parts(call, &config, &mine, mac);
    if parts.is_empty() {
        return Ok(());
    }
    table::check(call, &parts, |entry| {
        let address = oarlock_netlink::wire::read_address(entry.element.key.as_slice());
        match address.filter(|_| entry.set == masquerade::MAP) {
            Some(address) => format!("address {address} is not masqueraded"),
            None => format!("{} is not kept from sending under other Ethernet addresses", own_veth(call)),
        }
    })
}

/// What the attachment has in the nftables table.
fn parts(call: &Call, config: &Config, ips: &[IpConfig], mac: Mac) -> Vec<Part> {
    let part =
        |ip: &IpConfig| Part::Masquerade(Masquerade { address: ip.address, excluded: config.ip_masq_exclude.clone() });
    let mut parts: Vec<Part> = ips.iter().filter(|_| config.ip_masq).map(part).collect();
    if config.mac_spoof_check {
        parts.push(Part::SpoofCheck(SpoofCheck { port: own_veth(call), mac }));
    }
    parts
}

/// The sets of the nftables table that this plugin has elements in.
const SETS: [&str; 3] = [masquerade::MAP, spoof_check::SETS[0], spoof_check::SETS[1]];

fn status(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    if let Err(error) = host::existing_bridge(&mut route_connection()?, &config) {
        // Whoever is attached hung on the bridge that had the name before.
        let limited = config.ipam_type() == Some(host_local::PLUGIN.name) && host_local::is_in_use(call)?;
        return Err(PluginError::NotAvailable { limited, source: Box::new(error) });
    }
    if config.has_rules() {
        table::status()?;
    }
    config.ipam_type().map_or(Ok(()), |kind| delegate::status(kind, call))
}

fn gc(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let released = config.ipam_type().map_or(Ok(()), |kind| delegate::gc(kind, call));
    let removed = if config.has_rules() { table::keep_only(call, PLUGIN.name, &SETS) } else { Ok(()) };
    let name = |one: &oarlock_cni::ValidAttachment| veth_name(&call.network.name, &one.container_id, &one.ifname);
    let valid: Vec<String> = call.valid_attachments().iter().map(name).collect();
    let unlinked =
        route_connection().and_then(|mut connection| host::remove_stray_ports(&mut connection, &config, &valid));
    released.and(removed).and(unlinked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ethernet_addresses_are_stable_and_fit() {
        let name = veth_name("oarlock", &"f".repeat(64), "eth0");
        assert_eq!(name.len(), 15);
        assert_eq!(name, veth_name("oarlock", &"f".repeat(64), "eth0"));
        assert_ne!(name, veth_name("oarlock", &"f".repeat(64), "eth1"));
        let ip = IpConfig::new("10.42.0.5/24".parse().unwrap(), None);
        assert_eq!(address_of(&[ip]).to_string(), "0a:58:0a:2a:00:05");
    }
}
