//! What a running proxy takes up: another configuration, what others did to the host, and a health port that is taken.

#[macro_use]
mod netproxy_world;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use netproxy_world::{Family, TIMEOUT, World, ask, ask_until, endpoint_list, port, read_answer};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oarlock_machinery::fake::Refused;
use oarlock_netlink::{Connection, Protocol};
use oarlock_netproxy::Config;
use oarlock_testkit::wait_for;
use serde_json::json;

const NODE_PORT: u16 = 30_080;
const HEALTH: u16 = 10_256;
const METRICS: u16 = 10_249;

in_each_mode! {
    settings_change_without_a_restart
    health_checks_are_answered_where_node_ports_are_served
    how_long_changes_take_is_told
    bridged_packets_come_back_into_sight
    a_taken_health_port_keeps_nothing_else_away
    what_is_not_known_yet_is_not_taken_away
}

fn external(family: Family) -> IpAddr {
    if family == Family::V4 { [203, 0, 113, 9].into() } else { "fd98::9".parse().unwrap() }
}

/// The Service `web` with endpoint a, by node port and by an external address.
fn web(world: &World, family: Family) -> IpAddr {
    let name = format!("web-{}", family.table());
    world.slice(&name, "TCP", &[family.pod(11)]);
    world.service(
        &name,
        json!({
            "clusterIP": family.service(50).to_string(), "type": "NodePort", "ports": port("TCP", Some(NODE_PORT)),
            "externalIPs": [external(family).to_string()],
        }),
    );
    family.service(50)
}

fn until_refused(to: (IpAddr, u16)) {
    wait_for(&format!("{to:?} to be refused"), TIMEOUT, || {
        ask(Some("outside"), to).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused).then_some(())
    });
}

/// Whether a connection from before still carries.
fn echoes(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 2];
    stream.write_all(b"hi").is_ok() && stream.read_exact(&mut answer).is_ok() && answer == *b"hi"
}

fn settings_change_without_a_restart(world: &mut World, family: Family) {
    let service = web(world, family);
    let (node_port, external) = ((family.node(), NODE_PORT), (external(family), 80));
    ask_until(Some("outside"), node_port);
    let mut kept = TcpStream::connect_timeout(&(service, 80).into(), Duration::from_secs(5)).unwrap();
    read_answer(&mut kept).unwrap();
    let change = |change: &dyn Fn(&mut Config)| world.settings.send_modify(change);
    let before = ask(Some("outside"), external);
    assert!(before.is_err(), "external addresses are nobody's until they are allowed: {before:?}");
    change(&|config| config.external_ips_allowed.push(external.0.into()));
    assert_eq!(ask_until(Some("outside"), external).0, "a");
    change(&|config| config.node_port_addresses = vec![family.loopback().into()]);
    until_refused(node_port);
    assert!(ask(Some("outside"), external).is_ok(), "what was set before stays");
    change(&|config| config.node_port_addresses = Vec::new());
    assert_eq!(ask_until(Some("outside"), node_port).0, "a");
    change(&|config| config.external_ips_allowed = Vec::new());
    wait_for("external addresses to be nobody's again", TIMEOUT, || {
        ask(Some("outside"), external).is_err().then_some(())
    });
    // What cannot change while it runs is not half changed.
    change(&|config| config.cluster_domain = "elsewhere.test".to_owned());
    change(&|config| config.stub_domains = vec![("corp.test".to_owned(), vec![(family.node(), 5300).into()])]);
    assert!(ask(Some("client"), (service, 80)).is_ok());
    assert!(echoes(&mut kept), "a connection from before goes on");
}

