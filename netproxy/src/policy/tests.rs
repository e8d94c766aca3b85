//! Policies as a user writes them, against packets through the tables that come of them: in IPv4 and in IPv6.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use oarlock_nft::trace::{Outcome, Packet, trace};
use oarlock_nft::{Bytes, Command, Element, Fake, Kernel, NftError, Table, Transaction};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::index::Index;
use super::keeper::Keeper;
use super::model::{self, World};
use super::objects::{Labels, MATCHES, Name, Pod, Policy};
use super::{Enforcer, Event, Kind, PolicyError, Scope, table};

/// Pods by name: namespace, labels, last byte of the address; all on this node but `far`.
const PODS: [(&str, &str, &str, u8); 5] = [
    ("web", "shop", "web", 2),
    ("db", "shop", "db", 3),
    ("scraper", "monitoring", "scraper", 4),
    ("stranger", "other", "stranger", 5),
    ("far", "shop", "web", 200),
];

thread_local! {
    /// The family that packets of this thread's test are of.
    static IS_IPV4: std::cell::Cell<bool> = const { std::cell::Cell::new(true) };
}

/// Makes tests of the functions named, each in a cluster of IPv4, of IPv6 and of both: in that one once for each family.
macro_rules! in_each_mode {
    ($($name:ident)*) => {
        mod ipv4 { $(#[test] fn $name() { super::in_mode(&[true], super::$name); })* }
        mod ipv6 { $(#[test] fn $name() { super::in_mode(&[false], super::$name); })* }
        mod dual_stack { $(#[test] fn $name() { super::in_mode(&[true, false], super::$name); })* }
    };
}

in_each_mode! {
    a_pod_that_no_policy_selects_is_open
    default_deny_shuts_each_direction_on_its_own
    an_empty_rule_allows_everything_and_policies_add_up
    selectors_of_pods_and_namespaces_are_combined
    blocks_have_exceptions
    ports_are_numbers_ranges_names_or_whole_protocols
    egress_goes_by_the_receivers_ports_and_both_ends_have_their_say
    a_pod_reaches_itself_and_unknown_pods_are_cut_off
    changes_one_by_one_end_where_one_write_does_and_a_flush_is_undone
    an_address_is_that_of_the_pod_which_had_it_last
}

thread_local! {
    static FAMILIES: std::cell::RefCell<Vec<bool>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn in_mode(families: &[bool], test: fn()) {
    FAMILIES.set(families.to_vec());
    for is_ipv4 in families {
        IS_IPV4.set(*is_ipv4);
        test();
    }
}

/// Address `last` of pods of this node, or of another.
fn pod_address(is_ipv4: bool, node: u16, last: u16) -> IpAddr {
    match is_ipv4 {
        true => [10, 42, node as u8, last as u8].into(),
        false => Ipv6Addr::new(0xfd2a, 0, 0, node, 0, 0, 0, last).into(),
    }
}

fn addresses_of(name: &str, is_ipv4: bool) -> IpAddr {
    match PODS.iter().find(|pod| pod.0 == name) {
        Some(pod) => pod_address(is_ipv4, u16::from(pod.3 == 200), pod.3.into()),
        None if is_ipv4 => [203, 0, 113, 9].into(),
        None => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9).into(),
    }
}

fn address(of: &str) -> IpAddr {
    addresses_of(of, IS_IPV4.get())
}

fn cidrs() -> Vec<IpNet> {
    ["10.42.0.0/24", "fd2a::/64"].map(|text| text.parse().unwrap()).into()
}

fn name(namespace: &str, name: &str) -> Name {
    (namespace.into(), name.into())
}

fn world() -> World {
    let mut world = World::default();
    for (pod, namespace, app, last) in PODS {
        let ips: Vec<Value> =
            FAMILIES.with_borrow(|all| all.iter().map(|one| json!({"ip": addresses_of(pod, *one)})).collect());
        let object = json!({
            "metadata": {"name": pod, "namespace": namespace, "labels": {"app": app}},
            "spec": {"nodeName": if last == 200 { "n2" } else { "n1" },
                     "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8000 + i32::from(last)}]}]},
            "status": {"phase": "Running", "podIPs": ips},
        });
        let read = Pod::read(&serde_json::from_value(object).unwrap(), "n1").unwrap();
        world.pods.insert(name(namespace, pod), read);
        world.namespaces.insert(Arc::from(namespace), [("team".to_owned(), namespace.to_owned())].into());
    }
    world
}

fn read_policy(namespace: &str, spec: &Value) -> Policy {
    let object = json!({"metadata": {"name": "p", "namespace": namespace}, "spec": spec});
    Policy::read(&serde_json::from_value(object).unwrap()).unwrap()
}

fn with(policies: &[Value]) -> World {
    let mut world = world();
    for (index, spec) in policies.iter().enumerate() {
        world.policies.insert(name("shop", &format!("p{index}")), read_policy("shop", spec));
    }
    world
}

/// A keeper of the tables of a world, as the index has them; the model has the same.
fn keeper(world: &World) -> Keeper<Fake> {
    let is_ipv4 = IS_IPV4.get();
    let mut index = Index::new(&[is_ipv4]);
    index.set_pod_cidrs(&cidrs());
    world.events().into_iter().for_each(|event| feed(&mut index, event));
    let side = &index.sides()[0];
    assert_eq!(side.desired, model::plan(world, is_ipv4, &cidrs()));
    let mut keeper = Keeper::new(Fake::new(), table(is_ipv4), is_ipv4);
    keeper.apply(&side.desired, &side.touched).unwrap();
    keeper
}

fn feed(index: &mut Index, event: Event) {
    match event {
        Event::Policy(name, policy) => index.set_policy(&name, policy),
        Event::Pod(name, pod) => index.set_pod(&name, pod),
        Event::Namespace(name, labels) => index.set_namespace(&name, labels),
        Event::Listed(_) => {}
    }
}

/// An engine that has been told all there is, which is nothing.
fn listed_engine<K: Kernel + Default>(families: &[bool]) -> Engine<K> {
    let keeper = |is_ipv4: &bool| (*is_ipv4, Keeper::new(K::default(), table(*is_ipv4), *is_ipv4));
    let mut engine = Engine::new(families.iter().map(keeper).collect());
    engine.set_pod_cidrs(Some(cidrs()));
    [Kind::Policies, Kind::Pods, Kind::Namespaces].into_iter().for_each(|kind| engine.take(Event::Listed(kind)));
    engine
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

fn a_pod_that_no_policy_selects_is_open() {
    let world = with(&[json!({"podSelector": {"matchLabels": {"app": "db"}}})]);
    assert_eq!(reachers(&world, "web", 80), ALL_TO_WEB);
    assert_eq!(reached(&world, "db", 80), ["web", "scraper", "stranger", "far", "outside"], "ingress only");
}

fn default_deny_shuts_each_direction_on_its_own() {
    let ingress = with(&[json!({"podSelector": {}, "policyTypes": ["Ingress"]})]);
    assert!(reachers(&ingress, "web", 80).is_empty());
    let open = ["scraper", "stranger", "far", "outside"];
    assert_eq!(reached(&ingress, "web", 80), open, "what is on another node is for that node to refuse");
    let egress = with(&[json!({"podSelector": {}, "policyTypes": ["Egress"]})]);
    assert!(reached(&egress, "web", 80).is_empty());
    assert_eq!(reachers(&egress, "web", 80), ["scraper", "stranger", "far", "outside"]);
}

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

fn blocks_have_exceptions() {
    let block = |cidr: &str, except: &[&str]| {
        let peer = json!({"ipBlock": {"cidr": cidr, "except": except}});
        with(&[json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [peer]}]})])
    };
    let (all, other, some, outside, one) = match IS_IPV4.get() {
        true => ("0.0.0.0/0", "::/0", "10.42.0.4/31", "203.0.113.0/24", "203.0.113.9/32"),
        false => ("::/0", "0.0.0.0/0", "fd2a::4/127", "2001:db8::/32", "2001:db8::9/128"),
    };
    assert_eq!(reachers(&block(all, &[]), "web", 80), ALL_TO_WEB);
    assert_eq!(reachers(&block(all, &[some, outside]), "web", 80), ["db", "far"]);
    assert_eq!(reachers(&block(one, &[]), "web", 80), ["outside"]);
    assert!(reachers(&block(other, &[]), "web", 80).is_empty(), "the other family");
}

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

fn a_pod_reaches_itself_and_unknown_pods_are_cut_off() {
    let world = with(&[json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})]);
    let mut keeper = keeper(&world);
    assert!(passes(&mut keeper, address("web"), address("web"), 6, 80));
    let new = pod_address(IS_IPV4.get(), 0, 77);
    assert!(!passes(&mut keeper, address("stranger"), new, 6, 80), "nobody knows yet who that is");
    assert!(!passes(&mut keeper, new, address("stranger"), 6, 80));
    let elsewhere = pod_address(IS_IPV4.get(), 1, 77);
    assert!(passes(&mut keeper, address("stranger"), elsewhere, 6, 80), "another node's pods are that node's matter");
}

fn changes_one_by_one_end_where_one_write_does_and_a_flush_is_undone() {
    let is_ipv4 = IS_IPV4.get();
    let specs = [
        json!({"podSelector": {}}),
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": "http"}]}]}),
        json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}),
    ];
    let mut states = vec![world()];
    for count in [1, 2, 3, 2, 3, 1] {
        states.push(with(&specs[..count]));
    }
    let mut fewer = with(&specs);
    fewer.pods.remove(&name("shop", "db"));
    states.push(fewer);
    let mut engine = listed_engine::<Fake>(&[is_ipv4]);
    let mut before = World::default();
    for world in &states {
        changes(&before, world).into_iter().for_each(|event| engine.take(event));
        assert_eq!(engine.apply(), Some(cidrs()));
        before = world.clone();
    }
    let [step_by_step] = engine.keepers() else { panic!("one family") };
    assert!(!step_by_step.audit().unwrap(), "all is as it should be");
    let mut at_once = keeper(states.last().unwrap());
    for set in ["known", "itself", "ingress", "egress"] {
        let read = |keeper: &mut Keeper<Fake>| {
            let mut keys: Vec<_> = keeper.kernel_mut().elements(&table(is_ipv4), set).unwrap().unwrap();
            keys.sort_by_key(|element| element.key);
            keys
        };
        assert_eq!(read(step_by_step), read(&mut at_once), "{set}");
    }
    let chains = |keeper: &mut Keeper<Fake>| keeper.kernel_mut().chains(&table(is_ipv4)).unwrap();
    assert_eq!(chains(step_by_step), chains(&mut at_once));
    let mut flush = Transaction::new(table(is_ipv4));
    flush.push(Command::FlushSet("known".into()));
    step_by_step.kernel_mut().commit(&flush).unwrap();
    assert!(step_by_step.audit().unwrap());
    assert!(passes(step_by_step, address("web"), address("web"), 6, 80));
    step_by_step.clear().unwrap();
    assert_eq!(step_by_step.kernel_mut().table_comment(&table(is_ipv4)).unwrap(), None, "no policies, no table");
}

