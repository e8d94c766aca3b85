//! Asks plugins about a container that is being made, and carries out what they want of it.

use std::path::Path;
use std::sync::Arc;

use oarlock_nri::api::{self, ContainerAdjustment};
use oarlock_nri::marked_for_removal;
use oarlock_proto::cri;

use super::bundle::{self, Made};
use super::volumes;
use crate::cdi;
use crate::core::Core;
use crate::error::Error;
use crate::mounts;
use crate::nri;
use crate::record::{ContainerRecord, SandboxRecord};
use crate::spec::adjust::{Devices, Propagation, apply, cgroup, propagation};
use crate::spec::{SpecError, resources};
use crate::state::{Container, blocking};

/// What the container's record has to say since.
#[derive(Debug)]
pub(super) struct Changes {
    pub cgroup: String,
    pub resources: cri::LinuxContainerResources,
}

/// Asks, and writes the specification.
pub(super) async fn adjust(
    core: &Arc<Core>,
    container: &Arc<Container>,
    sandbox: &Arc<SandboxRecord>,
    made: Made,
) -> Result<Option<Changes>, Error> {
    let record = container.record();
    let wanted = nri::adjust(core, container, sandbox, &made.spec).await?;
    let mut changed = ContainerRecord::clone(&record);
    let mut spec = made.spec;
    let linux = wanted.linux.clone().unwrap_or_default();
    if !linux.cgroups_path.is_empty() {
        // More than one part of the specification follows from it.
        changed.cgroup = cgroup(&linux.cgroups_path, &core.host)?;
        spec = bundle::respecify(core, changed.clone(), sandbox, made.identity).await?;
    }
    if let Some(limits) = &linux.resources {
        changed.resources = resources::updated(&record.resources, &nri::to_cri(limits));
    }
    if let Some(score) = linux.oom_score_adj {
        changed.resources.oom_score_adj = score.value;
    }
    let changes = Changes { cgroup: changed.cgroup, resources: changed.resources };
    let (core, sandbox) = (core.clone(), sandbox.clone());
    blocking("a bundle", move || {
        let mut wanted = wanted;
        prepare_mounts(&core, &record.id, &sandbox, &mut wanted)?;
        apply(&mut spec, &wanted, &devices(&core, &wanted)?, &core.host)?;
        bundle::write(&core, &record.id, &spec)
    })
    .await?;
    Ok(Some(changes))
}

fn devices(core: &Core, wanted: &ContainerAdjustment) -> Result<Devices, Error> {
    let names: Vec<String> = wanted.cdi_devices.iter().map(|device| device.name.clone()).collect();
    let edits = cdi::resolve(&core.config.cdi_dirs, &names)?;
    Ok(Devices { nodes: cdi::nodes(&edits)?, edits })
}

/// Looks whether mounts can be seen as far as is asked for. In a user namespace what is bound is a view, because root there
/// may not be able to walk to the path itself.
fn prepare_mounts(
    core: &Core,
    id: &str,
    sandbox: &SandboxRecord,
    wanted: &mut ContainerAdjustment,
) -> Result<(), Error> {
    let added = wanted.mounts.iter_mut().filter(|mount| marked_for_removal(&mount.destination).is_none());
    for (index, mount) in added.enumerate() {
        let binds = mount.options.iter().any(|option| option == "bind" || option == "rbind");
        if !binds {
            continue;
        }
        check_propagation(mount)?;
        if sandbox.user.is_some() {
            let target = core.paths.bundle(id).volume(&format!("plugin-{index}"));
            mount.source = volumes::view(Path::new(&mount.source), &target, None)?.display().to_string();
        }
    }
    Ok(())
}

fn check_propagation(mount: &api::Mount) -> Result<(), Error> {
    let wanted = propagation(&mount.options);
    if wanted == Propagation::Private {
        return Ok(());
    }
    let (point, shared, slave) = mounts::propagation_of(Path::new(&mount.source))?;
    if shared || (slave && wanted == Propagation::Slave) {
        return Ok(());
    }
    let problem = format!("{:?} is mounted on {point:?}, which is not shared", mount.source);
    Err(SpecError::invalid(format!("adjustment.mounts[{}]", mount.destination), problem).into())
}
