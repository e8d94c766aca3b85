//! Which balancer address belongs to which Service. Pure: from the Services as they are, and nothing else, so that a
//! controller that starts anew comes to the same answer.
//!
//! A Service keeps what its status says. Of two with one address the older one keeps it, unless they share it: both ask for
//! that by the same word, have no port in common, and lead packets to the same nodes. What is left is handed out in the
//! order of age, the lowest address first that is shared or free.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use kube::ResourceExt;
use oarlock_machinery::Key;

/// The addresses that a Service wants, separated by commas, at most one of each family.
pub(crate) const WISH_ANNOTATION: &str = "oarlock.io/load-balancer-ips";

/// A word of the Service's choice: those that say the same one may have one address together.
pub(crate) const SHARING_ANNOTATION: &str = "oarlock.io/allow-shared-ip";

/// What has to change.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Services whose status has to have exactly these addresses.
    pub write: Vec<(Key, Vec<IpAddr>)>,
    /// Services that do not have all that they should, and why.
    pub problems: Vec<(Key, String)>,
}

/// Whose addresses are whose business.
#[derive(Debug, Clone)]
pub(crate) struct Provider {
    /// What may be handed out.
    pub pools: Vec<IpNet>,
    /// The `loadBalancerClass` that asks for these addresses, beside no class at all.
    pub class: String,
}

impl Provider {
    fn has(&self, address: &IpAddr) -> bool {
        self.pools.iter().any(|pool| pool.contains(address))
    }

    /// Whether a Service is to have addresses of ours.
    fn serves(&self, service: &Service) -> bool {
        let wanted = |spec: &&ServiceSpec| {
            is_balanced(spec) && spec.load_balancer_class.as_ref().is_none_or(|class| *class == self.class)
        };
        service.spec.as_ref().filter(wanted).is_some()
    }
}

fn is_balanced(spec: &ServiceSpec) -> bool {
    spec.type_.as_deref() == Some("LoadBalancer")
}

/// Whether a Service has or wants addresses at all.
pub(super) fn concerns(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(is_balanced) || !ingress(service).is_empty()
}

/// Whether a Service has an address of the provider's pools.
pub(super) fn has_of(service: &Service, provider: &Provider) -> bool {
    ingress(service).iter().any(|address| provider.has(address))
}

/// The addresses in a Service's status.
fn ingress(service: &Service) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let entries = balancer.into_iter().flat_map(|balancer| balancer.ingress.iter().flatten());
    entries.filter_map(|entry| entry.ip.as_ref()?.parse().ok()).collect()
}

/// Whether the status holds something that is no plain address, and so is not from here.
fn has_foreign_ingress(service: &Service) -> bool {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let count = balancer.and_then(|balancer| balancer.ingress.as_ref()).map_or(0, Vec::len);
    count != ingress(service).len()
}

/// The families that a Service has, in its order.
fn families(service: &Service) -> Vec<bool> {
    let listed = service.spec.as_ref().and_then(|spec| spec.ip_families.as_ref()).into_iter().flatten();
    let families: Vec<bool> = listed.map(|family| family == "IPv4").collect();
    if families.is_empty() { vec![true] } else { families }
}

/// The addresses that a Service asks for; the annotation wins over the older field.
fn wishes(service: &Service) -> Result<Vec<IpAddr>, String> {
    let annotated = service.annotations().get(WISH_ANNOTATION);
    let field = service.spec.as_ref().and_then(|spec| spec.load_balancer_ip.as_ref());
    let text = annotated.or(field).map(String::as_str).unwrap_or_default();
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().map_err(|_| format!("{part:?} is not an address"))).collect()
}

/// What decides with whom a Service can share an address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sharing {
    word: String,
    ports: BTreeSet<(String, i32)>,
    /// With policy Local only nodes with endpoints take the address's packets, so all that share it have the same ones.
    local: Option<(String, BTreeMap<String, String>)>,
}

impl Sharing {
    fn of(service: &Service) -> Option<Sharing> {
        let word = service.annotations().get(SHARING_ANNOTATION).filter(|word| !word.is_empty())?.clone();
        let spec = service.spec.as_ref()?;
        let protocol = |protocol: &Option<String>| protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        let ports = spec.ports.iter().flatten().map(|port| (protocol(&port.protocol), port.port)).collect();
        let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
        let backends = || (service.namespace().unwrap_or_default(), spec.selector.clone().unwrap_or_default());
        // Without a selector nobody knows whether two have the same endpoints.
        let local = is_local.then(backends);
        let is_known = local.as_ref().is_none_or(|(_, selector)| !selector.is_empty());
        is_known.then_some(Sharing { word, ports, local })
    }

