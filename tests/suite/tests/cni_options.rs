//! What a network may ask of `bridge` and `host-local` beyond the usual, and the versions of the specification, called as the
//! specification says.

mod cni_caller;

use std::fs;
use std::net::IpAddr;

use cni_caller::{Caller, addresses, are_apart, host_links, link_inside, netns, reaches, serve};
use ipnet::IpNet;
use oarlock_netlink::{Connection, Link, Protocol};
use oarlock_netns::create_pinned;
use oarlock_testkit::in_fresh_namespaces;
use serde_json::{Value, json};

fn with(mut config: Value, fields: Value) -> Value {
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    config
}

fn host_link(name: &str) -> Link {
    Connection::open(Protocol::Route).unwrap().require_link(name).unwrap()
}

/// The addresses of a link of the host without the link-local ones.
fn host_addresses(name: &str) -> Vec<String> {
    let mut connection = Connection::open(Protocol::Route).unwrap();
    let index = connection.require_link(name).unwrap().index;
    let is_link_local = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
    let mut found: Vec<String> = connection
        .addresses()
        .unwrap()
        .into_iter()
        .filter(|one| one.link == index && !is_link_local(&one.net))
        .map(|one| one.net.to_string())
        .collect();
    found.sort();
    found
}

/// The addresses that `host-local` has given out for a network.
fn reserved(caller: &Caller, network: &str) -> Vec<String> {
    let entries = fs::read_dir(caller.directory.path().join("ipam").join(network)).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<String> = names.filter(|name| name.parse::<IpAddr>().is_ok()).collect();
    found.sort();
    found
}

#[test]
fn isolated_ports_reach_the_node_and_others_but_not_each_other() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let isolated = with(caller.bridge("net", 0), json!({"portIsolation": true}));
        let a = caller.attach("a", isolated.clone());
        let b = caller.attach("b", isolated.clone());
        let open = caller.attach("open", caller.bridge("net", 0));
        ["a", "b", "open"].into_iter().for_each(serve);
        assert_eq!(reaches(Some("a"), &open), [true, true], "a port that is not isolated");
        assert_eq!(reaches(Some("open"), &a), [true, true]);
        assert_eq!(reaches(None, &b), [true, true], "the node");
        assert!(are_apart("a", &b) && are_apart("b", &a));
        caller.call("CHECK", "a", isolated, Some(&a)).unwrap();
    });
}

#[test]
fn a_bridge_becomes_promiscuous_when_it_is_made_and_when_it_is_there() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let promiscuous = |network: &str, third| with(caller.bridge(network, third), json!({"promiscMode": true}));
        caller.attach("a", promiscuous("new", 1));
        assert!(host_link("br-new").promiscuous);
        caller.attach("b", caller.bridge("old", 2));
        assert!(!host_link("br-old").promiscuous);
        caller.attach("c", promiscuous("old", 2));
        assert!(host_link("br-old").promiscuous);
        caller.attach("d", promiscuous("old", 2));
        caller.attach("e", caller.bridge("old", 2));
        assert!(host_link("br-old").promiscuous, "a network that does not ask for it does not end it");
        create_pinned(&netns("f")).unwrap();
        let both = with(promiscuous("both", 3), json!({"hairpinMode": true}));
        let error = caller.call_with("ADD", "f", both, None, "").unwrap_err();
        assert_eq!(error["code"], 7);
        assert!(error["msg"].as_str().unwrap().contains("promiscMode"), "{error}");
        assert!(!host_links().contains(&"br-both".to_owned()));
    });
}

