//! `bench net`: how fast pods reach each other. One stream and one small question at a time, over a bare veth pair, between two
//! pods of one node, and between pods of two nodes: routed on one segment, and by VXLAN and WireGuard across a router.
//!
//! Nodes are network namespaces, each with its own proxy, which sets the ways up; pods are attached by the CNI plugins. All
//! ways stand at once and are measured in turn, so that all see the same machine.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use oarlock_cni::{Attachment, CniClient};
use oarlock_machinery::fake::FakeApi;
use oarlock_netlink::{Connection, Protocol, Route, VethPair};
use oarlock_netns::{create_pinned, run_in};
use oarlock_netproxy::{Config, Netproxy, Network, Tunnel};
use oarlock_testkit::binary;
use serde_json::json;
use tokio::runtime::Runtime;

use crate::table::{self, Row};

const PORT: u16 = 5001;
const CHUNK_BYTES: usize = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(15);

/// Two ends that reach each other in one way.
struct Way {
    name: &'static str,
    /// The namespace of the end that sends.
    from: PathBuf,
    to: SocketAddr,
    mtu: u32,
    /// Bits per second, in units of 10^9, one a round.
    speeds: Vec<f64>,
    answers: Row,
}

impl Way {
    fn new(name: &'static str, from: &Path, to: (&Path, IpAddr)) -> anyhow::Result<Self> {
        let (listening, address) = to;
        let listener = run_in(listening, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))??;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || answer(stream));
            }
        });
        let mtu = Connection::open_in(Protocol::Route, from)?.require_link("eth0")?.mtu;
        let answers = Row { name: name.to_owned(), samples: Vec::new() };
        Ok(Self { name, from: from.to_owned(), to: SocketAddr::new(address, PORT), mtu, speeds: Vec::new(), answers })
    }

    fn connect(&self) -> anyhow::Result<TcpStream> {
        let to = self.to;
        let stream = run_in(&self.from, move || TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
        let stream = stream.with_context(|| format!("{}: cannot connect to {to}", self.name))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        Ok(stream)
    }

    /// Sends for a while, and counts what the other end says that it got.
    fn send(&mut self, time: Duration) -> anyhow::Result<()> {
        let mut stream = self.connect()?;
        stream.write_all(b"s")?;
        let chunk = vec![0u8; CHUNK_BYTES];
        let begin = Instant::now();
        while begin.elapsed() < time {
            stream.write_all(&chunk)?;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut got = [0u8; 8];
        stream.read_exact(&mut got)?;
        let seconds = begin.elapsed().as_secs_f64();
        self.speeds.push(u64::from_be_bytes(got) as f64 * 8.0 / seconds / 1e9);
        Ok(())
    }

    fn ask(&mut self, questions: usize) -> anyhow::Result<()> {
        let mut stream = self.connect()?;
        stream.write_all(b"q")?;
        let mut byte = [0u8];
        for _ in 0..questions {
            let begin = Instant::now();
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            self.answers.samples.push(begin.elapsed().as_secs_f64() * 1000.0);
        }
        Ok(())
    }

    fn speed(&self) -> f64 {
        let mut sorted = self.speeds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// The other end: counts a stream, or sends every byte back.
fn answer(mut stream: TcpStream) {
    let mut buffer = vec![0u8; CHUNK_BYTES];
    let mut kind = [0u8];
    if stream.read_exact(&mut kind).is_err() || stream.set_nodelay(true).is_err() {
        return;
    }
    let mut count = 0u64;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) if kind == *b"s" => count += length as u64,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
        }
    }
    let _ = stream.write_all(&count.to_be_bytes());
}

/// A veth pair from `eth0` of one namespace to `eth0` of another, or to a port of a bridge.
fn wire(near: &mut Connection, name: &str, bridge: Option<u32>, far: &Path) -> anyhow::Result<Connection> {
    let file = std::fs::File::open(far)?;
    near.create_veth(&VethPair {
        name,
        master: bridge,
        mac: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_netns: file.as_fd(),
        mtu: 0,
    })?;
    let mut inside = Connection::open_in(Protocol::Route, far)?;
    let link = inside.require_link("eth0")?.index;
    inside.set_up(link)?;
    Ok(inside)
}

fn set_address(connection: &mut Connection, address: [u8; 4]) -> anyhow::Result<u32> {
    let link = connection.require_link("eth0")?.index;
    connection.add_address(link, ipnet::IpNet::new(IpAddr::from(address), 24)?)?;
    Ok(link)
}

/// Two namespaces with nothing between them but a veth pair.
fn bare(directory: &Path) -> anyhow::Result<Way> {
    let (one, other) = (directory.join("bare-1"), directory.join("bare-2"));
    create_pinned(&one)?;
    create_pinned(&other)?;
    let mut near = Connection::open_in(Protocol::Route, &one)?;
    let mut far = wire(&mut near, "eth0", None, &other)?;
    set_address(&mut near, [10, 99, 0, 1])?;
    set_address(&mut far, [10, 99, 0, 2])?;
    Way::new("bare veth pair", &one, (&other, IpAddr::from([10, 99, 0, 2])))
}

