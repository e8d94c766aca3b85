//! SCTP through Services: real associations where the kernel has SCTP, and the same rules where it has not.

#[macro_use]
mod netproxy_world;

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use netproxy_world::{Family, TIMEOUT, World, at, netns, read_answer};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use oarlock_netns::run_in;
use oarlock_testkit::{is_lab, wait_for};
use serde_json::json;

in_each_mode! { associations_reach_endpoints_from_pods_the_node_and_outside }

const NODE_PORT: u16 = 30_132;

fn open(family: Family) -> nix::Result<OwnedFd> {
    let address_family = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(address_family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp)
}

/// Answers associations of a pod with its name and the client's address.
fn serve(name: &str, family: Family, address: IpAddr) {
    let listener = run_in(&netns(name), || {
        let socket = open(family).unwrap();
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, 8080))).unwrap();
        listen(&socket, Backlog::new(16).unwrap()).unwrap();
        // One association is used like a connection.
        TcpListener::from(socket)
    })
    .unwrap();
    let own = name.to_owned();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.peer_addr().map(|peer| stream.write_all(format!("{own} {}\n", peer.ip()).as_bytes()));
        }
    });
}

fn ask(place: Option<&str>, family: Family, to: IpAddr, port: u16) -> io::Result<(String, IpAddr)> {
    at(place, || {
        let socket = open(family)?;
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(3, 0))?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(to, port)))?;
        read_answer(&mut TcpStream::from(socket))
    })
}

fn associations_reach_endpoints_from_pods_the_node_and_outside(world: &mut World, family: Family) {
    let name = format!("sctp-{}", family.table());
    let node_port = NODE_PORT + u16::from(family == Family::V6);
    world.slice(&name, "SCTP", &[family.pod(11)]);
    world.service(
        &name,
        json!({"type": "NodePort", "clusterIP": family.service(70), "clusterIPs": [family.service(70)],
               "ports": [{"name": "p", "protocol": "SCTP", "port": 80, "targetPort": 8080, "nodePort": node_port}]}),
    );
    let listed = || {
        let map = Command::new("nft").args(["list", "map", family.table(), "oarlock-netproxy", "endpoints"]).output();
        String::from_utf8_lossy(&map.unwrap().stdout).into_owned()
    };
    wait_for("the rules", TIMEOUT, || {
        let text = listed();
        (text.contains("sctp . 80") && text.contains(&family.pod(11).to_string())).then_some(())
    });
    if open(family).is_err() {
        assert!(!is_lab());
        return;
    }
    for (pod, last) in [("a", 11), ("b", 12)] {
        serve(pod, family, family.pod(last));
    }
    let answers =
        |place, to, port| wait_for(&format!("an answer of {to}"), TIMEOUT, || ask(place, family, to, port).ok());
    assert_eq!(answers(Some("client"), family.service(70), 80), ("a".to_owned(), family.pod(13)));
    assert_eq!(answers(None, family.service(70), 80), ("a".to_owned(), family.gateway()));
    assert_eq!(answers(Some("outside"), family.node(), node_port), ("a".to_owned(), family.gateway()));
    world.set_endpoints(&name, &[family.pod(12)]);
    wait_for("the other endpoint", TIMEOUT, || {
        ask(Some("client"), family, family.service(70), 80).is_ok_and(|answer| answer.0 == "b").then_some(())
    });
}
