//! Runs a test body on a thread of its own with fresh network and mount namespaces, so that nothing of the host is touched.

use std::panic::resume_unwind;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Fails at once when the test does not run as root, with the reason.
pub fn require_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes namespaces, mounts and cgroups");
}

/// Runs `test` in fresh network and mount namespaces (mounts private, `/sys` of the new network namespace, an empty tmpfs on
/// `/run/netns` and on `/run/oarlock-cni`, where the CNI plugins keep records). Programs that the test starts inherit them; everything ends with the thread.
pub fn in_fresh_namespaces<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    require_root();
    let thread = std::thread::Builder::new().name("namespaced-test".to_owned()).spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare network and mount namespaces");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("make mounts private");
        for directory in ["/run/netns", "/run/oarlock-cni"] {
            std::fs::create_dir_all(directory).expect("create a directory below /run");
            mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), none).expect("mount tmpfs below /run");
        }
        test()
    });
    match thread.expect("start a thread").join() {
        Ok(value) => value,
        Err(panic) => resume_unwind(panic),
    }
}

/// The node's address that [`become_node`] sets up, from the range for documentation (RFC 5737).
pub const NODE_ADDRESS: &str = "192.0.2.2";

/// Moves the calling thread, and all that it starts from now on, into fresh network and mount namespaces that look like a
/// machine of its own: loopback up, a link `eth0` with [`NODE_ADDRESS`], a default route that leads nowhere, and a name server
/// that is not there, which is known at once.
pub fn become_node() {
    require_root();
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare network and mount namespaces");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("make mounts private");
    for arguments in [
        "link set lo up",
        "link add eth0 type veth peer name uplink",
        "address add 192.0.2.2/24 dev eth0",
        "link set eth0 up",
        "link set uplink up",
        "route add default via 192.0.2.1",
    ] {
        let status = std::process::Command::new("ip").args(arguments.split(' ')).status().expect("run ip");
        assert!(status.success(), "ip {arguments}");
    }
    let directory = std::env::temp_dir().join(format!("oarlock-resolver-{}", std::process::id()));
    let resolver = directory.join("resolv.conf");
    std::fs::create_dir_all(&directory).expect("create a directory");
    // A file system of its own: what is left of it is the one mount below, on which others may be mounted.
    mount(Some("tmpfs"), &directory, Some("tmpfs"), MsFlags::empty(), none).expect("mount tmpfs");
    std::fs::write(&resolver, "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").expect("write resolv.conf");
    if let Ok(file) = std::fs::canonicalize("/etc/resolv.conf") {
        mount(Some(&resolver), &file, none, MsFlags::MS_BIND, none).expect("mount on resolv.conf");
    }
    umount2(&directory, MntFlags::MNT_DETACH).expect("unmount tmpfs");
    std::fs::remove_dir(&directory).expect("remove the directory");
}