    fn suits(&self, other: &Sharing) -> bool {
        self.word == other.word && self.local == other.local && self.ports.is_disjoint(&other.ports)
    }
}

/// Who has which addresses.
#[derive(Debug, Default)]
struct Taken(HashMap<IpAddr, Vec<(Key, Option<Sharing>)>>);

impl Taken {
    /// Who keeps a Service from having an address too; nobody where it is free or can be shared.
    fn owner(&self, address: &IpAddr, sharing: Option<&Sharing>) -> Option<&Key> {
        let suits = |theirs: &Option<Sharing>| match (sharing, theirs) {
            (Some(own), Some(theirs)) => own.suits(theirs),
            _ => false,
        };
        self.0.get(address)?.iter().find(|(_, theirs)| !suits(theirs)).map(|(key, _)| key)
    }

    fn is_free(&self, address: &IpAddr) -> bool {
        !self.0.contains_key(address)
    }

    /// The lowest address of a family that somebody shares with such a Service.
    fn shared(&self, is_ipv4: bool, sharing: &Sharing) -> Option<IpAddr> {
        let of_family = self.0.keys().filter(|address| address.is_ipv4() == is_ipv4);
        of_family.filter(|address| self.owner(address, Some(sharing)).is_none()).min().copied()
    }

    fn take(&mut self, address: IpAddr, key: &Key, sharing: Option<&Sharing>) {
        self.0.entry(address).or_default().push((key.clone(), sharing.cloned()));
    }
}

/// One Service's way through the plan.
struct Case<'a> {
    key: Key,
    sharing: Option<Sharing>,
    service: &'a Service,
    has: Vec<IpAddr>,
    wishes: Vec<IpAddr>,
    gets: Vec<IpAddr>,
    problems: Vec<String>,
}

impl Case<'_> {
    fn wish(&self, is_ipv4: bool) -> Option<IpAddr> {
        self.wishes.iter().find(|wish| wish.is_ipv4() == is_ipv4).copied()
    }

    fn has_family(&self, is_ipv4: bool) -> bool {
        self.gets.iter().any(|address| address.is_ipv4() == is_ipv4)
    }
}

/// What has to change so that every Service has its addresses.
pub(super) fn plan(services: &[Arc<Service>], provider: &Provider) -> Plan {
    let mut plan = Plan::default();
    let mut taken = Taken::default();
    let mut cases = Vec::new();
    for service in services {
        let (key, has) = (Key::of(service.as_ref()), ingress(service));
        if provider.serves(service) {
            let sharing = Sharing::of(service);
            cases.push(Case { key, sharing, service, has, wishes: Vec::new(), gets: Vec::new(), problems: Vec::new() });
        } else if service.spec.as_ref().is_some_and(is_balanced) {
            // Another provider's, even where the address is one of ours.
            has.into_iter().for_each(|address| taken.take(address, &key, None));
        } else if !has.is_empty() && has.iter().all(|address| provider.has(address)) {
            plan.write.push((key, Vec::new()));
        }
    }
    cases.sort_by(|a, b| {
        let age = |case: &Case<'_>| case.service.metadata.creation_timestamp.as_ref().map(|time| time.0);
        (age(a), &a.key.namespace, &a.key.name).cmp(&(age(b), &b.key.namespace, &b.key.name))
    });
    for case in &mut cases {
        match wishes(case.service) {
            Ok(wishes) => case.wishes = wishes,
            Err(problem) => case.problems.push(problem),
        }
        keep(case, provider, &mut taken);
    }
    for case in &mut cases {
        fulfil_wishes(case, provider, &mut taken);
    }
    let mut free = Free::new(provider);
    for case in &mut cases {
        hand_out(case, provider, &mut free, &mut taken);
    }
    for mut case in cases {
        let order = families(case.service);
        case.gets.sort_by_key(|address| order.iter().position(|is_ipv4| *is_ipv4 == address.is_ipv4()));
        if !case.problems.is_empty() {
            plan.problems.push((case.key.clone(), case.problems.join("; ")));
        }
        // One that is going keeps what it has until it is gone.
        if case.service.metadata.deletion_timestamp.is_none()
            && (case.gets != case.has || has_foreign_ingress(case.service))
        {
            plan.write.push((case.key, case.gets));
        }
    }
    plan
}