#[test]
fn the_ethernet_address_comes_from_the_nearest_of_its_sources() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let of = |last: u8| format!("02:00:00:00:00:{last:02x}");
        let mut config = caller.bridge("net", 0);
        let given = |container: &str, config: &Value, arguments: &str| {
            create_pinned(&netns(container)).unwrap();
            let result = caller.call_with("ADD", container, config.clone(), None, arguments).unwrap();
            let mac = link_inside(container).mac.unwrap().to_string();
            assert_eq!(result["interfaces"][2]["mac"], mac, "the result says what is");
            caller.call("CHECK", container, config.clone(), Some(&result)).unwrap();
            mac
        };
        let default = given("none", &config, "");
        assert!(default.starts_with("0a:58:0a:2a:00:"), "made of the IPv4 address: {default}");
        config["mac"] = of(1).into();
        assert_eq!(given("network", &config, ""), of(1));
        let environment = format!("IgnoreUnknown=1;K8S_POD_NAME=x;MAC={}", of(2));
        assert_eq!(given("environment", &config, &environment), of(2));
        config["args"] = json!({"cni": {"mac": of(3)}});
        assert_eq!(given("arguments", &config, &environment), of(3));
        config["runtimeConfig"] = json!({"mac": of(4)});
        assert_eq!(given("capability", &config, &environment), of(4));
        config["runtimeConfig"] = json!({"mac": ""});
        assert_eq!(given("empty", &config, &environment), of(3), "an empty one is none");
        let (links, held) = (host_links(), reserved(&caller, "net"));
        config["runtimeConfig"] = json!({"mac": "02:00:00:00:00"});
        create_pinned(&netns("wrong")).unwrap();
        let error = caller.call_with("ADD", "wrong", config, None, "").unwrap_err();
        assert_eq!(error["code"], 7, "{error}");
        assert_eq!((host_links(), reserved(&caller, "net")), (links, held), "nothing is left");
    });
}

#[test]
fn a_default_gateway_is_a_gateway_with_the_default_routes_that_the_network_has_not() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let config = |network: &str, third: u8, routes: Value| {
            let mut config = caller.bridge(network, third);
            config["isGateway"] = false.into();
            config["isDefaultGateway"] = true.into();
            config["ipam"]["routes"] = routes;
            config
        };
        let near = caller.attach("near", config("near", 1, json!([])));
        let far = caller.attach("far", config("far", 2, json!([{"dst": "0.0.0.0/0"}])));
        let none = caller.attach("none", {
            let mut config = config("none", 3, json!([]));
            config["isDefaultGateway"] = false.into();
            config
        });
        assert_eq!(
            near["routes"],
            json!([{"dst": "0.0.0.0/0", "gw": "10.42.1.1"}, {"dst": "::/0", "gw": "fd42:1::1"}])
        );
        assert_eq!(far["routes"], json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd42:2::1"}]), "none twice");
        assert_eq!(none.get("routes"), None);
        assert_eq!(host_addresses("br-near"), ["10.42.1.1/24", "fd42:1::1/64"]);
        assert!(host_addresses("br-none").is_empty(), "no gateway was asked for");
        ["near", "far"].into_iter().for_each(serve);
        assert_eq!(reaches(Some("near"), &far), [true, true], "through the node");
        assert_eq!(reaches(Some("far"), &near), [true, true]);
        assert!(are_apart("none", &near), "no route");
        let checked = config("near", 1, json!([]));
        caller.call("CHECK", "near", checked.clone(), Some(&near)).unwrap();
        let mut inside = Connection::open_in(Protocol::Route, &netns("near")).unwrap();
        let eth0 = inside.require_link("eth0").unwrap().index;
        let default = oarlock_netlink::Route::new("::/0".parse().unwrap(), Some("fd42:1::1".parse().unwrap()), eth0);
        inside.delete_route(&default).unwrap();
        assert_eq!(caller.call("CHECK", "near", checked, Some(&near)).unwrap_err(), "the route to ::/0 is missing");
    });
}

