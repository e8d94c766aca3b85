//! `tuning`: settings of the container's link and of its namespace, after the link was made by another plugin.
//!
//! Sysctls are those of the configuration, if the administrator's list allows them (every line of
//! `/etc/cni/tuning/allowlist.conf` is a regular expression that a name may match; without the file all of `net` is
//! allowed). What the link was like before is kept below `dataDir`, and DEL puts it back.

mod config;

use std::fs;
use std::io;
use std::path::PathBuf;

use oarlock_cni::types::CniResult;
use oarlock_cni_table::stable_hash;
use oarlock_netlink::{Connection, Link, LinkChange, Mac, Protocol};
use serde::{Deserialize, Serialize};

use crate::call::Call;
use crate::chained::required_result;
use crate::error::{Context, PluginError, Result};
use crate::plugin::Plugin;
use config::{Config, Sysctl};

pub const PLUGIN: Plugin = Plugin { name: "tuning", add, del, check, status, gc };

/// What of a link was changed, as it was before.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Backup {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    promisc: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allmulti: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tx_q_len: Option<u32>,
}

fn backup_name(container_id: &str, ifname: &str) -> String {
    let shown = container_id.get(..64).unwrap_or(container_id);
    format!("{shown}_{ifname}_{:08x}.json", stable_hash(&[container_id, ifname]) as u32)
}

fn backup_path(call: &Call, config: &Config) -> PathBuf {
    config.data_dir.join(&call.network.name).join(backup_name(&call.container_id, &call.ifname))
}

fn add(call: &Call) -> Result<CniResult> {
    let config = Config::read(call)?;
    let mut result = required_result(call, "tuning")?;
    config::check_allowed(&config.sysctls)?;
    let netns = call.existing_netns()?;
    let work = || -> Result<()> {
        config.sysctls.iter().try_for_each(write)?;
        tune(call, &config)
    };
    oarlock_netns::run_in(netns, work).map_err(namespace(&call.ifname))??;
    // Those after this one go by what the link is now.
    let sandbox = netns.display().to_string();
    let own = result
        .interfaces
        .iter_mut()
        .filter(|one| one.name == call.ifname && one.sandbox.as_deref().is_none_or(|found| found == sandbox));
    for interface in own {
        interface.mac = config.mac.map(|mac| mac.to_string()).or(interface.mac.take());
        interface.mtu = config.mtu.or(interface.mtu);
    }
    Ok(result)
}

fn namespace(ifname: &str) -> impl FnOnce(oarlock_netns::NetnsError) -> PluginError {
    let what = format!("tune {ifname}");
    move |error| PluginError::Netlink { what, source: oarlock_netlink::NetlinkError::Namespace(error) }
}

fn write(sysctl: &Sysctl) -> Result<()> {
    fs::write(&sysctl.path, &sysctl.value).map_err(|source| PluginError::File {
        operation: "write",
        path: sysctl.path.clone(),
        source,
    })
}

/// Changes the link, with what it was like written down first.
fn tune(call: &Call, config: &Config) -> Result<()> {
    let change = config.change();
    if change == LinkChange::default() {
        return Ok(());
    }
    let failed = || format!("tune {}", call.ifname);
    let mut connection = Connection::open(Protocol::Route).context(failed)?;
    let link = connection.require_link(&call.ifname).context(failed)?;
    keep(call, config, &link)?;
    apply(&mut connection, &link, &change).context(failed)
}

/// Some drivers take another address only while the link is down, which loses routes: only then it is taken down.
fn apply(connection: &mut Connection, link: &Link, change: &LinkChange) -> oarlock_netlink::Result<()> {
    match connection.change_link(link.index, change) {
        Err(error) if error.errno() == Some(nix::errno::Errno::EBUSY) && change.mac.is_some() => {
            connection.change_link(link.index, &LinkChange { up: Some(false), ..change.clone() })?;
            connection.change_link(link.index, &LinkChange { up: Some(link.up), ..LinkChange::default() })
        }
        other => other,
    }
}