/// What leads from one world to another.
fn changes(before: &World, after: &World) -> Vec<Event> {
    let gone_policies = before.policies.keys().filter(|name| !after.policies.contains_key(*name));
    let gone_pods = before.pods.keys().filter(|name| !after.pods.contains_key(*name));
    let gone = gone_policies.map(|name| Event::Policy(name.clone(), None));
    gone.chain(gone_pods.map(|name| Event::Pod(name.clone(), None))).chain(after.events()).collect()
}

/// A pod that has ended, of which the API has not heard yet, and one that was given its address.
fn an_address_is_that_of_the_pod_which_had_it_last() {
    let is_ipv4 = IS_IPV4.get();
    let mut world = with(&[json!({"podSelector": {"matchLabels": {"app": "web"}}})]);
    let mut engine = listed_engine::<Fake>(&[is_ipv4]);
    world.events().into_iter().for_each(|event| engine.take(event));
    engine.apply();
    let reaches = |engine: &mut Engine<Fake>| passes(&mut engine.keepers()[0], address("db"), address("web"), 6, 80);
    assert!(!reaches(&mut engine));
    let mut successor = world.pods.remove(&name("shop", "web")).unwrap();
    successor.labels.insert("app".into(), "other".into());
    engine.take(Event::Pod(name("shop", "successor"), Some(successor.clone())));
    engine.apply();
    assert!(reaches(&mut engine), "the successor is not isolated");
    engine.take(Event::Pod(name("shop", "web"), None));
    engine.apply();
    assert!(reaches(&mut engine), "the address stays known");
    engine.take(Event::Pod(name("shop", "successor"), None));
    engine.apply();
    assert!(!reaches(&mut engine), "now it is nobody's");
}

