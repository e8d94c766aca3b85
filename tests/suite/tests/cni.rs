//! The CNI plugins as a runtime uses them: real executables, through the client, in namespaces.

#[macro_use]
mod cni_caller;

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cni_caller::{Mode, PATIENCE, gateway};
use oarlock_cni::{Attachment, CniClient, CniError, PortMapping, ValidAttachment};
use oarlock_netlink::{Connection, Protocol};
use oarlock_netns::{create_pinned, remove_pinned, run_in};
use oarlock_testkit::{Snapshot, binary, in_fresh_namespaces};
use serde_json::json;
use tokio::runtime::Runtime;

fn table_of(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

in_each_mode! {
    deleting_after_the_namespace_is_gone_frees_everything
    a_second_add_fails_and_the_first_attachment_stays
    check_finds_what_somebody_changed
    garbage_collection_frees_what_no_valid_attachment_has
    many_pods_at_once_all_get_their_own_address
    a_plugin_killed_at_any_moment_leaves_nothing_that_del_does_not_free
    pods_talk_to_each_other_and_the_node_and_leave_nothing_behind
    host_ports_lead_to_the_pod_from_everywhere_and_belong_to_one_pod
    host_ports_lead_to_the_pod_where_bridged_packets_are_out_of_sight
    what_leaves_the_cluster_is_masqueraded_and_addresses_are_usable_at_once
}

struct Node {
    directory: tempfile::TempDir,
    runtime: Runtime,
    client: CniClient,
}

impl Node {
    fn with(mode: Mode) -> Node {
        oarlock_netns::bring_loopback_up().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["bin", "net.d"] {
            fs::create_dir(path(name)).unwrap();
        }
        for plugin in ["bridge", "host-local", "portmap", "loopback"] {
            symlink(binary("oarlock-cni-plugins"), path("bin").join(plugin)).unwrap();
        }
        let subnets = mode.subnets().iter();
        let ranges: Vec<_> = subnets.clone().map(|(subnet, ..)| json!([{"subnet": subnet}])).collect();
        let exclude: Vec<_> = subnets.clone().map(|(_, cluster, _)| cluster).collect();
        let routes: Vec<_> = subnets.map(|(.., any)| json!({"dst": any})).collect();
        let list = json!({"cniVersion": "1.1.0", "name": "test", "plugins": [
            {"type": "bridge", "bridge": "br0", "isGateway": true, "ipMasq": true, "ipMasqExclude": exclude, "hairpinMode": true,
             "ipam": {"type": "host-local", "dataDir": path("ipam"), "ranges": ranges, "routes": routes}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ]});
        fs::write(path("net.d").join("10-test.conflist"), list.to_string()).unwrap();
        let client = CniClient::new(path("net.d"), vec![path("bin")], path("cache"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Node { directory, runtime, client }
    }

    fn plugin(&self, name: &str) -> PathBuf {
        self.directory.path().join("bin").join(name)
    }

    fn pod(&self, name: &str) -> Attachment {
        let netns = Path::new("/run/netns").join(name);
        create_pinned(&netns).unwrap();
        Attachment::for_pod(name, &netns, "default", name, "uid")
    }

    fn add(&self, pod: &Attachment) -> Result<IpAddr, CniError> {
        self.add_all(pod).map(|addresses| addresses[0])
    }

    fn add_all(&self, pod: &Attachment) -> Result<Vec<IpAddr>, CniError> {
        self.runtime.block_on(self.client.add(pod)).map(|result| result.container_ips())
    }

    fn del(&self, pod: &Attachment) {
        self.runtime.block_on(self.client.del(pod)).unwrap();
    }

    fn reserved(&self) -> HashSet<String> {
        let names =
            fs::read_dir(self.directory.path().join("ipam/test")).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).filter(|name| name.parse::<IpAddr>().is_ok()).collect()
    }
}

fn echo_server(pod: &Attachment, port: u16) {
    let listener = run_in(pod.netns.as_deref().unwrap(), || TcpListener::bind(("::", port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.peer_addr().map(|peer| write!(stream, "{}", peer.ip().to_canonical()));
        }
    });
}

fn seen_from(pod: Option<&Attachment>, address: IpAddr, port: u16) -> std::io::Result<String> {
    let ask = || {
        let stream = TcpStream::connect_timeout(&(address, port).into(), PATIENCE)?;
        std::io::read_to_string(stream)
    };
    match pod {
        Some(pod) => run_in(pod.netns.as_deref().unwrap(), ask).unwrap(),
        None => ask(),
    }
}

fn masqueraded() -> String {
    format!("{}{}", masqueraded_in("ip"), masqueraded_in("ip6"))
}

fn listed_ports() -> String {
    let listed = |family| {
        let output = Command::new("nft").args(["list", "map", family, "oarlock-cni", "hostports"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    format!("{}{}", listed("ip"), listed("ip6"))
}

/// Addresses as the files of `host-local` are called.
fn names(addresses: &[IpAddr]) -> HashSet<String> {
    addresses.iter().map(ToString::to_string).collect()
}

fn masqueraded_in(family: &str) -> String {
    let output = Command::new("nft").args(["list", "map", family, "oarlock-cni", "pods"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn pods_talk_to_each_other_and_the_node_and_leave_nothing_behind(mode: Mode) {
    let node = Node::with(mode);
    let (a, b) = (node.pod("a"), node.pod("b"));
    node.runtime.block_on(node.client.status()).unwrap();
    let (of_a, of_b) = (node.add_all(&a).unwrap(), node.add_all(&b).unwrap());
    assert_eq!(of_a.len(), mode.subnets().len());
    echo_server(&a, 80);
    for (address_a, address_b) in of_a.iter().zip(&of_b) {
        assert_ne!(address_a, address_b);
        assert_eq!(seen_from(Some(&b), *address_a, 80).unwrap(), address_b.to_string());
        assert_eq!(seen_from(None, *address_a, 80).unwrap(), gateway(*address_a).to_string());
        assert!(masqueraded_in(table_of(*address_a)).contains(&address_a.to_string()));
    }
    node.runtime.block_on(node.client.check(&a)).unwrap();
    for pod in [&a, &b] {
        node.del(pod);
        node.del(pod);
        remove_pinned(pod.netns.as_deref().unwrap()).unwrap();
    }
    assert!(node.reserved().is_empty());
    for address in of_a {
        assert!(!masqueraded_in(table_of(address)).contains(&address.to_string()));
    }
    let links = Connection::open(Protocol::Route).unwrap().links().unwrap();
    let names: Vec<_> = links.iter().map(|link| link.name.as_str()).collect();
    assert_eq!(names, ["lo", "br0"]);
}

/// A neighbour of the node that knows nothing of pods sees the node; and IPv6 does not wait for duplicates to be looked for
/// nor listens to routers.
fn what_leaves_the_cluster_is_masqueraded_and_addresses_are_usable_at_once(mode: Mode) {
    let node = Node::with(mode);
    let outside = node.pod("outside");
    let mut connection = Connection::open(Protocol::Route).unwrap();
    let netns = outside.netns.as_deref().unwrap();
    let file = fs::File::open(netns).unwrap();
    let pair = oarlock_netlink::VethPair {
        name: "uplink",
        master: None,
        mac: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_netns: std::os::fd::AsFd::as_fd(&file),
        mtu: 0,
    };
    connection.create_veth(&pair).unwrap();
    let near = connection.require_link("uplink").unwrap().index;
    let mut far = Connection::open_in(Protocol::Route, netns).unwrap();
    let eth0 = far.require_link("eth0").unwrap().index;
    far.set_up(eth0).unwrap();
    for (own, peer) in [("192.0.2.1/24", "192.0.2.2/24"), ("2001:db8::1/64", "2001:db8::2/64")] {
        connection.add_address(near, own.parse().unwrap()).unwrap();
        far.add_address(eth0, peer.parse().unwrap()).unwrap();
    }
    echo_server(&outside, 80);
    let pod = node.pod("a");
    for address in node.add_all(&pod).unwrap() {
        let (own, peer): (IpAddr, IpAddr) = if address.is_ipv4() {
            ([192, 0, 2, 1].into(), [192, 0, 2, 2].into())
        } else {
            ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap())
        };
        assert_eq!(seen_from(Some(&pod), peer, 80).unwrap(), own.to_string(), "at the first try");
    }
    let accepts =
        run_in(pod.netns.as_deref().unwrap(), || fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_ra").unwrap());
    assert_eq!(accepts.unwrap().trim(), "0", "router advertisements are refused");
}

fn deleting_after_the_namespace_is_gone_frees_everything(mode: Mode) {
    let node = Node::with(mode);
    let pod = node.pod("a");
    for address in node.add_all(&pod).unwrap() {
        assert!(masqueraded().contains(&format!("{address} ")));
    }
    remove_pinned(pod.netns.as_deref().unwrap()).unwrap();
    node.del(&pod);
    assert!(node.reserved().is_empty());
    assert!(!masqueraded().contains("goto"), "{}", masqueraded());
}

fn a_second_add_fails_and_the_first_attachment_stays(mode: Mode) {
    let node = Node::with(mode);
    let pod = node.pod("a");
    let addresses = node.add_all(&pod).unwrap();
    let error = node.add(&pod).unwrap_err();
    assert!(error.to_string().contains("eth0"), "{error}");
    assert_eq!(node.reserved(), names(&addresses));
    echo_server(&pod, 80);
    assert!(addresses.iter().all(|address| seen_from(None, *address, 80).is_ok()));
}

fn check_finds_what_somebody_changed(mode: Mode) {
    let node = Node::with(mode);
    let pod = node.pod("a").with_port_mappings(&[mapping(8080, 80)]);
    let addresses = node.add_all(&pod).unwrap();
    let check = || node.runtime.block_on(node.client.check(&pod));
    check().unwrap();
    let mut inside = Connection::open_in(Protocol::Route, pod.netns.as_deref().unwrap()).unwrap();
    let link = inside.require_link("eth0").unwrap();
    for address in addresses {
        let (length, any) = if address.is_ipv4() { (24, "0.0.0.0/0") } else { (64, "::/0") };
        let net = format!("{address}/{length}").parse().unwrap();
        let default = oarlock_netlink::Route::new(any.parse().unwrap(), Some(gateway(address)), link.index);
        inside.delete_address(link.index, net).unwrap();
        assert!(check().unwrap_err().to_string().contains(&address.to_string()));
        inside.add_address(link.index, net).unwrap();
        // Some families lose it with the address.
        inside.delete_route(&default).unwrap();
        assert!(check().unwrap_err().to_string().contains("route"));
        inside.add_route(&default).unwrap();
        check().unwrap();
        let flush = ["flush", "map", table_of(address), "oarlock-cni", "hostports"];
        assert!(Command::new("nft").args(flush).status().unwrap().success());
        assert!(check().unwrap_err().to_string().contains("tcp/8080"));
        oarlock_cni_table::restore(Path::new(oarlock_cni_table::STATE_DIR)).unwrap();
        let flush = ["flush", "chain", table_of(address), "oarlock-cni", "hostports-dnat"];
        assert!(Command::new("nft").args(flush).status().unwrap().success());
        assert!(check().unwrap_err().to_string().contains("hostports-dnat"));
        oarlock_cni_table::restore(Path::new(oarlock_cni_table::STATE_DIR)).unwrap();
        check().unwrap();
    }
}

fn mapping(host_port: u16, container_port: u16) -> PortMapping {
    PortMapping { host_port, container_port, protocol: "tcp".into(), host_ip: None }
}

/// As on a node without `br_netfilter`, where one pod's answer to another is never translated back.
fn host_ports_lead_to_the_pod_where_bridged_packets_are_out_of_sight(mode: Mode) {
    for family in ["ip", "ip6"] {
        let setting = format!("/proc/sys/net/bridge/bridge-nf-call-{family}tables");
        if Path::new(&setting).exists() {
            fs::write(setting, "0").unwrap();
        }
    }
    host_ports_lead_to_the_pod_from_everywhere_and_belong_to_one_pod(mode);
}

fn host_ports_lead_to_the_pod_from_everywhere_and_belong_to_one_pod(mode: Mode) {
    let node = Node::with(mode);
    let pod = node.pod("a").with_port_mappings(&[mapping(8080, 80)]);
    let addresses = node.add_all(&pod).unwrap();
    let other = node.pod("b");
    node.add(&other).unwrap();
    echo_server(&pod, 80);
    let open = |address: IpAddr| {
        let gateway = gateway(address);
        assert!(seen_from(None, gateway, 8080).is_ok(), "from the node");
        assert!(seen_from(Some(&other), gateway, 8080).is_ok(), "from another pod");
        let seen = seen_from(Some(&pod), gateway, 8080).unwrap();
        assert_ne!(seen, address.to_string(), "the pod itself must not see its own address");
    };
    addresses.iter().copied().for_each(open);
    let rival = node.pod("c").with_port_mappings(&[mapping(8080, 81)]);
    let error = node.add(&rival).unwrap_err();
    assert!(error.to_string().contains("tcp/8080"), "{error}");
    node.del(&rival);
    addresses.iter().copied().for_each(open);
    node.del(&pod);
    assert!(addresses.iter().all(|address| seen_from(None, gateway(*address), 8080).is_err()));
}

fn garbage_collection_frees_what_no_valid_attachment_has(mode: Mode) {
    let node = Node::with(mode);
    let (kept, lost) = (node.pod("kept"), node.pod("lost").with_port_mappings(&[mapping(8080, 80)]));
    let addresses = node.add_all(&kept).unwrap();
    node.add(&lost).unwrap();
    assert_eq!(listed_ports().matches("8080").count(), addresses.len());
    fs::remove_dir_all(node.directory.path().join("cache")).unwrap();
    let valid = [ValidAttachment { container_id: "kept".into(), ifname: "eth0".into() }];
    node.runtime.block_on(node.client.gc(&valid)).unwrap();
    assert_eq!(node.reserved(), names(&addresses));
    let text = masqueraded();
    assert!(text.contains("kept") && !text.contains("lost"), "{text}");
    assert!(!listed_ports().contains("8080"));
}

fn many_pods_at_once_all_get_their_own_address(mode: Mode) {
    let node = Node::with(mode);
    let pods: Vec<Attachment> = (0..20).map(|number| node.pod(&format!("p{number}"))).collect();
    let adds = futures::future::join_all(pods.iter().map(|pod| node.client.add(pod)));
    let started = Instant::now();
    let results = node.runtime.block_on(adds);
    eprintln!("20 pods attached in {:?}", started.elapsed());
    let addresses: HashSet<IpAddr> = results.into_iter().flat_map(|result| result.unwrap().container_ips()).collect();
    assert_eq!(addresses.len(), 20 * mode.subnets().len());
}

fn a_plugin_killed_at_any_moment_leaves_nothing_that_del_does_not_free(mode: Mode) {
    let node = Node::with(mode);
    let state = || Snapshot::take("no-process-has-this").without_cgroups();
    let before = state();
    for round in 0..40_u64 {
        let pod = node.pod("a");
        let config = fs::read_to_string(node.directory.path().join("net.d/10-test.conflist")).unwrap();
        let list: serde_json::Value = serde_json::from_str(&config).unwrap();
        let mut bridge = list["plugins"][0].clone();
        bridge["name"] = "test".into();
        bridge["cniVersion"] = "1.1.0".into();
        let mut child = Command::new(node.plugin("bridge"))
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", "a")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", pod.netns.as_ref().unwrap())
            .env("CNI_PATH", node.directory.path().join("bin"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(bridge.to_string().as_bytes()).unwrap();
        // Not a wait for anything: the moments of the kills are spread over the life of the plugin.
        std::thread::park_timeout(Duration::from_micros(round * 150));
        child.kill().unwrap();
        child.wait().unwrap();
        node.del(&pod);
        node.add(&pod).unwrap();
        node.del(&pod);
        remove_pinned(pod.netns.as_deref().unwrap()).unwrap();
        assert!(node.reserved().is_empty(), "round {round}");
    }
    let leaked = before.leaked(&state());
    let stays = ["interface br0", "nft table ip oarlock-cni", "nft table ip6 oarlock-cni"];
    assert_eq!(leaked.iter().find(|line| !stays.contains(&line.as_str())), None);
    let records = fs::read_dir(oarlock_cni_table::STATE_DIR).unwrap().flatten();
    let left = records.flat_map(|entry| fs::read_dir(entry.path()).unwrap().flatten()).map(|entry| entry.file_name());
    assert_eq!(left.collect::<Vec<_>>(), Vec::<std::ffi::OsString>::new(), "records");
    let accepts = fs::read_to_string("/proc/sys/net/ipv6/conf/br0/accept_ra").unwrap();
    assert_eq!(accepts.trim(), "0", "however early the call was killed that made the bridge");
}

#[test]
fn errors_are_the_specifications_error_objects() {
    in_fresh_namespaces(|| {
        let node = Node::with(Mode::Ipv4);
        let call = |environment: &[(&str, &str)], config: &str| {
            let mut command = Command::new(node.plugin("bridge"));
            command.env_clear().envs(environment.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            // A plugin that refuses its environment ends without reading.
            let _ = child.stdin.take().unwrap().write_all(config.as_bytes());
            let output = child.wait_with_output().unwrap();
            let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            (output.status.success(), value)
        };
        let whole = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/none"),
        ];
        let config = r#"{"cniVersion":"1.0.0","name":"n","type":"bridge"}"#;
        let code = |environment: &[(&str, &str)], config: &str| call(environment, config).1["code"].as_u64();
        assert_eq!(code(&whole, r#"{"cniVersion":"9.0.0","name":"n"}"#), Some(1));
        assert_eq!(code(&whole, config), Some(3));
        assert_eq!(code(&whole[..1], config), Some(4));
        assert_eq!(code(&whole, "{"), Some(6));
        assert_eq!(code(&whole, r#"{"cniVersion":"1.0.0","name":"n","bridge":"a/b"}"#), Some(7));
        assert_eq!(code(&[("CNI_COMMAND", "STATUS")], config), Some(1), "STATUS is newer than 1.0.0");
        let (success, versions) = call(&[("CNI_COMMAND", "VERSION")], "{}");
        assert!(success && versions["supportedVersions"].as_array().unwrap().contains(&json!("1.1.0")));
    });
}
