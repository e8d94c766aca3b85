//! The bridge of a network: what it listens to, what its ports may send, how large packets may be, and what CHECK and STATUS say
//! of it.

#[macro_use]
mod cni_caller;

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cni_caller::{
    Caller, Mode, addresses, asked, gateway, host_links, is_cut_off, link_inside, netns, nft, reaches, serve,
    tell_who_asks,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt, socket, sockopt,
};
use oarlock_cni_table::{STATE_DIR, restore};
use oarlock_netlink::{Connection, LinkChange, Protocol, VethPair};
use oarlock_netns::{create_pinned, run_in};
use oarlock_testkit::{in_fresh_namespaces, wait_for};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(20);

in_each_mode! {
    neither_pods_nor_the_bridge_listen_to_routers
    a_container_sends_from_its_own_ethernet_address_only
    check_finds_what_somebody_changed_at_the_bridge
    large_packets_arrive_after_the_mtu_was_lowered_and_raised
    a_container_whose_link_stays_down_is_brought_up_by_somebody_else
    an_ipam_plugin_of_others_finds_the_link_from_add_to_del
}

fn with(mut config: Value, fields: Value) -> Value {
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    config
}

fn host() -> Connection {
    Connection::open(Protocol::Route).unwrap()
}

/// A namespace with a port of the bridge that nobody set up: as a virtual machine or a stranger's container.
fn plug_in(name: &str, bridge: &str) {
    create_pinned(&netns(name)).unwrap();
    let file = std::fs::File::open(netns(name)).unwrap();
    let pair = VethPair {
        name: &format!("to-{name}"),
        master: Some(host().require_link(bridge).unwrap().index),
        mac: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_netns: std::os::fd::AsFd::as_fd(&file),
        mtu: 0,
    };
    host().create_veth(&pair).unwrap();
    let mut inside = Connection::open_in(Protocol::Route, &netns(name)).unwrap();
    let eth0 = inside.require_link("eth0").unwrap().index;
    inside.set_up(eth0).unwrap();
}

/// Tells all nodes from inside a namespace that it is the router and `2001:db8:bad::/64` the network.
fn advertise(name: &str) -> nix::Result<()> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const PREFIX: [u8; 16] = Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, 0, 0).octets();
    // Type 134; 64 hops; a default router for 1800 seconds; one option: the prefix, on the link and for addresses.
    let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    message.extend([3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0]);
    message.extend(PREFIX);
    let link = link_inside(name).index;
    let send = || {
        let raw = socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)?;
        setsockopt(&raw, sockopt::Ipv6MulticastHops, &255)?;
        let to = SockaddrIn6::from(SocketAddrV6::new(ALL_NODES, 0, 0, link));
        sendto(raw.as_raw_fd(), &message, &to, MsgFlags::empty()).map(drop)
    };
    run_in(&netns(name), send).unwrap()
}

/// Whether a namespace, or the host, has an address or a way out by a router's word.
fn believed(name: Option<&str>) -> bool {
    let mut connection = name.map_or_else(host, |name| Connection::open_in(Protocol::Route, &netns(name)).unwrap());
    let bad: ipnet::IpNet = "2001:db8:bad::/64".parse().unwrap();
    let has_address = connection.addresses().unwrap().iter().any(|one| bad.contains(&one.net.addr()));
    let by_router = |route: &oarlock_netlink::Route| {
        let is_default = route.destination.prefix_len() == 0 && route.destination.addr().is_ipv6();
        let is_link_local = |address: IpAddr| matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        bad.contains(&route.destination.addr()) || (is_default && route.gateway.is_some_and(is_link_local))
    };
    has_address || connection.routes().unwrap().iter().any(by_router)
}