#[test]
fn nothing_counts_as_enforced_before_everything_is_known() {
    FAMILIES.set(vec![true]);
    let mut engine = Engine::new(vec![(true, Keeper::new(Fake::new(), table(true), true))]);
    assert_eq!(engine.apply(), None);
    engine.take(Event::Listed(Kind::Policies));
    assert_eq!(engine.apply(), None, "the node's own networks are not known");
    engine.set_pod_cidrs(Some(cidrs()));
    with(&[json!({"podSelector": {}})]).events().into_iter().for_each(|event| engine.take(event));
    assert_eq!(engine.apply(), None, "there can be more pods");
    engine.take(Event::Listed(Kind::Pods));
    assert_eq!(engine.apply(), None, "and more namespaces");
    engine.take(Event::Listed(Kind::Namespaces));
    assert_eq!(engine.apply(), Some(cidrs()));
}

/// A kernel that refuses everything for as long as it is told to.
#[derive(Default)]
struct Stubborn {
    kernel: Fake,
    refuses: bool,
}

impl Kernel for Stubborn {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), NftError> {
        if self.refuses {
            let source = nix::errno::Errno::ENOMEM;
            return Err(NftError::Refused { what: "commit".into(), count: 1, hint: String::new(), source });
        }
        self.kernel.commit(transaction)
    }

    fn table_comment(&mut self, table: &Table) -> Result<Option<String>, NftError> {
        self.kernel.table_comment(table)
    }

    fn chains(&mut self, table: &Table) -> Result<Vec<String>, NftError> {
        self.kernel.chains(table)
    }

    fn rule_count(&mut self, table: &Table) -> Result<usize, NftError> {
        self.kernel.rule_count(table)
    }

    fn rules(&mut self, table: &Table) -> Result<Vec<(String, String)>, NftError> {
        self.kernel.rules(table)
    }

    fn elements(&mut self, table: &Table, set: &str) -> Result<Option<Vec<Element>>, NftError> {
        self.kernel.elements(table, set)
    }

    fn element(&mut self, table: &Table, set: &str, key: &Bytes) -> Result<Option<Element>, NftError> {
        self.kernel.element(table, set, key)
    }

    fn generation(&mut self) -> Result<u32, NftError> {
        self.kernel.generation()
    }
}

