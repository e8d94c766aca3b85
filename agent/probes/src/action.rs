//! What one attempt does: an exec, an HTTP GET, a TCP connect or a gRPC health check. Parsing of the manifest is pure.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPHeader, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::time::Instant;

use crate::model::ExecProbe;
use crate::{grpc, http, tcp};

/// Of an exec's output and an HTTP body, this much is looked at.
pub(crate) const OUTPUT_LIMIT_BYTES: usize = 10 * 1024;

/// How much longer than its timeout an exec may take to report that it timed out.
const EXEC_GRACE: Duration = Duration::from_secs(1);

/// What an attempt found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Attempt {
    Success(String),
    /// A success that its author should know something about.
    Warning(String),
    Failure(String),
    /// It could not be tried; says nothing about the container.
    Error(String),
}

/// A probe's action with everything resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Exec(Vec<String>),
    Http { tls: bool, host: String, port: u16, path: String, headers: Vec<(String, String)> },
    Tcp { host: String, port: u16 },
    Grpc { host: IpAddr, port: u16, service: String },
}

/// Reads the action out of the manifest; Err says what is wrong with it.
pub(crate) fn parse(probe: &Probe, container: &Container, pod_ip: IpAddr) -> Result<Action, String> {
    let host_or_pod = |host: &Option<String>| match host.as_deref() {
        Some(host) if !host.is_empty() => host.to_string(),
        _ => pod_ip.to_string(),
    };
    if let Some(exec) = &probe.exec {
        return Ok(Action::Exec(exec.command.clone().unwrap_or_default()));
    }
    if let Some(get) = &probe.http_get {
        let header = |header: &HTTPHeader| (header.name.clone(), header.value.clone());
        return Ok(Action::Http {
            tls: get.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")),
            host: host_or_pod(&get.host),
            port: resolve_port(&get.port, container)?,
            path: get.path.clone().unwrap_or_default(),
            headers: get.http_headers.iter().flatten().map(header).collect(),
        });
    }
    if let Some(socket) = &probe.tcp_socket {
        return Ok(Action::Tcp { host: host_or_pod(&socket.host), port: resolve_port(&socket.port, container)? });
    }
    if let Some(grpc) = &probe.grpc {
        let port = u16::try_from(grpc.port).map_err(|_| format!("invalid port number: {}", grpc.port))?;
        return Ok(Action::Grpc { host: pod_ip, port, service: grpc.service.clone().unwrap_or_default() });
    }
    Err("missing probe handler".to_string())
}

fn resolve_port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name));
            match named {
                Some(port) => port.container_port,
                None => {
                    name.parse().map_err(|_| format!("couldn't find port: {name} in container {}", container.name))?
                }
            }
        }
    };
    u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(|| format!("invalid port number: {number}"))
}

/// Carries attempts out.
#[derive(Clone)]
pub(crate) struct Prober {
    pub exec: Arc<dyn ExecProbe>,
    pub http: http::HttpProber,
}

impl Prober {
    pub async fn attempt(&self, action: &Action, container_id: &str, timeout: Duration) -> Attempt {
        match action {
            Action::Exec(command) => self.exec(container_id, command, timeout).await,
            Action::Http { tls, host, port, path, headers } => {
                self.http.get(http::Target { tls: *tls, host, port: *port, path }, headers, timeout).await
            }
            Action::Tcp { host, port } => tcp::connect(host, *port, timeout).await,
            Action::Grpc { host, port, service } => grpc::check(*host, *port, service, timeout).await,
        }
    }

    async fn exec(&self, container_id: &str, command: &[String], timeout: Duration) -> Attempt {
        let started = Instant::now();
        let timed_out =
            || Attempt::Failure(format!("command timed out: {:?} timed out after {timeout:?}", command.join(" ")));
        match tokio::time::timeout(timeout + EXEC_GRACE, self.exec.exec(container_id, command, timeout)).await {
            Ok(Ok((0, output))) => Attempt::Success(lossy(&output)),
            Ok(Ok((_, output))) => Attempt::Failure(lossy(&output)),
            Ok(Err(_)) if started.elapsed() >= timeout => timed_out(),
            // A runtime that is being restarted must not get containers killed.
            Ok(Err(message)) => Attempt::Error(message),
            Err(_) => timed_out(),
        }
    }
}

/// Output as text, capped.
pub(crate) fn lossy(output: &[u8]) -> String {
    String::from_utf8_lossy(&output[..output.len().min(OUTPUT_LIMIT_BYTES)]).into_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(probe: serde_json::Value) -> Result<Action, String> {
        let container = serde_json::from_value(json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}));
        parse(&serde_json::from_value(probe).unwrap(), &container.unwrap(), "10.0.0.1".parse().unwrap())
    }

    #[test]
    fn ports_are_found_by_number_and_name() {
        for port in [json!(8080), json!("web"), json!("8080")] {
            let action = parsed(json!({"tcpSocket": {"port": port}})).unwrap();
            assert_eq!(action, Action::Tcp { host: "10.0.0.1".into(), port: 8080 });
        }
        for port in [json!(0), json!(70000), json!("nope"), json!(-1)] {
            assert!(parsed(json!({"tcpSocket": {"port": port}})).is_err());
        }
    }

    #[test]
    fn http_takes_scheme_host_and_headers() {
        let action = parsed(json!({"httpGet": {"port": 1, "scheme": "HTTPS", "host": "h", "path": "/x",
            "httpHeaders": [{"name": "A", "value": "b"}]}}));
        let headers = vec![("A".to_string(), "b".to_string())];
        assert_eq!(action.unwrap(), Action::Http { tls: true, host: "h".into(), port: 1, path: "/x".into(), headers });
    }

    #[test]
    fn a_probe_without_a_handler_is_an_error() {
        assert_eq!(parsed(json!({})).unwrap_err(), "missing probe handler");
    }
}
