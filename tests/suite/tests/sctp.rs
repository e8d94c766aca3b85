//! SCTP through Services: real associations where the kernel has SCTP, and the same rules where it has not.

#[macro_use]
mod netproxy_world;

use std::io;
use std::net::IpAddr;
use std::process::Command;

use netproxy_world::sockets::{ask_stream, has_sctp, serve_sctp};
use netproxy_world::{Family, TIMEOUT, World};
use nix::sys::socket::SockProtocol;
use oarlock_testkit::{is_lab, wait_for};
use serde_json::json;

in_each_mode! { associations_reach_endpoints_from_pods_the_node_and_outside }

const NODE_PORT: u16 = 30_132;

fn ask(place: Option<&str>, to: IpAddr, port: u16) -> io::Result<(String, IpAddr)> {
    ask_stream(place, SockProtocol::Sctp, None, (to, port).into(), TIMEOUT)
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
    if !has_sctp() {
        assert!(!is_lab());
        println!("not run: associations, as this kernel has no SCTP; the rules are there");
        return;
    }
    for (pod, last) in [("a", 11), ("b", 12)] {
        serve_sctp(Some(pod), pod, (family.pod(last), 8080).into());
    }
    let answers = |place, to, port| wait_for(&format!("an answer of {to}"), TIMEOUT, || ask(place, to, port).ok());
    assert_eq!(answers(Some("client"), family.service(70), 80), ("a".to_owned(), family.pod(13)));
    assert_eq!(answers(None, family.service(70), 80), ("a".to_owned(), family.gateway()));
    assert_eq!(answers(Some("outside"), family.node(), node_port), ("a".to_owned(), family.gateway()));
    world.set_endpoints(&name, &[family.pod(12)]);
    wait_for("the other endpoint", TIMEOUT, || {
        ask(Some("client"), family.service(70), 80).is_ok_and(|answer| answer.0 == "b").then_some(())
    });
}