#[test]
fn what_the_kernel_refuses_is_written_later_also_when_a_repair_failed() {
    FAMILIES.set(vec![true]);
    IS_IPV4.set(true);
    let mut engine = listed_engine::<Stubborn>(&[true]);
    with(&[json!({"podSelector": {}})]).events().into_iter().for_each(|event| engine.take(event));
    engine.keepers()[0].kernel_mut().refuses = true;
    assert_eq!(engine.apply(), None);
    engine.keepers()[0].kernel_mut().refuses = false;
    assert_eq!(engine.apply(), Some(cidrs()));
    let kernel = engine.keepers()[0].kernel_mut();
    kernel.kernel.flush_ruleset();
    kernel.refuses = true;
    engine.audit();
    engine.keepers()[0].kernel_mut().refuses = false;
    assert_eq!(engine.apply(), Some(cidrs()), "without any other change");
    let kernel = engine.keepers()[0].kernel_mut();
    assert!(kernel.kernel.table_comment(&table(true)).unwrap().is_some());
}

#[tokio::test]
async fn a_panic_of_the_worker_ends_the_enforcement_with_an_error() {
    let client = kube::Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
    let (_cidrs_in, pod_cidrs) = tokio::sync::watch::channel(Some(cidrs()));
    let (enforced, _) = tokio::sync::watch::channel(None);
    let scope = Scope { node_name: "n1".into(), families: vec![true], pod_cidrs, enforced };
    let (events_in, events) = tokio::sync::mpsc::channel(1);
    let watchers = tokio::task::JoinSet::new();
    let enforcer = Enforcer { client, scope, status: Arc::default(), watchers, events_in, is_watching: false };
    let ended = enforcer.run(|_| panic!("as a fault of ours would"), events, CancellationToken::new()).await;
    assert!(matches!(ended, Err(PolicyError::Worker(_))), "{ended:?}");
}

