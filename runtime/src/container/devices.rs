//! Finds the host's device nodes that a container asks for.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use oarlock_proto::cri;

use crate::error::Error;
use crate::spec::SpecError;
use crate::spec::device::{self, HostDevice};

/// Below /dev, what is not the host's to give: every container has its own.
const OWN: &[&str] = &["pts", "shm", "mqueue", "fd", "console", "ptmx", ".udev", "log", "stdin", "stdout", "stderr"];

/// The devices asked for, and all of the host's for a privileged container.
pub(super) fn find(config: &cri::ContainerConfig, privileged: bool) -> Result<Vec<HostDevice>, Error> {
    let mut found = Vec::new();
    if privileged {
        collect(Path::new("/dev"), Path::new("/dev"), "rwm", &mut found)?;
    }
    for wanted in &config.devices {
        let access = device::access(wanted)?;
        let host = Path::new(&wanted.host_path);
        let path = if wanted.container_path.is_empty() { host } else { Path::new(&wanted.container_path) };
        let metadata = fs::metadata(host).map_err(|error| {
            SpecError::invalid(format!("devices[{}]", wanted.host_path), format!("cannot be used: {error}"))
        })?;
        let before = found.len();
        if metadata.is_dir() {
            collect(host, path, &access, &mut found)?;
        } else {
            found.extend(node(path, &metadata, &access));
        }
        if found.len() == before {
            return Err(SpecError::invalid(format!("devices[{}]", wanted.host_path), "is not a device").into());
        }
    }
    // A device named twice is made once, as it was named last.
    let mut kept: Vec<HostDevice> = Vec::with_capacity(found.len());
    for device in found {
        kept.retain(|known| known.path != device.path);
        kept.push(device);
    }
    Ok(kept)
}

fn collect(host: &Path, path: &Path, access: &str, found: &mut Vec<HostDevice>) -> Result<(), Error> {
    for entry in fs::read_dir(host).map_err(Error::io("list", host))? {
        let entry = entry.map_err(Error::io("list", host))?;
        let name = entry.file_name();
        if host == Path::new("/dev") && OWN.iter().any(|own| name == *own) {
            continue;
        }
        let inside: PathBuf = path.join(&name);
        // Links are left out: what they lead to is found under its own name. A node that vanished is none.
        let Ok(metadata) = fs::symlink_metadata(entry.path()) else { continue };
        if metadata.is_dir() {
            collect(&entry.path(), &inside, access, found)?;
        } else {
            found.extend(node(&inside, &metadata, access));
        }
    }
    Ok(())
}

fn node(path: &Path, metadata: &fs::Metadata, access: &str) -> Option<HostDevice> {
    let kind = metadata.file_type();
    if !kind.is_block_device() && !kind.is_char_device() {
        return None;
    }
    Some(HostDevice {
        path: path.to_owned(),
        block: kind.is_block_device(),
        major: major(metadata.rdev()) as i64,
        minor: minor(metadata.rdev()) as i64,
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        access: access.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(host: &str) -> cri::ContainerConfig {
        let device =
            cri::Device { host_path: host.into(), container_path: "/dev/mine".into(), permissions: "r".into() };
        cri::ContainerConfig { devices: vec![device], ..cri::ContainerConfig::default() }
    }

    #[test]
    fn a_device_is_found_with_its_numbers() {
        let found = find(&asking("/dev/null"), false).unwrap();
        assert_eq!((found[0].major, found[0].minor, found[0].path.as_path()), (1, 3, Path::new("/dev/mine")));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        assert!(find(&asking("/etc/passwd"), false).is_err());
        assert!(find(&asking("/dev/there-is-no-such-device"), false).is_err());
    }
}
