//! The CNI plugins `bridge`, `host-local`, `portmap`, `bandwidth`, `firewall`, `tuning` and `loopback` in one file, chosen by the name that it is called by.
//!
//! Installed under each plugin's name (hard links or copies); `oarlock-cni-plugins <plugin>` works too. Every call is one
//! process that lives for about a millisecond, so there is no async runtime, no logging and no helper process here: netlink
//! is spoken directly.

mod bandwidth;
mod bridge;
mod call;
mod chained;
mod delegate;
mod error;
mod firewall;
mod host_local;
mod linger;
mod loopback;
mod plugin;
mod portmap;
mod sysctl;
mod table;
mod tuning;

use std::path::Path;
use std::process::ExitCode;

use plugin::Plugin;

const PLUGINS: [Plugin; 7] = [
    bridge::PLUGIN,
    host_local::PLUGIN,
    portmap::PLUGIN,
    bandwidth::PLUGIN,
    firewall::PLUGIN,
    tuning::PLUGIN,
    loopback::PLUGIN,
];

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let own = arguments.next().unwrap_or_default();
    let by_name = |name: &str| PLUGINS.into_iter().find(|plugin| plugin.name == name);
    let called_as = Path::new(&own).file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let chosen = by_name(&called_as).or_else(|| by_name(arguments.next()?.to_str()?));
    match chosen {
        Some(plugin) => plugin::run(&plugin),
        None => {
            let names = PLUGINS.map(|plugin| plugin.name).join(", ");
            eprintln!("oarlock-cni-plugins {}: CNI plugins {names}", env!("CARGO_PKG_VERSION"));
            eprintln!("call it by a plugin's name (a link to this file), or with the name as first argument");
            ExitCode::from(64)
        }
    }
}
