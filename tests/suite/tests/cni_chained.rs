//! The plugins that are chained behind `bridge`, and VLANs of the bridge, called as the specification says, with real packets.

mod cni_caller;

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cni_caller::{Caller, addresses, are_apart, host_links, is_cut_off, link_inside, netns, reaches, serve, transfer};
use oarlock_netlink::{Connection, Protocol};
use oarlock_netns::{create_pinned, run_in};
use oarlock_testkit::{in_fresh_namespaces, is_lab};
use serde_json::{Value, json};

#[test]
fn bandwidth_limits_both_directions_by_themselves() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let result = caller.attach("a", caller.bridge("net", 0));
        serve("a");
        const MEGABYTE: u64 = 1 << 20;
        // What this machine takes without limits: one that is emulated is slow by itself.
        let unlimited =
            addresses(&result).into_iter().map(|to| transfer(None, to, 2 * MEGABYTE, 2 * MEGABYTE).unwrap());
        let slack = Duration::from_secs(5) + 3 * unlimited.max().unwrap();
        // A limit never lets through more. Less it does each time, and a machine that stands still does not.
        let takes = |to: IpAddr, (send, receive): (u64, u64), least: Duration| {
            let mut times = Vec::new();
            let is_enough = (0..3).any(|_| {
                let time = transfer(None, to, send, receive).unwrap();
                assert!(time > least, "{time:?} for {send} and {receive} bytes");
                times.push(time);
                time < slack
            });
            assert!(is_enough, "{times:?} for {send} and {receive} bytes");
        };
        let limits = json!({"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 16_000_000, "egressBurst": 800_000});
        let config = json!({"name": "net", "type": "bandwidth", "runtimeConfig": {"bandwidth": limits}});
        let tuned = caller.call("ADD", "a", config.clone(), Some(&result)).unwrap();
        let made = tuned["interfaces"].as_array().unwrap().last().unwrap()["name"].as_str().unwrap().to_owned();
        assert!(made.starts_with("bwp") && host_links().contains(&made), "{made}");
        caller.call("CHECK", "a", config.clone(), Some(&tuned)).unwrap();
        for address in addresses(&result) {
            // 1 MB/s to it, and 2 MB/s from it.
            takes(address, (2 * MEGABYTE, 0), Duration::from_millis(1700));
            takes(address, (0, 2 * MEGABYTE), Duration::from_millis(800));
        }
        let host = tuned["interfaces"][1]["name"].as_str().unwrap();
        assert!(Command::new("tc").args(["qdisc", "del", "dev", host, "root"]).status().unwrap().success());
        let drift = caller.call("CHECK", "a", config.clone(), Some(&tuned)).unwrap_err();
        assert_eq!(drift, format!("{host} is not limited"));
        // An attachment that is valid stays, and one that still is in use too.
        let mut gc = config.clone();
        gc["cni.dev/valid-attachments"] = json!([]);
        caller.call("GC", "a", gc.clone(), None).unwrap();
        assert!(host_links().contains(&made), "something is still led there");
        caller.call("DEL", "a", config.clone(), Some(&tuned)).unwrap();
        assert!(!host_links().contains(&made));
        caller.call("DEL", "a", config.clone(), None).unwrap();
        Connection::open(Protocol::Route).unwrap().create_ifb("bwp0123456789ab", 1500).unwrap();
        caller.call("GC", "a", gc, None).unwrap();
        assert!(!host_links().iter().any(|name| name.starts_with("bwp")));
        let mut half = config;
        half["runtimeConfig"]["bandwidth"]["egressBurst"] = 0.into();
        assert!(caller.call("ADD", "a", half, Some(&result)).unwrap_err().contains("egressBurst"));
    });
}

