//! `bench netproxy`: the Service proxy with thousands of Services. From the first list to the last commit, one Service more,
//! one endpoint changed, memory, connections through the rules, and stale flows among many tracked ones.

use std::collections::HashMap;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use nix::sys::socket::{setsockopt, sockopt};
use oarlock_netlink::{Connection, Protocol, Route, VethPair};
use serde_json::{Value, json};

use crate::commits::Commits;
use crate::list_server::ListServer;
use crate::proxy::Proxy;
use crate::table::{self, Row};

/// The first Service, whose endpoints exist.
const REAL: usize = 0;

pub(crate) fn run(sizes: &[usize], rounds: usize, tracked: usize) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let pod = directory.path().join("pod");
    make_pod(&pod)?;
    let mut loads = Vec::new();
    for size in sizes {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        loads.push(measure(&runtime, *size, rounds)?);
        runtime.shutdown_timeout(Duration::from_secs(1));
        remove_table();
    }
    if tracked > 0 {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        forget_flows(&runtime, &pod, tracked)?;
        runtime.shutdown_timeout(Duration::from_secs(1));
        remove_table();
    }
    println!(
        "\nfrom nothing to every rule\n{:>9} {:>16} {:>16} {:>12} {:>12} {:>12} {:>14}",
        "Services", "list to commit s", "start to ready s", "CPU s", "PSS MB", "peak MB", "idle CPU ms/s"
    );
    for load in &loads {
        println!(
            "{:>9} {:>16.3} {:>16.3} {:>12.2} {:>12.1} {:>12.1} {:>14.2}",
            load["services"],
            number(load, "load_s"),
            number(load, "start_s"),
            number(load, "cpu_s"),
            number(load, "pss_mb"),
            number(load, "peak_mb"),
            number(load, "idle_cpu_ms_per_s"),
        );
    }
    println!("{}", json!({"bench": "netproxy", "rows": loads}));
    oarlock_netns::remove_pinned(&pod)?;
    Ok(())
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or(f64::NAN)
}

fn measure(runtime: &tokio::runtime::Runtime, size: usize, rounds: usize) -> anyhow::Result<Value> {
    let objects = HashMap::from([
        ("services".to_owned(), (0..size).map(service).collect()),
        ("endpointslices".to_owned(), (0..size).map(|number| slice(number, 3)).collect()),
        ("nodes".to_owned(), vec![node()]),
    ]);
    let (server, address) = runtime.block_on(ListServer::start(objects))?;
    let (proxy, [start, load]) = Proxy::start(&server, address)?;
    let loaded = proxy.usage()?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while !(server.is_watched("services") && server.is_watched("endpointslices")) {
        anyhow::ensure!(Instant::now() < deadline, "netproxy does not watch:\n{}", proxy.log());
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let (idle, settled) = idle(&proxy)?;
    let mut commits = Commits::open()?;
    let mut changes = [
        Row { name: format!("one Service more, at {size}"), samples: Vec::new() },
        Row { name: format!("one endpoint changed, at {size}"), samples: Vec::new() },
    ];
    for round in 0..rounds {
        let number = size + round;
        // Without its Service the slice changes nothing.
        server.send("endpointslices", "ADDED", &slice(number, 3));
        std::thread::park_timeout(Duration::from_millis(2));
        commits.drain();
        changes[0].samples.push(commits.wait_since(server.send("services", "ADDED", &service(number)))?);
        changes[1].samples.push(commits.wait_since(server.send("endpointslices", "MODIFIED", &slice(number, 2)))?);
    }
    table::print("event to commit", &changes);
    let (service, direct) = (SocketAddr::from((cluster_ip(REAL), 80)), SocketAddr::from((endpoints(REAL, 1)[0], 8080)));
    let rows = [
        connect("to the Service", service, rounds * 10).context(proxy.log())?,
        connect("to its endpoint", direct, rounds * 10)?,
    ];
    table::print(&format!("connecting, one after another, at {size}"), &rows);
    let rates = [rate(service)?, rate(direct)?];
    println!("\nconnections a second at {size}: {:.0} through the Service, {:.0} to its endpoint", rates[0], rates[1]);
    let [first, floor] = rows;
    anyhow::ensure!(proxy.directory().exists(), "the directory of the proxy is gone");
    Ok(json!({
        "services": size, "load_s": load.as_secs_f64(), "start_s": start.as_secs_f64(), "cpu_s": loaded.cpu.as_secs_f64(),
        "pss_mb": settled as f64 / 1e6, "peak_mb": loaded.peak_bytes as f64 / 1e6, "idle_cpu_ms_per_s": idle,
        "add_ms_p50": changes[0].percentile(0.5), "change_ms_p50": changes[1].percentile(0.5),
        "connect_ms_p50": first.percentile(0.5), "connect_direct_ms_p50": floor.percentile(0.5),
        "connections_per_s": rates[0], "connections_direct_per_s": rates[1],
    }))
}

/// CPU milliseconds a second while nothing changes, and the memory at the end.
fn idle(proxy: &Proxy) -> anyhow::Result<(f64, u64)> {
    const WINDOW: Duration = Duration::from_secs(5);
    let wait = |until: Instant| {
        while Instant::now() < until {
            std::thread::park_timeout(until.saturating_duration_since(Instant::now()));
        }
    };
    wait(Instant::now() + Duration::from_secs(2));
    let before = proxy.usage()?;
    wait(Instant::now() + WINDOW);
    let after = proxy.usage()?;
    Ok(((after.cpu - before.cpu).as_secs_f64() * 1000.0 / WINDOW.as_secs_f64(), after.pss_bytes))
}

/// Connections from the node, one after another.
fn connect(name: &str, address: SocketAddr, count: usize) -> anyhow::Result<Row> {
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("no connection to {address}"))?;
        samples.push(begin.elapsed().as_secs_f64() * 1000.0);
        finish(&mut stream)?;
    }
    Ok(Row { name: name.to_owned(), samples })
}