/// What the status says stays, unless it is not ours to give, somebody older has it, or something else is wished for.
fn keep(case: &mut Case<'_>, provider: &Provider, taken: &mut Taken) {
    let families = families(case.service);
    for address in case.has.clone() {
        let fits = provider.has(&address)
            && families.contains(&address.is_ipv4())
            && !case.has_family(address.is_ipv4())
            && case.wish(address.is_ipv4()).is_none_or(|wish| wish == address);
        if fits && taken.owner(&address, case.sharing.as_ref()).is_none() {
            taken.take(address, &case.key, case.sharing.as_ref());
            case.gets.push(address);
        }
    }
}

fn fulfil_wishes(case: &mut Case<'_>, provider: &Provider, taken: &mut Taken) {
    for is_ipv4 in families(case.service) {
        let Some(wish) = case.wish(is_ipv4).filter(|_| !case.has_family(is_ipv4)) else { continue };
        if !provider.has(&wish) {
            case.problems.push(format!("{wish} is in no pool"));
        } else if let Some(owner) = taken.owner(&wish, case.sharing.as_ref()) {
            case.problems.push(format!("{wish} belongs to Service {}/{}", owner.namespace, owner.name));
        } else {
            taken.take(wish, &case.key, case.sharing.as_ref());
            case.gets.push(wish);
        }
    }
}

/// An address of each family that the Service has none of and wishes none of.
fn hand_out(case: &mut Case<'_>, provider: &Provider, free: &mut Free, taken: &mut Taken) {
    let families = families(case.service);
    let has_pool = |is_ipv4: bool| provider.pools.iter().any(|pool| pool.addr().is_ipv4() == is_ipv4);
    for is_ipv4 in &families {
        let is_settled = case.has_family(*is_ipv4) || case.wish(*is_ipv4).is_some() || !case.problems.is_empty();
        if is_settled || !has_pool(*is_ipv4) {
            continue;
        }
        let shared = case.sharing.as_ref().and_then(|sharing| taken.shared(*is_ipv4, sharing));
        match shared.or_else(|| free.next(*is_ipv4, taken)) {
            Some(address) => {
                taken.take(address, &case.key, case.sharing.as_ref());
                case.gets.push(address);
            }
            None => case.problems.push(format!("no {} address is free", name(*is_ipv4))),
        }
    }
    if case.gets.is_empty() && case.problems.is_empty() {
        let names: BTreeSet<&str> = families.iter().map(|is_ipv4| name(*is_ipv4)).collect();
        case.problems.push(format!("there is no pool of {}", names.into_iter().collect::<Vec<_>>().join(" or ")));
    }
}

fn name(is_ipv4: bool) -> &'static str {
    if is_ipv4 { "IPv4" } else { "IPv6" }
}

/// Walks through the pools once for each family, whatever the number of Services.
struct Free {
    walks: [Box<dyn Iterator<Item = IpAddr>>; 2],
}

impl Free {
    fn new(provider: &Provider) -> Free {
        let walk = |is_ipv4: bool| -> Box<dyn Iterator<Item = IpAddr>> {
            let mut pools: Vec<IpNet> =
                provider.pools.iter().filter(|pool| pool.addr().is_ipv4() == is_ipv4).copied().collect();
            pools.sort();
            Box::new(pools.into_iter().flat_map(addresses))
        };
        Free { walks: [walk(true), walk(false)] }
    }

    fn next(&mut self, is_ipv4: bool, taken: &Taken) -> Option<IpAddr> {
        self.walks[usize::from(!is_ipv4)].find(|address| taken.is_free(address))
    }
}

