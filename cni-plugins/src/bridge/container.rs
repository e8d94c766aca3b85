//! The container's side: everything inside its network namespace, done through one visit of it.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use ipnet::IpNet;
use oarlock_cni::types::{CniResult, IpConfig, Route as CniRoute};
use oarlock_netlink::{Connection, NetlinkError, Protocol, Route};
use oarlock_netns::{NetnsError, visit_network};

use crate::error::{Context, PluginError, Result};
use crate::linger::{self, Deletion};
use crate::sysctl;

/// The container's namespace, with a connection that works inside it.
pub struct Inside {
    file: File,
    connection: Connection,
}

/// Enters the namespace once: refuses router advertisements on links to come, and opens a connection. The container must
/// not have the link yet.
pub fn prepare(netns: &Path, ifname: &str) -> Result<Inside> {
    let file =
        File::open(netns).map_err(|source| PluginError::File { operation: "open", path: netns.to_owned(), source })?;
    let visit = || -> Result<Connection> {
        sysctl::ensure("net/ipv6/conf/all/accept_ra", "0")?;
        sysctl::ensure("net/ipv6/conf/default/accept_ra", "0")?;
        Connection::open(Protocol::Route).context(|| format!("set up {ifname}"))
    };
    let mut connection = visit_network(file.as_fd(), visit)??;
    if connection.link(ifname).context(|| format!("look up {ifname}"))?.is_some() {
        return Err(PluginError::LinkExists { name: ifname.to_owned() });
    }
    Ok(Inside { file, connection })
}

impl Inside {
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The number of the container's link, which is known unless the kernel did not tell it.
    pub fn find(&mut self, ifname: &str, known: Option<u32>) -> Result<u32> {
        let mut found = || self.connection.require_link(ifname).context(|| format!("find {ifname} of the container"));
        known.map_or_else(|| found().map(|link| link.index), Ok)
    }

    pub fn set_up(&mut self, ifname: &str, index: u32) -> Result<()> {
        self.connection.set_up(index).context(|| format!("bring {ifname} up"))
    }

    /// Addresses and routes of the container's link.
    pub fn configure(&mut self, ifname: &str, index: u32, result: &CniResult) -> Result<()> {
        let connection = &mut self.connection;
        for ip in &result.ips {
            connection.add_address(index, ip.address).context(|| format!("give {} to {ifname}", ip.address))?;
        }
        for route in &result.routes {
            let whole = route_of(route, &result.ips, index);
            connection.replace_route(&whole).context(|| format!("add the route to {}", route.dst))?;
        }
        Ok(())
    }
}

/// A default route for each family that has a gateway and no default route yet.
pub fn default_routes(result: &CniResult) -> Vec<CniRoute> {
    let mut routes: Vec<CniRoute> = Vec::new();
    for ip in &result.ips {
        let is_default =
            |route: &CniRoute| route.dst.prefix_len() == 0 && route.dst.addr().is_ipv4() == ip.address.addr().is_ipv4();
        if let Some(gateway) = ip.gateway
            && !result.routes.iter().chain(&routes).any(is_default)
        {
            let any: IpNet = if gateway.is_ipv4() {
                IpNet::V4(ipnet::Ipv4Net::default())
            } else {
                IpNet::V6(ipnet::Ipv6Net::default())
            };
            routes.push(CniRoute { dst: any, gw: Some(gateway), ..CniRoute::default() });
        }
    }
    routes
}

fn route_of(route: &CniRoute, ips: &[IpConfig], link: u32) -> Route {
    let same_family = |address: &IpAddr| address.is_ipv4() == route.dst.addr().is_ipv4();
    // A route without a gateway goes through that of its family; one on the link itself says so by its scope.
    const SCOPE_LINK: u8 = 253;
    let default = || ips.iter().filter_map(|ip| ip.gateway).find(same_family);
    let gateway = if route.scope == Some(SCOPE_LINK) { None } else { route.gw.or_else(default) };
    Route {
        metric: route.priority.unwrap_or(0),
        table: route.table.unwrap_or(0),
        mtu: route.mtu.unwrap_or(0),
        advertised_mss: route.advmss.unwrap_or(0),
        scope: route.scope,
        ..Route::new(route.dst, gateway, link)
    }
}

/// The container's link on its way out.
pub struct Removal<'a> {
    ifname: &'a str,
    deletion: Option<Deletion>,
}

/// DEL: begins to delete the container's link, and with it the pair. A namespace or link that is gone is fine.
pub fn begin_removal<'a>(netns: &Path, ifname: &'a str) -> Result<Removal<'a>> {
    let failed = || deletion_of(ifname);
    let open = || Connection::open(Protocol::Route);
    let visited = match File::open(netns) {
        Ok(file) => visit_network(file.as_fd(), open),
        Err(source) => Err(NetnsError::Open { path: netns.to_owned(), source }),
    };
    let mut connection = match visited {
        Ok(connection) => connection.context(failed)?,
        // The runtime took it away between the look and the visit, or the path is no namespace any more.
        Err(_) if !oarlock_netns::is_pinned(netns) => return Ok(Removal { ifname, deletion: None }),
        Err(error) => return Err(NetlinkError::Namespace(error)).context(failed),
    };
    let deletion = match connection.link(ifname).context(failed)? {
        Some(link) => Some(linger::begin_deletion(connection, link.index).context(failed)?),
        None => None,
    };
    Ok(Removal { ifname, deletion })
}

fn deletion_of(ifname: &str) -> String {
    format!("delete {ifname} of the container")
}

impl Removal<'_> {
    /// Returns when nobody can find the link any more.
    pub fn finish(self) -> Result<()> {
        self.deletion.map_or(Ok(()), Deletion::finish).context(|| deletion_of(self.ifname))
    }
}

/// CHECK: the link, its addresses and routes are as ADD left them.
pub fn check(netns: &Path, ifname: &str, previous: &CniResult, is_up: bool) -> Result<()> {
    let drift = |text: String| Err(PluginError::Drift(text));
    let mut connection = Connection::open_in(Protocol::Route, netns).context(|| "look into the container".into())?;
    let Some(link) = connection.link(ifname).context(|| format!("look up {ifname}"))? else {
        return drift(format!("{ifname} is missing"));
    };
    if is_up && !link.up {
        return drift(format!("{ifname} is down"));
    }
    let sandbox = netns.display().to_string();
    let recorded =
        previous.interfaces.iter().find(|one| one.name == ifname && one.sandbox.as_deref() == Some(&sandbox));
    if let Some(mac) = recorded.and_then(|one| one.mac.as_ref())
        && link.mac.is_some_and(|actual| !actual.to_string().eq_ignore_ascii_case(mac))
    {
        return drift(format!("{ifname} does not have Ethernet address {mac}"));
    }
    if let Some(mtu) = recorded.and_then(|one| one.mtu)
        && link.mtu != mtu
    {
        return drift(format!("the MTU of {ifname} is {}", link.mtu));
    }
    let addresses = connection.addresses().context(|| "list the container's addresses".into())?;
    for ip in &previous.ips {
        if !addresses.iter().any(|one| one.link == link.index && one.net == ip.address) {
            return drift(format!("{ifname} does not have address {}", ip.address));
        }
    }
    let routes = connection.routes().context(|| "list the container's routes".into())?;
    for route in &previous.routes {
        let wanted = route_of(route, &previous.ips, link.index);
        let same = |one: &Route| one.destination == wanted.destination.trunc() && one.gateway == wanted.gateway;
        if wanted.table == 0 && !routes.iter().any(same) {
            return drift(format!("the route to {} is missing", route.dst));
        }
    }
    Ok(())
}