#[test]
fn the_addresses_of_a_bridge_are_replaced_only_by_force() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let on = |subnets: &[&str], force: bool| {
            let ranges: Vec<Value> = subnets.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
            let mut config = with(caller.bridge("net", 0), json!({"forceAddress": force}));
            config["ipam"]["ranges"] = ranges.into();
            config["ipam"]["routes"] = json!([]);
            config
        };
        caller.attach("a", on(&["10.42.0.0/24", "fd42:0:0:1::/64"], false));
        create_pinned(&netns("b")).unwrap();
        let (links, held) = (host_links(), reserved(&caller, "net"));
        for (subnet, existing, wanted) in [
            ("10.42.9.0/24", "10.42.0.1/24", "10.42.9.1/24"),
            ("fd42::/48", "fd42:0:0:1::1/64", "fd42::1/48"),
            ("fd42:0:0:1:8000::/72", "fd42:0:0:1::1/64", "fd42::1:8000:0:0:1/72"),
        ] {
            let error = caller.call("ADD", "b", on(&[subnet], false), None).unwrap_err();
            assert_eq!(error, format!("bridge br-net has address {existing}, not {wanted}"));
            assert_eq!((host_links(), reserved(&caller, "net")), (links.clone(), held.clone()), "nothing is left");
        }
        // Networks of IPv6 that have nothing in common share a bridge, by force or not.
        caller.call("ADD", "b", on(&["fd42:0:0:2::/64"], false), None).unwrap();
        caller.attach("c", on(&["10.42.9.0/24", "fd42:0:0:3::/64"], true));
        assert_eq!(
            host_addresses("br-net"),
            ["10.42.9.1/24", "fd42:0:0:1::1/64", "fd42:0:0:2::1/64", "fd42:0:0:3::1/64"]
        );
        let d = caller.attach("d", on(&["10.42.8.0/24", "fd42::/48", "10.42.7.0/24"], true));
        assert_eq!(host_addresses("br-net"), ["10.42.7.1/24", "10.42.8.1/24", "fd42::1/48"]);
        serve("d");
        assert_eq!(reaches(None, &d), [true, true, true]);
        // What an interrupted call left of its own two is completed, not refused.
        let mut connection = Connection::open(Protocol::Route).unwrap();
        let bridge = connection.require_link("br-net").unwrap().index;
        connection.delete_address(bridge, "10.42.7.1/24".parse().unwrap()).unwrap();
        caller.attach("e", on(&["10.42.8.0/24", "fd42::/48", "10.42.7.0/24"], false));
        assert_eq!(host_addresses("br-net"), ["10.42.7.1/24", "10.42.8.1/24", "fd42::1/48"]);
    });
}

