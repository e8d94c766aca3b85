//! Puts the decisions about one container together into an OCI runtime specification.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oarlock_cgroup::Unit;
use oarlock_proto::cri;
use oarlock_proto::cri::security_profile::ProfileType;
use oci_spec::runtime::{LinuxBuilder, LinuxSeccomp, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder};

use super::cdi::{self, Edits};
use super::device::{self, HostDevice};
use super::image::{self, Defaults, OwnVariables};
use super::mount::{self, SandboxFiles, Volume};
use super::namespace::{self, Pinned, UserMapping};
use super::user::Identity;
use crate::apparmor::DEFAULT_PROFILE;

use super::{HostFacts, SpecError, capability, resources, seccomp};

/// In names of scopes, before the container's id.
const SCOPE_PREFIX: &str = "cri-oarlock";

/// Everything that decides a container's specification.
pub(crate) struct Inputs<'a> {
    pub config: &'a cri::ContainerConfig,
    /// The resources in force, which an update may have changed since the container was made.
    pub resources: &'a cri::LinuxContainerResources,
    pub image: &'a Defaults,
    pub identity: &'a Identity,
    pub hostname: &'a str,
    pub pinned: &'a Pinned,
    /// The identities of the sandbox's user namespace.
    pub user: Option<UserMapping>,
    /// A PID namespace to join; None with `own_pid` makes one, without it is the host's.
    pub pid_namespace: Option<PathBuf>,
    pub own_pid: bool,
    pub files: &'a SandboxFiles,
    pub volumes: &'a [Volume],
    pub devices: &'a [HostDevice],
    /// What the vendors of its devices want; their nodes are among `devices`.
    pub edits: &'a Edits,
    pub rootfs: &'a Path,
    /// The container's control group, without a leading slash.
    pub cgroup: &'a str,
    /// The profile read from the node's files, for a localhost profile.
    pub seccomp_profile: Option<LinuxSeccomp>,
    pub annotations: HashMap<String, String>,
    pub host: &'a HostFacts,
}

/// The control group of a container: one of its sandbox's group, or a scope in its sandbox's slice. No slash leads it.
pub(crate) fn group(parent: &str, id: &str) -> String {
    match Unit::at(parent) {
        Some(_) => format!("{parent}/{SCOPE_PREFIX}-{id}.scope"),
        None => format!("{parent}/{id}"),
    }
}

/// The group in the form that tells OCI runtimes who makes it.
fn specified(group: &str) -> String {
    Unit::at(group).and_then(|unit| unit.specified()).unwrap_or_else(|| format!("/{group}"))
}

/// Refuses what cannot be honoured, before anything is made for the container.
pub(crate) fn check(config: &cri::ContainerConfig, host: &HostFacts) -> Result<(), SpecError> {
    let metadata = config.metadata.as_ref().ok_or_else(|| SpecError::invalid("config.metadata", "is required"))?;
    if metadata.name.is_empty() {
        return Err(SpecError::invalid("config.metadata.name", "is required"));
    }
    if config.image.as_ref().is_none_or(|image| image.image.is_empty()) {
        return Err(SpecError::invalid("config.image", "is required"));
    }
    if config.windows.is_some() {
        return Err(SpecError::unsupported("config.windows", "this is Linux"));
    }
    for device in cdi_names(config) {
        cdi::check_name(&device)?;
    }
    if Path::new(&config.log_path).is_absolute()
        || Path::new(&config.log_path).components().any(|part| part.as_os_str() == "..")
    {
        return Err(SpecError::invalid(
            "config.log_path",
            format!("{:?} does not stay in the log directory", config.log_path),
        ));
    }
    for mount in &config.mounts {
        mount::check(mount)?;
    }
    for device in &config.devices {
        device::access(device)?;
    }
    let linux = config.linux.clone().unwrap_or_default();
    if let Some(wanted) = &linux.resources {
        resources::check(wanted, host)?;
    }
    if let Some(context) = &linux.security_context {
        check_security(context, host)?;
        capability::decide(context.capabilities.as_ref(), context.privileged, &host.capabilities)?;
    }
    seccomp::choose(linux.security_context.as_ref()).map(drop)
}

/// The devices of the Container Device Interface that are asked for.
pub(crate) fn cdi_names(config: &cri::ContainerConfig) -> Vec<String> {
    let field = config.cdi_devices.iter().map(|device| device.name.as_str());
    cdi::names(field, config.annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())))
}

