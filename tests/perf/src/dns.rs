//! `bench dns`: questions a second and how long one takes, for names of the cluster, for outside names from the cache and for
//! headless Services of many endpoints, and how soon a name is right after its endpoint changed.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use serde_json::json;

use crate::list_server::ListServer;
use crate::netproxy::proxy_with;
use crate::proxy::Proxy;
use crate::table::{self, Row};

const CLUSTER_DNS: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 10);
const UPSTREAM: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Questions under way at once when as many as possible are asked.
const WINDOW: usize = 64;
const SERVICES: usize = 1000;
/// Endpoints of the headless Services, and how many of them a slice has.
const LARGE: [usize; 2] = [250, 1000];
const SLICE: usize = 100;
const A: u8 = 1;
const SRV: u8 = 33;

pub(crate) fn run(seconds: u64, rounds: usize, changes: usize) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    serve_upstream(directory.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (list, proxy) = proxy_with(&runtime, SERVICES)?;
    let server = SocketAddr::from((CLUSTER_DNS, 53));
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    let time = Duration::from_secs(seconds);
    for (name, kind) in [("s7.bench.svc.cluster.local", "cluster name"), ("www.example.org", "outside name, cached")] {
        let question = question(name, A);
        rows.push(Row { name: format!("{kind}, one at a time"), samples: one_by_one(server, &question, rounds)? });
        documents.push(told(kind, time, flood(&proxy, server, &question, time)?));
    }
    watched(&list)?;
    for count in LARGE {
        let name = make_large(&list, server, count)?;
        let question_a = question(&name, A);
        let row = format!("headless of {count}, A by UDP, cut");
        documents.push(told(&row, time, flood(&proxy, server, &question_a, time)?));
        let row = format!("headless of {count}, A by TCP");
        documents.push(told(&row, time, flood_tcp(&proxy, server, &question_a, time)?));
        let row = format!("headless of {count}, SRV by TCP");
        documents.push(told(&row, time, flood_tcp(&proxy, server, &question(&name, SRV), time)?));
    }
    table::print("cluster DNS by UDP", &rows);
    let row = Row { name: "endpoint change to right answer".to_owned(), samples: changed(&list, server, changes)? };
    table::print("cluster DNS after a change", &[row]);
    println!("{}", json!({"bench": "dns", "rows": documents}));
    Ok(())
}

/// Prints what a flood came to, and returns it for the document.
fn told(kind: &str, time: Duration, (count, cpu): (u64, Duration)) -> serde_json::Value {
    let per_second = count as f64 / time.as_secs_f64();
    let per_core_second = count as f64 / cpu.as_secs_f64();
    println!(
        "{kind}: {per_second:.0} questions a second, {:.1} µs of netproxy's CPU each ({per_core_second:.0} a second on one core)",
        1e6 / per_core_second
    );
    json!({"name": kind, "per_second": per_second, "per_core_second": per_core_second})
}

/// A question for the records of a type.
fn question(name: &str, kind: u8) -> Vec<u8> {
    let mut bytes = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.extend_from_slice(&[0, 0, kind, 0, 1]);
    bytes
}

fn socket() -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(socket)
}

fn one_by_one(server: SocketAddr, question: &[u8], rounds: usize) -> anyhow::Result<Vec<f64>> {
    let socket = socket()?;
    let mut buffer = [0; 1500];
    let mut samples = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let begin = Instant::now();
        socket.send_to(question, server)?;
        let length = socket.recv(&mut buffer).context("cluster DNS does not answer")?;
        samples.push(begin.elapsed().as_secs_f64() * 1000.0);
        anyhow::ensure!(length > question.len() && buffer[3] & 0xf == 0, "the answer has no record");
    }
    Ok(samples)
}

/// Keeps many questions under way; counts answers and netproxy's CPU time.
fn flood(proxy: &Proxy, server: SocketAddr, question: &[u8], time: Duration) -> anyhow::Result<(u64, Duration)> {
    let socket = socket()?;
    socket.connect(server)?;
    let before = proxy.usage()?.cpu;
    let begin = Instant::now();
    let mut buffer = [0; 1500];
    let mut count = 0;
    for _ in 0..WINDOW {
        socket.send(question)?;
    }
    while begin.elapsed() < time {
        socket.recv(&mut buffer).context("cluster DNS stopped answering")?;
        count += 1;
        socket.send(question)?;
    }
    Ok((count, proxy.usage()?.cpu - before))
}

/// Asks one question after the other on one connection; counts answers and netproxy's CPU time.
fn flood_tcp(proxy: &Proxy, server: SocketAddr, question: &[u8], time: Duration) -> anyhow::Result<(u64, Duration)> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let before = proxy.usage()?.cpu;
    let begin = Instant::now();
    let mut count = 0;
    while begin.elapsed() < time {
        ask_tcp(&mut stream, question)?;
        count += 1;
    }
    Ok((count, proxy.usage()?.cpu - before))
}

