//! A small HTTP/1.1 server that says which pod answered, and a client to ask it.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::number;

/// Shared state of the server: tests flip readiness and health through it.
#[derive(Default)]
struct State {
    unready: AtomicBool,
    unhealthy: AtomicBool,
}

/// `http [PORT]`: serves until SIGTERM.
///
/// `/` says pod, node and message; `/hostname`; `/client` the peer's address; `/env/NAME`; `/file/PATH`; `/readyz` and
/// `/healthz` with `/set/unready`, `/set/ready`, `/set/unhealthy`; `/stream` a line every 100 ms; `/exit/CODE`.
pub(crate) fn serve(arguments: &[String]) -> io::Result<u8> {
    let default = std::env::var("PORT").ok().and_then(|port| port.parse().ok()).unwrap_or(8080);
    let port: u16 = number(arguments, 0, default)?;
    super::process::exit_on_sigterm()?;
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    println!("serving on port {port} as {}", pod_name());
    let state = Arc::new(State::default());
    for connection in listener.incoming().flatten() {
        let state = Arc::clone(&state);
        std::thread::spawn(move || {
            let _ = answer(connection, &state);
        });
    }
    Ok(0)
}

fn pod_name() -> String {
    std::env::var("POD_NAME").or_else(|_| super::process::host_name()).unwrap_or_default()
}

fn answer(mut connection: TcpStream, state: &State) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut reader = BufReader::new(connection.try_clone()?.take(1 << 30));
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
        let mut keep_alive = line.trim_end().ends_with("HTTP/1.1");
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            if header.to_ascii_lowercase().starts_with("connection: close") {
                keep_alive = false;
            }
        }
        if path == "/stream" {
            return stream(connection);
        }
        let (status, body) = respond(&path, &connection, state);
        write!(
            connection,
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: {}\r\n\r\n{body}",
            body.len(),
            if keep_alive { "keep-alive" } else { "close" },
        )?;
        if let Some(code) = path.strip_prefix("/exit/") {
            std::process::exit(code.parse().unwrap_or(1));
        }
        if !keep_alive {
            return Ok(());
        }
    }
}

fn respond(path: &str, connection: &TcpStream, state: &State) -> (&'static str, String) {
    let flag = |down: &AtomicBool| match down.load(Ordering::SeqCst) {
        true => ("503 Service Unavailable", "no\n".to_owned()),
        false => ("200 OK", "ok\n".to_owned()),
    };
    match path {
        "/" => ("200 OK", page()),
        "/hostname" => ("200 OK", format!("{}\n", pod_name())),
        "/client" => ("200 OK", connection.peer_addr().map(|peer| format!("{peer}\n")).unwrap_or_default()),
        "/readyz" => flag(&state.unready),
        "/healthz" => flag(&state.unhealthy),
        "/set/unready" => set(&state.unready, true),
        "/set/ready" => set(&state.unready, false),
        "/set/unhealthy" => set(&state.unhealthy, true),
        _ => {
            if let Some(name) = path.strip_prefix("/env/") {
                std::env::var(name)
                    .map_or(("404 Not Found", "not set\n".to_owned()), |value| ("200 OK", format!("{value}\n")))
            } else if let Some(file) = path.strip_prefix("/file") {
                std::fs::read_to_string(file)
                    .map_or_else(|error| ("404 Not Found", format!("{error}\n")), |text| ("200 OK", text))
            } else if path.starts_with("/exit/") {
                ("200 OK", "bye\n".to_owned())
            } else {
                ("404 Not Found", "no such page\n".to_owned())
            }
        }
    }
}

fn set(flag: &AtomicBool, value: bool) -> (&'static str, String) {
    flag.store(value, Ordering::SeqCst);
    ("200 OK", "set\n".to_owned())
}

fn page() -> String {
    let variables: HashMap<String, String> = std::env::vars().collect();
    let get = |name: &str| variables.get(name).cloned().unwrap_or_default();
    let motto = std::fs::read_to_string("/etc/demo/motto").unwrap_or_default();
    format!(
        "{greeting}\npod {pod} on node {node} at {address}\n{motto}",
        greeting = get("GREETING"),
        pod = pod_name(),
        node = get("NODE_NAME"),
        address = get("POD_IP"),
    )
}

/// A line every 100 ms for as long as the client listens.
fn stream(mut connection: TcpStream) -> io::Result<()> {
    write!(connection, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n")?;
    for count in 0u64.. {
        writeln!(connection, "{count} {}", pod_name())?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// `fetch HOST:PORT[/PATH] [TIMEOUT_SECONDS]`: prints the body; fails on any status but 200.
pub(crate) fn fetch(arguments: &[String]) -> io::Result<u8> {
    let target =
        arguments.first().ok_or_else(|| io::Error::other("usage: fetch HOST:PORT[/PATH] [TIMEOUT_SECONDS]"))?;
    let timeout = Duration::from_secs(number(arguments, 1, 5)?);
    let target = target.strip_prefix("http://").unwrap_or(target);
    let (authority, path) = target.split_once('/').unwrap_or((target, ""));
    let (host, port) = authority.rsplit_once(':').unwrap_or((authority, "80"));
    let port: u16 = port.parse().map_err(|_| io::Error::other("the port is not a number"))?;
    let host = host.trim_matches(['[', ']']);
    let addresses = match host.parse::<std::net::IpAddr>() {
        Ok(address) => vec![address],
        Err(_) => super::resolve::lookup(host, timeout)?,
    };
    let address = addresses.first().ok_or_else(|| io::Error::other(format!("{host} has no address")))?;
    let socket = (*address, port).to_socket_addrs()?.next().ok_or_else(|| io::Error::other("no address"))?;
    let mut connection = TcpStream::connect_timeout(&socket, timeout)?;
    connection.set_read_timeout(Some(timeout))?;
    write!(connection, "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("not an HTTP answer"))?;
    print!("{body}");
    let ok = head.split_whitespace().nth(1) == Some("200");
    Ok(if ok { 0 } else { 22 })
}
