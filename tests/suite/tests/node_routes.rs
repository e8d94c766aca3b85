//! Nodes as network namespaces with a router between them, each with its own proxy: pods of one segment reach each other
//! directly, others through VXLAN, and what is not needed any more goes.

#[macro_use]
mod netproxy_nodes;
mod netproxy_world;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use netproxy_nodes::{cluster, net, number, pod, seen, underlay};
use netproxy_world::{Family, TIMEOUT, netns};
use oarlock_netlink::{Connection, LinkChange, Protocol, Wireguard};
use oarlock_netns::run_in;
use oarlock_netproxy::Tunnel;
use oarlock_testkit::{in_fresh_namespaces, is_lab, wait_for};
use serde_json::json;

with_each_families! {
    pods_of_all_nodes_reach_each_other
    links_and_tunnels_follow_what_they_are_made_of
    another_plugin_can_do_all_of_it
    wireguard_is_used_where_both_kernels_have_it
    with_wireguard_alone_nothing_is_readable_on_the_way
}

/// Calls are repeated every 5 s, looked after every 10 s at the least, and VXLAN stays for 12 s.
const SWITCHING: Duration = Duration::from_secs(60);

/// How long a node may take to say that there is no way.
const ANSWER: Duration = Duration::from_secs(5);

fn reaches(from: &str, family: Family, to: &str) {
    let client = wait_for(&format!("{from} to reach {to} by {family:?}"), TIMEOUT, || seen(from, family, to));
    assert_eq!(client, pod(family, from, 2), "pods see each other's own addresses");
}

fn vxlan_links(node: &str) -> Vec<String> {
    let links = Connection::open_in(Protocol::Route, &netns(node)).unwrap().links().unwrap();
    links.into_iter().map(|link| link.name).filter(|name| name.starts_with("oar-vxlan")).collect()
}

/// Whether packets may come by a tunnel that would not be answered by it, as they do while tunnels change.
fn takes_from_anywhere(node: &str, device: &str) -> bool {
    let path = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
    run_in(&netns(node), || std::fs::read_to_string(path).unwrap()).unwrap().trim() == "2"
}

/// None without a device; it may go between the two questions.
fn wireguard_peers(node: &str) -> Option<usize> {
    run_in(&netns(node), || {
        let link = Connection::open(Protocol::Route).unwrap().link("oar-wg0").unwrap()?;
        match Wireguard::open().unwrap().device(link.index) {
            Err(error) if error.is_not_found() => None,
            device => Some(device.unwrap().peers.len()),
        }
    })
    .unwrap()
}

/// Whether this machine's kernel has WireGuard.
fn has_wireguard() -> bool {
    let mut connection = Connection::open(Protocol::Route).unwrap();
    let has = connection.create_wireguard("probe", 0).is_ok();
    connection.delete_link_by_name("probe").unwrap();
    assert!(has || !is_lab());
    has
}