/// On a bridge that was there before, made by somebody else or by a call that was killed at once. A stranger on the same bridge
/// believes the advertisement, so it is one that would be believed.
fn neither_pods_nor_the_bridge_listen_to_routers(mode: Mode) {
    let caller = Caller::new();
    host().create_bridge("br0", None, 0, false).unwrap();
    let bridge = host().require_link("br0").unwrap().index;
    host().set_up(bridge).unwrap();
    // Without being a gateway the host does not forward, and would listen.
    let config = with(caller.masqueraded(mode), json!({"isGateway": false}));
    caller.attach("a", config);
    plug_in("stranger", "br0");
    plug_in("rogue", "br0");
    wait_for("the stranger to believe the rogue router", TIMEOUT, || {
        // Until the sender's own address is usable there is nowhere to send from.
        let _ = advertise("rogue");
        believed(Some("stranger")).then_some(())
    });
    advertise("rogue").unwrap();
    assert!(!believed(Some("a")), "the pod");
    assert!(!believed(None), "the host, by its bridge");
    let setting = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/br0/{name}")).unwrap();
    assert_eq!(setting("accept_dad").trim(), "0", "the bridge's own address is usable at once");
}

fn a_container_sends_from_its_own_ethernet_address_only(mode: Mode) {
    let caller = Caller::new();
    let checked = with(caller.masqueraded(mode), json!({"macspoofchk": true}));
    let result = caller.attach("a", checked.clone());
    let other = caller.attach("b", caller.masqueraded(mode));
    std::thread::spawn(|| {
        for mut stream in std::net::TcpListener::bind(("::", 80)).unwrap().incoming().flatten() {
            let _ = stream.peer_addr().map(|peer| write!(stream, "{}", peer.ip().to_canonical()));
        }
    });
    let pretend = |name: &str, mac: &str| {
        let change = LinkChange { mac: Some(mac.parse().unwrap()), ..LinkChange::default() };
        let mut inside = Connection::open_in(Protocol::Route, &netns(name)).unwrap();
        let index = inside.require_link("eth0").unwrap().index;
        inside.change_link(index, &change).unwrap();
    };
    let reaches = |name: &str, result: &Value| -> Vec<bool> {
        addresses(result).into_iter().map(|own| asked(Some(name), gateway(own), 80).is_ok()).collect()
    };
    let is_alone = || addresses(&result).into_iter().all(|own| is_cut_off("a", gateway(own), 80));
    let all = vec![true; mode.subnets().len()];
    let own = link_inside("a").mac.unwrap().to_string();
    wait_for("the server", TIMEOUT, || (reaches("b", &other) == all).then_some(()));
    pretend("a", "02:00:00:00:00:99");
    pretend("b", "02:00:00:00:00:98");
    assert!(is_alone(), "under another address");
    pretend("a", &own);
    assert_eq!(reaches("a", &result), all, "under its own");
    caller.call("CHECK", "a", checked.clone(), Some(&result)).unwrap();
    nft("flush ruleset");
    assert!(caller.call("CHECK", "a", checked.clone(), Some(&result)).is_err());
    assert!(restore(Path::new(STATE_DIR)).unwrap() > 0);
    caller.call("CHECK", "a", checked.clone(), Some(&result)).unwrap();
    pretend("a", "02:00:00:00:00:99");
    assert!(is_alone(), "after a flush");
    pretend("a", &own);
    nft("flush chain bridge oarlock-cni spoof-check");
    let drift = caller.call("CHECK", "a", checked.clone(), Some(&result)).unwrap_err();
    assert_eq!(drift, "chain spoof-check of table bridge oarlock-cni does not have its rules");
    caller.call("DEL", "a", checked, Some(&result)).unwrap();
    let left = nft("list table bridge oarlock-cni");
    assert!(!left.contains("elements"), "{left}");
}