fn keep(call: &Call, config: &Config, link: &Link) -> Result<()> {
    let path = backup_path(call, config);
    // The first one is from before all tuning.
    if path.exists() {
        return Ok(());
    }
    let backup = Backup {
        mac: config.mac.and(link.mac).map(|mac| mac.to_string()),
        promisc: config.promisc.map(|_| link.promiscuous),
        mtu: config.mtu.map(|_| link.mtu),
        allmulti: config.allmulti.map(|_| link.all_multicast),
        tx_q_len: config.tx_queue_length.map(|_| link.queue_length),
    };
    let write = || -> io::Result<()> {
        fs::create_dir_all(path.parent().unwrap_or(&config.data_dir))?;
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(&backup)?)?;
        fs::rename(&new, &path)
    };
    write().map_err(|source| PluginError::File { operation: "write", path: path.clone(), source })
}

/// Puts back what was written down. A container or link that is gone needs nothing.
fn del(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let path = backup_path(call, &config);
    let backup: Backup = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(PluginError::File { operation: "read", path, source }),
    };
    if let Some(netns) = call.netns.as_deref().filter(|netns| oarlock_netns::is_pinned(netns)) {
        let restore = || -> oarlock_netlink::Result<()> {
            let mut connection = Connection::open(Protocol::Route)?;
            match connection.link(&call.ifname)? {
                Some(link) => apply(&mut connection, &link, &backup.change()),
                None => Ok(()),
            }
        };
        oarlock_netns::run_in(netns, restore)
            .map_err(namespace(&call.ifname))?
            .context(|| format!("put {} back", call.ifname))?;
    }
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(PluginError::File { operation: "remove", path, source })
        }
        _ => Ok(()),
    }
}

impl Backup {
    fn change(&self) -> LinkChange {
        LinkChange {
            mac: self.mac.as_ref().and_then(|mac| mac.parse::<Mac>().ok()),
            promiscuous: self.promisc,
            mtu: self.mtu,
            all_multicast: self.allmulti,
            queue_length: self.tx_q_len,
            ..LinkChange::default()
        }
    }
}

fn check(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    required_result(call, "tuning")?;
    let drift = |text: String| Err(PluginError::Drift(text));
    let look = || -> Result<()> {
        for sysctl in &config.sysctls {
            let current = fs::read_to_string(&sysctl.path).unwrap_or_default();
            if current.split_whitespace().ne(sysctl.value.split_whitespace()) {
                return drift(format!("{} is {:?}, not {:?}", sysctl.name, current.trim(), sysctl.value));
            }
        }
        let failed = || format!("look up {}", call.ifname);
        let mut connection = Connection::open(Protocol::Route).context(failed)?;
        let Some(link) = connection.link(&call.ifname).context(failed)? else {
            return drift(format!("{} is missing", call.ifname));
        };
        let wanted = config.change();
        let differences = [
            ("Ethernet address", wanted.mac.is_some_and(|mac| link.mac != Some(mac))),
            ("mtu", wanted.mtu.is_some_and(|mtu| link.mtu != mtu)),
            ("promisc", wanted.promiscuous.is_some_and(|on| link.promiscuous != on)),
            ("allmulti", wanted.all_multicast.is_some_and(|on| link.all_multicast != on)),
            ("txQLen", wanted.queue_length.is_some_and(|length| link.queue_length != length)),
        ];
        match differences.iter().find(|(_, differs)| *differs) {
            Some((what, _)) => drift(format!("{what} of {} was changed", call.ifname)),
            None => Ok(()),
        }
    };
    oarlock_netns::run_in(call.existing_netns()?, look).map_err(namespace(&call.ifname))?
}

fn status(call: &Call) -> Result<()> {
    config::check_allowed(&Config::read(call)?.sysctls)
}

/// Forgets what links of containers that are gone were like.
fn gc(call: &Call) -> Result<()> {
    let config = Config::read(call)?;
    let valid: Vec<String> =
        call.valid_attachments().iter().map(|one| backup_name(&one.container_id, &one.ifname)).collect();
    let directory = config.data_dir.join(&call.network.name);
    let failed = |source| PluginError::File { operation: "list", path: directory.clone(), source };
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !valid.iter().any(|one| one == name) {
            fs::remove_file(&path).map_err(|source| PluginError::File { operation: "remove", path, source })?;
        }
    }
    Ok(())
}