#[test]
fn bridges_of_the_same_policy_are_kept_apart_and_inside_one_everything_passes() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let one = caller.attach("a", caller.bridge("one", 1));
        let neighbour = caller.attach("b", caller.bridge("one", 1));
        let two = caller.attach("c", caller.bridge("two", 2));
        let open = caller.attach("d", caller.bridge("three", 3));
        ["a", "b", "c", "d"].iter().for_each(|container| serve(container));
        let reach = |from: &str, to: &Value| reaches(Some(from), to) == [true, true];
        assert!(reach("a", &two) && reach("c", &one), "without a policy");
        let config = |network: &str| json!({"name": network, "type": "firewall", "ingressPolicy": "same-bridge"});
        for (container, network, result) in [("a", "one", &one), ("b", "one", &neighbour), ("c", "two", &two)] {
            let passed_on = caller.call("ADD", container, config(network), Some(result)).unwrap();
            assert_eq!(passed_on["ips"], result["ips"]);
            caller.call("CHECK", container, config(network), Some(result)).unwrap();
        }
        assert!(are_apart("a", &two) && are_apart("c", &one), "between the bridges");
        assert!(reach("a", &neighbour) && reach("b", &one), "inside one");
        assert!(reach("a", &open) && reach("d", &two), "a network without the policy");
        assert_eq!(reaches(None, &one), [true, true], "from the host");
        let admit = ["add", "rule", "ip", "oarlock-cni", "firewall-admin", "accept"];
        assert!(Command::new("nft").args(admit).status().unwrap().success());
        assert!(transfer(Some("a"), addresses(&two)[0], 10, 10).is_ok(), "the administrator's rules come first");
        caller.call("ADD", "b", config("one"), Some(&neighbour)).unwrap();
        assert!(transfer(Some("a"), addresses(&two)[0], 10, 10).is_ok(), "and stay");
        let flushed = Command::new("nft").args(["flush", "set", "ip6", "oarlock-cni", "firewall-bridges"]).status();
        assert!(flushed.unwrap().success());
        let drift = caller.call("CHECK", "a", config("one"), Some(&one)).unwrap_err();
        assert_eq!(drift, "br-one is not in firewall-bridges");
        let listed =
            Command::new("nft").args(["list", "set", "ip", "oarlock-cni", "firewall-bridges"]).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(listed.contains("\"br-one\"") && listed.contains("\"br-two\""), "nft can read it: {listed}");
        Connection::open(Protocol::Route).unwrap().delete_link_by_name("br-one").unwrap();
        caller.call("DEL", "a", config("one"), Some(&one)).unwrap();
        let listed = Command::new("nft").args(["list", "table", "ip", "oarlock-cni"]).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(!listed.contains("\"br-one\"") && listed.contains("\"br-two\""), "{listed}");
    });
}

#[test]
fn tuning_changes_the_link_and_puts_it_back() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let result = caller.attach("a", caller.bridge("net", 0));
        let before = link_inside("a");
        let config = json!({
            "name": "net", "type": "tuning", "dataDir": caller.directory.path().join("tuning-data"),
            "sysctl": {"net.core.somaxconn": "499", "net.ipv4.conf.IFNAME.arp_notify": "1"},
            "mac": "02:11:22:33:44:55", "mtu": 1400, "promisc": true, "allmulti": true, "txQLen": 77,
        });
        let tuned = caller.call("ADD", "a", config.clone(), Some(&result)).unwrap();
        let shown = &tuned["interfaces"][2];
        assert_eq!((&shown["mac"], &shown["mtu"]), (&json!("02:11:22:33:44:55"), &json!(1400)));
        let link = link_inside("a");
        assert_eq!((link.mac.unwrap().to_string().as_str(), link.mtu), ("02:11:22:33:44:55", 1400));
        assert!(link.promiscuous && link.all_multicast && link.up);
        assert_eq!(link.queue_length, 77);
        let sysctl = |name: &str| {
            let read = || std::fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap().trim().to_owned();
            run_in(&netns("a"), read).unwrap()
        };
        assert_eq!(
            (sysctl("net/core/somaxconn").as_str(), sysctl("net/ipv4/conf/eth0/arp_notify").as_str()),
            ("499", "1")
        );
        caller.call("CHECK", "a", config.clone(), Some(&tuned)).unwrap();
        let mut inside = Connection::open_in(Protocol::Route, &netns("a")).unwrap();
        let change = oarlock_netlink::LinkChange { mtu: Some(1300), ..Default::default() };
        inside.change_link(link.index, &change).unwrap();
        assert_eq!(caller.call("CHECK", "a", config.clone(), Some(&tuned)).unwrap_err(), "mtu of eth0 was changed");
        caller.call("DEL", "a", config.clone(), Some(&tuned)).unwrap();
        let after = link_inside("a");
        assert_eq!((after.mac, after.mtu, after.queue_length), (before.mac, before.mtu, before.queue_length));
        assert!(!after.promiscuous && !after.all_multicast);
        caller.call("DEL", "a", config.clone(), Some(&tuned)).unwrap();
        let mut foreign = config;
        foreign["sysctl"] = json!({"kernel.shmmax": "1"});
        assert!(caller.call("ADD", "a", foreign, Some(&result)).unwrap_err().contains("kernel.shmmax"));
    });
}

