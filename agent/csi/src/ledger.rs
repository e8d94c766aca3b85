//! Where drivers are told to put volumes, and the record beside each place, written before the driver is asked: from these records
//! alone everything is taken down again, by this agent or the next. Names and form are upstream's. All calls block.

use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use crate::error::CsiError;
use crate::resolve::{DriverVolume, sha256};

const RECORD: &str = "vol_data.json";
const PLUGIN: &str = "kubernetes.io~csi";
/// Where a pod's volumes are, and its devices.
const KINDS: &[&str] = &["volumes", "volumeDevices"];

/// What must be known to take a volume down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    #[serde(rename = "specVolID")]
    pub name: String,
    pub volume_handle: String,
    pub driver_name: String,
    pub node_name: String,
    #[serde(rename = "attachmentID")]
    pub attachment: String,
    pub volume_lifecycle_mode: String,
}

impl Record {
    pub(crate) fn of(volume: &DriverVolume, node: &str) -> Self {
        let mode = if volume.ephemeral { "Ephemeral" } else { "Persistent" };
        Self {
            name: volume.name.clone(),
            volume_handle: volume.handle.clone(),
            driver_name: volume.driver.clone(),
            node_name: node.to_owned(),
            attachment: crate::resolve::attachment_name(&volume.handle, &volume.driver, node),
            volume_lifecycle_mode: mode.to_owned(),
        }
    }

    /// As node status names it.
    pub(crate) fn in_status(&self) -> String {
        format!("kubernetes.io/csi/{}^{}", self.driver_name, self.volume_handle)
    }

    pub(crate) fn same_volume(&self, other: &Record) -> bool {
        (&self.driver_name, &self.volume_handle) == (&other.driver_name, &other.volume_handle)
    }
}

/// A volume's directory in a pod, or its staging directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Holds the record.
    pub dir: PathBuf,
    /// What the driver is told.
    pub target: PathBuf,
}

/// Everything below a kubelet's directory.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    root: PathBuf,
}

