//! A runtime that calls the CNI plugins one by one, and containers that answer.
#![allow(dead_code, reason = "each test program uses a part")]
#![allow(unused_macros, reason = "each test program uses a part")]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oarlock_netlink::{Connection, Link, Protocol};
use oarlock_netns::{create_pinned, run_in};
use oarlock_testkit::binary;
use serde_json::{Value, json};

/// How long a connection may take that has to come about. One that is refused is over at once, however long this is.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long one is tried that must not come about, and that nobody refuses.
const SHUT: Duration = Duration::from_secs(2);

const NAMES: [&str; 7] = ["bandwidth", "bridge", "firewall", "host-local", "loopback", "portmap", "tuning"];

/// The subnets of a network: of one family, of the other, or of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Ipv4,
    Ipv6,
    Dual,
}

impl Mode {
    /// Of each family the pods of the node, those of the cluster, and everything.
    pub fn subnets(self) -> &'static [(&'static str, &'static str, &'static str)] {
        const V4: (&str, &str, &str) = ("10.42.0.0/24", "10.42.0.0/16", "0.0.0.0/0");
        const V6: (&str, &str, &str) = ("fd42::/64", "fd42::/48", "::/0");
        match self {
            Mode::Ipv4 => &[V4],
            Mode::Ipv6 => &[V6],
            Mode::Dual => &[V4, V6],
        }
    }
}

/// The gateway of the pods in the family of an address.
pub fn gateway(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { [10, 42, 0, 1].into() } else { "fd42::1".parse().unwrap() }
}

/// Each function as a test in networks of IPv4, of IPv6 and of both.
macro_rules! in_each_mode {
    ($($name:ident)*) => {
        mod ipv4 { $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(super::Mode::Ipv4)); })* }
        mod ipv6 { $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(super::Mode::Ipv6)); })* }
        mod dual_stack { $(#[test] fn $name() { super::in_fresh_namespaces(|| super::$name(super::Mode::Dual)); })* }
    };
}

/// A runtime that calls plugins one by one.
pub struct Caller {
    pub directory: tempfile::TempDir,
}

impl Caller {
    pub fn new() -> Caller {
        oarlock_netns::bring_loopback_up().unwrap();
        let directory = tempfile::tempdir().unwrap();
        for plugin in NAMES {
            symlink(binary("oarlock-cni-plugins"), directory.path().join(plugin)).unwrap();
        }
        Caller { directory }
    }

    /// Calls a plugin for a container; the result, or the error object's message.
    pub fn call(&self, verb: &str, container: &str, config: Value, previous: Option<&Value>) -> Result<Value, String> {
        let refused = |error: Value| error["msg"].as_str().unwrap_or_default().to_owned();
        self.call_with(verb, container, config, previous, "").map_err(refused)
    }

    /// As [`Caller::call`], with `CNI_ARGS`; fails with the whole error object. The version is the newest unless the
    /// configuration has one.
    pub fn call_with(
        &self,
        verb: &str,
        container: &str,
        mut config: Value,
        previous: Option<&Value>,
        arguments: &str,
    ) -> Result<Value, Value> {
        if config["cniVersion"].is_null() {
            config["cniVersion"] = "1.1.0".into();
        }
        config["prevResult"] = previous.cloned().unwrap_or(Value::Null);
        let plugin = config["type"].as_str().unwrap().to_owned();
        let mut child = Command::new(self.directory.path().join(plugin))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns(container))
            .env("CNI_PATH", self.directory.path())
            .env("CNI_ARGS", arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        if output.status.success() { Ok(answer) } else { Err(answer) }
    }

    pub fn bridge(&self, network: &str, third: u8) -> Value {
        json!({
            "name": network, "type": "bridge", "bridge": format!("br-{network}"), "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": self.directory.path().join("ipam"),
                     "ranges": [[{"subnet": format!("10.42.{third}.0/24")}], [{"subnet": format!("fd42:{third}::/64")}]],
                     "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]},
        })
    }

    /// A network of these families whose containers reach the outside as the node, on the bridge `br0`.
    pub fn masqueraded(&self, mode: Mode) -> Value {
        let subnets = mode.subnets().iter();
        let ranges: Vec<_> = subnets.clone().map(|(subnet, ..)| json!([{"subnet": subnet}])).collect();
        let exclude: Vec<_> = subnets.clone().map(|(_, cluster, _)| cluster).collect();
        let routes: Vec<_> = subnets.map(|(.., any)| json!({"dst": any})).collect();
        json!({
            "name": "net", "type": "bridge", "bridge": "br0", "isGateway": true, "hairpinMode": true,
            "ipMasq": true, "ipMasqExclude": exclude,
            "ipam": {"type": "host-local", "dataDir": self.directory.path().join("ipam"), "ranges": ranges, "routes": routes},
        })
    }

    /// A container on the bridge of a network.
    pub fn attach(&self, container: &str, bridge: Value) -> Value {
        create_pinned(&netns(container)).unwrap();
        self.call("ADD", container, bridge, None).unwrap()
    }
}

pub fn netns(container: &str) -> PathBuf {
    Path::new("/run/netns").join(container)
}

