//! A disk that fills up: every part says so where its user looks, and goes on once there is room.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oarlock_testkit::{Snapshot, image_archive, wait_for};

use super::LoneCase;
use super::cluster::{PATIENCE, oarlock, text};

pub(crate) const LONE_CASES: &[LoneCase] = &[("a_full_disk_is_said_and_survived", full_disk)];

/// A tmpfs of a few megabytes, unmounted when dropped.
struct SmallDisk {
    directory: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(megabytes: u32) -> Self {
        let directory = tempfile::tempdir().expect("tempdir");
        let options = format!("size={megabytes}m");
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).expect("tmpfs");
        Self { directory }
    }

    /// Writes a file until there is no room left.
    fn fill(&self) {
        let mut file = File::create(self.filler()).expect("create");
        let block = [0u8; 4096];
        while file.write_all(&block).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.filler()).expect("remove");
    }

    fn filler(&self) -> std::path::PathBuf {
        self.directory.path().join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.directory.path(), MntFlags::MNT_DETACH);
    }
}

/// Ends the cluster even when the case failed on the way.
struct Reset<'a>(&'a Path);

impl Drop for Reset<'_> {
    fn drop(&mut self) {
        let _ = oarlock(self.0, &["reset", "--yes"]);
    }
}

fn full_disk() {
    let disk = SmallDisk::mount(24);
    let data_dir = disk.directory.path().join("data");
    let before = Snapshot::take(&data_dir.to_string_lossy());
    let reset = Reset(&data_dir);
    let up = oarlock(&data_dir, &["up", "--detach"]);
    assert!(up.status.success(), "{}{}", text(&up.stdout), text(&up.stderr));
    let import = || oarlock(&data_dir, &["images", "import", &image_archive().to_string_lossy()]);
    let create = || {
        Command::new(std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into()))
            .arg("--kubeconfig")
            .arg(data_dir.join("admin.kubeconfig"))
            .args(["create", "configmap", "log", "--from-literal=depth=3"])
            .env("HOME", "/nonexistent")
            .output()
            .expect("kubectl")
    };

    disk.fill();
    let refused = import();
    let said = text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("No space left on device"), "{said}");
    let refused = create();
    let said = text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("disk is full"), "{said}");

    disk.make_room();
    let imported = import();
    assert!(imported.status.success(), "{}", text(&imported.stderr));
    let removed = oarlock(&data_dir, &["images", "rm", "oarlock.local/testimage:1"]);
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    let listed = oarlock(&data_dir, &["images", "ls"]);
    assert!(!text(&listed.stdout).contains("testimage"), "{}", text(&listed.stdout));
    wait_for("the API to store again", PATIENCE, || create().status.success().then_some(()));

    drop(reset);
    before.assert_nothing_leaked(&Snapshot::take(&data_dir.to_string_lossy()));
    assert!(!data_dir.exists() || fs::read_dir(&data_dir).expect("read").next().is_none(), "reset leaves no file");
}
