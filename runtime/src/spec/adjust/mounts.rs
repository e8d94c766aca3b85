//! Adjustments of mounts.

use std::path::Path;

use oarlock_nri::api;
use oarlock_nri::marked_for_removal;
use oci_spec::runtime::{Mount, MountBuilder, Spec};

use super::named;
use crate::spec::SpecError;
use crate::spec::mount::clean;

/// How far mounts below a mount are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Propagation {
    Private,
    /// The host's are seen in the container.
    Slave,
    /// And the container's on the host.
    Shared,
}

/// What a mount's options say.
pub(crate) fn propagation(options: &[String]) -> Propagation {
    let is = |names: [&str; 2]| options.iter().any(|option| names.contains(&option.as_str()));
    if is(["shared", "rshared"]) {
        Propagation::Shared
    } else if is(["slave", "rslave"]) {
        Propagation::Slave
    } else {
        Propagation::Private
    }
}

/// Removes and adds; parents come before children.
pub(super) fn adjust(spec: &mut Spec, wanted: &[api::Mount]) -> Result<(), SpecError> {
    if wanted.is_empty() {
        return Ok(());
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut needed = Propagation::Private;
    for mount in wanted {
        if let Some(gone) = marked_for_removal(&mount.destination) {
            mounts.retain(|known| clean(known.destination()) != clean(Path::new(gone)));
            continue;
        }
        let new = to_oci(mount)?;
        mounts.retain(|known| clean(known.destination()) != clean(new.destination()));
        mounts.push(new);
        needed = needed.max(propagation(&mount.options));
    }
    mounts.sort_by_key(|mount| clean(mount.destination()).components().count());
    spec.set_mounts(Some(mounts));
    root_propagation(spec, needed);
    Ok(())
}

fn to_oci(mount: &api::Mount) -> Result<Mount, SpecError> {
    let field = named(&format!("mounts[{}]", mount.destination));
    let destination = Path::new(&mount.destination);
    let climbs = destination.components().any(|part| part.as_os_str() == "..");
    if !destination.is_absolute() || climbs || clean(destination) == Path::new("/") {
        return Err(SpecError::invalid(field, "the destination must lead below the root, without `..`"));
    }
    let binds = mount.options.iter().any(|option| option == "bind" || option == "rbind");
    if binds && !Path::new(&mount.source).is_absolute() {
        return Err(SpecError::invalid(field, format!("source {:?} is not absolute", mount.source)));
    }
    let mut builder = MountBuilder::default().destination(destination).options(mount.options.clone());
    if !mount.source.is_empty() {
        builder = builder.source(&mount.source);
    }
    let kind = if mount.r#type.is_empty() && binds { "bind" } else { &mount.r#type };
    if !kind.is_empty() {
        builder = builder.typ(kind);
    }
    builder.build().map_err(|error| SpecError::invalid(field, error.to_string()))
}

/// The root's own propagation lets that of its mounts work.
fn root_propagation(spec: &mut Spec, needed: Propagation) {
    let Some(linux) = spec.linux_mut() else { return };
    let now = linux.rootfs_propagation().as_deref().map(|word| propagation(&[word.to_owned()]));
    if needed > now.unwrap_or(Propagation::Private) {
        let word = if needed == Propagation::Shared { "shared" } else { "slave" };
        linux.set_rootfs_propagation(Some(word.to_owned()));
    }
}
