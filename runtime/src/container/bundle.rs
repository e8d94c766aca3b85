//! Makes a container's bundle: root file system mounted, volumes found, specification written.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oarlock_failpoint::step;
use oarlock_images::Image;
use oci_spec::runtime::{LinuxSeccomp, Spec};

use super::{devices, ids, volumes};
use crate::apparmor;
use crate::cdi;
use crate::core::Core;
use crate::error::Error;
use crate::idmap::Owner;
use crate::mounts;
use crate::nri::Further;
use crate::record::{ContainerPhase, ContainerRecord, SandboxRecord};
use crate::sandbox;
use crate::spec;
use crate::spec::image::Defaults;
use crate::spec::namespace::PidMode;
use crate::spec::seccomp::Choice;
use crate::spec::user::Identity;
use crate::state::blocking;

/// Largest seccomp profile read.
const PROFILE_BYTES_MAX: u64 = 4 << 20;

/// A bundle that is made.
#[derive(Clone, Debug)]
pub(super) struct Made {
    /// As whom the container runs.
    pub identity: Identity,
    pub spec: Spec,
}

/// Makes everything, and writes the specification if it is not to be `adjusted` first. On failure what was made stays for
/// the caller to undo.
pub(super) async fn make(
    core: &Arc<Core>,
    record: &Arc<ContainerRecord>,
    sandbox: &Arc<SandboxRecord>,
    as_it_is: bool,
) -> Result<Made, Error> {
    let image = image_of(core, record)?;
    let rootfs = core.images.prepare_rootfs(&image.id, &record.id).await?;
    step("the container's layer is made");
    let images = volumes::prepare_images(core, record).await?;
    let (core, record, sandbox) = (core.clone(), record.clone(), sandbox.clone());
    blocking("a bundle", move || {
        let paths = core.paths.bundle(&record.id);
        let owner = owner_of(&core, &sandbox)?;
        mounts::overlay(&rootfs, &paths.rootfs(), owner.as_ref())?;
        step("the root file system is mounted");
        volumes::mount_images(&core, &record, &images, owner.as_ref())?;
        let identity = ids::look_up(&paths.rootfs(), &record.config, &Defaults::of(&image.config).user)?;
        let spec = specify(&core, &record, &sandbox, &Defaults::of(&image.config), &identity)?;
        if as_it_is {
            write(&core, &record.id, &spec)?;
        }
        Ok(Made { identity, spec })
    })
    .await
}

/// Makes the specification anew, for a record that says something else than the one it was made of.
pub(super) async fn respecify(
    core: &Arc<Core>,
    record: ContainerRecord,
    sandbox: &Arc<SandboxRecord>,
    identity: Identity,
) -> Result<Spec, Error> {
    let image = image_of(core, &record)?;
    let (core, sandbox) = (core.clone(), sandbox.clone());
    blocking("a bundle", move || specify(&core, &record, &sandbox, &Defaults::of(&image.config), &identity)).await
}

/// Writes the resources in force to the specification, after those of a container that has not started changed. All else
/// stays as it is: plugins may have had a say in it.
pub(super) async fn limit(core: &Arc<Core>, record: &Arc<ContainerRecord>, further: Further) -> Result<(), Error> {
    let (core, record) = (core.clone(), record.clone());
    blocking("a bundle", move || {
        let path = core.paths.bundle(&record.id).config();
        let failed = |error: oci_spec::OciSpecError| Error::io("read", &path)(std::io::Error::other(error));
        let mut spec = Spec::load(&path).map_err(failed)?;
        if let Some(linux) = spec.linux_mut() {
            let current = linux.resources().clone().unwrap_or_default();
            let renewed = spec::resources::renew(&current, &record.resources, &core.host)?;
            linux.set_resources(Some(spec::resources::further(renewed, further)?));
        }
        write(&core, &record.id, &spec)
    })
    .await
}

/// The sandbox's user namespace, if it has one.
pub(super) fn owner_of(core: &Core, sandbox: &SandboxRecord) -> Result<Option<Owner>, Error> {
    let pinned = sandbox::pinned(core, sandbox);
    pinned.user.zip(sandbox.user).map(|(path, mapping)| Owner::pinned(&path, mapping)).transpose()
}

fn image_of(core: &Core, record: &ContainerRecord) -> Result<Image, Error> {
    core.images.status(&record.image_id).ok_or_else(|| Error::NoImage { reference: record.image_id.clone() })
}

