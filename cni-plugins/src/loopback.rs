//! `loopback`: brings `lo` of the container up and says which addresses it has.

use oarlock_cni::types::{CniResult, Interface, IpConfig};
use oarlock_netlink::{Connection, Link, Protocol};

use crate::call::Call;
use crate::error::{Context, PluginError, Result};
use crate::plugin::Plugin;

pub const PLUGIN: Plugin = Plugin { name: "loopback", add, del: |_| Ok(()), check, status: |_| Ok(()), gc: |_| Ok(()) };

fn add(call: &Call) -> Result<CniResult> {
    let netns = call.existing_netns()?;
    let mut connection = Connection::open_in(Protocol::Route, netns).context(|| "loopback".into())?;
    let link = lo(&mut connection)?;
    connection.set_up(link.index).context(|| "bring lo up".into())?;
    if let Some(previous) = call.prev_result()? {
        return Ok(previous);
    }
    let addresses = connection.addresses().context(|| "list the addresses of lo".into())?;
    let of_lo = addresses.into_iter().filter(|address| address.link == link.index);
    let ips = of_lo.map(|address| IpConfig { interface: Some(0), ..IpConfig::new(address.net, None) }).collect();
    let interface = Interface {
        name: link.name,
        mac: Some("00:00:00:00:00:00".into()),
        sandbox: Some(netns.display().to_string()),
        ..Interface::default()
    };
    Ok(CniResult { interfaces: vec![interface], ips, ..CniResult::default() })
}

fn check(call: &Call) -> Result<()> {
    let mut connection = Connection::open_in(Protocol::Route, call.existing_netns()?).context(|| "loopback".into())?;
    if lo(&mut connection)?.up { Ok(()) } else { Err(PluginError::Drift("lo is down".into())) }
}

fn lo(connection: &mut Connection) -> Result<Link> {
    connection.require_link("lo").context(|| "find lo".into())
}
