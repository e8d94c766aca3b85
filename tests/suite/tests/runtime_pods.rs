//! What pods ask of the runtime beyond the plain case: host ports on loopback. Needs root.

#[allow(dead_code, reason = "shared with the tests of other files, which use the rest")]
mod runtime_daemon;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Instant;

use oarlock_proto::cri;
use runtime_daemon::{LIMIT, container_config, sandbox_config, with_daemon};

fn port(host_port: i32, container_port: i32, protocol: cri::Protocol) -> cri::PortMapping {
    cri::PortMapping { host_port, container_port, protocol: protocol as i32, host_ip: String::new() }
}

/// Sends a word on a connection to the host's port and reads it back; None while nobody serves.
fn echo(stream: &mut TcpStream, word: &[u8]) -> Option<()> {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(word).ok()?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer).ok()?;
    assert_eq!(answer, word);
    Some(())
}

fn served(port: u16) -> TcpStream {
    oarlock_testkit::wait_for("an answer by the host's port", LIMIT, || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        echo(&mut stream, b"first").map(|()| stream)
    })
}

#[test]
fn a_host_port_answers_on_loopback_while_the_daemon_is_gone_and_closes_with_its_pod() {
    with_daemon("ports", |mut daemon| async move {
        let route_localnet = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/route_localnet").unwrap();
        let before = route_localnet();
        let taken = TcpListener::bind(("127.0.0.1", 18079)).unwrap();
        let mut config = sandbox_config("ports", &daemon.log_directory("ports"));
        config.port_mappings = vec![
            port(18080, 8080, cri::Protocol::Tcp),
            port(18081, 8081, cri::Protocol::Udp),
            port(18079, 8080, cri::Protocol::Tcp),
        ];
        let sandbox = daemon.run(config).await.unwrap();
        daemon.container(&sandbox, container_config("tcp", &["tcp-echo", "8080"])).await;
        daemon.container(&sandbox, container_config("udp", &["udp-echo", "8081"])).await;

        let mut held = tokio::task::spawn_blocking(|| served(18080)).await.unwrap();
        daemon.crash().await;
        tokio::task::spawn_blocking(move || {
            echo(&mut held, b"the connection goes on").unwrap();
            served(18080);
            let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
            socket.connect(("127.0.0.1", 18081)).unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
            let mut answer = [0; 16];
            let deadline = Instant::now() + LIMIT;
            let count = loop {
                // The echo server may only be starting.
                let _ = socket.send(b"datagram");
                match socket.recv(&mut answer) {
                    Ok(count) => break count,
                    Err(_) => assert!(Instant::now() < deadline, "no datagram comes back"),
                }
            };
            assert_eq!(&answer[..count], b"ports: datagram");
        })
        .await
        .unwrap();
        daemon.open().await;

        // Whoever had the port keeps it, and the pod is none the worse.
        assert!(TcpStream::connect(("127.0.0.1", 18079)).is_ok() && taken.accept().is_ok());
        let stop = cri::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        daemon.runtime.stop_pod_sandbox(stop).await.unwrap();
        assert!(TcpStream::connect(("127.0.0.1", 18080)).is_err());
        assert_eq!(route_localnet(), before);
        daemon
    });
}