/// Where the kernel's bridges know VLANs, containers meet those of their own; elsewhere ADD says so and leaves nothing.
#[test]
fn containers_of_one_bridge_are_in_vlans() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let on = |network: &str, vlan: u16| {
            let mut config = caller.bridge(network, 7);
            config["bridge"] = "br-vlan".into();
            config["vlan"] = vlan.into();
            config["preserveDefaultVlan"] = false.into();
            config["isGateway"] = false.into();
            config
        };
        let knows_vlans = Connection::open(Protocol::Route).unwrap().create_bridge("probe", None, 0, true).is_ok();
        assert!(knows_vlans || !is_lab());
        create_pinned(&netns("a")).unwrap();
        if !knows_vlans {
            let error = caller.call("ADD", "a", on("hundred", 100), None).unwrap_err();
            assert!(error.contains("br-vlan"), "{error}");
            assert_eq!(host_links(), ["lo"]);
            return;
        }
        Connection::open(Protocol::Route).unwrap().delete_link_by_name("probe").unwrap();
        let a = caller.call("ADD", "a", on("hundred", 100), None).unwrap();
        let b = caller.attach("b", on("hundred", 100));
        // Its own network: the same subnet would give an address that somebody has.
        let mut other = on("two-hundred", 200);
        other["ipam"]["ranges"] = json!([[{"subnet": "10.42.7.0/24", "rangeStart": "10.42.7.100"}]]);
        other["ipam"]["routes"] = json!([]);
        let c = caller.attach("c", other);
        ["a", "b", "c"].iter().for_each(|container| serve(container));
        assert!(transfer(Some("a"), addresses(&b)[0], 10, 10).is_ok());
        assert!(is_cut_off("a", addresses(&c)[0], 80), "another VLAN of the same bridge");
        caller.call("CHECK", "a", on("hundred", 100), Some(&a)).unwrap();
        let port = a["interfaces"][1]["name"].as_str().unwrap();
        let moved = Command::new("bridge").args(["vlan", "del", "dev", port, "vid", "100"]).status();
        assert!(moved.unwrap().success());
        let drift = caller.call("CHECK", "a", on("hundred", 100), Some(&a)).unwrap_err();
        assert_eq!(drift, format!("{port} is not in the VLANs of the network"));
        // The gateway of a VLAN is on a link of its own.
        let mut gateway = caller.bridge("three-hundred", 9);
        gateway["bridge"] = "br-vlan".into();
        gateway["vlan"] = 300.into();
        let d = caller.attach("d", gateway);
        serve("d");
        assert!(host_links().contains(&"br-vlan.300".to_owned()));
        assert!(addresses(&d).iter().all(|address| transfer(None, *address, 10, 10).is_ok()), "through the gateway");
        let mut trunk = caller.bridge("trunk", 10);
        trunk["bridge"] = "br-vlan".into();
        trunk["vlanTrunk"] = json!([{"id": 400}, {"minID": 410, "maxID": 412}]);
        let e = caller.attach("e", trunk.clone());
        caller.call("CHECK", "e", trunk, Some(&e)).unwrap();
        let port = e["interfaces"][1]["name"].as_str().unwrap();
        let index = Connection::open(Protocol::Route).unwrap().require_link(port).unwrap().index;
        let vlans = Connection::open(Protocol::Route).unwrap().port_vlans(index).unwrap();
        let ids: Vec<u16> = vlans.iter().map(|vlan| vlan.id).collect();
        assert_eq!(ids, [1, 400, 410, 411, 412]);
    });
}