/// How many records there are for a question.
fn ask_tcp(stream: &mut TcpStream, question: &[u8]) -> anyhow::Result<usize> {
    let length = u16::try_from(question.len())?;
    stream.write_all(&[&length.to_be_bytes()[..], question].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).context("cluster DNS stopped answering")?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(usize::from(u16::from_be_bytes([answer[6], answer[7]])))
}

fn watched(list: &ListServer) -> anyhow::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let deadline = Instant::now() + PATIENCE;
    while !(list.is_watched("services") && list.is_watched("endpointslices")) {
        anyhow::ensure!(Instant::now() < deadline, "netproxy does not watch");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    Ok(())
}

/// A headless Service of that many endpoints, once it is answered for; its name.
fn make_large(list: &ListServer, server: SocketAddr, count: usize) -> anyhow::Result<String> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let service = format!("large-{count}");
    list.send("services", "ADDED", &headless(&service));
    for first in (0..count).step_by(SLICE) {
        let addresses =
            (first..(first + SLICE).min(count)).map(|number| Ipv4Addr::from(0x0a2a_0000 + 1 + number as u32));
        list.send("endpointslices", "ADDED", &slice(&service, first, addresses));
    }
    let name = format!("{service}.bench.svc.cluster.local");
    let (mut stream, begin) = (TcpStream::connect(server)?, Instant::now());
    while ask_tcp(&mut stream, &question(&name, A))? != count {
        anyhow::ensure!(begin.elapsed() < PATIENCE, "the headless Service never has {count} addresses");
    }
    Ok(name)
}

/// Milliseconds from the event of an endpoint's change to the first answer that has it. What is asked for is asked again and
/// again, so that one answer's time is the resolution.
fn changed(list: &ListServer, server: SocketAddr, changes: usize) -> anyhow::Result<Vec<f64>> {
    const NAME: &str = "changing";
    const PATIENCE: Duration = Duration::from_secs(10);
    watched(list)?;
    list.send("services", "ADDED", &headless(NAME));
    let question = question(&format!("{NAME}.bench.svc.cluster.local"), A);
    let socket = socket()?;
    let mut buffer = [0; 1500];
    let mut samples = Vec::with_capacity(changes);
    // The first makes the slice and is not measured.
    for change in 0..=changes {
        let address = Ipv4Addr::from(0x0a2a_8000 + 1 + change as u32);
        let event = if change == 0 { "ADDED" } else { "MODIFIED" };
        let since = list.send("endpointslices", event, &slice(NAME, 0, std::iter::once(address)));
        loop {
            socket.send_to(&question, server)?;
            let length = socket.recv(&mut buffer).context("cluster DNS does not answer")?;
            // One answer, whose data is the last of the message.
            if buffer[6..8] == [0, 1] && buffer[..length].ends_with(&address.octets()) {
                break;
            }
            anyhow::ensure!(since.elapsed() < PATIENCE, "the answer never becomes {address}");
        }
        if change > 0 {
            samples.push(since.elapsed().as_secs_f64() * 1000.0);
        }
    }
    Ok(samples)
}

fn headless(name: &str) -> Bytes {
    let object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "bench", "uid": name, "resourceVersion": "1"},
        "spec": {"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"], "ports": [{"port": 80, "protocol": "TCP"}]},
    });
    Bytes::from(object.to_string())
}

/// A slice of a Service, by a number.
fn slice(service: &str, number: usize, addresses: impl Iterator<Item = Ipv4Addr>) -> Bytes {
    let endpoint = |address: Ipv4Addr| json!({"addresses": [address.to_string()], "conditions": {"ready": true}});
    let name = format!("{service}-{number}");
    let object = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": "bench", "uid": name, "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4", "ports": [{"name": "p", "port": 80, "protocol": "TCP"}],
        "endpoints": addresses.map(endpoint).collect::<Vec<_>>(),
    });
    Bytes::from(object.to_string())
}

/// A resolver on loopback that says 192.0.2.80 to everything, and a resolv.conf that names it (in this mount namespace).
fn serve_upstream(directory: &std::path::Path) -> anyhow::Result<()> {
    let own = directory.join("resolv.conf");
    std::fs::write(&own, format!("nameserver {UPSTREAM}\n"))?;
    let none: Option<&str> = None;
    for path in [RESOLV_CONF, "/run/systemd/resolve/resolv.conf"] {
        if std::path::Path::new(path).exists() {
            nix::mount::mount(Some(&own), path, none, nix::mount::MsFlags::MS_BIND, none)?;
        }
    }
    let socket = UdpSocket::bind((UPSTREAM, 53))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            // The question up to its end, without what follows it, and one A record that points back at the name.
            let end = 12 + buffer[12..length].iter().position(|byte| *byte == 0).unwrap_or(0) + 5;
            let mut answer = buffer[..end].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 2, 88, 0, 4, 192, 0, 2, 80]);
            let _ = socket.send_to(&answer, peer);
        }
    });
    Ok(())
}
