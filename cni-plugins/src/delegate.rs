//! Address management by another plugin. The `host-local` of this very file is called as a function, every other plugin is
//! run as the specification says.

use std::io::Write;
use std::process::{Command, Stdio};

use oarlock_cni::types::{CniResult, ErrorObject};

use crate::call::Call;
use crate::error::{PluginError, Result};
use crate::host_local;

/// Lets the IPAM plugin `kind` answer ADD.
pub fn add(kind: &str, call: &Call) -> Result<CniResult> {
    if kind == host_local::PLUGIN.name {
        return (host_local::PLUGIN.add)(call);
    }
    serde_json::from_slice(&run(kind, "ADD", call)?).map_err(PluginError::PrevResult)
}

pub fn del(kind: &str, call: &Call) -> Result<()> {
    if kind == host_local::PLUGIN.name { (host_local::PLUGIN.del)(call) } else { run(kind, "DEL", call).map(drop) }
}

pub fn check(kind: &str, call: &Call) -> Result<()> {
    if kind == host_local::PLUGIN.name { (host_local::PLUGIN.check)(call) } else { run(kind, "CHECK", call).map(drop) }
}

pub fn status(kind: &str, call: &Call) -> Result<()> {
    if kind == host_local::PLUGIN.name {
        (host_local::PLUGIN.status)(call)
    } else {
        run(kind, "STATUS", call).map(drop)
    }
}

pub fn gc(kind: &str, call: &Call) -> Result<()> {
    if kind == host_local::PLUGIN.name { (host_local::PLUGIN.gc)(call) } else { run(kind, "GC", call).map(drop) }
}

fn run(kind: &str, verb: &str, call: &Call) -> Result<Vec<u8>> {
    let sound = !kind.is_empty() && !kind.contains('/');
    let path = call.plugin_path.iter().map(|directory| directory.join(kind)).find(|path| sound && path.is_file());
    let path = path.ok_or_else(|| PluginError::NoIpam { plugin: kind.to_owned() })?;
    let failed = |source| PluginError::File { operation: "run IPAM plugin", path: path.clone(), source };
    // The environment is this call's own, so only the verb has to be set.
    let mut child = Command::new(&path)
        .env("CNI_COMMAND", verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that fails before it reads has its own error to tell.
        let _ = stdin.write_all(&call.stdin);
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let error = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| ErrorObject {
        cni_version: call.network.cni_version.to_string(),
        code: 999,
        msg: format!("{} without an error object", output.status),
        details: String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    });
    Err(PluginError::Ipam { plugin: kind.to_owned(), error })
}