/// Labels say nothing on a host without SELinux, as with other runtimes; where they do, none are set yet.
pub(crate) fn check_selinux(
    field: &str,
    options: Option<&cri::SeLinuxOption>,
    host: &HostFacts,
) -> Result<(), SpecError> {
    if host.selinux && options.is_some_and(|options| *options != cri::SeLinuxOption::default()) {
        return Err(SpecError::unsupported(field, "this runtime sets no SELinux labels"));
    }
    Ok(())
}

#[allow(deprecated, reason = "older clients only set apparmor_profile")]
fn check_security(context: &cri::LinuxContainerSecurityContext, host: &HostFacts) -> Result<(), SpecError> {
    let field = |name: &str| format!("linux.security_context.{name}");
    check_selinux(&field("selinux_options"), context.selinux_options.as_ref(), host)?;
    let policy = context.supplemental_groups_policy;
    cri::SupplementalGroupsPolicy::try_from(policy)
        .map_err(|_| SpecError::invalid(field("supplemental_groups_policy"), format!("unknown policy {policy}")))?;
    if context.no_new_privs && context.privileged {
        return Err(SpecError::invalid(field("no_new_privs"), "a privileged container cannot have it"));
    }
    apparmor(context, host).map(drop)
}

/// The AppArmor profile to run under. A container that names none gets the runtime's own where that is loaded; where the host
/// has no AppArmor, only a profile by name is refused.
#[allow(deprecated, reason = "older clients only set apparmor_profile")]
fn apparmor(context: &cri::LinuxContainerSecurityContext, host: &HostFacts) -> Result<Option<String>, SpecError> {
    let field = "linux.security_context.apparmor";
    let own = || host.apparmor_default.then(|| DEFAULT_PROFILE.to_owned());
    let (kind, name) = match (&context.apparmor, context.apparmor_profile.as_str()) {
        (Some(profile), _) => (ProfileType::try_from(profile.profile_type), profile.localhost_ref.as_str()),
        (None, "") if context.privileged => return Ok(None),
        (None, "") => return Ok(own()),
        (None, "unconfined") => (Ok(ProfileType::Unconfined), ""),
        (None, "runtime/default") => (Ok(ProfileType::RuntimeDefault), ""),
        (None, other) => (Ok(ProfileType::Localhost), other),
    };
    let name = name.strip_prefix("localhost/").unwrap_or(name);
    match kind {
        _ if context.privileged => Ok(None),
        Ok(ProfileType::Unconfined) => Ok(host.apparmor.then(|| "unconfined".to_owned())),
        Ok(ProfileType::RuntimeDefault) if !host.apparmor => Ok(None),
        Ok(ProfileType::RuntimeDefault) => own().map(Some).ok_or_else(|| {
            SpecError::unsupported(
                field,
                format!("the profile {DEFAULT_PROFILE} is not loaded: is the package apparmor installed?"),
            )
        }),
        Ok(ProfileType::Localhost) if !host.apparmor => Err(SpecError::unsupported(field, "this host has no AppArmor")),
        Ok(ProfileType::Localhost) if name.is_empty() => Err(SpecError::invalid(field, "the profile has no name")),
        Ok(ProfileType::Localhost) => Ok(Some(name.to_owned())),
        Err(_) => Err(SpecError::invalid(field, "unknown profile type")),
    }
}

/// Builds the specification.
pub(crate) fn build(inputs: Inputs<'_>) -> Result<Spec, SpecError> {
    let context = inputs.config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default();
    let failed = |error: oci_spec::OciSpecError| SpecError::invalid("config", error.to_string());
    let capabilities =
        capability::decide(context.capabilities.as_ref(), context.privileged, &inputs.host.capabilities)?;
    let own = OwnVariables { hostname: inputs.hostname, home: &inputs.identity.home, tty: inputs.config.tty };
    let user = UserBuilder::default()
        .uid(inputs.identity.uid)
        .gid(inputs.identity.gid)
        .additional_gids(inputs.identity.groups.clone())
        .build()
        .map_err(failed)?;
    let mut process = ProcessBuilder::default()
        .terminal(inputs.config.tty)
        .user(user)
        .args(image::command_line(inputs.config, inputs.image)?)
        .env(image::environment(inputs.config, inputs.image, &own)?)
        .cwd(image::working_dir(inputs.config, inputs.image)?)
        .capabilities(capabilities.to_oci())
        .oom_score_adj(resources::oom_score_adj(Some(inputs.resources), inputs.host))
        .build()
        .map_err(failed)?;
    process.set_rlimits(None);
    // Some(false) together with a filter makes the engine fail; None means the same.
    process.set_no_new_privileges(context.no_new_privs.then_some(true));
    process.set_apparmor_profile(apparmor(&context, inputs.host)?);

    let root = RootBuilder::default().path(inputs.rootfs).readonly(context.readonly_rootfs).build().map_err(failed)?;
    let mounts = mount::for_container(&mount::Inputs {
        files: inputs.files,
        volumes: inputs.volumes,
        privileged: context.privileged,
        cgroup: inputs.cgroup,
        host: inputs.host,
        readonly_rootfs: context.readonly_rootfs,
    });
    let linux = linux(&inputs, &context, &capabilities.granted)?;
    let mut spec = SpecBuilder::default()
        .version("1.2.0")
        .root(root)
        .mounts(mounts)
        .process(process)
        .annotations(inputs.annotations)
        .linux(linux)
        .build()
        .map_err(failed)?;
    spec.set_hostname(None);
    inputs.edits.apply(&mut spec)?;
    Ok(spec)
}