#[test]
fn addresses_that_are_asked_for_are_given_or_refused() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let ask = |container: &str, fields: Value, arguments: &str| {
            if !netns(container).exists() {
                create_pinned(&netns(container)).unwrap();
            }
            caller.call_with("ADD", container, with(caller.bridge("net", 0), fields), None, arguments)
        };
        let given = |answer: Result<Value, Value>| -> Vec<String> {
            addresses(&answer.unwrap()).iter().map(ToString::to_string).collect()
        };
        let ips = |list: &[&str]| json!({"runtimeConfig": {"ips": list}});
        assert_eq!(given(ask("a", ips(&["fd42:0::77", "10.42.0.77/24"]), "")), ["10.42.0.77", "fd42::77"]);
        assert_eq!(given(ask("b", json!({"args": {"cni": {"ips": ["10.42.0.99"]}}}), "")), ["10.42.0.99", "fd42::78"]);
        assert_eq!(
            given(ask("c", json!({}), "IgnoreUnknown=1;IP=10.42.0.5,fd42::5;K8S_POD_NAME=c")),
            ["10.42.0.5", "fd42::5"]
        );
        assert_eq!(given(ask("d", ips(&["fd42::9"]), "IP=10.42.0.9")), ["10.42.0.9", "fd42::9"]);
        let (links, held) = (host_links(), reserved(&caller, "net"));
        for (fields, message, code) in [
            (ips(&["10.42.0.77"]), "address 10.42.0.77 is taken by another container", 102),
            (ips(&["10.42.0.1"]), "address 10.42.0.1 is taken by another container", 102),
            (ips(&["10.42.0.50", "fd42::77"]), "address fd42::77 is taken by another container", 102),
            (ips(&["10.42.0.50", "10.99.0.1"]), "address 10.99.0.1 is in none of the network's ranges", 999),
            (
                ips(&["10.42.0.50", "nonsense"]),
                "network configuration: field requested address: \"nonsense\" is not an IP address",
                7,
            ),
        ] {
            let error = ask("e", fields, "").unwrap_err();
            assert_eq!((error["msg"].as_str().unwrap(), &error["code"]), (message, &json!(code)));
            assert_eq!((host_links(), reserved(&caller, "net")), (links.clone(), held.clone()), "nothing is left");
        }
        caller.call("DEL", "a", caller.bridge("net", 0), None).unwrap();
        assert_eq!(given(ask("e", ips(&["10.42.0.77"]), ""))[0], "10.42.0.77", "free again");
        // What a container has stays its own when it asks for what cannot be given.
        let alone = |fields: Value| with(with(caller.bridge("net", 0), json!({"type": "host-local"})), fields);
        let held = reserved(&caller, "net");
        for wrong in [&["10.99.0.1"][..], &["10.42.0.99", "10.99.0.1"], &["10.42.0.77", "10.42.0.78"]] {
            let error = caller.call_with("ADD", "e", alone(ips(wrong)), None, "").unwrap_err();
            assert!(error["msg"].as_str().unwrap().contains("none of the network's ranges"), "{error}");
            assert_eq!(reserved(&caller, "net"), held, "{wrong:?}");
        }
        assert_eq!(given(caller.call_with("ADD", "e", alone(json!({})), None, ""))[0], "10.42.0.77");
    });
}

/// What cannot be done is refused, not passed over.
#[test]
fn options_of_other_backends_are_refused() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let result = caller.attach("a", caller.bridge("net", 0));
        let ports = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
        let portmap = json!({"name": "net", "type": "portmap", "runtimeConfig": ports});
        let limits = json!({"ingressRate": 8_000_000, "ingressBurst": 800_000});
        let bandwidth = with(json!({"name": "net", "type": "bandwidth"}), limits.clone());
        for (config, field) in [
            (with(portmap.clone(), json!({"conditionsV4": ["!", "-d", "192.0.2.0/24"]})), "conditionsV4"),
            (with(portmap.clone(), json!({"conditionsV6": ["!", "-d", "2001:db8::/32"]})), "conditionsV6"),
            (with(bandwidth.clone(), json!({"unshapedSubnets": ["10.42.0.0/16"]})), "unshapedSubnets"),
            (with(bandwidth.clone(), json!({"shapedSubnets": ["10.42.0.0/16"]})), "shapedSubnets"),
            (
                json!({"name": "net", "type": "bandwidth",
                       "runtimeConfig": {"bandwidth": with(limits, json!({"shapedSubnets": ["::/0"]}))}}),
                "shapedSubnets",
            ),
        ] {
            let error = caller.call_with("ADD", "a", config, Some(&result), "").unwrap_err();
            assert_eq!(error["code"], 7, "{error}");
            assert!(error["msg"].as_str().unwrap().contains(field), "{error}");
        }
        for empty in [json!({"conditionsV4": []}), json!({"conditionsV4": null, "conditionsV6": null})] {
            caller.call("ADD", "a", with(portmap.clone(), empty), Some(&result)).unwrap();
        }
        caller.call("ADD", "a", with(bandwidth, json!({"shapedSubnets": []})), Some(&result)).unwrap();
    });
}