/// One more pod beside many costs no more than it does beside few: what is counted is how often a selector is held against
/// labels, and how much is written.
#[test]
fn a_pod_costs_the_same_beside_any_number_of_pods_and_policies() {
    let cost = |namespaces: u16, pods: u16| {
        let mut index = Index::new(&[true]);
        index.set_pod_cidrs(&cidrs());
        let pod = |namespace: &str, number: u16| Pod {
            namespace: namespace.into(),
            labels: [("app".to_owned(), format!("app-{}", number % 10))].into(),
            addresses: vec![[10, 42, (number >> 8) as u8, number as u8].into()],
            ports: Vec::new(),
            local: number.is_multiple_of(20),
        };
        for number in 0..namespaces {
            let namespace = format!("ns-{number}");
            for app in ["app-1", "app-2"] {
                let spec = json!({
                    "podSelector": {"matchLabels": {"app": "app-0"}},
                    "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": app}}}]}],
                });
                index.set_policy(&name(&namespace, app), Some(read_policy(&namespace, &spec)));
            }
            for more in 0..pods {
                index.set_pod(&name(&namespace, &format!("p{more}")), Some(pod(&namespace, number * pods + more)));
            }
        }
        index.sides()[0].touched = Default::default();
        let before = MATCHES.get();
        let mut new = pod("ns-0", 20);
        new.addresses = vec![[10, 42, 255, 255].into()];
        index.set_pod(&name("ns-0", "new"), Some(new));
        let touched = &index.sides()[0].touched;
        let written: usize = touched.sets.values().chain(&touched.maps).map(|keys| keys.len()).sum();
        (MATCHES.get() - before, written + touched.chains.len())
    };
    let (few, many) = (cost(1, 40), cost(40, 200));
    assert_eq!(few, many);
    // The two policies in each direction, their two groups of peers; its address as known, itself, and isolated.
    assert!(many.0 <= 8 && many.1 <= 6, "{many:?}");
}