/// Runs `work` in a namespace by name, or on the host.
pub fn at<T: Send>(place: Option<&str>, work: impl FnOnce() -> T + Send) -> T {
    match place {
        Some(name) => run_in(&netns(name), work).unwrap(),
        None => work(),
    }
}

pub fn addresses(result: &Value) -> Vec<IpAddr> {
    let text = |ip: &Value| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap();
    result["ips"].as_array().unwrap().iter().map(text).collect()
}

pub fn link_inside(container: &str) -> Link {
    Connection::open_in(Protocol::Route, &netns(container)).unwrap().require_link("eth0").unwrap()
}

pub fn host_links() -> Vec<String> {
    Connection::open(Protocol::Route).unwrap().links().unwrap().into_iter().map(|link| link.name).collect()
}

/// A server in the container that takes everything in, and then sends as much as it was asked for by the first 8 bytes.
pub fn serve(container: &str) {
    let listener = run_in(&netns(container), || TcpListener::bind(("::", 80)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut header = [0; 8];
            if stream.read_exact(&mut header).is_err() {
                continue;
            }
            let wanted = u64::from_be_bytes(header);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
            let _ = std::io::copy(&mut std::io::repeat(7).take(wanted), &mut stream);
        }
    });
}

/// How long it takes to send and to receive that much.
pub fn transfer(from: Option<&str>, to: IpAddr, send: u64, receive: u64) -> std::io::Result<Duration> {
    let work = || {
        let begin = Instant::now();
        let mut stream = TcpStream::connect_timeout(&(to, 80).into(), PATIENCE)?;
        stream.write_all(&receive.to_be_bytes())?;
        std::io::copy(&mut std::io::repeat(7).take(send), &mut stream)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        assert_eq!(std::io::copy(&mut stream, &mut std::io::sink())?, receive);
        Ok(begin.elapsed())
    };
    at(from, work)
}

/// Whether a container, or the host, reaches the server of another by each of its addresses.
pub fn reaches(from: Option<&str>, to: &Value) -> Vec<bool> {
    addresses(to).into_iter().map(|to| transfer(from, to, 10, 10).is_ok()).collect()
}

/// Whether no connection comes about from a container to this place.
pub fn is_cut_off(from: &str, to: IpAddr, port: u16) -> bool {
    at(Some(from), || TcpStream::connect_timeout(&(to, port).into(), SHUT)).is_err()
}

/// As [`is_cut_off`], by every address of another container's server.
pub fn are_apart(from: &str, to: &Value) -> bool {
    addresses(to).into_iter().all(|to| is_cut_off(from, to, 80))
}

/// A neighbour of the node that knows nothing of pods: what it has in a family, and how the node is seen from there.
pub fn neighbour_addresses(like: IpAddr) -> (IpAddr, IpAddr) {
    if like.is_ipv4() {
        ([192, 0, 2, 2].into(), [192, 0, 2, 1].into())
    } else {
        ("2001:db8::2".parse().unwrap(), "2001:db8::1".parse().unwrap())
    }
}

/// Makes the neighbour with a server on port 80 that tells who asks. It has a way back to pods, so a pod whose packets are not
/// masqueraded is seen by its own address.
pub fn neighbour(name: &str) {
    create_pinned(&netns(name)).unwrap();
    let file = std::fs::File::open(netns(name)).unwrap();
    let pair = oarlock_netlink::VethPair {
        name: "uplink",
        master: None,
        mac: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_netns: std::os::fd::AsFd::as_fd(&file),
        mtu: 0,
    };
    let mut near = Connection::open(Protocol::Route).unwrap();
    near.create_veth(&pair).unwrap();
    let uplink = near.require_link("uplink").unwrap().index;
    let mut far = Connection::open_in(Protocol::Route, &netns(name)).unwrap();
    let eth0 = far.require_link("eth0").unwrap().index;
    far.set_up(eth0).unwrap();
    for (pods, like) in [("10.42.0.0/16", [0; 4].into()), ("fd42::/48", [0; 16].into())] {
        let (its, nodes) = neighbour_addresses(like);
        let net = |address| ipnet::IpNet::new(address, if address.is_ipv4() { 24 } else { 64 }).unwrap();
        near.add_address(uplink, net(nodes)).unwrap();
        far.add_address(eth0, net(its)).unwrap();
        far.add_route(&oarlock_netlink::Route::new(pods.parse().unwrap(), Some(nodes), eth0)).unwrap();
    }
    tell_who_asks(name, 80);
}

/// A server in a namespace that tells each client its address.
pub fn tell_who_asks(name: &str, port: u16) {
    let listener = run_in(&netns(name), || TcpListener::bind(("::", port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.peer_addr().map(|peer| write!(stream, "{}", peer.ip().to_canonical()));
        }
    });
}

/// What such a server says to a client in a container, or on the host.
pub fn asked(from: Option<&str>, to: IpAddr, port: u16) -> std::io::Result<IpAddr> {
    let ask = || {
        let stream = TcpStream::connect_timeout(&(to, port).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(std::io::read_to_string(stream)?.parse().expect("an address"))
    };
    at(from, ask)
}

/// Runs `nft` with these words, which has to succeed; what it says.
pub fn nft(words: &str) -> String {
    let output = Command::new("nft").args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "nft {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
