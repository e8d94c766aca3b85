//! Pinned namespaces with the real kernel.

use std::fs;
use std::path::Path;

use oarlock_netns::{NetnsError, PinOptions, Pins, create_pinned, is_pinned, remove_pinned, run_in};
use oarlock_testkit::{Snapshot, in_fresh_namespaces};

fn inode(path: &str) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap())
}

#[test]
fn a_pinned_namespace_outlives_its_maker_and_goes_without_a_trace() {
    in_fresh_namespaces(|| {
        let state = || Snapshot::take("no-process-has-this").without_cgroups();
        let before = state();
        let path = Path::new("/run/netns/a");
        create_pinned(path).unwrap();
        assert!(is_pinned(path));
        assert!(matches!(create_pinned(path), Err(NetnsError::AlreadyPinned { .. })));
        let here = inode("/proc/thread-self/ns/net");
        let inside = run_in(path, || inode("/proc/thread-self/ns/net")).unwrap();
        assert_ne!(here, inside);
        assert_eq!(inode("/proc/thread-self/ns/net"), here, "the caller stays where it is");
        let loopback = run_in(path, || std::net::TcpListener::bind("127.0.0.1:0").is_ok()).unwrap();
        assert!(loopback, "lo is up");
        remove_pinned(path).unwrap();
        remove_pinned(path).unwrap();
        assert!(!path.exists());
        before.assert_nothing_leaked(&state());
    });
}

#[test]
fn pins_have_their_hostname_and_sysctls_and_the_host_keeps_its_own() {
    in_fresh_namespaces(|| {
        let directory = Path::new("/run/netns/pod");
        let own_name = nix::unistd::gethostname().unwrap();
        let options = PinOptions {
            net: true,
            ipc: true,
            uts: true,
            hostname: Some("pod-1".into()),
            sysctls: vec![
                ("net.ipv4.ip_local_port_range".into(), "2000\t3000".into()),
                ("kernel.msgmax".into(), "12345".into()),
            ],
            user: None,
        };
        let pins = Pins::create(directory, &options).unwrap();
        assert_eq!(Pins::open(directory), pins);
        let uts = run_in(pins.uts.as_deref().unwrap(), || nix::unistd::gethostname().unwrap()).unwrap();
        assert_eq!(uts, "pod-1");
        let read =
            |path: &Path, sysctl: &'static str| run_in(path, move || fs::read_to_string(sysctl).unwrap()).unwrap();
        let ports = read(pins.net.as_deref().unwrap(), "/proc/sys/net/ipv4/ip_local_port_range");
        assert_eq!(ports.trim(), "2000\t3000");
        assert_eq!(read(pins.ipc.as_deref().unwrap(), "/proc/sys/kernel/msgmax").trim(), "12345");
        assert_eq!(nix::unistd::gethostname().unwrap(), own_name);
        Pins::remove(directory).unwrap();
        Pins::remove(directory).unwrap();
        assert!(!directory.exists());
    });
}

#[test]
fn a_failure_leaves_nothing_pinned() {
    in_fresh_namespaces(|| {
        let directory = Path::new("/run/netns/pod");
        let sysctls = vec![("net.ipv4.no_such_sysctl".to_owned(), "1".to_owned())];
        let options = PinOptions { net: true, uts: true, sysctls, ..PinOptions::default() };
        assert!(matches!(Pins::create(directory, &options), Err(NetnsError::Sysctl { .. })));
        assert_eq!(Pins::open(directory), Pins::default());
    });
}

#[test]
fn a_file_that_is_no_namespace_is_refused() {
    in_fresh_namespaces(|| {
        let path = Path::new("/run/netns/plain");
        fs::write(path, "").unwrap();
        assert!(matches!(run_in(path, || ()), Err(NetnsError::NotANamespace { .. })));
        assert!(matches!(run_in(Path::new("/run/netns/absent"), || ()), Err(NetnsError::Open { .. })));
    });
}
