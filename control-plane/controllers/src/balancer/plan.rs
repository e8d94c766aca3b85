//! Which balancer address belongs to which Service. Pure: from the Services as they are, and nothing else, so that a
//! controller that starts anew comes to the same answer.
//!
//! A Service keeps what its status says. Of two with one address the older one keeps it. What is left is handed out in the
//! order of age, the lowest free address first.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use kube::ResourceExt;
use oarlock_machinery::Key;

/// The addresses that a Service wants, separated by commas, at most one of each family.
pub(crate) const WISH_ANNOTATION: &str = "oarlock.io/load-balancer-ips";

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

/// One Service's way through the plan.
struct Case<'a> {
    key: Key,
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
    let mut taken: HashMap<IpAddr, Key> = HashMap::new();
    let mut cases = Vec::new();
    for service in services {
        let (key, has) = (Key::of(service.as_ref()), ingress(service));
        if provider.serves(service) {
            cases.push(Case { key, service, has, wishes: Vec::new(), gets: Vec::new(), problems: Vec::new() });
        } else if service.spec.as_ref().is_some_and(is_balanced) {
            // Another provider's, even where the address is one of ours.
            has.into_iter().for_each(|address| drop(taken.insert(address, key.clone())));
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
fn keep(case: &mut Case<'_>, provider: &Provider, taken: &mut HashMap<IpAddr, Key>) {
    let families = families(case.service);
    for address in case.has.clone() {
        let fits = provider.has(&address)
            && families.contains(&address.is_ipv4())
            && !case.has_family(address.is_ipv4())
            && case.wish(address.is_ipv4()).is_none_or(|wish| wish == address);
        if fits && !taken.contains_key(&address) {
            taken.insert(address, case.key.clone());
            case.gets.push(address);
        }
    }
}

fn fulfil_wishes(case: &mut Case<'_>, provider: &Provider, taken: &mut HashMap<IpAddr, Key>) {
    for is_ipv4 in families(case.service) {
        let Some(wish) = case.wish(is_ipv4).filter(|_| !case.has_family(is_ipv4)) else { continue };
        if !provider.has(&wish) {
            case.problems.push(format!("{wish} is in no pool"));
        } else if let Some(owner) = taken.get(&wish) {
            case.problems.push(format!("{wish} belongs to Service {}/{}", owner.namespace, owner.name));
        } else {
            taken.insert(wish, case.key.clone());
            case.gets.push(wish);
        }
    }
}

/// An address of each family that the Service has none of and wishes none of.
fn hand_out(case: &mut Case<'_>, provider: &Provider, free: &mut Free, taken: &mut HashMap<IpAddr, Key>) {
    let families = families(case.service);
    let has_pool = |is_ipv4: bool| provider.pools.iter().any(|pool| pool.addr().is_ipv4() == is_ipv4);
    for is_ipv4 in &families {
        let is_settled = case.has_family(*is_ipv4) || case.wish(*is_ipv4).is_some() || !case.problems.is_empty();
        if is_settled || !has_pool(*is_ipv4) {
            continue;
        }
        match free.next(*is_ipv4, taken) {
            Some(address) => {
                taken.insert(address, case.key.clone());
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

    fn next(&mut self, is_ipv4: bool, taken: &HashMap<IpAddr, Key>) -> Option<IpAddr> {
        self.walks[usize::from(!is_ipv4)].find(|address| !taken.contains_key(address))
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