/// Every address of a network: a pool is not a link, and its first and last address are as good as the others.
fn addresses(net: IpNet) -> Box<dyn Iterator<Item = IpAddr>> {
    match net {
        IpNet::V4(net) => {
            let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
            Box::new((first..=last).map(|number| IpAddr::V4(number.into())))
        }
        IpNet::V6(net) => {
            let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
            Box::new((first..=last).map(|number| IpAddr::V6(number.into())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn provider(pools: &[&str]) -> Provider {
        Provider { pools: pools.iter().map(|pool| pool.parse().unwrap()).collect(), class: "ours".into() }
    }

    /// A Service made in second `age`, with these addresses in its status.
    fn service(name: &str, age: u32, spec: Value, has: &[&str]) -> Arc<Service> {
        let mut whole = json!({"type": "LoadBalancer", "ipFamilies": ["IPv4"]});
        spec.as_object().unwrap().iter().for_each(|(field, value)| whole[field] = value.clone());
        let ingress: Vec<Value> = has.iter().map(|address| json!({"ip": address})).collect();
        let made = format!("2026-01-01T00:00:{age:02}Z");
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "namespace": "ns", "creationTimestamp": made},
                "spec": whole, "status": {"loadBalancer": {"ingress": ingress}},
            }))
            .unwrap(),
        )
    }

    fn written(plan: &Plan, name: &str) -> Option<Vec<String>> {
        let found = plan.write.iter().find(|(key, _)| key.name == name)?;
        Some(found.1.iter().map(ToString::to_string).collect())
    }

    fn problem<'a>(plan: &'a Plan, name: &str) -> &'a str {
        plan.problems.iter().find(|(key, _)| key.name == name).map_or("", |(_, problem)| problem)
    }

    #[test]
    fn the_lowest_free_addresses_go_to_the_oldest_and_stay_with_them() {
        let services = [
            service("young", 9, json!({}), &[]),
            service("old", 1, json!({}), &[]),
            service("settled", 5, json!({}), &["192.0.2.1"]),
        ];
        let plan = plan(&services, &provider(&["192.0.2.0/30"]));
        assert_eq!(written(&plan, "old").unwrap(), ["192.0.2.0"]);
        assert_eq!(written(&plan, "settled"), None);
        assert_eq!(written(&plan, "young").unwrap(), ["192.0.2.2"]);
    }

    #[test]
    fn a_service_of_both_families_gets_an_address_of_each_that_has_a_pool() {
        let both = service("both", 1, json!({"ipFamilies": ["IPv6", "IPv4"]}), &[]);
        let wanted = plan(std::slice::from_ref(&both), &provider(&["192.0.2.8/29", "2001:db8::10/124"]));
        assert_eq!(written(&wanted, "both").unwrap(), ["2001:db8::10", "192.0.2.8"]);
        let half = plan(&[both], &provider(&["192.0.2.8/29"]));
        assert_eq!(written(&half, "both").unwrap(), ["192.0.2.8"]);
        let none = plan(&[service("six", 1, json!({"ipFamilies": ["IPv6"]}), &[])], &provider(&["192.0.2.8/29"]));
        assert_eq!((none.write.len(), problem(&none, "six")), (0, "there is no pool of IPv6"));
    }

    /// A Service that says a word by which it shares its address.
    fn sharing(name: &str, age: u32, spec: Value, has: &[&str]) -> Arc<Service> {
        let mut service = (*service(name, age, spec, has)).clone();
        service.annotations_mut().insert(SHARING_ANNOTATION.to_owned(), "word".to_owned());
        Arc::new(service)
    }

    #[test]
    fn services_that_say_so_share_an_address_as_long_as_nothing_is_ambiguous() {
        let port = |protocol: &str, number: i32| json!([{"protocol": protocol, "port": number}]);
        let services = [
            sharing("tcp", 1, json!({"ports": port("TCP", 53)}), &[]),
            sharing("udp", 2, json!({"ports": port("UDP", 53)}), &[]),
            sharing("same-port", 3, json!({"ports": port("TCP", 53)}), &[]),
            sharing("local", 4, json!({"ports": port("TCP", 80), "externalTrafficPolicy": "Local"}), &[]),
            service("alone", 5, json!({"ports": port("TCP", 81)}), &[]),
            sharing("late", 6, json!({"ports": port("TCP", 443)}), &[]),
        ];
        let plan = plan(&services, &provider(&["192.0.2.0/29"]));
        let got =
            ["tcp", "udp", "same-port", "local", "alone", "late"].map(|name| written(&plan, name).unwrap().join(","));
        assert_eq!(got, ["192.0.2.0", "192.0.2.0", "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.0"]);
        assert_eq!(plan.problems, []);
    }

    #[test]
    fn a_shared_address_stays_shared_and_can_be_wished_for() {
        let ports = |number: i32| json!([{"port": number}]);
        let wish = |number: i32| json!({"ports": ports(number), "loadBalancerIP": "192.0.2.1"});
        let services = [
            sharing("one", 1, json!({"ports": ports(80)}), &["192.0.2.1"]),
            sharing("two", 2, json!({"ports": ports(81)}), &["192.0.2.1"]),
            sharing("wishes", 3, wish(82), &[]),
            service("stranger", 4, wish(83), &[]),
        ];
        let plan = plan(&services, &provider(&["192.0.2.0/29"]));
        assert_eq!((written(&plan, "one"), written(&plan, "two")), (None, None));
        assert_eq!(written(&plan, "wishes").unwrap(), ["192.0.2.1"]);
        assert_eq!(problem(&plan, "stranger"), "192.0.2.1 belongs to Service ns/one");
    }

    #[test]
    fn of_two_with_one_address_the_older_keeps_it() {
        let services = [service("young", 2, json!({}), &["192.0.2.0"]), service("old", 1, json!({}), &["192.0.2.0"])];
        let plan = plan(&services, &provider(&["192.0.2.0/30"]));
        assert_eq!(written(&plan, "young").unwrap(), ["192.0.2.1"]);
        assert_eq!(written(&plan, "old"), None);
    }

    #[test]
    fn wishes_come_true_where_they_can_and_are_never_replaced_by_something_else() {
        let wish = |address: &str| json!({"loadBalancerIP": address});
        let services = [
            service("first", 1, json!({}), &["192.0.2.2"]),
            service("good", 2, wish("192.0.2.3"), &[]),
            service("moved", 3, wish("192.0.2.1"), &["192.0.2.0"]),
            service("late", 4, wish("192.0.2.2"), &[]),
            service("outside", 5, wish("198.51.100.1"), &[]),
            service("nonsense", 6, wish("here"), &[]),
            service("any", 7, json!({}), &[]),
        ];
        let plan = plan(&services, &provider(&["192.0.2.0/29"]));
        assert_eq!(written(&plan, "good").unwrap(), ["192.0.2.3"]);
        assert_eq!(written(&plan, "moved").unwrap(), ["192.0.2.1"]);
        assert_eq!(written(&plan, "any").unwrap(), ["192.0.2.0"], "what was left behind is free again");
        for (name, expected) in [
            ("late", "192.0.2.2 belongs to Service ns/first"),
            ("outside", "198.51.100.1 is in no pool"),
            ("nonsense", "\"here\" is not an address"),
        ] {
            assert_eq!((written(&plan, name), problem(&plan, name)), (None, expected));
        }
    }

    #[test]
    fn other_classes_are_left_alone_and_what_is_no_balancer_any_more_gives_back() {
        let services = [
            service("foreign", 1, json!({"loadBalancerClass": "theirs"}), &["192.0.2.0"]),
            service("ours", 2, json!({"loadBalancerClass": "ours"}), &[]),
            service("former", 3, json!({"type": "ClusterIP"}), &["192.0.2.1"]),
            service("not-ours", 4, json!({"type": "ClusterIP"}), &["198.51.100.1"]),
        ];
        let plan = plan(&services, &provider(&["192.0.2.0/30"]));
        assert_eq!(written(&plan, "foreign"), None);
        assert_eq!(written(&plan, "ours").unwrap(), ["192.0.2.1"]);
        assert_eq!(written(&plan, "former").unwrap(), [""; 0]);
        assert_eq!(written(&plan, "not-ours"), None);
    }

    #[test]
    fn an_empty_pool_is_told() {
        let services = [service("a", 1, json!({}), &[]), service("b", 2, json!({}), &[])];
        let plan = plan(&services, &provider(&["192.0.2.7/32"]));
        assert_eq!(written(&plan, "a").unwrap(), ["192.0.2.7"]);
        assert_eq!(problem(&plan, "b"), "no IPv4 address is free");
    }

    proptest! {
        /// Whatever is there at the start, one round settles it: no address twice, none outside, and the next round has nothing to do.
        #[test]
        fn one_round_settles_everything(
            start in proptest::collection::vec((0u8..10, 0u8..12, any::<bool>()), 1..12)) {
            let provider = provider(&["192.0.2.0/29"]);
            let make = |number: usize, wish: u8, has: &[String]| {
                let spec = if wish < 8 { json!({"loadBalancerIP": format!("192.0.2.{wish}")}) } else { json!({}) };
                let has: Vec<&str> = has.iter().map(String::as_str).collect();
                service(&format!("s{number}"), number as u32, spec, &has)
            };
            let state = |(_, has, with): &(u8, u8, bool)| if *with { vec![format!("192.0.2.{has}")] } else { vec![] };
            let mut has: Vec<Vec<String>> = start.iter().map(state).collect();
            let services = |has: &[Vec<String>]| -> Vec<Arc<Service>> {
                start.iter().enumerate().map(|(number, (wish, ..))| make(number, *wish, &has[number])).collect()
            };
            let first = plan(&services(&has), &provider);
            for (number, one) in has.iter_mut().enumerate() {
                if let Some(addresses) = written(&first, &format!("s{number}")) { *one = addresses; }
            }
            let all: Vec<&String> = has.iter().flatten().collect();
            let unique: BTreeSet<&String> = all.iter().copied().collect();
            prop_assert_eq!(unique.len(), all.len());
            prop_assert!(all.iter().all(|address| provider.has(&address.parse().unwrap())));
            prop_assert_eq!(plan(&services(&has), &provider).write, vec![]);
        }
    }
}
