//! A resolver that follows `/etc/resolv.conf` (name servers, search list, ndots), because a static program has no NSS.

use std::fs;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::str::FromStr;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RData, RecordType};

/// `resolve NAME [TYPE]`: prints each record's data on a line; exit code 2 where there is none.
pub(crate) fn resolve(arguments: &[String]) -> io::Result<u8> {
    let name = arguments.first().ok_or_else(|| io::Error::other("usage: resolve NAME [TYPE]"))?;
    let kind = arguments.get(1).map_or("A", String::as_str).to_ascii_uppercase();
    let kind = RecordType::from_str(&kind).map_err(|_| io::Error::other(format!("unknown record type {kind}")))?;
    let records = query(name, kind, Duration::from_secs(5))?;
    for record in &records {
        println!("{record}");
    }
    Ok(if records.is_empty() { 2 } else { 0 })
}

/// The IPv4 addresses of a name, or where it has none, its IPv6 addresses.
pub(crate) fn lookup(name: &str, timeout: Duration) -> io::Result<Vec<IpAddr>> {
    if let Some(address) = from_hosts_file(name) {
        return Ok(vec![address]);
    }
    for kind in [RecordType::A, RecordType::AAAA] {
        let addresses: Vec<IpAddr> = query(name, kind, timeout)?.iter().filter_map(address).collect();
        if !addresses.is_empty() {
            return Ok(addresses);
        }
    }
    Ok(Vec::new())
}

fn address(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(address) => Some(address.0.into()),
        RData::AAAA(address) => Some(address.0.into()),
        _ => None,
    }
}

fn from_hosts_file(name: &str) -> Option<IpAddr> {
    let text = fs::read_to_string("/etc/hosts").ok()?;
    text.lines().filter_map(|line| line.split('#').next()).find_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word == name).then_some(address)
    })
}

struct Configuration {
    servers: Vec<IpAddr>,
    search: Vec<String>,
    ndots: usize,
}

fn configuration() -> Configuration {
    let mut configuration = Configuration { servers: Vec::new(), search: Vec::new(), ndots: 1 };
    for line in fs::read_to_string("/etc/resolv.conf").unwrap_or_default().lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                configuration.servers.extend(words.next().and_then(|word| word.parse::<IpAddr>().ok()))
            }
            Some("search") => configuration.search = words.map(str::to_owned).collect(),
            Some("options") => {
                for option in words {
                    if let Some(value) = option.strip_prefix("ndots:") {
                        configuration.ndots = value.parse().unwrap_or(1);
                    }
                }
            }
            _ => {}
        }
    }
    configuration
}

fn query(name: &str, kind: RecordType, timeout: Duration) -> io::Result<Vec<RData>> {
    let configuration = configuration();
    let mut candidates = Vec::new();
    let absolute = name.trim_end_matches('.').to_owned();
    let searched = configuration.search.iter().map(|domain| format!("{absolute}.{}", domain.trim_end_matches('.')));
    if name.ends_with('.') {
        candidates.push(absolute);
    } else if absolute.matches('.').count() >= configuration.ndots {
        candidates.push(absolute.clone());
        candidates.extend(searched);
    } else {
        candidates.extend(searched);
        candidates.push(absolute.clone());
    }
    let server = configuration.servers.first().ok_or_else(|| io::Error::other("no name server in /etc/resolv.conf"))?;
    for candidate in candidates {
        let records = ask(*server, &candidate, kind, timeout)?;
        if !records.is_empty() {
            return Ok(records);
        }
    }
    Ok(Vec::new())
}

fn ask(server: IpAddr, name: &str, kind: RecordType, timeout: Duration) -> io::Result<Vec<RData>> {
    let name = Name::from_str(&format!("{name}.")).map_err(io::Error::other)?;
    let id = u16::try_from(std::process::id() & 0xffff).unwrap_or(1);
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect((server, 53))?;
    socket.send(&message.to_vec().map_err(io::Error::other)?)?;
    let mut buffer = [0u8; 4096];
    let length = socket.recv(&mut buffer)?;
    let answer = Message::from_vec(&buffer[..length]).map_err(io::Error::other)?;
    Ok(answer.answers.iter().map(|record| record.data.clone()).collect())
}
