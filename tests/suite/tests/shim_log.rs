//! The log of a container on a disk that does not take it. Needs root, loop devices and mkfs.ext4.

#[allow(dead_code, reason = "shared with the shim's other tests, which use the rest")]
mod shim_pod;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use oarlock_shim_api::CreateRequest;
use oarlock_testkit::wait_for;
use shim_pod::{LIMIT, Pod, Wish, parse_log, process};

const LINES: u64 = 120_000;
const LINE_BYTES: &str = "200";
/// What the shim keeps of a log that cannot be written.
const BACKLOG_BYTES: u64 = 8 << 20;
/// So much of that are the lines themselves, without the times in front of them.
const WRITTEN_BYTES_MIN: u64 = BACKLOG_BYTES * 3 / 4;
/// Backlog, what is being made of it, and the shim itself; its tables and code are larger when compiled for tests.
const BUDGET_KILOBYTES: u64 = 24 * 1024;
/// What is done at once takes no longer on a machine under load.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A file system of its own that can be frozen: whoever writes then waits.
struct Disk {
    root: PathBuf,
    frozen: bool,
}

nix::ioctl_readwrite!(freeze, b'X', 119, nix::libc::c_int);
nix::ioctl_readwrite!(thaw, b'X', 120, nix::libc::c_int);

impl Disk {
    /// In a mount namespace that only this test's thread and its children see.
    fn new(directory: &Path) -> Disk {
        let (image, root) = (directory.join("disk.img"), directory.join("disk"));
        File::create(&image).unwrap().set_len(96 << 20).unwrap();
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        run(Command::new("mkfs.ext4").arg("-q").arg(&image));
        fs::create_dir(&root).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&root));
        Disk { root, frozen: false }
    }

    fn freeze(&mut self) {
        let root = File::open(&self.root).unwrap();
        #[allow(unsafe_code, reason = "an ioctl of the file system")]
        // SAFETY: the argument is not used.
        unsafe { freeze(root.as_raw_fd(), std::ptr::null_mut()) }.unwrap();
        self.frozen = true;
    }

    fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            let root = File::open(&self.root).unwrap();
            #[allow(unsafe_code, reason = "an ioctl of the file system")]
            // SAFETY: the argument is not used.
            unsafe { thaw(root.as_raw_fd(), std::ptr::null_mut()) }.unwrap();
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.thaw();
        let _ = umount2(&self.root, MntFlags::MNT_DETACH);
    }
}

fn private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

async fn create(pod: &Pod, id: &str, log: &Path, args: &[&str]) -> i32 {
    let request = CreateRequest {
        container_id: id.into(),
        bundle: pod.bundle(id, &Wish::new(args)),
        log_path: Some(log.to_owned()),
        tty: false,
        stdin: false,
        stdin_once: false,
        oci_runtime: None,
    };
    pod.shim.create(request).await.unwrap().pid
}

async fn runs_a_command_at_once(pod: &mut Pod, id: &str, exec_id: &str) {
    let exec = pod.exec(id, exec_id, process(&["echo", "here"]));
    let (output, code) = tokio::time::timeout(AT_ONCE, exec).await.expect("an exec that waits for nobody's log");
    assert_eq!((output.as_str(), code), ("here\n", 0));
}

fn pss_kilobytes(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The shim has as much of a log as it takes, and the container waits for it.
fn wait_until_full(pid: i32) {
    wait_for("the container to wait", LIMIT, || {
        let waits = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap().contains("pipe");
        let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let written: u64 = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse().unwrap();
        (waits && written > WRITTEN_BYTES_MIN).then_some(())
    });
}

#[tokio::test]
async fn a_disk_that_stands_still_stops_no_exec_and_no_signal_and_costs_no_line() {
    private_mounts();
    let mut pod = Pod::start("frozen").await;
    let mut disk = Disk::new(pod.dir.path());
    let (log, rotated) = (disk.root.join("c.log"), disk.root.join("c.log.old"));
    let pid = create(&pod, "c", &log, &["log", &LINES.to_string(), LINE_BYTES]).await;
    create(&pod, "quick", &disk.root.join("quick.log"), &["exit", "3"]).await;
    fs::rename(&log, &rotated).unwrap();
    disk.freeze();
    pod.shim.start("c").await.unwrap();
    // The container waits when the shim's memory for its log is full.
    wait_until_full(pid);
    runs_a_command_at_once(&mut pod, "c", "first").await;
    assert!(pss_kilobytes(pod.shim.record().pid) < BUDGET_KILOBYTES);

    // Others of the pod live and end; whoever wants the log rotated waits, and nobody else does.
    pod.shim.start("quick").await.unwrap();
    assert_eq!(tokio::time::timeout(AT_ONCE, pod.exited("quick")).await.unwrap().exit_code, 3);
    {
        let reopened = pod.shim.reopen_log("c");
        tokio::pin!(reopened);
        let state = pod.shim.state();
        tokio::select! {
            biased;
            _ = &mut reopened => panic!("a log was opened on a frozen disk"),
            state = state => assert_eq!(state.unwrap().containers.len(), 2),
        }
        disk.thaw();
        reopened.await.unwrap();
    }
    assert_eq!(pod.exited("c").await.exit_code, 0);
    let lines: Vec<_> = [&rotated, &log].into_iter().flat_map(|file| parse_log(file)).collect();
    let mut numbers: Vec<u64> = lines.iter().map(|(_, _, text)| text[..10].parse().unwrap()).collect();
    numbers.sort_unstable();
    assert!(numbers.iter().copied().eq(0..LINES), "{} lines of {LINES}", numbers.len());
    assert!(!parse_log(&rotated).is_empty() && !parse_log(&log).is_empty());
    drop(disk);
    pod.finish().await;
}

#[tokio::test]
async fn an_end_is_told_and_a_pod_goes_though_the_disk_never_takes_the_log() {
    private_mounts();
    let mut pod = Pod::start("stuck").await;
    let mut disk = Disk::new(pod.dir.path());
    let pid = create(&pod, "c", &disk.root.join("c.log"), &["log", &LINES.to_string(), LINE_BYTES]).await;
    disk.freeze();
    pod.shim.start("c").await.unwrap();
    wait_until_full(pid);
    pod.shim.signal("c", 9, false).await.unwrap();
    assert_eq!(pod.exited("c").await.exit_code, 137);
    tokio::time::timeout(AT_ONCE, pod.shim.delete("c")).await.unwrap().unwrap();
    disk.thaw();
    // What was in memory is written though its container is gone.
    wait_for("the log of a container that is gone", LIMIT, || {
        (fs::metadata(disk.root.join("c.log")).unwrap().len() >= WRITTEN_BYTES_MIN).then_some(())
    });
    pod.finish_after(|| drop(disk)).await;
}
