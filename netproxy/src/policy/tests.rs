//! Policies as a user writes them, against packets through the planned tables.

use std::net::IpAddr;
use std::sync::Arc;

use oarlock_nft::trace::{Outcome, Packet, trace};
use oarlock_nft::{Command, Fake, Kernel, Transaction};
use serde_json::{Value, json};

use super::keeper::Keeper;
use super::objects::{Pod, Policy};
use super::plan::{self, World};
use super::table;

/// Pods by name: namespace, labels, last byte of the address; all on this node but `far`.
const PODS: [(&str, &str, &str, u8); 5] = [
    ("web", "shop", "web", 2),
    ("db", "shop", "db", 3),
    ("scraper", "monitoring", "scraper", 4),
    ("stranger", "other", "stranger", 5),
    ("far", "shop", "web", 200),
];
const OUTSIDE: [u8; 4] = [203, 0, 113, 9];

fn address(of: &str) -> IpAddr {
    let pod = PODS.iter().find(|pod| pod.0 == of);
    pod.map_or(IpAddr::from(OUTSIDE), |pod| [10, 42, u8::from(pod.3 == 200), pod.3].into())
}

fn world() -> World {
    let mut world = World::default();
    for (name, namespace, app, last) in PODS {
        let object = json!({
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": app}},
            "spec": {"nodeName": if last == 200 { "n2" } else { "n1" },
                     "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8000 + i32::from(last)}]}]},
            "status": {"phase": "Running", "podIP": address(name).to_string()},
        });
        let pod = Pod::read(&serde_json::from_value(object).unwrap(), "n1").unwrap();
        world.pods.insert((namespace.into(), name.into()), pod);
        world.namespaces.insert(Arc::from(namespace), [("team".to_owned(), namespace.to_owned())].into());
    }
    world
}

fn with(policies: &[Value]) -> World {
    let mut world = world();
    for (index, spec) in policies.iter().enumerate() {
        let object = json!({"metadata": {"name": format!("p{index}"), "namespace": "shop"}, "spec": spec});
        let policy = Policy::read(&serde_json::from_value(object).unwrap()).unwrap();
        world.policies.insert(("shop".into(), format!("p{index}").into()), policy);
    }
    world
}

fn keeper(world: &World) -> Keeper<Fake> {
    let mut keeper = Keeper::new(Fake::new(), table(true), true);
    keeper.apply(Some(plan::plan(world, true, &["10.42.0.0/24".parse().unwrap()]))).unwrap();
    keeper
}

fn passes(keeper: &mut Keeper<Fake>, from: IpAddr, to: IpAddr, protocol: i32, port: u16) -> bool {
    let packet = Packet {
        protocol: protocol as u8,
        source: from,
        source_port: 40_000,
        destination: to,
        destination_port: port,
        from_node: false,
    };
    matches!(trace(keeper.kernel_mut(), &[], packet, |_| 0), Outcome::Delivered { .. })
}

/// Who reaches `to` on a TCP port, of all pods and the outside.
fn reachers(world: &World, to: &str, port: u16) -> Vec<&'static str> {
    let mut keeper = keeper(world);
    let everybody = PODS.iter().map(|pod| pod.0).chain(["outside"]);
    everybody.filter(|from| *from != to && passes(&mut keeper, address(from), address(to), 6, port)).collect()
}

/// Whom `from` reaches on a TCP port.
fn reached(world: &World, from: &str, port: u16) -> Vec<&'static str> {
    let mut keeper = keeper(world);
    let everybody = PODS.iter().map(|pod| pod.0).chain(["outside"]);
    everybody.filter(|to| *to != from && passes(&mut keeper, address(from), address(to), 6, port)).collect()
}

const ALL_TO_WEB: [&str; 5] = ["db", "scraper", "stranger", "far", "outside"];