/// Every change of a world of a few names, so that they meet.
fn any_event() -> impl Strategy<Value = Event> {
    let namespace = || prop::sample::select(vec!["a", "b", "c"]);
    let label = || prop::sample::select(vec!["x", "y"]);
    let selector = || {
        prop_oneof![
            Just(json!({})),
            label().prop_map(|value| json!({"matchLabels": {"l": value}})),
            label()
                .prop_map(|value| json!({"matchExpressions": [{"key": "l", "operator": "NotIn", "values": [value]}]})),
        ]
    };
    let peer = prop_oneof![
        selector().prop_map(|pods| json!({"podSelector": pods})),
        selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        (selector(), selector()).prop_map(|(one, other)| json!({"namespaceSelector": one, "podSelector": other})),
        Just(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.42.0.0/30"]}})),
        Just(json!({"ipBlock": {"cidr": "fd00::/8"}})),
    ];
    let port = prop_oneof![Just(json!({"port": 80})), Just(json!({"port": "http"})), Just(json!({"port": "names"}))];
    let rule = (prop::collection::vec(peer, 0..3), prop::collection::vec(port, 0..3));
    let rules = prop::collection::vec(rule, 0..3).boxed();
    let types = prop::sample::subsequence(vec!["Ingress", "Egress"], 1..3);
    let policy = (namespace(), 0..3, prop::option::of((selector(), types, rules.clone(), rules))).prop_map(
        |(namespace, number, content)| {
            let policy = content.map(|(pods, types, ingress, egress)| {
                let ingress: Vec<_> =
                    ingress.iter().map(|(from, ports)| json!({"from": from, "ports": ports})).collect();
                let egress: Vec<_> = egress.iter().map(|(to, ports)| json!({"to": to, "ports": ports})).collect();
                let spec = json!({"podSelector": pods, "policyTypes": types, "ingress": ingress, "egress": egress});
                read_policy(namespace, &spec)
            });
            Event::Policy(name(namespace, &format!("p{number}")), policy)
        },
    );
    let named = prop::option::of(prop::sample::select(vec![("http", 80_u16), ("http", 8080), ("names", 53)]));
    let pod = (namespace(), 0..6_u16, prop::option::of((label(), named, any::<bool>(), 0..3_u16))).prop_map(
        |(namespace, number, content)| {
            // Two names of different namespaces never share an address.
            let place = u16::from(namespace.as_bytes()[0]) * 100 + number * 10;
            let pod = content.map(|(label, named, local, shift)| Pod {
                namespace: namespace.into(),
                labels: Labels::from([("l".to_owned(), label.to_owned())]),
                addresses: [true, false].map(|is_ipv4| pod_address(is_ipv4, place >> 8, (place & 255) + shift)).into(),
                ports: named
                    .map(|(name, port)| (name.into(), crate::service::Protocol::TCP, port))
                    .into_iter()
                    .collect(),
                local,
            });
            Event::Pod(name(namespace, &format!("pod-{number}")), pod)
        },
    );
    let space = (namespace(), prop::option::of(label())).prop_map(|(namespace, label)| {
        Event::Namespace(namespace.into(), label.map(|label| BTreeMap::from([("l".to_owned(), label.to_owned())])))
    });
    prop_oneof![3 => policy, 4 => pod, 1 => space]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the world came to be, the tables are what it means, and so is what the kernel has.
    #[test]
    fn the_index_and_the_kernel_follow_every_change(rounds in prop::collection::vec(prop::collection::vec(any_event(), 1..6), 1..20)) {
        let families = [true, false];
        let mut engine = listed_engine::<Fake>(&families);
        let mut world = World::default();
        for round in rounds {
            for event in round {
                world.take(event.clone());
                engine.take(event);
            }
            prop_assert_eq!(engine.apply(), Some(cidrs()));
            for (position, is_ipv4) in families.into_iter().enumerate() {
                let wanted = model::plan(&world, is_ipv4, &cidrs());
                prop_assert_eq!(engine.desired(position), &wanted);
                let keeper = &mut engine.keepers()[position];
                prop_assert!(world.policies.is_empty() || keeper.has(&wanted).unwrap());
            }
        }
    }
}
