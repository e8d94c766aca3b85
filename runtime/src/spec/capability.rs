//! Which capabilities a container's process gets.

use std::collections::BTreeSet;

use oarlock_proto::cri;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, LinuxCapabilitiesBuilder};

use super::SpecError;

/// Capability names in the kernel's spelling without `CAP_`.
pub(crate) type Set = BTreeSet<&'static str>;

/// By number, as in linux/capability.h.
const BY_NUMBER: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container gets that asks for nothing; the set users know from other runtimes.
const DEFAULT: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The capabilities of a mask as in `/proc/PID/status`.
pub(crate) fn of_mask(mask: u64) -> Set {
    BY_NUMBER.iter().enumerate().filter(|(bit, _)| mask & (1 << bit) != 0).map(|(_, name)| *name).collect()
}

/// The sets of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Bounding, permitted and effective.
    pub granted: Set,
    /// Ambient and inheritable.
    pub ambient: Set,
}

/// Decides from the defaults, what is added and dropped, and what the runtime itself holds.
pub(crate) fn decide(wanted: Option<&cri::Capability>, privileged: bool, held: &Set) -> Result<Decision, SpecError> {
    if privileged {
        return Ok(Decision { granted: held.clone(), ambient: Set::new() });
    }
    let none = cri::Capability::default();
    let wanted = wanted.unwrap_or(&none);
    let field = |which: &str| format!("linux.security_context.capabilities.{which}");

    let mut granted: Set = DEFAULT.iter().copied().filter(|name| held.contains(name)).collect();
    if has_all(&wanted.add_capabilities) {
        granted = held.clone();
    }
    if has_all(&wanted.drop_capabilities) {
        granted.clear();
    }
    for name in wanted.add_capabilities.iter().filter(|name| !is_all(name)) {
        let known = known(name, &field("add_capabilities"))?;
        if !held.contains(known) {
            return Err(SpecError::unsupported(
                field("add_capabilities"),
                format!("this host does not grant {known} to the runtime"),
            ));
        }
        granted.insert(known);
    }
    for name in wanted.drop_capabilities.iter().filter(|name| !is_all(name)) {
        granted.remove(known(name, &field("drop_capabilities"))?);
    }
    let mut ambient = Set::new();
    for name in &wanted.add_ambient_capabilities {
        let added =
            if is_all(name) { held.clone() } else { Set::from([known(name, &field("add_ambient_capabilities"))?]) };
        if let Some(missing) = added.iter().find(|name| !held.contains(*name)) {
            let reason = format!("this host does not grant {missing} to the runtime");
            return Err(SpecError::unsupported(field("add_ambient_capabilities"), reason));
        }
        granted.extend(&added);
        ambient.extend(&added);
    }
    Ok(Decision { granted, ambient })
}

impl Decision {
    /// The form of the OCI runtime specification.
    pub(crate) fn to_oci(&self) -> LinuxCapabilities {
        let granted = oci(&self.granted);
        let ambient = oci(&self.ambient);
        LinuxCapabilitiesBuilder::default()
            .bounding(granted.clone())
            .effective(granted.clone())
            .permitted(granted)
            .inheritable(ambient.clone())
            .ambient(ambient)
            .build()
            .unwrap_or_default()
    }
}

fn oci(set: &Set) -> Capabilities {
    set.iter().filter_map(|name| name.parse::<Capability>().ok()).collect()
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL")
}

fn has_all(names: &[String]) -> bool {
    names.iter().any(|name| is_all(name))
}

fn known(name: &str, field: &str) -> Result<&'static str, SpecError> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    BY_NUMBER
        .iter()
        .find(|known| **known == bare)
        .copied()
        .ok_or_else(|| SpecError::invalid(field, format!("unknown capability {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(add: &[&str], drop: &[&str], ambient: &[&str]) -> cri::Capability {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        cri::Capability {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            add_ambient_capabilities: owned(ambient),
        }
    }

    fn all() -> Set {
        BY_NUMBER.iter().copied().collect()
    }

    #[test]
    fn every_name_has_a_specification_form() {
        assert_eq!(oci(&all()).len(), BY_NUMBER.len());
    }

    #[test]
    fn dropping_all_and_adding_one_leaves_that_one() {
        let decision = decide(Some(&wanted(&["NET_BIND_SERVICE"], &["ALL"], &[])), false, &all()).unwrap();
        assert_eq!(decision.granted, Set::from(["NET_BIND_SERVICE"]));
    }

    #[test]
    fn adding_all_and_dropping_one_leaves_the_others() {
        let decision = decide(Some(&wanted(&["all"], &["CAP_NET_RAW"], &[])), false, &all()).unwrap();
        assert_eq!(decision.granted.len(), BY_NUMBER.len() - 1);
        assert!(!decision.granted.contains("NET_RAW"));
    }

    #[test]
    fn a_capability_the_runtime_lacks_is_refused_when_asked_for_and_left_out_otherwise() {
        let mut held = all();
        held.remove("SYS_RESOURCE");
        assert!(decide(Some(&wanted(&["SYS_RESOURCE"], &[], &[])), false, &held).is_err());
        assert!(!decide(None, true, &held).unwrap().granted.contains("SYS_RESOURCE"));
        assert!(decide(Some(&wanted(&["ALL"], &[], &[])), false, &held).is_ok());
    }

    #[test]
    fn ambient_capabilities_are_granted_too_and_unknown_names_are_refused() {
        let decision = decide(Some(&wanted(&[], &["ALL"], &["NET_ADMIN"])), false, &all()).unwrap();
        assert_eq!((decision.granted.len(), decision.ambient.len()), (1, 1));
        assert!(decide(Some(&wanted(&["FLY"], &[], &[])), false, &all()).is_err());
    }
}