/// Waits until the server has accepted and closed: connections that only wait to be accepted fill its queue, and the next one
/// is lost and tried again a second later. Then resets, so that the port is free at once.
fn finish(stream: &mut TcpStream) -> anyhow::Result<()> {
    let _ = stream.read(&mut [0]);
    setsockopt(stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok(())
}

/// Connections a second from the node, made by a few clients at once.
fn rate(address: SocketAddr) -> anyhow::Result<f64> {
    const CLIENTS: usize = 4;
    const WINDOW: Duration = Duration::from_secs(2);
    let begin = Instant::now();
    let client = || -> anyhow::Result<usize> {
        let mut count = 0;
        while begin.elapsed() < WINDOW {
            finish(&mut TcpStream::connect_timeout(&address, Duration::from_secs(5))?)?;
            count += 1;
        }
        Ok(count)
    };
    let counts = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().expect("a client does not panic")).collect::<Vec<_>>()
    });
    let count = counts.into_iter().sum::<anyhow::Result<usize>>()?;
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

/// How soon flows to an endpoint that is gone are forgotten, among `tracked` ones that are nobody's business.
fn forget_flows(runtime: &tokio::runtime::Runtime, pod: &Path, tracked: usize) -> anyhow::Result<()> {
    const SERVICE: usize = 2000;
    const STALE: [usize; 2] = [1, 25_000];
    let (server, proxy) = proxy_with(runtime, 1000)?;
    let [old, new] = [endpoints(REAL, 2)[0], endpoints(REAL, 2)[1]];
    // What nobody receives would be answered with refusals.
    let _sink = oarlock_netns::run_in(pod, || UdpSocket::bind(("0.0.0.0", 8080)))??;
    let begin = Instant::now();
    fill(tracked, old)?;
    println!("\n{} flows tracked after {:.1} s", count_flows()?, begin.elapsed().as_secs_f64());
    let udp = |object: Bytes| String::from_utf8_lossy(&object).replace("TCP", "UDP");
    let slice_to = |address: Ipv4Addr| {
        let mut object: Value = serde_json::from_str(&udp(slice(SERVICE, 1))).expect("it was JSON before");
        object["endpoints"][0]["addresses"] = json!([address.to_string()]);
        Bytes::from(object.to_string())
    };
    let mut rows = Vec::new();
    let mut commits = Commits::open()?;
    server.send("endpointslices", "ADDED", &slice_to(new));
    std::thread::park_timeout(Duration::from_millis(5));
    commits.drain();
    commits.wait_since(server.send("services", "ADDED", &Bytes::from(udp(service(SERVICE)))))?;
    for stale in STALE {
        commits.drain();
        commits.wait_since(server.send("endpointslices", "MODIFIED", &slice_to(old)))?;
        for port in 0..stale {
            let socket = UdpSocket::bind(("0.0.0.0", 5000 + port as u16))?;
            socket.send_to(b"?", (cluster_ip(SERVICE), 80))?;
        }
        let forgotten = proxy.metric("oarlock_netproxy_stale_flows_removed_total")?;
        let begin = server.send("endpointslices", "MODIFIED", &slice_to(new));
        while proxy.metric("oarlock_netproxy_stale_flows_removed_total")? < forgotten + stale as f64 {
            anyhow::ensure!(begin.elapsed() < Duration::from_secs(60), "flows are not forgotten:\n{}", proxy.log());
            std::thread::park_timeout(Duration::from_millis(2));
        }
        rows.push(Row {
            name: format!("{stale} stale of {}", count_flows()? + stale),
            samples: vec![begin.elapsed().as_secs_f64() * 1000.0],
        });
    }
    table::print("endpoint gone to its flows forgotten", &rows);
    Ok(())
}

