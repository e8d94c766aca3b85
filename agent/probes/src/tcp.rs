//! tcpSocket probes: a connection that opens is a success.

use std::io;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::action::Attempt;

pub(crate) async fn connect(host: &str, port: u16, timeout: Duration) -> Attempt {
    let address = join_host_port(host, port);
    match tokio::time::timeout(timeout, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Attempt::Success(String::new()),
        Ok(Err(error)) => Attempt::Failure(format!("dial tcp {address}: {}", describe(&error))),
        Err(_) => Attempt::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

pub(crate) fn join_host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A connect error as events have always shown it.
pub(crate) fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connect: connection refused".to_string(),
        io::ErrorKind::HostUnreachable => "connect: no route to host".to_string(),
        io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_string(),
        io::ErrorKind::TimedOut => "i/o timeout".to_string(),
        io::ErrorKind::ConnectionReset => "read: connection reset by peer".to_string(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_open_port_succeeds_and_a_closed_one_fails() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(connect("127.0.0.1", port, Duration::from_secs(5)).await, Attempt::Success(String::new()));
        drop(listener);
        let message = format!("dial tcp 127.0.0.1:{port}: connect: connection refused");
        assert_eq!(connect("127.0.0.1", port, Duration::from_secs(5)).await, Attempt::Failure(message));
    }
}