fn check_finds_what_somebody_changed_at_the_bridge(mode: Mode) {
    let caller = Caller::new();
    let config = with(
        caller.masqueraded(mode),
        json!({"hairpinMode": false, "promiscMode": true, "portIsolation": true, "mtu": 1400}),
    );
    let result = caller.attach("a", config.clone());
    let check = || caller.call("CHECK", "a", config.clone(), Some(&result)).map(drop);
    check().unwrap();
    let own = addresses(&result)[0];
    let family = if own.is_ipv4() { "ip" } else { "ip6" };
    let port = result["interfaces"][1]["name"].as_str().unwrap().to_owned();
    let (bridge, index) = (host().require_link("br0").unwrap().index, host().require_link(&port).unwrap().index);
    let change = |index: u32, change: LinkChange| host().change_link(index, &change).unwrap();

    let net = ipnet::IpNet::new(gateway(own), if own.is_ipv4() { 24 } else { 64 }).unwrap();
    host().delete_address(bridge, net).unwrap();
    assert_eq!(check().unwrap_err(), format!("br0 does not have address {net}"));
    host().add_address(bridge, net).unwrap();
    host().set_bridge_port(index, false, false).unwrap();
    assert_eq!(check().unwrap_err(), format!("isolation of {port} is false"));
    host().set_bridge_port(index, false, true).unwrap();
    change(bridge, LinkChange { promiscuous: Some(false), ..LinkChange::default() });
    assert_eq!(check().unwrap_err(), "bridge br0 is not in promiscuous mode");
    change(bridge, LinkChange { promiscuous: Some(true), ..LinkChange::default() });
    change(index, LinkChange { mtu: Some(1300), ..LinkChange::default() });
    assert_eq!(check().unwrap_err(), format!("the MTU of {port} is 1300"));
    change(index, LinkChange { mtu: Some(1400), ..LinkChange::default() });
    let mut inside = Connection::open_in(Protocol::Route, &netns("a")).unwrap();
    let eth0 = inside.require_link("eth0").unwrap().index;
    inside.change_link(eth0, &LinkChange { mtu: Some(1300), ..LinkChange::default() }).unwrap();
    assert_eq!(check().unwrap_err(), "the MTU of eth0 is 1300");
    inside.change_link(eth0, &LinkChange { mtu: Some(1400), ..LinkChange::default() }).unwrap();
    check().unwrap();

    nft(&format!("flush table {family} oarlock-cni"));
    let drift = check().unwrap_err();
    assert_eq!(drift, format!("chain postrouting of table {family} oarlock-cni does not have its rules"));
    restore(Path::new(STATE_DIR)).unwrap();
    check().unwrap();
    nft(&format!("flush map {family} oarlock-cni pods"));
    assert_eq!(check().unwrap_err(), format!("address {own} is not masqueraded"));
}