/// Nobody said which attachments are valid, so nothing is taken away.
#[test]
fn garbage_collection_without_a_list_is_refused() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let config = with(caller.bridge("net", 0), json!({"ipMasq": true}));
        let result = caller.attach("a", config.clone());
        serve("a");
        let held = reserved(&caller, "net");
        let plugins = [
            config.clone(),
            with(config.clone(), json!({"type": "host-local"})),
            json!({"name": "net", "type": "portmap"}),
            json!({"name": "net", "type": "firewall"}),
            json!({"name": "net", "type": "bandwidth"}),
            json!({"name": "net", "type": "tuning"}),
        ];
        for plugin in plugins {
            let error = caller.call_with("GC", "", plugin, None, "").unwrap_err();
            assert_eq!(error["code"], 7, "{error}");
        }
        assert_eq!((reserved(&caller, "net"), reaches(None, &result)), (held.clone(), vec![true, true]));
        caller.call("CHECK", "a", config.clone(), Some(&result)).unwrap();
        let valid = json!([{"containerID": "a", "ifname": "eth0"}]);
        caller.call("GC", "", with(config.clone(), json!({"cni.dev/attachments": valid})), None).unwrap();
        assert_eq!((reserved(&caller, "net"), reaches(None, &result)), (held, vec![true, true]), "the older name");
        caller.call("GC", "", with(config, json!({"cni.dev/valid-attachments": []})), None).unwrap();
        assert!(reserved(&caller, "net").is_empty());
    });
}

#[test]
fn the_runtimes_ranges_come_before_those_of_the_network() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let ranges = json!([[{"subnet": "10.50.0.0/24", "rangeStart": "10.50.0.20", "rangeEnd": "10.50.0.21", "gateway": "10.50.0.254"}]]);
        let mut config = with(caller.bridge("net", 0), json!({"runtimeConfig": {"ipRanges": ranges}}));
        // The old way to say one range.
        config["ipam"]["subnet"] = "10.60.0.0/24".into();
        let result = caller.attach("a", config.clone());
        let ips: Vec<&str> =
            result["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
        assert_eq!(ips, ["10.50.0.20/24", "10.60.0.2/24", "10.42.0.2/24", "fd42::2/64"]);
        assert_eq!(result["ips"][0]["gateway"], "10.50.0.254");
        serve("a");
        assert_eq!(reaches(None, &result), [true; 4]);
        caller.attach("b", config.clone());
        create_pinned(&netns("c")).unwrap();
        let held = reserved(&caller, "net");
        let error = caller.call_with("ADD", "c", config.clone(), None, "").unwrap_err();
        assert_eq!(error["msg"], "no address is left in 10.50.0.20-10.50.0.21");
        config["runtimeConfig"]["ipRanges"] = json!([[{"subnet": "10.42.0.0/16"}]]);
        let error = caller.call_with("ADD", "c", config.clone(), None, "").unwrap_err();
        assert!(error["code"] == 7 && error["msg"].as_str().unwrap().contains("overlaps"), "{error}");
        assert_eq!(reserved(&caller, "net"), held);
        // Neither needs DEL the ranges as they were.
        config["runtimeConfig"] = Value::Null;
        config.as_object_mut().unwrap().remove("runtimeConfig");
        for container in ["a", "b"] {
            caller.call("DEL", container, config.clone(), None).unwrap();
        }
        assert!(reserved(&caller, "net").is_empty());
    });
}