fn linux(
    inputs: &Inputs<'_>,
    context: &cri::LinuxContainerSecurityContext,
    granted: &capability::Set,
) -> Result<oci_spec::runtime::Linux, SpecError> {
    let failed = |error: oci_spec::OciSpecError| SpecError::invalid("config.linux", error.to_string());
    let access = device::access_list(inputs.devices, context.privileged);
    let (mut masked, mut readonly) = (context.masked_paths.clone(), context.readonly_paths.clone());
    if context.privileged {
        (masked, readonly) = (Vec::new(), Vec::new());
    } else if !inputs.host.cgroup_v2 && !inputs.host.cgroup_v1_hierarchies.is_empty() {
        // The tmpfs that the groups are bound into has to stay writable until they are.
        readonly.push("/sys/fs/cgroup".to_owned());
    }
    let own_cgroup = inputs.host.cgroup_v2 && !context.privileged;
    let mut linux = LinuxBuilder::default()
        .namespaces(namespace::for_container(inputs.pinned, inputs.pid_namespace.clone(), inputs.own_pid, own_cgroup))
        .devices(device::nodes(inputs.devices)?)
        .resources(resources::to_oci(Some(inputs.resources), access, inputs.host)?)
        .cgroups_path(specified(inputs.cgroup))
        .masked_paths(masked)
        .readonly_paths(readonly)
        .build()
        .map_err(failed)?;
    // The namespace exists; these say who is who in it.
    linux.set_uid_mappings(inputs.user.map(|user| vec![user.uid.to_oci()]));
    linux.set_gid_mappings(inputs.user.map(|user| vec![user.gid.to_oci()]));
    linux.set_rootfs_propagation(mount::rootfs_propagation(inputs.volumes).map(str::to_owned));
    linux.set_seccomp(match seccomp::choose(Some(context))? {
        seccomp::Choice::Unconfined => None,
        seccomp::Choice::Default => Some(seccomp::default_profile(granted)),
        seccomp::Choice::Localhost(_) => inputs.seccomp_profile.clone(),
    });
    Ok(linux)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "i".into(), ..cri::ImageSpec::default() }),
            command: vec!["/bin/true".into()],
            ..cri::ContainerConfig::default()
        }
    }

    fn built(config: &cri::ContainerConfig) -> Spec {
        let host = HostFacts {
            cgroup_v1_hierarchies: vec!["/sys/fs/cgroup/memory".into()],
            capabilities: capability::of_mask(u64::MAX >> 23),
            ..HostFacts::default()
        };
        check(config, &host).unwrap();
        build(Inputs {
            config,
            resources: &cri::LinuxContainerResources::default(),
            image: &Defaults::default(),
            identity: &Identity { home: "/".into(), ..Identity::default() },
            hostname: "h",
            pinned: &Pinned::default(),
            user: None,
            pid_namespace: None,
            own_pid: true,
            files: &SandboxFiles::default(),
            volumes: &[],
            devices: &[],
            edits: &Edits::default(),
            rootfs: Path::new("/r"),
            cgroup: "oarlock/s/c",
            seccomp_profile: None,
            annotations: HashMap::new(),
            host: &host,
        })
        .unwrap()
    }

    fn with_context(change: impl FnOnce(&mut cri::LinuxContainerSecurityContext)) -> cri::ContainerConfig {
        let mut context = cri::LinuxContainerSecurityContext::default();
        change(&mut context);
        let linux =
            cri::LinuxContainerConfig { security_context: Some(context), ..cri::LinuxContainerConfig::default() };
        cri::ContainerConfig { linux: Some(linux), ..config() }
    }

    #[test]
    fn a_container_is_a_group_of_its_sandboxs_or_a_scope_in_its_slice() {
        assert_eq!(group("oarlock/s", "c"), "oarlock/s/c");
        let scope = group("a.slice/a-b.slice", "0f");
        assert_eq!(scope, "a.slice/a-b.slice/cri-oarlock-0f.scope");
        assert_eq!(
            (specified("oarlock/s/c").as_str(), specified(&scope).as_str()),
            ("/oarlock/s/c", "a-b.slice:cri-oarlock:0f")
        );
    }

    #[test]
    fn no_new_privileges_is_absent_unless_asked_for() {
        assert_eq!(built(&config()).process().as_ref().unwrap().no_new_privileges(), None);
        let asked = built(&with_context(|context| context.no_new_privs = true));
        assert_eq!(asked.process().as_ref().unwrap().no_new_privileges(), Some(true));
    }

    #[test]
    fn a_privileged_container_masks_nothing_and_has_no_filter() {
        let spec = built(&with_context(|context| {
            context.privileged = true;
            context.masked_paths = vec!["/proc/kcore".into()];
            context.seccomp = Some(cri::SecurityProfile::default());
        }));
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.masked_paths().as_ref().unwrap().is_empty() && linux.seccomp().is_none());
    }

    #[test]
    fn no_own_limits_or_hostname_are_invented() {
        let spec = built(&config());
        assert!(spec.process().as_ref().unwrap().rlimits().is_none() && spec.hostname().is_none());
        assert_eq!(spec.linux().as_ref().unwrap().cgroups_path().as_deref(), Some(Path::new("/oarlock/s/c")));
    }

    #[test]
    fn what_is_not_honoured_is_refused() {
        let host = HostFacts::default();
        let mut cdi = config();
        cdi.cdi_devices = vec![cri::CdiDevice { name: "no device".into() }];
        assert!(check(&cdi, &host).is_err());
        let mut log = config();
        log.log_path = "../../etc/passwd".into();
        assert!(check(&log, &host).is_err());
        let selinux = with_context(|context| {
            context.selinux_options = Some(cri::SeLinuxOption { level: "s0".into(), ..cri::SeLinuxOption::default() });
        });
        assert!(check(&selinux, &HostFacts { selinux: true, ..HostFacts::default() }).is_err());
        assert!(check(&selinux, &host).is_ok(), "where nothing is labelled, labels say nothing");
        let profile = with_context(|context| {
            let localhost = ProfileType::Localhost as i32;
            context.apparmor = Some(cri::SecurityProfile { profile_type: localhost, localhost_ref: "p".into() });
        });
        assert!(check(&profile, &host).is_err());
    }

    #[test]
    fn a_container_gets_the_profile_it_names_or_the_runtimes_own() {
        use ProfileType::{Localhost, RuntimeDefault, Unconfined};
        let host = |apparmor, apparmor_default| HostFacts { apparmor, apparmor_default, ..HostFacts::default() };
        let of = |kind: Option<(ProfileType, &str)>, privileged, host: &HostFacts| {
            let profile = |(kind, name): (ProfileType, &str)| cri::SecurityProfile {
                profile_type: kind as i32,
                localhost_ref: name.to_owned(),
            };
            let context = cri::LinuxContainerSecurityContext {
                apparmor: kind.map(profile),
                privileged,
                ..cri::LinuxContainerSecurityContext::default()
            };
            apparmor(&context, host).map_err(|_| ())
        };
        let some = |name: &str| Ok(Some(name.to_owned()));
        let (none, bare, full) = (host(false, false), host(true, false), host(true, true));
        assert_eq!(of(None, false, &full), some(DEFAULT_PROFILE));
        assert_eq!(of(Some((RuntimeDefault, "")), false, &full), some(DEFAULT_PROFILE));
        assert_eq!(of(Some((Localhost, "mine")), false, &full), some("mine"));
        assert_eq!(of(Some((Unconfined, "")), false, &full), some("unconfined"));
        assert_eq!(of(None, true, &full), Ok(None));
        assert_eq!(of(None, false, &bare), Ok(None));
        assert_eq!(of(Some((RuntimeDefault, "")), false, &bare), Err(()));
        assert_eq!(of(Some((RuntimeDefault, "")), false, &none), Ok(None));
        assert_eq!(of(Some((Localhost, "mine")), false, &none), Err(()));
    }
}