/// A packet of this size from the host to a container, in as many pieces as the links ask for.
fn arrives(name: &str, to: IpAddr, bytes: usize) -> bool {
    let bind = || {
        let server = UdpSocket::bind(("::", 0)).unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        server
    };
    let server = run_in(&netns(name), bind).unwrap();
    let client = UdpSocket::bind(("::", 0)).unwrap();
    let to = match to {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    client.send_to(&vec![7; bytes], (to, server.local_addr().unwrap().port())).unwrap();
    server.recv(&mut vec![0; 65_536]).is_ok_and(|received| received == bytes)
}

/// Also on a bridge that was given an MTU when it was made.
fn large_packets_arrive_after_the_mtu_was_lowered_and_raised(mode: Mode) {
    let caller = Caller::new();
    host().create_bridge("br0", None, 1500, false).unwrap();
    let on = |mtu: u32| with(caller.masqueraded(mode), json!({"mtu": mtu}));
    let all = |name: &str, result: &Value| addresses(result).into_iter().all(|to| arrives(name, to, 1440));
    let first = caller.attach("first", on(1500));
    assert!(all("first", &first));
    let lower = caller.attach("lower", on(1400));
    assert_eq!(lower["interfaces"][0]["mtu"], 1400);
    assert!(all("lower", &lower), "after the MTU was lowered");
    assert!(all("first", &first), "and to the one with the larger MTU");
    let higher = caller.attach("higher", on(1500));
    assert_eq!(higher["interfaces"][0]["mtu"], 1400, "the smallest of the ports");
    assert!(all("lower", &lower) && all("higher", &higher));
    caller.call("DEL", "lower", on(1400), Some(&lower)).unwrap();
    let last = caller.attach("last", on(1500));
    assert_eq!(last["interfaces"][0]["mtu"], 1500, "nobody needs the smaller one any more");
    assert!(all("last", &last) && all("first", &first));
}

fn a_container_whose_link_stays_down_is_brought_up_by_somebody_else(mode: Mode) {
    let caller = Caller::new();
    let down = |ipam: bool| {
        let mut config = with(caller.masqueraded(mode), json!({"disableContainerInterface": true}));
        if !ipam {
            config.as_object_mut().unwrap().remove("ipam");
        }
        config
    };
    create_pinned(&netns("a")).unwrap();
    let error = caller.call_with("ADD", "a", down(true), None, "").unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("disableContainerInterface"), "{error}");
    let result = caller.call("ADD", "a", down(false), None).unwrap();
    assert!(!link_inside("a").up);
    caller.call("CHECK", "a", down(false), Some(&result)).unwrap();
    let mut inside = Connection::open_in(Protocol::Route, &netns("a")).unwrap();
    let eth0 = inside.require_link("eth0").unwrap().index;
    inside.set_up(eth0).unwrap();
    caller.call("CHECK", "a", down(false), Some(&result)).unwrap();
    let (subnet, ..) = mode.subnets()[0];
    let net: ipnet::IpNet = subnet.parse().unwrap();
    inside.add_address(eth0, ipnet::IpNet::new(net.hosts().nth(7).unwrap(), net.prefix_len()).unwrap()).unwrap();
    caller.attach("b", caller.masqueraded(mode));
    tell_who_asks("a", 80);
    assert!(asked(Some("b"), net.hosts().nth(7).unwrap(), 80).is_ok(), "it is on the bridge");
    caller.call("DEL", "a", down(false), Some(&result)).unwrap();
}