/// A node on a segment of the router. Its proxy runs as long as this lives.
struct Node {
    name: String,
    netns: PathBuf,
    directory: PathBuf,
    number: u8,
    _runtime: Runtime,
}

impl Node {
    fn start(
        directory: &Path,
        (number, segment): (u8, u8),
        tunnel: Tunnel,
        api: &Arc<FakeApi>,
        router: &mut Connection,
    ) -> anyhow::Result<Self> {
        let name = format!("node-{number}");
        let own = directory.join(&name);
        std::fs::create_dir_all(own.join("bin"))?;
        for plugin in ["bridge", "host-local", "portmap", "loopback"] {
            std::os::unix::fs::symlink(binary("oarlock-cni-plugins"), own.join("bin").join(plugin))?;
        }
        std::fs::write(own.join("resolv.conf"), "")?;
        let netns = own.join("netns");
        create_pinned(&netns)?;
        let bridge = router.require_link(&format!("seg{segment}"))?.index;
        let mut inside = wire(router, &format!("to-{number}"), Some(bridge), &netns)?;
        let address = [192, 168, segment, number];
        let link = set_address(&mut inside, address)?;
        let gateway = IpAddr::from([192, 168, segment, 254]);
        inside.add_route(&Route::new("0.0.0.0/0".parse()?, Some(gateway), link))?;
        let lo = inside.require_link("lo")?.index;
        inside.set_up(lo)?;
        api.create(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": pods_of(number).to_string(), "podCIDRs": [pods_of(number).to_string()]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": IpAddr::from(address).to_string()}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }));
        let network = Network {
            cluster_cidr: "10.42.0.0/16".parse()?,
            service_cidr: "10.43.0.0/16".parse()?,
            cluster_dns: IpAddr::from([10, 43, 0, 10]),
            node_ip: Some(address.into()),
        };
        let config = Config {
            node_name: name.clone(),
            networks: vec![network],
            cni_conf_dir: Some(own.join("net.d")),
            cni_state_dir: own.join("ipam"),
            wireguard_key: Some(own.join("wireguard.key")),
            upstream_resolv_conf: own.join("resolv.conf"),
            tunnel,
            ..Config::default()
        };
        // Its threads are in the node's namespace, and so is all that they do.
        let runtime =
            run_in(&netns, || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build())??;
        let api = api.clone();
        runtime.spawn(async move {
            if let Err(error) = Netproxy::new(config, api.client()).run(Default::default()).await {
                eprintln!("the proxy of a node ended: {error}");
            }
        });
        Ok(Self { name, netns, directory: own, number, _runtime: runtime })
    }

    /// Attaches a pod: its namespace and its address.
    fn pod(&self, name: &str) -> anyhow::Result<(PathBuf, IpAddr)> {
        let netns = self.directory.join(name);
        create_pinned(&netns)?;
        let client = CniClient::new(
            self.directory.join("net.d"),
            vec![self.directory.join("bin")],
            self.directory.join("cache"),
        );
        let attachment = Attachment::for_pod(&format!("{}-{name}", self.name), &netns, "default", name, "uid");
        let added = run_in(&self.netns, || -> anyhow::Result<_> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(client.add(&attachment))?)
        })??;
        let address = added.ips.first().context("the pod got no address")?.address.addr();
        Ok((netns, address))
    }

    /// Waits until the way to another node's pods is there and this node's pods can be attached; says by which link it goes.
    fn way_to(&self, other: &Node) -> anyhow::Result<String> {
        let begin = Instant::now();
        loop {
            let mut connection = Connection::open_in(Protocol::Route, &self.netns)?;
            let wanted = pods_of(other.number);
            let route = connection.routes()?.into_iter().find(|route| route.destination == wanted);
            if let Some(route) = route
                && self.directory.join("net.d/10-oarlock.conflist").exists()
            {
                let links = connection.links()?;
                let link = links.into_iter().find(|link| link.index == route.link);
                return Ok(link.map(|link| link.name).unwrap_or_default());
            }
            anyhow::ensure!(begin.elapsed() < PATIENCE, "{} has no way to {}", self.name, other.name);
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

fn pods_of(number: u8) -> ipnet::IpNet {
    ipnet::IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, 42, number, 0), 24))
}

/// A pair of nodes, and what they are good for: the pods of the first reach each other, and those of the second.
fn pair(
    directory: &Path,
    first: u8,
    segments: (u8, u8),
    tunnel: Tunnel,
    router: &mut Connection,
) -> anyhow::Result<(Node, Node)> {
    let api = FakeApi::new();
    let one = Node::start(directory, (first, segments.0), tunnel, &api, router)?;
    let other = Node::start(directory, (first + 1, segments.1), tunnel, &api, router)?;
    Ok((one, other))
}

