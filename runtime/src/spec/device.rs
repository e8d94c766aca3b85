//! Devices a container sees, and its device access list.

use std::path::PathBuf;

use oarlock_proto::cri;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};

use super::SpecError;

/// A device node of the host, found by whoever may look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostDevice {
    /// Where it is to appear in the container.
    pub path: PathBuf,
    pub block: bool,
    pub major: i64,
    pub minor: i64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// `r`, `w`, `m`.
    pub access: String,
}

/// Checks a device as asked for; gives its access string.
pub(crate) fn access(device: &cri::Device) -> Result<String, SpecError> {
    let field = format!("devices[{}]", device.host_path);
    if !device.host_path.starts_with('/')
        || (!device.container_path.is_empty() && !device.container_path.starts_with('/'))
    {
        return Err(SpecError::invalid(field, "paths of devices are absolute"));
    }
    let permissions = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
    if permissions.chars().any(|letter| !"rwm".contains(letter)) {
        return Err(SpecError::invalid(field, format!("permissions {permissions:?} are not of r, w and m")));
    }
    Ok(permissions.to_owned())
}

/// The nodes to make, besides the ones every container has.
pub(crate) fn nodes(devices: &[HostDevice]) -> Result<Vec<LinuxDevice>, SpecError> {
    let one = |device: &HostDevice| {
        LinuxDeviceBuilder::default()
            .path(device.path.clone())
            .typ(if device.block { LinuxDeviceType::B } else { LinuxDeviceType::C })
            .major(device.major)
            .minor(device.minor)
            .file_mode(device.mode & 0o7777)
            .uid(device.uid)
            .gid(device.gid)
            .build()
    };
    devices.iter().map(one).collect::<Result<_, _>>().map_err(|error| SpecError::invalid("devices", error.to_string()))
}

/// The device access list: all for a privileged container, else deny, then what every container may use, then its own.
pub(crate) fn access_list(devices: &[HostDevice], privileged: bool) -> Vec<LinuxDeviceCgroup> {
    if privileged {
        return vec![rule(true, LinuxDeviceType::A, None, None, "rwm")];
    }
    let mut rules = vec![rule(false, LinuxDeviceType::A, None, None, "rwm")];
    // Making a node is harmless without the right to open it.
    rules.push(rule(true, LinuxDeviceType::C, None, None, "m"));
    rules.push(rule(true, LinuxDeviceType::B, None, None, "m"));
    // null, zero, full, random, urandom, tty, console, ptmx
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(rule(true, LinuxDeviceType::C, Some(major), Some(minor), "rwm"));
    }
    // pseudo-terminals
    rules.push(rule(true, LinuxDeviceType::C, Some(136), None, "rwm"));
    for device in devices {
        let kind = if device.block { LinuxDeviceType::B } else { LinuxDeviceType::C };
        rules.push(rule(true, kind, Some(device.major), Some(device.minor), &device.access));
    }
    rules
}

fn rule(allow: bool, typ: LinuxDeviceType, major: Option<i64>, minor: Option<i64>, access: &str) -> LinuxDeviceCgroup {
    let mut builder = LinuxDeviceCgroupBuilder::default().allow(allow).typ(typ).access(access);
    if let Some(major) = major {
        builder = builder.major(major);
    }
    if let Some(minor) = minor {
        builder = builder.minor(minor);
    }
    builder.build().expect("a device rule has no required field")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_denied_first_and_own_devices_come_last() {
        let device = HostDevice {
            path: "/dev/fuse".into(),
            block: false,
            major: 10,
            minor: 229,
            mode: 0o666,
            uid: 0,
            gid: 0,
            access: "rw".into(),
        };
        let rules = access_list(std::slice::from_ref(&device), false);
        assert!(!rules[0].allow());
        let last = rules.last().unwrap();
        assert_eq!((last.major(), last.minor(), last.access().as_deref()), (Some(10), Some(229), Some("rw")));
        assert_eq!(access_list(&[device], true).len(), 1);
    }

    #[test]
    fn bad_permissions_and_relative_paths_are_refused() {
        let device = |host: &str, permissions: &str| cri::Device {
            container_path: String::new(),
            host_path: host.into(),
            permissions: permissions.into(),
        };
        assert_eq!(access(&device("/dev/fuse", "")).unwrap(), "rwm");
        assert!(access(&device("/dev/fuse", "x")).is_err());
        assert!(access(&device("dev/fuse", "r")).is_err());
    }
}
