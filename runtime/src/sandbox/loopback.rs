//! Host ports on the host's loopback addresses. Packets there cannot be led elsewhere without `route_localnet`, which nothing
//! of ours sets, so the sandbox's shim listens and forwards. Here is decided what it is told.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use oarlock_shim_api::wire::{ForwardRule, Transport};

use crate::spec::sandbox::PortMapping;
use crate::state::Sandbox;

/// Tells the sandbox's shim. A port that somebody else listens on is no reason to refuse the pod: it is reached by the
/// node's other addresses.
pub(super) async fn forward(sandbox: &Sandbox, mappings: &[PortMapping], ips: &[String]) {
    let rules = rules(mappings, ips);
    let (id, Some(shim)) = (sandbox.id(), sandbox.shim()) else { return };
    if rules.is_empty() {
        return;
    }
    match shim.forward(rules).await {
        Ok(failures) => {
            for failure in failures {
                tracing::warn!(sandbox.id = %id, failure, "host port cannot be reached by loopback");
            }
        }
        Err(error) => tracing::warn!(sandbox.id = %id, %error, "host ports cannot be reached by loopback"),
    }
}

fn rules(mappings: &[PortMapping], ips: &[String]) -> Vec<ForwardRule> {
    let ips: Vec<IpAddr> = ips.iter().filter_map(|ip| ip.parse().ok()).collect();
    mappings.iter().filter_map(|mapping| rule(mapping, &ips)).collect()
}

fn rule(mapping: &PortMapping, ips: &[IpAddr]) -> Option<ForwardRule> {
    let transport = match mapping.protocol {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        _ => return None,
    };
    let listen: IpAddr = match mapping.host_ip {
        None => Ipv4Addr::LOCALHOST.into(),
        Some(IpAddr::V4(ip)) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        Some(IpAddr::V6(ip)) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        Some(ip) if ip.is_loopback() => ip,
        Some(_) => return None,
    };
    let target = ips.iter().find(|ip| ip.is_ipv4() == listen.is_ipv4()).or_else(|| ips.first())?;
    Some(ForwardRule {
        transport,
        listen: SocketAddr::new(listen, mapping.host_port),
        target: SocketAddr::new(*target, mapping.container_port),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ports_that_loopback_is_part_of_are_forwarded() {
        let mapping = |protocol, host_ip: Option<&str>| PortMapping {
            host_port: 8080,
            container_port: 80,
            protocol,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        let all = [
            mapping("tcp", None),
            mapping("udp", Some("0.0.0.0")),
            mapping("tcp", Some("127.0.0.2")),
            mapping("tcp", Some("::")),
            mapping("tcp", Some("192.0.2.1")),
            mapping("sctp", None),
        ];
        let ips = ["10.1.0.5".to_owned(), "fd00::5".to_owned()];
        let found: Vec<String> = rules(&all, &ips)
            .into_iter()
            .map(|rule| format!("{:?} {} {}", rule.transport, rule.listen, rule.target))
            .collect();
        assert_eq!(
            found,
            [
                "Tcp 127.0.0.1:8080 10.1.0.5:80",
                "Udp 127.0.0.1:8080 10.1.0.5:80",
                "Tcp 127.0.0.2:8080 10.1.0.5:80",
                "Tcp [::1]:8080 [fd00::5]:80"
            ]
        );
        assert!(rules(&all, &[]).is_empty());
    }
}