/// The segments and the way between them, in this thread's namespace.
fn router() -> anyhow::Result<Connection> {
    let mut router = Connection::open(Protocol::Route)?;
    for segment in 1..=2 {
        let name = format!("seg{segment}");
        router.create_bridge(&name, None, 0, false)?;
        let index = router.require_link(&name)?.index;
        router.set_up(index)?;
        router.add_address(index, ipnet::IpNet::new(IpAddr::from([192, 168, segment, 254]), 24)?)?;
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("cannot forward")?;
    Ok(router)
}

pub(crate) fn run(rounds: usize, seconds: f64, questions: usize) -> anyhow::Result<()> {
    let directory = tempfile::Builder::new().prefix("oarlock-perf-").tempdir()?;
    let outcome = measure(directory.path(), rounds, seconds, questions);
    unpin(directory.path())?;
    outcome
}

/// Lets go of every namespace that is pinned below a directory.
fn unpin(directory: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(directory)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            unpin(&path)?;
        } else if oarlock_netns::is_pinned(&path) {
            oarlock_netns::remove_pinned(&path)?;
        }
    }
    Ok(())
}

fn measure(directory: &Path, rounds: usize, seconds: f64, questions: usize) -> anyhow::Result<()> {
    let mut router = router()?;
    let mut ways = vec![bare(directory)?];
    let mut nodes = Vec::new();
    let (one, other) = pair(directory, 1, (1, 1), Tunnel::Vxlan, &mut router)?;
    one.way_to(&other)?;
    other.way_to(&one)?;
    let (from, neighbour, far) = (one.pod("from")?, one.pod("neighbour")?, other.pod("far")?);
    ways.push(Way::new("two pods of one node", &from.0, (&neighbour.0, neighbour.1))?);
    ways.push(Way::new("two nodes of one segment", &from.0, (&far.0, far.1))?);
    nodes.push((one, other));
    for (name, first, tunnel, device) in [
        ("two nodes by VXLAN", 3, Tunnel::Vxlan, "oar-vxlan4"),
        ("two nodes by WireGuard", 5, Tunnel::Wireguard, "oar-wg0"),
    ] {
        if tunnel == Tunnel::Wireguard && !has_wireguard(directory)? {
            println!("not run: {name}, which this kernel does not have");
            continue;
        }
        let (one, other) = pair(directory, first, (1, 2), tunnel, &mut router)?;
        for (from, to) in [(&one, &other), (&other, &one)] {
            let by = from.way_to(to)?;
            anyhow::ensure!(by == device, "the way from {} leads through {by} and not {device}", from.name);
        }
        let (from, far) = (one.pod("from")?, other.pod("far")?);
        ways.push(Way::new(name, &from.0, (&far.0, far.1))?);
        nodes.push((one, other));
    }
    for way in &mut ways {
        way.send(Duration::from_millis(200))?;
        way.speeds.clear();
    }
    for _ in 0..rounds {
        for way in &mut ways {
            way.send(Duration::from_secs_f64(seconds))?;
            way.ask(questions)?;
        }
    }
    show(&ways, rounds, seconds);
    let answers: Vec<Row> = ways.into_iter().map(|way| way.answers).collect();
    table::print("one byte there and back, one connection", &answers);
    drop(nodes);
    Ok(())
}

fn has_wireguard(directory: &Path) -> anyhow::Result<bool> {
    let netns = directory.join("wireguard");
    create_pinned(&netns)?;
    let made = Connection::open_in(Protocol::Route, &netns)?.create_wireguard("try", 0);
    oarlock_netns::remove_pinned(&netns)?;
    match made {
        Err(error) if error.errno() == Some(nix::errno::Errno::EOPNOTSUPP) => Ok(false),
        other => Ok(other.map(|()| true)?),
    }
}

fn show(ways: &[Way], rounds: usize, seconds: f64) {
    let first = ways.first().map_or(f64::NAN, Way::speed);
    println!("\none stream, median of {rounds} rounds of {seconds} s (Gbit/s)");
    println!("{:<28} {:>6} {:>8} {:>8} {:>8} {:>8}", "", "MTU", "min", "median", "max", "ratio");
    let mut document = Vec::new();
    for way in ways {
        let (least, most) =
            way.speeds.iter().fold((f64::INFINITY, 0.0f64), |(least, most), one| (least.min(*one), most.max(*one)));
        let (median, ratio) = (way.speed(), way.speed() / first);
        println!("{:<28} {:>6} {least:>8.2} {median:>8.2} {most:>8.2} {ratio:>8.2}", way.name, way.mtu);
        document.push(json!({"name": way.name, "mtu": way.mtu, "median": median, "ratio": ratio}));
    }
    println!("{}", json!({"bench": "net", "unit": "Gbit/s", "rows": document}));
}
