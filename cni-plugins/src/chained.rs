//! What plugins that come after another one have in common: they look for the attachment's link, and hand its result on.

use oarlock_cni::types::CniResult;
use oarlock_netlink::{Connection, Link, Protocol};

use crate::call::Call;
use crate::error::{Context, PluginError, Result};

/// The result of the plugins before this one, which has to be there.
pub fn required_result(call: &Call, plugin: &str) -> Result<CniResult> {
    call.prev_result()?.ok_or_else(|| PluginError::config("prevResult", format!("is required: {plugin} is chained")))
}

/// The host's end of the container's link.
pub fn host_end(call: &Call, connection: &mut Connection) -> Result<Link> {
    let inside = Connection::open_in(Protocol::Route, call.existing_netns()?);
    let link = inside.and_then(|mut inside| inside.link(&call.ifname));
    let link = link.context(|| format!("look up {} of the container", call.ifname))?;
    let peer = link.and_then(|link| link.peer).ok_or_else(|| PluginError::NoPair { name: call.ifname.clone() })?;
    let host = connection.link_by_index(peer).context(|| "look up the host's end".into())?;
    host.ok_or_else(|| PluginError::NoPair { name: call.ifname.clone() })
}