/// Health check ports of Services go by `nodePortAddresses`, while it changes and while addresses come and go.
fn health_checks_are_answered_where_node_ports_are_served(world: &mut World, family: Family) {
    let v4 = family == Family::V4;
    let port = if v4 { 31_100 } else { 31_101 };
    let later: IpAddr = if v4 { [192, 168, 7, 77].into() } else { "fd07::77".parse().unwrap() };
    let name = format!("balanced-{}", family.table());
    world.slice(&name, "TCP", &[family.pod(11)]);
    let service = json!({
        "clusterIP": family.service(60).to_string(), "type": "LoadBalancer", "externalTrafficPolicy": "Local",
        "healthCheckNodePort": port, "ports": [{"name": "p", "port": 80}],
    });
    world.service(&name, service);
    let answers = |address| get(address, port, "/").is_some_and(|text| text.starts_with("HTTP/1.1 200"));
    let until = |what: &str, address, wanted| {
        wait_for(what, TIMEOUT, || (answers(address) == wanted).then_some(()));
    };
    let select =
        |nets: &[ipnet::IpNet]| world.settings.send_modify(|config| config.node_port_addresses = nets.to_vec());
    until("an answer on the node's address", family.node(), true);
    assert!(answers(family.loopback()) && answers(family.gateway()), "every address without networks");
    select(&[family.node().into(), later.into()]);
    until("silence on an address that is not selected", family.gateway(), false);
    assert!(!answers(family.loopback()));
    until("an answer on the address that is", family.node(), true);
    assert!(!is_listened_on(later, port));
    let mut connection = Connection::open(Protocol::Route).unwrap();
    let link = connection.require_link("to-outside").unwrap().index;
    connection.add_address(link, later.into()).unwrap();
    until("an answer on the address that came", later, true);
    connection.delete_address(link, later.into()).unwrap();
    wait_for("the listener to be gone with the address", TIMEOUT, || (!is_listened_on(later, port)).then_some(()));
    connection.add_address(link, later.into()).unwrap();
    until("an answer on the address that came again", later, true);
    connection.delete_address(link, later.into()).unwrap();
    select(&[]);
    until("an answer on every address again", family.gateway(), true);
    assert!(answers(family.loopback()) && answers(family.node()));
}

fn is_listened_on(address: IpAddr, port: u16) -> bool {
    // Each word of an address is in the order of the machine's memory.
    let words = |bytes: &[u8]| -> String {
        let word = |word: &[u8]| format!("{:08X}", u32::from_ne_bytes(word.try_into().unwrap()));
        bytes.chunks(4).map(word).collect()
    };
    let (file, text) = match address {
        IpAddr::V4(address) => ("/proc/thread-self/net/tcp", words(&address.octets())),
        IpAddr::V6(address) => ("/proc/thread-self/net/tcp6", words(&address.octets())),
    };
    let local = format!(" {text}:{port:04X} ");
    std::fs::read_to_string(file).unwrap().lines().any(|line| line.contains(&local) && line.contains(" 0A "))
}