impl Ledger {
    pub(crate) fn below(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn published(&self, pod: &str, name: &str) -> Place {
        let dir = self.root.join("pods").join(pod).join("volumes").join(PLUGIN).join(name);
        Place { target: dir.join("mount"), dir }
    }

    /// A device has its record with the pod, and its place where drivers may make one.
    pub(crate) fn published_device(&self, pod: &str, name: &str) -> Place {
        let dir = self.root.join("pods").join(pod).join("volumeDevices").join(PLUGIN).join(name);
        let target = self.root.join("plugins/kubernetes.io/csi/volumeDevices/publish").join(name).join(pod);
        Place { dir, target }
    }

    pub(crate) fn staged(&self, record: &Record) -> Place {
        let dir = self.root.join("plugins/kubernetes.io/csi").join(&record.driver_name);
        let dir = dir.join(sha256(&record.volume_handle));
        Place { target: dir.join("globalmount"), dir }
    }

    /// Pods that have something here.
    pub(crate) fn pods(&self) -> Vec<String> {
        let pods = names(&self.root.join("pods"));
        let has =
            |pod: &String| KINDS.iter().any(|kind| self.root.join("pods").join(pod).join(kind).join(PLUGIN).is_dir());
        pods.into_iter().filter(has).collect()
    }

    /// The volumes of a pod, with their records; a directory without one was made and never used.
    pub(crate) fn of_pod(&self, pod: &str) -> Vec<(Place, Option<Record>)> {
        let below = |kind: &str| names(&self.root.join("pods").join(pod).join(kind).join(PLUGIN)).into_iter();
        let volumes = below("volumes").map(|name| self.published(pod, &name));
        let places = volumes.chain(below("volumeDevices").map(|name| self.published_device(pod, &name)));
        places.map(|place| (place.clone(), read(&place))).collect()
    }

    /// Whether some pod has the volume.
    pub(crate) fn in_use(&self, record: &Record) -> bool {
        let all = self.pods().into_iter().flat_map(|pod| self.of_pod(&pod));
        all.filter_map(|(_, found)| found).any(|found| found.same_volume(record))
    }

    /// The volumes that were handed to drivers for all pods, with the record beside each.
    pub(crate) fn staged_all(&self) -> Vec<(Place, Record)> {
        let base = self.root.join("plugins/kubernetes.io/csi");
        let mut found = Vec::new();
        for driver in names(&base) {
            for volume in names(&base.join(&driver)) {
                let dir = base.join(&driver).join(volume);
                let place = Place { target: dir.join("globalmount"), dir };
                if let Some(record) = read(&place) {
                    found.push((place, record));
                }
            }
        }
        found
    }

    /// Drivers' volumes of this node in the notation of the node's status: those of pods, and those not given back yet.
    pub(crate) fn in_status(&self) -> Vec<String> {
        let of_pods = self.pods().into_iter().flat_map(|pod| self.of_pod(&pod)).filter_map(|(_, record)| record);
        let records = of_pods.chain(self.staged_all().into_iter().map(|(_, record)| record));
        let mut names: Vec<String> =
            records.filter(|r| r.volume_lifecycle_mode != "Ephemeral").map(|r| r.in_status()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Removes a pod's directories where nothing is left in them.
    pub(crate) fn tidy(&self, pod: &str) {
        let pod = self.root.join("pods").join(pod);
        for kind in KINDS {
            let _ = std::fs::remove_dir(pod.join(kind).join(PLUGIN));
            let _ = std::fs::remove_dir(pod.join(kind));
        }
        let _ = std::fs::remove_dir(pod);
    }
}

/// Unmounts every volume that drivers mounted for an agent of that node and removes the records, without asking the drivers: for
/// a node that is given up. Says what could not be removed. Others' volumes there stay.
pub fn abandon(kubelet_dir: &Path, node: &str) -> Vec<String> {
    let ledger = Ledger::below(kubelet_dir.to_owned());
    let pods = ledger.pods();
    let published = pods.iter().flat_map(|pod| ledger.of_pod(pod));
    let noted = published.filter_map(|(place, record)| Some((place, record?))).chain(ledger.staged_all());
    let mut problems = Vec::new();
    for (place, _) in noted.filter(|(_, record)| record.node_name == node) {
        // Several mounts may lie upon each other.
        while oarlock_volumes::is_mount_point(&place.target).unwrap_or(false) {
            if let Err(error) = umount2(&place.target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                problems.push(format!("unmount {}: {error}", place.target.display()));
                break;
            }
        }
        if let Err(error) = forget(&place) {
            problems.push(error.to_string());
        }
        for above in [place.dir.parent(), place.target.parent()].into_iter().flatten() {
            let _ = std::fs::remove_dir(above);
        }
    }
    let devices = kubelet_dir.join("plugins/kubernetes.io/csi/volumeDevices");
    for empty in [devices.join("publish"), devices] {
        let _ = std::fs::remove_dir(empty);
    }
    pods.iter().for_each(|pod| ledger.tidy(pod));
    problems
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

fn read(place: &Place) -> Option<Record> {
    serde_json::from_slice(&std::fs::read(place.dir.join(RECORD)).ok()?).ok()
}

/// Makes the directory and the record in it.
pub(crate) fn note(place: &Place, record: &Record) -> Result<(), CsiError> {
    let make = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(&place.dir);
    make.map_err(|error| CsiError::io("create", &place.dir, error))?;
    if read(place).as_ref() == Some(record) {
        return Ok(());
    }
    let path = place.dir.join(RECORD);
    let partial = place.dir.join(".vol_data.new");
    let write = || -> io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)?;
        std::fs::File::open(&place.dir)?.sync_all()
    };
    write().map_err(|error| CsiError::io("write", &path, error))
}

/// Removes the record and the directory, never anything in a volume: what still holds files or a mount is an error.
pub(crate) fn forget(place: &Place) -> Result<(), CsiError> {
    let gone = |outcome: io::Result<()>, path: &Path| match outcome {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(CsiError::io("remove", path, error)),
        _ => Ok(()),
    };
    // A device's place is an empty file where the driver has made one.
    let removed = match std::fs::symlink_metadata(&place.target) {
        Ok(meta) if meta.is_file() && meta.len() == 0 => std::fs::remove_file(&place.target),
        _ => std::fs::remove_dir(&place.target),
    };
    gone(removed, &place.target)?;
    for name in [RECORD, ".vol_data.new"] {
        let path = place.dir.join(name);
        gone(std::fs::remove_file(&path), &path)?;
    }
    gone(std::fs::remove_dir(&place.dir), &place.dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let volume =
            DriverVolume { driver: "d.io".into(), handle: "h".into(), name: "pv".into(), ..Default::default() };
        Record::of(&volume, "node")
    }

    #[test]
    fn a_node_that_is_given_up_leaves_only_what_is_others() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::below(dir.path().to_owned());
        let theirs = Record { node_name: "other".into(), ..record() };
        for (pod, record) in [("ours", record()), ("theirs", theirs)] {
            let place = ledger.published(pod, "pv");
            note(&place, &record).unwrap();
            std::fs::create_dir(&place.target).unwrap();
        }
        let staged = ledger.staged(&record());
        note(&staged, &record()).unwrap();
        std::fs::create_dir(&staged.target).unwrap();
        assert_eq!(abandon(dir.path(), "node"), [""; 0]);
        assert!(!dir.path().join("pods/ours").exists() && !staged.dir.exists());
        assert!(ledger.published("theirs", "pv").target.exists());
        // What is in a volume is never removed.
        note(&staged, &record()).unwrap();
        std::fs::create_dir(&staged.target).unwrap();
        std::fs::write(staged.target.join("data"), "precious").unwrap();
        assert_eq!(abandon(dir.path(), "node").len(), 1);
        assert!(staged.target.join("data").exists());
    }

    #[test]
    fn a_volume_is_in_use_until_it_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::below(dir.path().to_owned());
        let (staged, published) = (ledger.staged(&record()), ledger.published("u", "pv"));
        note(&published, &record()).unwrap();
        note(&staged, &record()).unwrap();
        assert_eq!(ledger.in_status(), ["kubernetes.io/csi/d.io^h"]);
        forget(&published).unwrap();
        assert_eq!(ledger.in_status(), ["kubernetes.io/csi/d.io^h"], "its driver still has it");
        forget(&staged).unwrap();
        assert!(ledger.in_status().is_empty());
    }

    #[test]
    fn a_record_is_found_again_and_a_volume_with_files_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::below(dir.path().to_owned());
        let place = ledger.published("u", "pv");
        assert!(place.target.ends_with("pods/u/volumes/kubernetes.io~csi/pv/mount"));
        note(&place, &record()).unwrap();
        note(&place, &record()).unwrap();
        assert_eq!(ledger.of_pod("u"), [(place.clone(), Some(record()))]);
        assert!(ledger.in_use(&record()));
        std::fs::create_dir(&place.target).unwrap();
        std::fs::write(place.target.join("data"), "precious").unwrap();
        assert!(forget(&place).is_err());
        assert!(place.target.join("data").exists() && ledger.in_use(&record()));
        std::fs::remove_file(place.target.join("data")).unwrap();
        forget(&place).unwrap();
        forget(&place).unwrap();
        ledger.tidy("u");
        assert!(!dir.path().join("pods/u").exists() && !ledger.in_use(&record()));
    }
}