fn nft(arguments: &[&str]) {
    let output = std::process::Command::new("nft").args(arguments).output().unwrap();
    assert!(output.status.success(), "nft {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// From now on the router says nothing about packets for a node's pods.
fn swallow(family: Family, node: &str) {
    let (protocol, pods) = (if family == Family::V4 { "ip" } else { "ip6" }, net(pod(family, node, 0)).trunc());
    nft(&["add table inet sink"]);
    nft(&["add chain inet sink arrivals { type filter hook prerouting priority -300; }"]);
    nft(&[&format!("add rule inet sink arrivals {protocol} daddr {pods} drop")]);
}

/// Whether a node says itself that there is no way to another's pods; nothing where somebody else is asked, or answers.
fn says(from: &str, family: Family, to: &str) -> Option<bool> {
    swallow(family, to);
    let there = SocketAddr::new(pod(family, to, 2), 8080);
    let refused = run_in(&netns(from), || TcpStream::connect_timeout(&there, ANSWER)).unwrap().err()?;
    [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable].contains(&refused.kind()).then_some(true)
}

/// Where the kernel has no WireGuard, or something on the way drops it, the same configuration leads to VXLAN.
fn wireguard_is_used_where_both_kernels_have_it(families: &[Family]) {
    let has_wireguard = has_wireguard();
    nft(&["add table inet router"]);
    nft(&["add chain inet router between { type filter hook forward priority 0; }"]);
    nft(&["add rule inet router between udp dport 51820 drop"]);
    let (_router, api, _machines) = cluster(Tunnel::Auto, families);
    for family in families.iter().copied() {
        for (from, to) in [("a", "b"), ("b", "a"), ("a", "c"), ("c", "b")] {
            reaches(from, family, to);
        }
    }
    if !has_wireguard {
        assert_eq!((vxlan_links("a").len(), wireguard_peers("a")), (families.len(), None));
        return;
    }
    let counts = || ["a", "b", "c"].map(|node| (vxlan_links(node).len(), wireguard_peers(node)));
    let both = [Some(1), Some(2), Some(1)].map(|peers| (families.len(), peers));
    wait_for("peers to be called", TIMEOUT, || (counts() == both).then_some(()));
    for family in families.iter().copied() {
        [("a", "b"), ("b", "c")].iter().for_each(|(from, to)| reaches(from, family, to));
    }
    for device in vxlan_links("b").iter().map(String::as_str).chain(["oar-wg0"]) {
        assert!(takes_from_anywhere("b", device), "{device}");
    }
    nft(&["flush chain inet router between"]);
    // One packet that gets lost on a machine that stands still for a moment is no cut.
    let is_seen = |family| (0..3).find_map(|_| seen("a", family, "b"));
    wait_for("WireGuard in the place of VXLAN", SWITCHING, || {
        for family in families.iter().copied() {
            assert_eq!(is_seen(family), Some(pod(family, "a", 2)), "nobody is cut off meanwhile");
        }
        (counts() == [(0, Some(1)), (0, Some(2)), (0, Some(1))]).then_some(())
    });
    families.iter().for_each(|family| reaches("a", *family, "b"));
    // A node whose kernel loses it says so no more, and the others follow.
    api.edit("nodes", "", "b", |node| node["metadata"]["annotations"] = json!({}));
    wait_for("the key to be told again", TIMEOUT, || {
        let node = api.get("nodes", "", "b")?;
        node["metadata"]["annotations"]["oarlock.io/wireguard-public-key"].is_string().then_some(())
    });
    families.iter().for_each(|family| reaches("b", *family, "c"));
    api.delete("nodes", "", "b", json!({}));
    wait_for("the device to go", TIMEOUT, || wireguard_peers("a").is_none().then_some(()));
    reaches("a", families[0], "c");
}

fn with_wireguard_alone_nothing_is_readable_on_the_way(families: &[Family]) {
    let has_wireguard = has_wireguard();
    let (_router, _api, machines) = cluster(Tunnel::Wireguard, families);
    if !has_wireguard {
        let conflist = machines[0].directory.path().join("net.d/10-oarlock.conflist");
        wait_for("the node's configuration", TIMEOUT, || conflist.exists().then_some(()));
        for family in families.iter().copied() {
            wait_for("no way, which is better than one in plain sight", TIMEOUT, || says("a", family, "c"));
        }
        return;
    }
    for family in families.iter().copied() {
        for (from, to) in [("a", "b"), ("a", "c"), ("c", "b")] {
            reaches(from, family, to);
        }
        // On the same segment too.
        let routes = Connection::open_in(Protocol::Route, &netns("a")).unwrap().routes().unwrap();
        let route = routes.iter().find(|route| route.destination == net(pod(family, "c", 0)).trunc()).unwrap();
        assert_eq!(route.gateway, None, "through the device");
    }
    assert_eq!(wireguard_peers("a"), Some(2));
}

/// With `none` there is nothing of ours between nodes, and what an earlier start has left goes.
fn another_plugin_can_do_all_of_it(families: &[Family]) {
    let (_router, api, machines) = cluster(Tunnel::None, families);
    let conflist = machines[0].directory.path().join("net.d/10-oarlock.conflist");
    std::fs::create_dir_all(conflist.parent().unwrap()).unwrap();
    std::fs::write(&conflist, "{}").unwrap();
    let theirs = conflist.with_file_name("20-other.conflist");
    std::fs::write(&theirs, "{}").unwrap();
    api.delete("nodes", "", "c", json!({}));
    wait_for("our configuration to go", TIMEOUT, || (!conflist.exists()).then_some(()));
    assert!(theirs.exists());
    assert!(vxlan_links("a").is_empty());
    assert_eq!(wireguard_peers("a"), None);
    let routes = Connection::open_in(Protocol::Route, &netns("a")).unwrap().routes().unwrap();
    for family in families.iter().copied() {
        assert!(!routes.iter().any(|route| route.destination == net(pod(family, "b", 0)).trunc()));
    }
}

fn pods_of_all_nodes_reach_each_other(families: &[Family]) {
    let (mut router, api, machines) = cluster(Tunnel::Vxlan, families);
    for family in families.iter().copied() {
        for (from, to) in [("a", "b"), ("b", "a"), ("a", "c"), ("c", "b")] {
            reaches(from, family, to);
        }
        let routes = Connection::open_in(Protocol::Route, &netns("a")).unwrap().routes().unwrap();
        let gateway = |to: &str| {
            let route = routes.iter().find(|route| route.destination == net(pod(family, to, 0)).trunc());
            route.and_then(|route| route.gateway)
        };
        assert_eq!(gateway("c"), Some(underlay(family, 1, number("c"))), "on one segment, through the node itself");
        assert_eq!(gateway("b"), Some(pod(family, "b", 0)), "elsewhere, through the tunnel");
    }
    assert_eq!(vxlan_links("a").len(), families.len());
    let smallest = if families.contains(&Family::V6) { 1430 } else { 1450 };
    let conflist = || std::fs::read_to_string(machines[0].directory.path().join("net.d/10-oarlock.conflist")).ok();
    wait_for("pods' links to be small enough", TIMEOUT, || {
        conflist().filter(|text| text.contains(&format!("\"mtu\": {smallest}")))
    });
    // A link that is cut and healed needs nobody's help.
    let cut = router.require_link("to-b").unwrap().index;
    let set = |router: &mut Connection, up| {
        router.change_link(cut, &LinkChange { up: Some(up), ..LinkChange::default() }).unwrap();
    };
    set(&mut router, false);
    assert_eq!(seen("a", families[0], "b"), None);
    set(&mut router, true);
    reaches("a", families[0], "b");
    api.delete("nodes", "", "b", json!({}));
    wait_for("the tunnel to go", TIMEOUT, || vxlan_links("a").is_empty().then_some(()));
    for family in families.iter().copied() {
        reaches("a", family, "c");
        assert_eq!(says("a", family, "b"), Some(true), "packets for pods that are gone stay here");
    }
}

/// Pods of one segment send no larger packets than it takes, and tunnels come and go with the configuration.
fn links_and_tunnels_follow_what_they_are_made_of(families: &[Family]) {
    let (_router, api, machines) = cluster(Tunnel::Vxlan, families);
    let conflist = || std::fs::read_to_string(machines[0].directory.path().join("net.d/10-oarlock.conflist")).ok();
    wait_for("a tunnel", TIMEOUT, || (vxlan_links("a").len() == families.len()).then_some(()));
    machines[0].settings.send_modify(|config| config.tunnel = Tunnel::None);
    wait_for("the tunnel to go", TIMEOUT, || vxlan_links("a").is_empty().then_some(()));
    wait_for("the configuration to go", TIMEOUT, || conflist().is_none().then_some(()));
    machines[0].settings.send_modify(|config| config.tunnel = Tunnel::Vxlan);
    wait_for("a tunnel again", TIMEOUT, || (vxlan_links("a").len() == families.len()).then_some(()));
    families.iter().for_each(|family| reaches("a", *family, "b"));
    api.delete("nodes", "", "b", json!({}));
    wait_for("links of the usual size", TIMEOUT, || conflist().filter(|text| !text.contains("mtu")));
    let mut own = Connection::open_in(Protocol::Route, &netns("a")).unwrap();
    let eth0 = own.require_link("eth0").unwrap().index;
    own.change_link(eth0, &LinkChange { mtu: Some(1400), ..LinkChange::default() }).unwrap();
    // What happens to links is looked for as often as to nodes, or every half minute.
    api.edit("nodes", "", "c", |node| node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": "z"}));
    wait_for("pods' links to be as small as the node's", TIMEOUT, || {
        conflist().filter(|text| text.contains("\"mtu\": 1400"))
    });
}