/// As one that asks a DHCP server needs it: through the link, under its Ethernet address.
fn an_ipam_plugin_of_others_finds_the_link_from_add_to_del(mode: Mode) {
    const MANAGER: &str = "#!/bin/sh
cd \"${0%/*}\"
nsenter --net=\"$CNI_NETNS\" ip -o link show \"$CNI_IFNAME\" > seen-$CNI_COMMAND 2>&1
[ $CNI_COMMAND != ADD ] || cat answer 2> seen-error
";
    let caller = Caller::new();
    let at = |name: &str| caller.directory.path().join(name);
    std::fs::write(at("manager"), MANAGER).unwrap();
    std::fs::set_permissions(at("manager"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = with(caller.masqueraded(mode), json!({"macspoofchk": true, "ipam": {"type": "manager"}}));
    let before = host_links();

    create_pinned(&netns("a")).unwrap();
    let error = caller.call("ADD", "a", config.clone(), None).unwrap_err();
    assert!(error.contains("IPAM plugin manager failed"), "{error}");
    assert_eq!(host_links(), [&before[..], &["br0".to_owned()]].concat(), "nothing but the bridge is left");
    assert!(seen(&at("seen-DEL")).contains("LOWER_UP"), "what it began it could end through the link");

    let nets = mode.subnets().iter().map(|(subnet, ..)| subnet.parse::<ipnet::IpNet>().unwrap());
    let address = |net: &ipnet::IpNet, nth| net.hosts().nth(nth).unwrap();
    let ip = |net: ipnet::IpNet| json!({"address": format!("{}/{}", address(&net, 8), net.prefix_len()), "gateway": address(&net, 0)});
    let answer = json!({"cniVersion": "1.1.0", "ips": nets.map(ip).collect::<Vec<_>>()});
    std::fs::write(at("answer"), answer.to_string()).unwrap();
    let result = caller.call("ADD", "a", config.clone(), None).unwrap();
    assert_eq!(addresses(&result).len(), mode.subnets().len());
    let told = seen(&at("seen-ADD"));
    let mac = result["interfaces"][2]["mac"].as_str().unwrap();
    assert!(told.contains("LOWER_UP") && told.contains(mac), "{told}");
    // It is masqueraded and kept to its Ethernet address too.
    caller.call("CHECK", "a", config.clone(), Some(&result)).unwrap();
    serve("a");
    assert!(reaches(None, &result).into_iter().all(|reached| reached));
    std::fs::remove_file(at("seen-DEL")).unwrap();
    caller.call("DEL", "a", config, Some(&result)).unwrap();
    let told = seen(&at("seen-DEL"));
    assert!(told.contains("LOWER_UP") && told.contains(mac), "{told}");
    assert_eq!(host_links(), [&before[..], &["br0".to_owned()]].concat());
}

fn seen(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// What STATUS answers: the error's code, or 0.
fn status(caller: &Caller, config: &Value) -> u64 {
    caller.call_with("STATUS", "", config.clone(), None, "").err().map_or(0, |error| error["code"].as_u64().unwrap())
}

#[test]
fn status_tells_what_add_would_meet() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let config = with(caller.bridge("net", 0), json!({"ipMasq": true}));
        assert_eq!(status(&caller, &config), 0);
        let foreign = |name: &str| host().create_ifb(name, 1500).unwrap();
        foreign("br-net");
        assert_eq!(status(&caller, &config), 50, "a foreign link of the bridge's name");
        host().delete_link_by_name("br-net").unwrap();
        let result = caller.attach("a", config.clone());
        assert_eq!(status(&caller, &config), 0);
        host().delete_link_by_name("br-net").unwrap();
        foreign("br-net");
        assert_eq!(status(&caller, &config), 51, "and containers hung on the bridge");
        host().delete_link_by_name("br-net").unwrap();
        caller.call("DEL", "a", config.clone(), Some(&result)).unwrap();

        let mut small = config.clone();
        small["name"] = "small".into();
        small["ipam"]["ranges"] = json!([[{"subnet": "10.42.0.0/24", "rangeStart": "10.42.0.7", "rangeEnd": "10.42.0.7"}], [{"subnet": "fd42::/64"}]]);
        assert_eq!(status(&caller, &small), 0);
        let result = caller.attach("b", small.clone());
        assert_eq!(status(&caller, &small), 0, "a node that is full is none whose network does not work");
        assert_eq!(status(&caller, &with(small.clone(), json!({"type": "host-local"}))), 0);
        caller.call("DEL", "b", small.clone(), Some(&result)).unwrap();
        assert_eq!(status(&caller, &with(config.clone(), json!({"bridge": "a/b"}))), 7, "a mistake is a mistake");
    });
}

/// A program that may not change the network, as where the kernel has no nftables.
#[test]
fn status_tells_that_nftables_cannot_be_used() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let ask = |config: Value| {
            let mut child = Command::new("setpriv")
                .args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"])
                .arg(caller.directory.path().join(config["type"].as_str().unwrap()))
                .env("CNI_COMMAND", "STATUS")
                .env("CNI_PATH", caller.directory.path())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let config = with(config, json!({"cniVersion": "1.1.0"}));
            child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            serde_json::from_slice::<Value>(&output.stdout).unwrap_or(Value::Null)
        };
        assert_eq!(ask(caller.bridge("net", 0)), Value::Null, "without masquerading nothing is needed");
        for config in [
            with(caller.bridge("net", 0), json!({"ipMasq": true})),
            with(caller.bridge("net", 0), json!({"macspoofchk": true})),
            json!({"name": "net", "type": "portmap"}),
            json!({"name": "net", "type": "firewall"}),
        ] {
            let error = ask(config);
            assert_eq!(error["code"], 50, "{error}");
            assert_eq!(error["msg"], "ADD cannot be served: nftables cannot be used");
        }
    });
}
