//! Makes what a sandbox consists of: namespaces and network, shim, files, control group; side by side where one does not
//! need the other.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::sync::Arc;

use oarlock_failpoint::step;
use oarlock_netns::{PinOptions, Pins};
use oarlock_shim_api::Shim;

use tracing::{Instrument, debug_span};

use super::network::{self, Joined};
use crate::core::Core;
use crate::error::Error;
use crate::groups;
use crate::mounts;
use crate::paths::SandboxPaths;
use crate::spec::sandbox::Decision;
use crate::state::{Sandbox, blocking};

/// Size of a sandbox's shared memory.
const SHM_BYTES: u64 = 64 << 20;

/// Makes everything and tells where in the network it is. On failure what was made stays for the caller to undo.
pub(super) async fn make(core: &Arc<Core>, sandbox: &Arc<Sandbox>, decision: &Decision) -> Result<Joined, Error> {
    let id = sandbox.id();
    let paths = core.paths.sandbox(&id);
    let (root, group, ours) = (paths.root.clone(), decision.cgroup_parent.clone(), decision.owns_cgroup_parent);
    blocking("the sandbox directory", move || {
        fs::create_dir_all(&root).map_err(Error::io("create", &root))?;
        // The shim and every container go below it, so it comes before both.
        step("the sandbox's directory is made");
        groups::create(&group, ours)
    })
    .instrument(debug_span!("directory and cgroup"))
    .await?;
    step("the sandbox's control group is made");
    // A shared PID namespace belongs to the sandbox's user namespace, so the shim has to wait for that.
    let pinned_first = decision.modes.user.is_some();
    if pinned_first {
        pin_namespaces(decision, sandbox, &paths).await?;
    }
    // None of the three may be dropped half way because another failed: each is waited for.
    let (network, shim, files) = tokio::join!(
        async {
            if !pinned_first {
                pin_namespaces(decision, sandbox, &paths).await?;
            }
            make_network(core, sandbox, decision).instrument(debug_span!("network")).await
        },
        make_shim(core, sandbox, decision).instrument(debug_span!("shim")),
        make_files(decision, sandbox, &paths).instrument(debug_span!("files"))
    );
    shim?;
    files?;
    network
}

async fn pin_namespaces(decision: &Decision, sandbox: &Arc<Sandbox>, paths: &SandboxPaths) -> Result<(), Error> {
    let modes = decision.modes;
    let options = PinOptions {
        net: !modes.host_network,
        ipc: !modes.host_ipc,
        uts: !modes.host_network,
        hostname: Some(decision.hostname.clone()).filter(|name| !name.is_empty()),
        sysctls: decision.sysctls.clone(),
        user: modes.user.map(|user| user.mappings()),
    };
    let (directory, id) = (paths.namespaces(), sandbox.id());
    blocking("namespaces", move || {
        if !(options.net || options.ipc || options.uts) {
            return Ok(());
        }
        Pins::create(&directory, &options).map(drop).map_err(|source| Error::Namespaces {
            sandbox: id,
            operation: "make",
            source,
        })
    })
    .instrument(debug_span!("namespaces"))
    .await?;
    step("namespaces are pinned");
    Ok(())
}

async fn make_network(core: &Arc<Core>, sandbox: &Arc<Sandbox>, decision: &Decision) -> Result<Joined, Error> {
    if decision.modes.host_network {
        return Ok(Joined::default());
    }
    let joined = network::attach(core, &sandbox.record(), decision).await?;
    step("the network is joined");
    Ok(joined)
}

async fn make_shim(core: &Arc<Core>, sandbox: &Arc<Sandbox>, decision: &Decision) -> Result<(), Error> {
    let id = sandbox.id();
    let options = core.shim_options(&id, decision.modes);
    let limit = core.config.shim_timeout;
    let shim = tokio::time::timeout(limit, Shim::spawn(options))
        .await
        .map_err(|_| Error::TimedOut { operation: format!("starting the shim of sandbox {id}"), limit })?
        .map_err(Error::shim(format!("start the shim of sandbox {id}")))?;
    sandbox.set_shim(Some(shim));
    // Who waits for the lock of moves holds the one of all groups: not before the shim is born in its own.
    core.moves.expect();
    step("the shim runs");
    Ok(())
}

async fn make_files(decision: &Decision, sandbox: &Arc<Sandbox>, paths: &SandboxPaths) -> Result<(), Error> {
    let record = sandbox.record();
    let (paths, decision) = (paths.clone(), decision.clone());
    blocking("the sandbox's files", move || {
        let resolv_conf = match &decision.resolv_conf {
            Some(text) => text.clone().into_bytes(),
            None => host_resolv_conf()?,
        };
        let owner = decision.modes.user.map_or((0, 0), |user| (user.uid.outside, user.gid.outside));
        write_readable(&paths.resolv_conf(), &resolv_conf, owner)?;
        write_readable(&paths.hostname(), format!("{}\n", decision.hostname).as_bytes(), owner)?;
        if !decision.modes.host_ipc {
            mounts::shm(&paths.shm(), SHM_BYTES, owner)?;
            step("shared memory is mounted");
        }
        let logs = Path::new(&record.config.log_directory);
        if logs.is_absolute() {
            fs::create_dir_all(logs).map_err(Error::io("create", logs))?;
        }
        Ok(())
    })
    .await
}

fn host_resolv_conf() -> Result<Vec<u8>, Error> {
    let path = "/etc/resolv.conf";
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(Error::io("read", path)),
    }
}

/// Containers of any user read these, whatever the daemon's umask is; `owner` is their root.
fn write_readable(path: &Path, content: &[u8], (uid, gid): (u32, u32)) -> Result<(), Error> {
    fs::write(path, content).map_err(Error::io("write", path))?;
    if uid != 0 || gid != 0 {
        chown(path, Some(uid), Some(gid)).map_err(Error::io("change the owner of", path))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(Error::io("change the mode of", path))
}