#[test]
fn a_pod_that_no_policy_selects_is_open() {
    let world = with(&[json!({"podSelector": {"matchLabels": {"app": "db"}}})]);
    assert_eq!(reachers(&world, "web", 80), ALL_TO_WEB);
    assert_eq!(reached(&world, "db", 80), ["web", "scraper", "stranger", "far", "outside"], "ingress only");
}

#[test]
fn default_deny_shuts_each_direction_on_its_own() {
    let ingress = with(&[json!({"podSelector": {}, "policyTypes": ["Ingress"]})]);
    assert!(reachers(&ingress, "web", 80).is_empty());
    let open = ["scraper", "stranger", "far", "outside"];
    assert_eq!(reached(&ingress, "web", 80), open, "what is on another node is for that node to refuse");
    let egress = with(&[json!({"podSelector": {}, "policyTypes": ["Egress"]})]);
    assert!(reached(&egress, "web", 80).is_empty());
    assert_eq!(reachers(&egress, "web", 80), ["scraper", "stranger", "far", "outside"]);
}

#[test]
fn an_empty_rule_allows_everything_and_policies_add_up() {
    let open = with(&[json!({"podSelector": {}, "ingress": [{}]}), json!({"podSelector": {}})]);
    assert_eq!(reachers(&open, "web", 80), ALL_TO_WEB);
    let two = with(&[
        json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]}),
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}]}]}),
    ]);
    assert_eq!(reachers(&two, "web", 80), ["db", "scraper"]);
    assert!(reachers(&two, "db", 80).is_empty());
}

#[test]
fn selectors_of_pods_and_namespaces_are_combined() {
    let from =
        |peer: Value| with(&[json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [peer]}]})]);
    assert_eq!(reachers(&from(json!({"podSelector": {}})), "web", 80), ["db", "far"], "the own namespace");
    let all = json!({"namespaceSelector": {}});
    assert_eq!(reachers(&from(all), "web", 80), ["db", "scraper", "stranger", "far"], "every pod, nobody else");
    let both = json!({"namespaceSelector": {"matchLabels": {"team": "other"}}, "podSelector": {"matchLabels": {"app": "stranger"}}});
    assert_eq!(reachers(&from(both), "web", 80), ["stranger"]);
    let neither =
        json!({"namespaceSelector": {"matchLabels": {"team": "other"}}, "podSelector": {"matchLabels": {"app": "db"}}});
    assert!(reachers(&from(neither), "web", 80).is_empty());
    let expression = json!({"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["shop", "other"]}]}});
    assert_eq!(reachers(&from(expression), "web", 80), ["scraper"]);
}

#[test]
fn blocks_have_exceptions() {
    let block = |cidr: &str, except: &[&str]| {
        let peer = json!({"ipBlock": {"cidr": cidr, "except": except}});
        with(&[json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [peer]}]})])
    };
    assert_eq!(reachers(&block("0.0.0.0/0", &[]), "web", 80), ALL_TO_WEB);
    assert_eq!(reachers(&block("0.0.0.0/0", &["10.42.0.4/31", "203.0.113.0/24"]), "web", 80), ["db", "far"]);
    assert_eq!(reachers(&block("203.0.113.9/32", &[]), "web", 80), ["outside"]);
    assert!(reachers(&block("::/0", &[]), "web", 80).is_empty(), "the other family");
}

#[test]
fn ports_are_numbers_ranges_names_or_whole_protocols() {
    let allowed = |port: Value| {
        let world = with(&[json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"ports": [port]}]})]);
        let mut keeper = keeper(&world);
        let mut open = Vec::new();
        for (protocol, name) in [(libc::IPPROTO_TCP, "tcp"), (libc::IPPROTO_UDP, "udp"), (libc::IPPROTO_SCTP, "sctp")] {
            for port in [80, 81, 90, 91, 8002, 8003] {
                if passes(&mut keeper, address("db"), address("web"), protocol, port) {
                    open.push(format!("{name}/{port}"));
                }
            }
        }
        open
    };
    assert_eq!(allowed(json!({"port": 80})), ["tcp/80"]);
    assert_eq!(allowed(json!({"port": 80, "endPort": 90, "protocol": "UDP"})), ["udp/80", "udp/81", "udp/90"]);
    assert_eq!(allowed(json!({"port": "http"})), ["tcp/8002"], "the number that this pod has under the name");
    assert!(allowed(json!({"port": "http", "protocol": "UDP"})).is_empty());
    assert_eq!(allowed(json!({"protocol": "SCTP"})).len(), 6);
}

