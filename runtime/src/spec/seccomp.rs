//! Which seccomp filter a container gets: the default profile, one from the node's files, or none.

use oarlock_proto::cri;
use oarlock_proto::cri::security_profile::ProfileType;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::seccomp_table as table;
use super::{SpecError, capability};

const FIELD: &str = "linux.security_context.seccomp";

/// What to do about seccomp.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    Unconfined,
    Default,
    /// The file of a profile; absolute.
    Localhost(String),
}

/// Decides from the security context; the older path field counts where the newer one is absent.
#[allow(deprecated, reason = "older clients only set seccomp_profile_path")]
pub(crate) fn choose(context: Option<&cri::LinuxContainerSecurityContext>) -> Result<Choice, SpecError> {
    let Some(context) = context.filter(|context| !context.privileged) else { return Ok(Choice::Unconfined) };
    let localhost = |path: &str| match path.starts_with('/') {
        true => Ok(Choice::Localhost(path.to_owned())),
        false => Err(SpecError::invalid(FIELD, format!("the profile {path:?} is not an absolute path"))),
    };
    if let Some(profile) = &context.seccomp {
        return match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::RuntimeDefault) => Ok(Choice::Default),
            Ok(ProfileType::Unconfined) => Ok(Choice::Unconfined),
            Ok(ProfileType::Localhost) => localhost(&profile.localhost_ref),
            Err(_) => Err(SpecError::invalid(FIELD, format!("unknown profile type {}", profile.profile_type))),
        };
    }
    match context.seccomp_profile_path.as_str() {
        "" | "unconfined" => Ok(Choice::Unconfined),
        "runtime/default" | "docker/default" => Ok(Choice::Default),
        other => match other.strip_prefix("localhost/") {
            Some(path) => localhost(path),
            None => Err(SpecError::invalid(FIELD, format!("unknown profile {other:?}"))),
        },
    }
}

/// A profile from its file, in the form of the OCI runtime specification.
pub(crate) fn parse(path: &str, content: &[u8]) -> Result<LinuxSeccomp, SpecError> {
    serde_json::from_slice(content)
        .map_err(|error| SpecError::invalid(FIELD, format!("cannot load profile {path}: {error}")))
}

/// The default profile for a process with these capabilities.
pub(crate) fn default_profile(capabilities: &capability::Set) -> LinuxSeccomp {
    let mut rules = vec![allow(&names(table::ALWAYS), Vec::new())];
    rules
        .push(allow(&["socket".to_owned()], vec![argument(0, table::AF_VSOCK, None, LinuxSeccompOperator::ScmpCmpNe)]));
    for persona in table::PERSONALITIES {
        rules.push(allow(
            &["personality".to_owned()],
            vec![argument(0, *persona, None, LinuxSeccompOperator::ScmpCmpEq)],
        ));
    }
    let architectures = match std::env::consts::ARCH {
        "x86_64" => {
            rules.push(allow(&names(table::X86_64), Vec::new()));
            // Not X32: no distribution's kernel runs it, a filter without it kills whoever tries, and each architecture
            // adds a third to the time that compiling takes at every start.
            vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86]
        }
        "aarch64" => {
            rules.push(allow(&names(table::AARCH64), Vec::new()));
            vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
        }
        _ => vec![Arch::ScmpArchNative],
    };
    let mut granted: Vec<String> = table::WITH_CAPABILITY
        .iter()
        .filter(|(capability, _)| capabilities.contains(capability))
        .flat_map(|(_, calls)| names(calls))
        .collect();
    granted.sort();
    granted.dedup();
    if !granted.is_empty() {
        rules.push(allow(&granted, Vec::new()));
    }
    if !capabilities.contains("SYS_ADMIN") {
        let no_namespaces = argument(0, table::CLONE_NAMESPACES, Some(0), LinuxSeccompOperator::ScmpCmpMaskedEq);
        rules.push(allow(&["clone".to_owned()], vec![no_namespaces]));
        // The flags of clone3 lie in memory that a filter cannot read; with ENOSYS libraries fall back to clone.
        rules.push(rule(
            &["clone3".to_owned()],
            LinuxSeccompAction::ScmpActErrno,
            Some(libc::ENOSYS as u32),
            Vec::new(),
        ));
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(libc::EPERM as u32)
        .architectures(architectures)
        .syscalls(rules)
        .build()
        .unwrap_or_default()
}

fn names(list: &str) -> Vec<String> {
    list.split_ascii_whitespace().map(str::to_owned).collect()
}

fn allow(names: &[String], args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow, None, args)
}

fn rule(names: &[String], action: LinuxSeccompAction, errno: Option<u32>, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    let mut builder = LinuxSyscallBuilder::default().names(names).action(action);
    if let Some(errno) = errno {
        builder = builder.errno_ret(errno);
    }
    if !args.is_empty() {
        builder = builder.args(args);
    }
    builder.build().expect("names and action are all that a rule requires")
}

fn argument(index: usize, value: u64, value_two: Option<u64>, op: LinuxSeccompOperator) -> LinuxSeccompArg {
    let mut builder = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    if let Some(value) = value_two {
        builder = builder.value_two(value);
    }
    builder.build().expect("index, value and operator are all that an argument requires")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(profile: &LinuxSeccomp, call: &str) -> bool {
        profile.syscalls().iter().flatten().any(|rule| {
            rule.action() == LinuxSeccompAction::ScmpActAllow && rule.names().iter().any(|name| name == call)
        })
    }

    #[test]
    fn mounting_and_namespaces_need_sys_admin() {
        let plain = default_profile(&capability::Set::from(["CHOWN"]));
        let admin = default_profile(&capability::Set::from(["SYS_ADMIN"]));
        for call in ["mount", "unshare", "setns", "bpf", "clone3"] {
            assert!(!allows(&plain, call) && allows(&admin, call), "{call}");
        }
        for call in ["read", "execve", "clone", "openat2"] {
            assert!(allows(&plain, call) && allows(&admin, call), "{call}");
        }
        for call in ["kexec_load", "keyctl", "add_key", "io_uring_setup", "userfaultfd", "init_module"] {
            assert!(!allows(&plain, call) && !allows(&admin, call), "{call}");
        }
    }

    #[test]
    fn no_call_is_listed_twice() {
        let mut all = names(table::ALWAYS);
        all.sort();
        let before = all.len();
        all.dedup();
        assert_eq!(all.len(), before);
    }

    #[test]
    fn a_privileged_container_has_no_filter_and_a_relative_profile_is_refused() {
        let mut context = cri::LinuxContainerSecurityContext {
            seccomp: Some(cri::SecurityProfile {
                profile_type: ProfileType::Localhost as i32,
                localhost_ref: "a.json".into(),
            }),
            ..cri::LinuxContainerSecurityContext::default()
        };
        assert!(choose(Some(&context)).is_err());
        context.privileged = true;
        assert_eq!(choose(Some(&context)), Ok(Choice::Unconfined));
        assert_eq!(choose(None), Ok(Choice::Unconfined));
        assert!(parse("/p.json", b"{\"defaultAction\":\"NO\"}").is_err());
        assert!(parse("/p.json", b"{\"defaultAction\":\"SCMP_ACT_ALLOW\"}").is_ok());
    }
}