fn specify(
    core: &Core,
    record: &ContainerRecord,
    sandbox: &SandboxRecord,
    defaults: &Defaults,
    identity: &Identity,
) -> Result<Spec, Error> {
    let paths = core.paths.bundle(&record.id);
    let context = record.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    let pid = spec::namespace::container_pid(options, sandbox.modes())?;
    let volumes = volumes::find(core, record, defaults, owner_of(core, sandbox)?.as_ref())?;
    let mut devices = devices::find(&record.config, context.is_some_and(|context| context.privileged))?;
    let edits = cdi::resolve(&core.config.cdi_dirs, &spec::container::cdi_names(&record.config))?;
    for device in cdi::nodes(&edits)? {
        devices.retain(|known| known.path != device.path);
        devices.push(device);
    }
    let spec = spec::container::build(spec::container::Inputs {
        config: &record.config,
        resources: &record.resources,
        image: defaults,
        identity,
        hostname: &sandbox.hostname,
        pinned: &sandbox::pinned(core, sandbox),
        user: sandbox.user,
        pid_namespace: pid_path(core, record, &pid)?,
        own_pid: pid == PidMode::Own,
        files: &sandbox::files(core, sandbox),
        volumes: &volumes,
        devices: &devices,
        edits: &edits,
        rootfs: &paths.rootfs(),
        cgroup: &record.cgroup,
        seccomp_profile: profile(context)?,
        annotations: annotations(record, sandbox),
        host: &core.host,
    })?;
    if let Some(name) = spec.process().as_ref().and_then(|process| process.apparmor_profile().as_deref()) {
        apparmor::require(name)?;
    }
    Ok(spec)
}

/// Writes a specification, whole or not at all.
pub(super) fn write(core: &Core, id: &str, spec: &Spec) -> Result<(), Error> {
    let config = core.paths.bundle(id).config();
    let bytes = serde_json::to_vec(spec)
        .map_err(|error| Error::Invalid(format!("cannot encode the specification: {error}")))?;
    let partial = config.with_extension("partial");
    // Environments hold secrets.
    write_private(&partial, &bytes).map_err(Error::io("write", &partial))?;
    fs::rename(&partial, &config).map_err(Error::io("rename to", &config))?;
    step("the specification is written");
    Ok(())
}

fn pid_path(core: &Core, record: &ContainerRecord, mode: &PidMode) -> Result<Option<PathBuf>, Error> {
    match mode {
        PidMode::Own | PidMode::Host => Ok(None),
        PidMode::Shared => Ok(Some(core.paths.sandbox(&record.sandbox_id).pid_namespace())),
        PidMode::Target(id) => {
            let target = core.index.container(id)?.record();
            if target.sandbox_id != record.sandbox_id || target.phase != ContainerPhase::Running {
                return Err(Error::Invalid(format!("target_id: container {id} does not run in the same sandbox")));
            }
            Ok(Some(format!("/proc/{}/ns/pid", target.pid).into()))
        }
    }
}

fn profile(context: Option<&oarlock_proto::cri::LinuxContainerSecurityContext>) -> Result<Option<LinuxSeccomp>, Error> {
    let Choice::Localhost(path) = spec::seccomp::choose(context)? else { return Ok(None) };
    let size = fs::metadata(&path).map_err(Error::io("read seccomp profile", &path))?.len();
    if size > PROFILE_BYTES_MAX {
        return Err(Error::Invalid(format!("seccomp profile {path} is larger than {PROFILE_BYTES_MAX} bytes")));
    }
    let content = fs::read(&path).map_err(Error::io("read seccomp profile", &path))?;
    Ok(Some(spec::seccomp::parse(&path, &content)?))
}

/// Who the container is, under the names that tools of other runtimes read.
fn annotations(record: &ContainerRecord, sandbox: &SandboxRecord) -> HashMap<String, String> {
    let pod = sandbox.metadata();
    let image = record.config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
    [
        ("container-type", "container".to_owned()),
        ("container-name", record.metadata().name),
        ("image-name", image),
        ("sandbox-id", sandbox.id.clone()),
        ("sandbox-name", pod.name),
        ("sandbox-namespace", pod.namespace),
        ("sandbox-uid", pod.uid),
    ]
    .into_iter()
    .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value))
    .collect()
}

/// A file that root alone reads, whoever may walk the directories above it.
fn write_private(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(content)
}