#[test]
fn egress_goes_by_the_receivers_ports_and_both_ends_have_their_say() {
    let egress = with(&[json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"],
        "egress": [{"to": [{"namespaceSelector": {}}], "ports": [{"port": "http"}]}],
    })]);
    assert_eq!(reached(&egress, "web", 8004), ["scraper"], "each pod has its own number under the name");
    assert_eq!(reached(&egress, "web", 8003), ["db"]);
    let both = with(&[
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"], "egress": [{}]}),
        json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"ports": [{"port": 5432}]}]}),
    ]);
    assert!(reached(&both, "web", 80).iter().all(|name| *name != "db"));
    assert!(reached(&both, "web", 5432).contains(&"db"));
}

#[test]
fn a_pod_reaches_itself_and_unknown_pods_are_cut_off() {
    let world = with(&[json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})]);
    let mut keeper = keeper(&world);
    assert!(passes(&mut keeper, address("web"), address("web"), 6, 80));
    let new: IpAddr = [10, 42, 0, 77].into();
    assert!(!passes(&mut keeper, address("stranger"), new, 6, 80), "nobody knows yet who that is");
    assert!(!passes(&mut keeper, new, address("stranger"), 6, 80));
    let elsewhere: IpAddr = [10, 42, 1, 77].into();
    assert!(passes(&mut keeper, address("stranger"), elsewhere, 6, 80), "another node's pods are that node's matter");
}

#[test]
fn changes_one_by_one_end_where_one_write_does_and_a_flush_is_undone() {
    let cidrs = ["10.42.0.0/24".parse().unwrap()];
    let specs = [
        json!({"podSelector": {}}),
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": "http"}]}]}),
        json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}),
    ];
    let mut step_by_step = Keeper::new(Fake::new(), table(true), true);
    let mut states = vec![world()];
    for count in [1, 2, 3, 2, 3, 1] {
        states.push(with(&specs[..count]));
    }
    let mut fewer = with(&specs);
    fewer.pods.remove(&(Arc::from("shop"), Arc::from("db")));
    states.push(fewer);
    for world in &states {
        let wanted = (!world.policies.is_empty()).then(|| plan::plan(world, true, &cidrs));
        step_by_step.apply(wanted).unwrap();
    }
    assert!(!step_by_step.audit().unwrap(), "all is as it should be");
    let mut at_once = keeper(states.last().unwrap());
    for set in ["known", "itself", "ingress", "egress"] {
        let read = |keeper: &mut Keeper<Fake>| {
            let mut keys: Vec<_> = keeper.kernel_mut().elements(&table(true), set).unwrap().unwrap();
            keys.sort_by_key(|element| element.key);
            keys
        };
        assert_eq!(read(&mut step_by_step), read(&mut at_once), "{set}");
    }
    let chains = |keeper: &mut Keeper<Fake>| keeper.kernel_mut().chains(&table(true)).unwrap();
    assert_eq!(chains(&mut step_by_step), chains(&mut at_once));
    let mut flush = Transaction::new(table(true));
    flush.push(Command::FlushSet("known".into()));
    step_by_step.kernel_mut().commit(&flush).unwrap();
    assert!(step_by_step.audit().unwrap());
    assert!(passes(&mut step_by_step, address("web"), address("web"), 6, 80));
    step_by_step.apply(None).unwrap();
    assert_eq!(step_by_step.kernel_mut().table_comment(&table(true)).unwrap(), None, "no policies, no table");
}