/// What is answered there; nothing where nobody is.
fn get(address: IpAddr, port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect((address, port)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// By the time in the EndpointSlice, once for each change of it while the proxy runs.
fn how_long_changes_take_is_told(world: &mut World, family: Family) {
    let service = (web(world, family), 80);
    ask_until(Some("client"), service);
    let slice = format!("web-{}-1", family.table());
    let change = |trigger: &str, endpoint: IpAddr| {
        world.api.edit("endpointslices", "default", &slice, |slice| {
            slice["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": trigger});
            slice["endpoints"] = endpoint_list(&[endpoint]);
        });
    };
    let counted = |suffix: &str| -> f64 {
        let text = get(Ipv4Addr::LOCALHOST.into(), METRICS, "/metrics").unwrap();
        let line = format!("kubeproxy_network_programming_duration_seconds_{suffix} ");
        text.lines().find_map(|found| found.strip_prefix(&line)).expect("the metric").parse().unwrap()
    };
    let until_answered_by = |name: &str| {
        wait_for(name, TIMEOUT, || ask(Some("client"), service).is_ok_and(|answer| answer.0 == name).then_some(()));
    };
    let before = (counted("count"), counted("sum"));
    change("2020-01-01T00:00:00Z", family.pod(12));
    until_answered_by("b");
    let now = || jiff::Timestamp::now().to_string();
    change(&now(), family.pod(12));
    change(&now(), family.pod(11));
    until_answered_by("a");
    wait_for("the change to be counted", TIMEOUT, || (counted("count") > before.0).then_some(()));
    assert!(counted("count") - before.0 == 1.0, "one from before the proxy, one that changed nothing, and one");
    let took = counted("sum") - before.1;
    assert!((0.0..TIMEOUT.as_secs_f64()).contains(&took), "{took} seconds");
}

fn bridged_packets_come_back_into_sight(world: &mut World, family: Family) {
    let service = web(world, family);
    let name = if family == Family::V4 { "bridge-nf-call-iptables" } else { "bridge-nf-call-ip6tables" };
    let setting = std::path::Path::new("/proc/sys/net/bridge").join(name);
    assert!(setting.exists(), "the proxy has loaded br_netfilter");
    let (_, seen) = ask_until(Some("client"), (service, 80));
    assert_eq!(seen, family.pod(13), "pods of one node see each other");
    std::fs::write(&setting, "0").unwrap();
    wait_for("the setting to be put right", TIMEOUT, || {
        (std::fs::read_to_string(&setting).unwrap().trim() == "1").then_some(())
    });
    assert_eq!(ask_until(Some("client"), (service, 80)).1, family.pod(13));
}

/// The kernel shows bridged packets only when the proxy has been running for a while, and the API says nothing yet.
fn what_is_not_known_yet_is_not_taken_away(world: &mut World, family: Family) {
    const SETTINGS: &str = "/proc/sys/net/bridge";
    let service = web(world, family);
    ask_until(Some("client"), (service, 80));
    world.stop_proxy();
    world.api.refuse("GET", "services", usize::MAX, Refused::new(503, "ServiceUnavailable", "not yet"));
    let none: Option<&str> = None;
    mount(Some("tmpfs"), SETTINGS, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let config = world.config();
    let ready = world.launch_proxy(config);
    wait_for("the proxy to be there", TIMEOUT, || get(family.node(), HEALTH, "/livez"));
    umount2(SETTINGS, MntFlags::MNT_DETACH).unwrap();
    let name = if family == Family::V4 { "bridge-nf-call-iptables" } else { "bridge-nf-call-ip6tables" };
    let setting = std::path::Path::new(SETTINGS).join(name);
    for _ in 0..2 {
        // Two looks, so that what the first one led to is over.
        std::fs::write(&setting, "0").unwrap();
        wait_for("the setting to be put right", TIMEOUT, || {
            (std::fs::read_to_string(&setting).unwrap().trim() == "1").then_some(())
        });
    }
    assert_eq!(ask(Some("client"), (service, 80)).unwrap().0, "a", "the rules of before stay");
    assert!(!*ready.borrow(), "nothing is known yet");
    world.api.allow("GET", "services");
    wait_for("the proxy to be ready", TIMEOUT, || ready.borrow().then_some(()));
    assert_eq!(ask_until(Some("client"), (service, 80)).0, "a");
}

fn a_taken_health_port_keeps_nothing_else_away(world: &mut World, family: Family) {
    world.stop_proxy();
    let taken = TcpListener::bind((family.any(), HEALTH)).unwrap();
    world.start_proxy();
    let service = web(world, family);
    assert_eq!(ask_until(Some("client"), (service, 80)).0, "a");
    drop(taken);
    wait_for("the health port", TIMEOUT, || {
        get(family.node(), HEALTH, "/healthz").filter(|text| text.starts_with("HTTP/1.1 200"))
    });
    // What is not for everybody is told on loopback alone.
    assert!(get(family.node(), HEALTH, "/metrics").unwrap().starts_with("HTTP/1.1 404"));
    assert!(get(family.node(), METRICS, "/metrics").is_none(), "metrics are told to everybody");
    let loopback = Ipv4Addr::LOCALHOST.into();
    assert!(get(loopback, METRICS, "/metrics").unwrap().contains("kubeproxy_sync_proxy_rules_duration_seconds"));
    assert!(get(loopback, METRICS, "/proxyMode").unwrap().ends_with("\r\n\r\nnftables"));
}