/// Makes flows past all Services.
fn fill(count: usize, to: Ipv4Addr) -> anyhow::Result<()> {
    const PORTS: usize = 50_000;
    for (number, part) in (0..count).step_by(PORTS).zip(0_u16..) {
        let socket = UdpSocket::bind(("0.0.0.0", 2000 + part))?;
        for port in 0..PORTS.min(count - number) {
            // A refusal of the packet before is told here.
            let _ = socket.send_to(b"?", (to, 10_000 + port as u16));
        }
    }
    Ok(())
}

fn count_flows() -> anyhow::Result<usize> {
    Ok(std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?.trim().parse()?)
}

/// A namespace with the first Service's endpoints.
fn make_pod(path: &Path) -> anyhow::Result<()> {
    oarlock_netns::create_pinned(path)?;
    let file = std::fs::File::open(path)?;
    let mut outside = Connection::open(Protocol::Route)?;
    outside.create_veth(&VethPair {
        name: "to-pod",
        master: None,
        mac: None,
        peer_name: "eth0",
        peer_mac: None,
        peer_netns: file.as_fd(),
        mtu: 0,
    })?;
    let near = outside.require_link("to-pod")?.index;
    outside.add_address(near, "10.42.0.1/24".parse()?)?;
    let mut inside = Connection::open_in(Protocol::Route, path)?;
    let far = inside.require_link("eth0")?.index;
    inside.set_up(far)?;
    for address in endpoints(REAL, 3) {
        inside.add_address(far, format!("{address}/24").parse()?)?;
    }
    inside.add_route(&Route::new("0.0.0.0/0".parse()?, Some([10, 42, 0, 1].into()), far))?;
    let listener = oarlock_netns::run_in(path, || TcpListener::bind(("0.0.0.0", 8080)))??;
    std::thread::spawn(move || listener.incoming().for_each(drop));
    Ok(())
}

/// The proxy leaves its rules behind, as it should, but the next size starts from nothing.
fn remove_table() {
    use oarlock_nft::{Command, Family, Kernel, Netlink, Table, Transaction};
    if let Ok(mut kernel) = Netlink::open() {
        for family in [Family::Ip, Family::Ip6] {
            let mut transaction = Transaction::new(Table::new(family, "oarlock-netproxy"));
            transaction.push(Command::DeleteTable);
            let _ = kernel.commit(&transaction);
        }
    }
}

fn cluster_ip(number: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a2b_0000 + 256 + number as u32)
}

fn endpoints(number: usize, count: usize) -> Vec<Ipv4Addr> {
    // The first three are the real pod's; the others do not exist, and nobody calls them.
    let first = if number == REAL { 0x0a2a_0000 + 11 } else { 0x0a2a_0100 + (number as u32 * 3) % 60_000 };
    (0..count as u32).map(|offset| Ipv4Addr::from(first + offset)).collect()
}

fn metadata(name: &str, labels: Value) -> Value {
    json!({
        "name": name, "namespace": "bench", "uid": format!("5f0c5d5e-0000-4000-8000-{name:0>12}"), "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z", "labels": labels, "annotations": {"meta.helm.sh/release-name": name},
    })
}

fn service(number: usize) -> Bytes {
    let (name, address) = (format!("s{number}"), cluster_ip(number).to_string());
    let object = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(&name, json!({"app": name})),
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "selector": {"app": name},
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
        },
        "status": {"loadBalancer": {}},
    });
    Bytes::from(object.to_string())
}

fn slice(number: usize, count: usize) -> Bytes {
    let name = format!("s{number}");
    let endpoint = |(index, address): (usize, Ipv4Addr)| {
        json!({
            "addresses": [address.to_string()], "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", (number + index) % 100),
            "targetRef": {"kind": "Pod", "namespace": "bench", "name": format!("{name}-{index}"), "uid": format!("{name}-{index}")},
        })
    };
    let all: Vec<Value> = endpoints(number, count).into_iter().enumerate().map(endpoint).collect();
    let labels = json!({"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"});
    let object = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata(&format!("{name}-x7k2p"), labels),
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": all,
    });
    Bytes::from(object.to_string())
}

fn node() -> Bytes {
    let object = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "bench", "resourceVersion": "1"}, "spec": {"podCIDR": "10.42.0.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": oarlock_testkit::NODE_ADDRESS}]},
    });
    Bytes::from(object.to_string())
}

/// The objects that a benchmark of names needs: some Services and this node.
pub(crate) fn objects(services: usize) -> HashMap<String, Vec<Bytes>> {
    HashMap::from([
        ("services".to_owned(), (0..services).map(service).collect()),
        ("endpointslices".to_owned(), (0..services).map(|number| slice(number, 3)).collect()),
        ("nodes".to_owned(), vec![node()]),
    ])
}

/// A proxy with some Services for another benchmark; the runtime has to live on.
pub(crate) fn proxy_with(
    runtime: &tokio::runtime::Runtime,
    services: usize,
) -> anyhow::Result<(Arc<ListServer>, Proxy)> {
    let (server, address) = runtime.block_on(ListServer::start(objects(services)))?;
    let (proxy, _) = Proxy::start(&server, address)?;
    Ok((server, proxy))
}