#[test]
fn name_servers_come_from_the_file_that_the_network_names() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        let path = caller.directory.path().join("resolv.conf");
        let text = "# a comment\ndomain example.org\nsearch a.example.org b.example.org\n\nnameserver 192.0.2.53\n\
                    nameserver 2001:db8::53\noptions ndots:5 edns0\n";
        fs::write(&path, text).unwrap();
        let mut config = with(caller.bridge("net", 0), json!({"dns": {"nameservers": ["192.0.2.99"]}}));
        let own = caller.attach("a", config.clone());
        assert_eq!(own["dns"], json!({"nameservers": ["192.0.2.99"]}), "the bridge's own, as the file is not named");
        config["ipam"]["resolvConf"] = json!(path);
        let wanted = json!({
            "nameservers": ["192.0.2.53", "2001:db8::53"], "domain": "example.org",
            "search": ["a.example.org", "b.example.org"], "options": ["ndots:5", "edns0"],
        });
        assert_eq!(caller.attach("b", config.clone())["dns"], wanted);
        let alone = with(config.clone(), json!({"type": "host-local"}));
        let result = caller.call("ADD", "alone", alone.clone(), None).unwrap();
        assert_eq!((&result["dns"], &result["ips"][0]["address"]), (&wanted, &json!("10.42.0.4/24")));
        caller.call("CHECK", "alone", alone.clone(), Some(&result)).unwrap();
        caller.call("DEL", "alone", alone, None).unwrap();
        fs::remove_file(&path).unwrap();
        let held = reserved(&caller, "net");
        create_pinned(&netns("c")).unwrap();
        let error = caller.call_with("ADD", "c", config, None, "").unwrap_err();
        assert!(error["code"] == 5 && error["msg"].as_str().unwrap().contains("resolv.conf"), "{error}");
        assert_eq!(reserved(&caller, "net"), held, "no address is lost");
    });
}

/// The result of ADD in each version, and CHECK and DEL with it; the plugin that comes next hands on what it was given.
#[test]
fn every_version_of_the_specification_is_spoken_in_its_own_shape() {
    in_fresh_namespaces(|| {
        let caller = Caller::new();
        for (number, version) in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].into_iter().enumerate() {
            let bridge = with(caller.bridge("net", 0), json!({"cniVersion": version}));
            let portmap = json!({
                "cniVersion": version, "name": "net", "type": "portmap",
                "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
            });
            create_pinned(&netns(version)).unwrap();
            let result = caller.call("ADD", version, bridge.clone(), None).unwrap();
            let port = result["interfaces"][1]["name"].as_str().unwrap().to_owned();
            let mac = |link: &Link| link.mac.unwrap().to_string();
            let mut interfaces = json!([
                {"name": "br-net", "mac": mac(&host_link("br-net"))}, {"name": port, "mac": mac(&host_link(&port))},
                {"name": "eth0", "mac": mac(&link_inside(version)), "sandbox": netns(version)},
            ]);
            let last = number + 2;
            let mut ips = json!([
                {"address": format!("10.42.0.{last}/24"), "gateway": "10.42.0.1", "interface": 2},
                {"address": format!("fd42::{last}/64"), "gateway": "fd42::1", "interface": 2},
            ]);
            if version < "1.0.0" {
                ips[0]["version"] = "4".into();
                ips[1]["version"] = "6".into();
            }
            if version >= "1.1.0" {
                interfaces.as_array_mut().unwrap().iter_mut().for_each(|interface| interface["mtu"] = 1500.into());
            }
            let whole = json!({
                "cniVersion": version, "interfaces": interfaces, "ips": ips,
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            });
            assert_eq!(result, whole);
            let passed_on = caller.call("ADD", version, portmap.clone(), Some(&result)).unwrap();
            assert_eq!(passed_on, whole, "portmap");
            serve(version);
            assert_eq!(reaches(None, &result), [true, true]);
            for config in [&bridge, &portmap] {
                let checked = caller.call_with("CHECK", version, config.clone(), Some(&result), "");
                if version == "0.3.1" {
                    let error = checked.unwrap_err();
                    assert_eq!((&error["code"], &error["cniVersion"]), (&json!(1), &json!(version)), "{error}");
                } else {
                    assert_eq!(checked, Ok(Value::Null));
                }
            }
            // Below 0.4.0 runtimes do not hand DEL what ADD said.
            let previous = Some(&result).filter(|_| version != "0.3.1");
            for config in [&portmap, &bridge, &portmap, &bridge] {
                assert_eq!(caller.call("DEL", version, config.clone(), previous), Ok(Value::Null), "{version}");
            }
            assert_eq!(host_links(), ["lo", "br-net"], "{version}");
            assert!(reserved(&caller, "net").is_empty(), "{version}");
        }
    });
}
