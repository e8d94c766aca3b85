//! `bench dns`: questions a second and how long one takes, for names of the cluster and for outside names from the cache, and
//! how soon a name is right after its endpoint changed.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
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

pub(crate) fn run(seconds: u64, rounds: usize, changes: usize) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    serve_upstream(directory.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (list, proxy) = proxy_with(&runtime, SERVICES)?;
    let server = SocketAddr::from((CLUSTER_DNS, 53));
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    for (name, kind) in [("s7.bench.svc.cluster.local", "cluster name"), ("www.example.org", "outside name, cached")] {
        let question = question(name);
        rows.push(Row { name: format!("{kind}, one at a time"), samples: one_by_one(server, &question, rounds)? });
        let (count, cpu) = flood(&proxy, server, &question, Duration::from_secs(seconds))?;
        println!(
            "{kind}: {:.0} questions a second, {:.1} µs of netproxy's CPU each ({:.0} a second on one core)",
            count as f64 / seconds as f64,
            cpu.as_secs_f64() * 1e6 / count as f64,
            count as f64 / cpu.as_secs_f64()
        );
        documents.push(json!({
            "name": kind, "per_second": count as f64 / seconds as f64, "per_core_second": count as f64 / cpu.as_secs_f64(),
        }));
    }
    table::print("cluster DNS by UDP", &rows);
    let row = Row { name: "endpoint change to right answer".to_owned(), samples: changed(&list, server, changes)? };
    table::print("cluster DNS after a change", &[row]);
    println!("{}", json!({"bench": "dns", "rows": documents}));
    Ok(())
}

/// A question for the A records of a name.
fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
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

/// Milliseconds from the event of an endpoint's change to the first answer that has it. What is asked for is asked again and
/// again, so that one answer's time is the resolution.
fn changed(list: &ListServer, server: SocketAddr, changes: usize) -> anyhow::Result<Vec<f64>> {
    const NAME: &str = "changing";
    const PATIENCE: Duration = Duration::from_secs(10);
    let deadline = Instant::now() + PATIENCE;
    while !(list.is_watched("services") && list.is_watched("endpointslices")) {
        anyhow::ensure!(Instant::now() < deadline, "netproxy does not watch");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    list.send("services", "ADDED", &headless(NAME));
    let question = question(&format!("{NAME}.bench.svc.cluster.local"));
    let socket = socket()?;
    let mut buffer = [0; 1500];
    let mut samples = Vec::with_capacity(changes);
    // The first makes the slice and is not measured.
    for change in 0..=changes {
        let address = Ipv4Addr::from(0x0a2a_8000 + 1 + change as u32);
        let event = if change == 0 { "ADDED" } else { "MODIFIED" };
        let since = list.send("endpointslices", event, &slice(NAME, address));
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

/// The slice of a Service with one endpoint.
fn slice(service: &str, address: Ipv4Addr) -> Bytes {
    let object = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-1"), "namespace": "bench", "uid": format!("{service}-1"), "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4", "ports": [{"port": 80, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address.to_string()], "conditions": {"ready": true}}],
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
