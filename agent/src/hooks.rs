//! Lifecycle hooks: exec, httpGet, tcpSocket and sleep handlers of postStart and preStop.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use oarlock_probes::LifecycleGet;
use tokio::net::TcpStream;

use crate::cri::Runtime;

/// A hook of a running container.
pub(crate) struct Hook<'a> {
    pub handler: &'a LifecycleHandler,
    pub container: &'a Container,
    pub container_id: &'a str,
    /// The pod's address.
    pub host: &'a str,
}

/// Runs the hook to its end. Err is what the event says.
pub(crate) async fn run(runtime: &Runtime, hook: &Hook<'_>, limit: Duration) -> Result<(), String> {
    let run = async {
        if let Some(exec) = &hook.handler.exec {
            let command = exec.command.clone().unwrap_or_default();
            let answer = runtime.exec_sync(hook.container_id, &command, limit).await.map_err(|e| e.to_string())?;
            if answer.exit_code != 0 {
                let output = String::from_utf8_lossy(&answer.stderr).into_owned();
                return Err(format!("command '{}' exited with {}: {output}", command.join(" "), answer.exit_code));
            }
            return Ok(());
        }
        if let Some(http) = &hook.handler.http_get {
            return http_get(hook, http).await;
        }
        if let Some(tcp) = &hook.handler.tcp_socket {
            let port = port_number(hook.container, &tcp.port)?;
            let host = tcp.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(hook.host);
            return TcpStream::connect((host, port)).await.map(drop).map_err(|error| error.to_string());
        }
        if let Some(sleep) = &hook.handler.sleep {
            tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        }
        Ok(())
    };
    match tokio::time::timeout(limit, run).await {
        Ok(result) => result,
        Err(_) => Err(format!("did not end within {} s", limit.as_secs())),
    }
}

async fn http_get(hook: &Hook<'_>, http: &HTTPGetAction) -> Result<(), String> {
    let headers: Vec<(String, String)> =
        http.http_headers.iter().flatten().map(|header| (header.name.clone(), header.value.clone())).collect();
    oarlock_probes::lifecycle_get(LifecycleGet {
        tls: http.scheme.as_deref() == Some("HTTPS"),
        host: http.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(hook.host),
        port: port_number(hook.container, &http.port)?,
        path: http.path.as_deref().unwrap_or_default(),
        headers: &headers,
    })
    .await
}

/// A port by number, or by its name among the container's ports.
fn port_number(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => match name.parse() {
            Ok(number) => number,
            Err(_) => {
                let mut ports = container.ports.iter().flatten();
                let found = ports.find(|port| port.name.as_deref() == Some(name));
                found
                    .ok_or_else(|| format!("couldn't find port {name:?} in container {:?}", container.name))?
                    .container_port
            }
        },
    };
    u16::try_from(number).ok().filter(|number| *number > 0).ok_or_else(|| format!("invalid port {number}"))
}
