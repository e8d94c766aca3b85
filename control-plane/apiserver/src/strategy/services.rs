//! Services: cluster addresses and node ports, handed out so that no two Services share one.
//!
//! What is taken is read from the stored Services whenever they have changed, so nothing can leak and nothing needs
//! repair; what has been handed out but is not stored yet is held by a [`Reservation`].

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use oarlock_kinds::{FieldError, Kind};
use oarlock_store::{Range, Store};
use parking_lot::Mutex;
use rand::Rng;
use serde_json::{Value, json};

use crate::core::Context;
use crate::error::{ApiError, ApiResult};
use crate::object;

#[derive(Default)]
struct Taken {
    stamp: Option<u64>,
    addresses: HashSet<IpAddr>,
    ports: HashSet<(u16, Protocol)>,
    held_addresses: HashSet<IpAddr>,
    held_ports: HashSet<(u16, Protocol)>,
}

type Protocol = Box<str>;

/// Knows which addresses and ports are taken.
#[derive(Default)]
pub(crate) struct Allocator {
    taken: Mutex<Taken>,
}

/// Addresses and ports that are handed out; given back on drop, by when the Service is stored or never will be.
pub(crate) struct Reservation<'a> {
    allocator: &'a Allocator,
    addresses: Vec<IpAddr>,
    ports: Vec<(u16, Protocol)>,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut taken = self.allocator.taken.lock();
        for address in &self.addresses {
            taken.held_addresses.remove(address);
        }
        for port in &self.ports {
            taken.held_ports.remove(port);
        }
    }
}

impl Taken {
    fn refresh(&mut self, store: &dyn Store, kind: &Kind) {
        let prefix = object::bucket(kind);
        let stamp = store.last_change(&prefix);
        if self.stamp == Some(stamp) {
            return;
        }
        let Ok(page) = store.range(Range { prefix: &prefix, ..Range::default() }) else { return };
        self.addresses.clear();
        self.ports.clear();
        for record in &page.records {
            let service = object::parse(record);
            self.addresses.extend(addresses(&service));
            self.ports.extend(node_ports(&service));
        }
        self.stamp = Some(stamp);
    }

    fn has_address(&self, address: &IpAddr) -> bool {
        self.addresses.contains(address) || self.held_addresses.contains(address)
    }

    fn has_port(&self, port: &(u16, Protocol)) -> bool {
        self.ports.contains(port) || self.held_ports.contains(port)
    }
}

fn addresses(service: &Value) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> =
        object::strings(service.pointer("/spec/clusterIPs")).filter_map(|text| text.parse().ok()).collect();
    if let Ok(address) = object::text(service, "/spec/clusterIP").parse::<IpAddr>()
        && !found.contains(&address)
    {
        found.push(address);
    }
    found
}

fn node_ports(service: &Value) -> Vec<(u16, Protocol)> {
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
    let mut found: Vec<(u16, Protocol)> = ports
        .filter_map(|port| Some((u16::try_from(port.get("nodePort")?.as_u64()?).ok()?, protocol(port))))
        .filter(|(port, _)| *port != 0)
        .collect();
    if let Some(port) = service.pointer("/spec/healthCheckNodePort").and_then(Value::as_u64).filter(|port| *port != 0) {
        found.extend(u16::try_from(port).ok().map(|port| (port, "TCP".into())));
    }
    found
}

fn protocol(port: &Value) -> Protocol {
    port.get("protocol").and_then(Value::as_str).unwrap_or("TCP").into()
}

fn service_type(service: &Value) -> &str {
    match object::text(service, "/spec/type") {
        "" => "ClusterIP",
        other => other,
    }
}

fn is_headless(service: &Value) -> bool {
    object::text(service, "/spec/clusterIP") == "None"
        || object::strings(service.pointer("/spec/clusterIPs")).next() == Some("None")
}

fn wants_node_ports(service: &Value) -> bool {
    match service_type(service) {
        "NodePort" => true,
        "LoadBalancer" => service.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false)),
        _ => false,
    }
}

/// Gives a new Service what it lacks.
pub(crate) fn on_create<'a>(ctx: &'a Context, kind: &Kind, service: &mut Value) -> ApiResult<Option<Reservation<'a>>> {
    allocate(ctx, kind, service, &[], &[])
}

/// Keeps what a Service has where the new state is silent, gives it what its new type needs, and takes away what the
/// type has no use for.
pub(crate) fn on_update<'a>(
    ctx: &'a Context,
    kind: &Kind,
    old: &Value,
    service: &mut Value,
) -> ApiResult<Option<Reservation<'a>>> {
    keep_addresses(old, service);
    drop_second_family(old, service);
    keep_node_ports(old, service);
    allocate(ctx, kind, service, &addresses(old), &node_ports(old))
}

fn keep_addresses(old: &Value, service: &mut Value) {
    let external = service_type(service) == "ExternalName";
    let was_external = service_type(old) == "ExternalName";
    let spec = object::section(service, "spec");
    if external {
        if !was_external {
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                spec.remove(field);
            }
        }
        return;
    }
    let unset = |value: Option<&Value>| value.is_none_or(|value| value.is_null() || value == "" || value == &json!([]));
    if unset(spec.get("clusterIP")) && unset(spec.get("clusterIPs")) {
        for field in ["clusterIP", "clusterIPs"] {
            if let Some(value) = old["spec"].get(field) {
                spec.insert(field.into(), value.clone());
            }
        }
    }
    for field in ["ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
        if let Some(value) = old["spec"].get(field).filter(|_| unset(spec.get(field))) {
            spec.insert(field.into(), value.clone());
        }
    }
}

/// A Service that becomes single-stack keeps its first family alone, when nothing else was said.
fn drop_second_family(old: &Value, service: &mut Value) {
    let was_dual = matches!(object::text(old, "/spec/ipFamilyPolicy"), "PreferDualStack" | "RequireDualStack");
    if !was_dual || object::text(service, "/spec/ipFamilyPolicy") != "SingleStack" {
        return;
    }
    for field in ["ipFamilies", "clusterIPs"] {
        let unchanged = service["spec"].get(field) == old["spec"].get(field);
        if let Some(list) = service["spec"].get_mut(field).and_then(Value::as_array_mut).filter(|_| unchanged) {
            list.truncate(1);
        }
    }
}

fn keep_node_ports(old: &Value, service: &mut Value) {
    let wants = wants_node_ports(service);
    let had = wants_node_ports(old);
    let before = old.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut used: HashSet<u64> = HashSet::new();
    let ports = object::section(service, "spec").get_mut("ports").and_then(Value::as_array_mut);
    for port in ports.into_iter().flatten().filter_map(Value::as_object_mut) {
        let asked = port.get("nodePort").and_then(Value::as_u64).unwrap_or(0);
        let previous = before.iter().find(|earlier| {
            earlier["port"] == port.get("port").cloned().unwrap_or_default()
                && protocol(earlier) == protocol(&Value::Object(port.clone()))
        });
        let number = previous.and_then(|earlier| earlier.get("nodePort")).and_then(Value::as_u64).unwrap_or(0);
        if wants && asked == 0 && number != 0 && used.insert(number) {
            port.insert("nodePort".into(), number.into());
        } else if !wants && had && asked == number {
            port.remove("nodePort");
        }
    }
}

fn allocate<'a>(
    ctx: &'a Context,
    kind: &Kind,
    service: &mut Value,
    own_addresses: &[IpAddr],
    own_ports: &[(u16, Protocol)],
) -> ApiResult<Option<Reservation<'a>>> {
    let allocator = &ctx.core.services;
    let mut taken = allocator.taken.lock();
    taken.refresh(&*ctx.core.store, kind);
    let mut wanted = Wanted {
        name: object::name(service).to_owned(),
        cidrs: [ctx.core.config.service_cidr].into_iter().chain(ctx.core.config.second_service_cidr).collect(),
        port_range: ctx.core.config.node_port_range,
        taken: &taken,
        own_addresses,
        own_ports,
        addresses: Vec::new(),
        ports: Vec::new(),
        errors: Vec::new(),
    };
    wanted.families(service);
    wanted.cluster_addresses(service);
    wanted.node_ports(service);
    let Wanted { addresses, ports, errors, name, .. } = wanted;
    if !errors.is_empty() {
        return Err(ApiError::invalid("", "Service", &name, &errors));
    }
    if ctx.dry_run || (addresses.is_empty() && ports.is_empty()) {
        return Ok(None);
    }
    taken.held_addresses.extend(addresses.iter().copied());
    taken.held_ports.extend(ports.iter().cloned());
    Ok(Some(Reservation { allocator, addresses, ports }))
}

/// One Service's wishes against what is taken.
struct Wanted<'t> {
    name: String,
    /// One range for each family of the cluster, the primary one first.
    cidrs: Vec<IpNet>,
    port_range: (u16, u16),
    taken: &'t Taken,
    own_addresses: &'t [IpAddr],
    own_ports: &'t [(u16, Protocol)],
    addresses: Vec<IpAddr>,
    ports: Vec<(u16, Protocol)>,
    errors: Vec<FieldError>,
}

impl Wanted<'_> {
    /// Fills in and checks the families, the policy about them, and the internal traffic policy.
    fn families(&mut self, service: &mut Value) {
        if service_type(service) == "ExternalName" {
            return;
        }
        let own: Vec<&str> = self.cidrs.iter().map(|cidr| family_of(cidr.addr())).collect();
        let mut families: Vec<String> =
            object::strings(service.pointer("/spec/ipFamilies")).map(str::to_owned).collect();
        if families.is_empty() {
            let asked = asked_addresses(service);
            families.extend(asked.iter().filter_map(|text| text.parse().ok()).map(|one| family_of(one).to_owned()));
        }
        // Whoever writes the endpoints of a headless Service without a selector may use any family.
        let has_selector =
            service.pointer("/spec/selector").and_then(Value::as_object).is_some_and(|map| !map.is_empty());
        let is_anyones = is_headless(service) && !has_selector;
        let mut policy = object::text(service, "/spec/ipFamilyPolicy").to_owned();
        if policy.is_empty() {
            let is_dual = families.len() > 1 || (is_anyones && families.is_empty());
            policy = if is_dual { "RequireDualStack" } else { "SingleStack" }.to_owned();
        }
        if families.len() > 1 && policy == "SingleStack" {
            let detail = "must be RequireDualStack or PreferDualStack when multiple IP families are specified";
            self.errors.push(FieldError::invalid("spec.ipFamilyPolicy", policy.clone(), detail));
        }
        if !is_anyones {
            self.check_families(&own, &families, &policy);
        }
        if families.is_empty() {
            families.extend(own.first().map(|family| (*family).to_owned()));
        }
        let other = if families[0] == "IPv4" { "IPv6" } else { "IPv4" };
        let wants_two = policy != "SingleStack" && families.len() == 1;
        if wants_two && (is_anyones || own.contains(&other)) {
            families.push(other.to_owned());
        }
        let spec = object::section(service, "spec");
        spec.insert("ipFamilies".into(), json!(families));
        spec.insert("ipFamilyPolicy".into(), policy.into());
        if spec.get("internalTrafficPolicy").is_none_or(|value| value.is_null() || value == "") {
            spec.insert("internalTrafficPolicy".into(), "Cluster".into());
        }
    }

    fn check_families(&mut self, own: &[&str], families: &[String], policy: &str) {
        if policy == "RequireDualStack" && own.len() < 2 {
            let detail = "this cluster is not configured for dual-stack services";
            self.errors.push(FieldError::invalid("spec.ipFamilyPolicy", policy, detail));
        }
        for (at, family) in families.iter().enumerate().filter(|(_, family)| !own.contains(&family.as_str())) {
            let path = format!("spec.ipFamilies[{at}]");
            self.errors.push(FieldError::invalid(path, family.clone(), "not configured on this cluster"));
        }
    }

    fn cluster_addresses(&mut self, service: &mut Value) {
        if service_type(service) == "ExternalName" {
            return;
        }
        if is_headless(service) {
            let spec = object::section(service, "spec");
            spec.insert("clusterIP".into(), "None".into());
            spec.insert("clusterIPs".into(), json!(["None"]));
            return;
        }
        if !self.errors.is_empty() {
            return;
        }
        let asked = asked_addresses(service);
        let families: Vec<String> = object::strings(service.pointer("/spec/ipFamilies")).map(str::to_owned).collect();
        let mut given: Vec<String> = Vec::new();
        for (at, family) in families.iter().enumerate() {
            let cidr = self.cidrs.iter().copied().find(|cidr| family_of(cidr.addr()) == family);
            let Some(cidr) = cidr else { continue };
            let address = match asked.get(at) {
                Some(text) => self.asked_address(text, cidr),
                None => self.free_address(cidr),
            };
            let Some(address) = address else { return };
            if !self.own_addresses.contains(&address) {
                self.addresses.push(address);
            }
            given.push(address.to_string());
        }
        let spec = object::section(service, "spec");
        spec.insert("clusterIP".into(), json!(given.first()));
        spec.insert("clusterIPs".into(), json!(given));
    }

    fn asked_address(&mut self, asked: &str, cidr: IpNet) -> Option<IpAddr> {
        let invalid = |detail: String| FieldError::invalid("spec.clusterIPs", json!([asked]), detail);
        let Ok(address) = asked.parse::<IpAddr>() else {
            self.errors.push(invalid("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()));
            return None;
        };
        if self.own_addresses.contains(&address) {
            return Some(address);
        }
        if !cidr.contains(&address) {
            let detail = format!(
                "failed to allocate IP {asked}: the provided IP ({asked}) is not in the valid range. The range of valid IPs \
                 is {cidr}"
            );
            self.errors.push(invalid(detail));
            return None;
        }
        if self.taken.has_address(&address) {
            self.errors.push(invalid(format!("failed to allocate IP {asked}: provided IP is already allocated")));
            return None;
        }
        Some(address)
    }

    /// A free address, first from the upper part of the range, so that small numbers stay free for those who ask.
    fn free_address(&mut self, cidr: IpNet) -> Option<IpAddr> {
        let size = range_size(cidr);
        let lower = (size / 16).clamp(16, 256).min(size / 2);
        let start = lower + rand::rng().random_range(0..(size - lower).max(1));
        let order = (start..size).chain(lower..start).chain(1..lower);
        for offset in order {
            let Some(address) = nth_address(cidr, offset) else { continue };
            if address != cidr.broadcast() && !self.taken.has_address(&address) {
                return Some(address);
            }
        }
        let detail = "failed to allocate a serviceIP: range is full";
        self.errors.push(FieldError::new(
            "spec.clusterIPs",
            oarlock_kinds::FieldErrorKind::Internal,
            Value::Null,
            detail,
        ));
        None
    }

    fn node_ports(&mut self, service: &mut Value) {
        if !wants_node_ports(service) {
            return;
        }
        let ports = object::section(service, "spec").get_mut("ports").and_then(Value::as_array_mut);
        for (at, port) in ports.into_iter().flatten().enumerate() {
            let protocol = protocol(port);
            let asked = port.get("nodePort").and_then(Value::as_i64).unwrap_or(0);
            let number = if asked == 0 { self.free_port(&protocol) } else { self.asked_port(at, asked, &protocol) };
            if let (Some(number), Some(port)) = (number, port.as_object_mut()) {
                port.insert("nodePort".into(), number.into());
            }
        }
        let local = object::text(service, "/spec/externalTrafficPolicy") == "Local";
        if service_type(service) == "LoadBalancer" && local {
            let asked = service.pointer("/spec/healthCheckNodePort").and_then(Value::as_u64).unwrap_or(0);
            if let Some(number) = (asked == 0).then(|| self.free_port("TCP")).flatten() {
                object::section(service, "spec").insert("healthCheckNodePort".into(), number.into());
            }
        }
    }

    fn asked_port(&mut self, at: usize, asked: i64, protocol: &str) -> Option<u16> {
        let path = format!("spec.ports[{at}].nodePort");
        let (low, high) = self.port_range;
        let Some(number) = u16::try_from(asked).ok() else {
            self.errors.push(FieldError::invalid(path, asked, "must be between 1 and 65535, inclusive"));
            return None;
        };
        let port = (number, Protocol::from(protocol));
        if self.own_ports.contains(&port) {
            return Some(number);
        }
        if !(low..=high).contains(&number) {
            let detail = format!("provided port is not in the valid range. The range of valid ports is {low}-{high}");
            self.errors.push(FieldError::invalid(path, asked, detail));
            return None;
        }
        if self.taken.has_port(&port) || self.ports.contains(&port) {
            self.errors.push(FieldError::invalid(path, asked, "provided port is already allocated"));
            return None;
        }
        self.ports.push(port);
        Some(number)
    }

    fn free_port(&mut self, protocol: &str) -> Option<u16> {
        let (low, high) = self.port_range;
        let size = u32::from(high.saturating_sub(low)) + 1;
        let start = rand::rng().random_range(0..size);
        for offset in 0..size {
            let number = low + u16::try_from((start + offset) % size).unwrap_or(0);
            let port = (number, Protocol::from(protocol));
            if !self.taken.has_port(&port) && !self.ports.contains(&port) && !self.own_ports.contains(&port) {
                self.ports.push(port);
                return Some(number);
            }
        }
        let detail = "failed to allocate a nodePort: range is full";
        self.errors.push(FieldError::new("spec.ports", oarlock_kinds::FieldErrorKind::Internal, Value::Null, detail));
        None
    }
}

fn family_of(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// The addresses that a Service asks for, in order.
fn asked_addresses(service: &Value) -> Vec<String> {
    let mut asked: Vec<String> = object::strings(service.pointer("/spec/clusterIPs")).map(str::to_owned).collect();
    let first = object::text(service, "/spec/clusterIP");
    if asked.is_empty() && !first.is_empty() {
        asked.push(first.to_owned());
    }
    asked.retain(|text| !text.is_empty() && text != "None");
    asked
}

fn range_size(cidr: IpNet) -> u64 {
    1u64 << u32::from(cidr.max_prefix_len() - cidr.prefix_len()).min(32)
}

/// The address at an offset from the start of a range.
pub(crate) fn nth_address(cidr: IpNet, offset: u64) -> Option<IpAddr> {
    let address = match cidr.network() {
        IpAddr::V4(network) => IpAddr::V4(Ipv4Addr::from(u32::from(network).checked_add(u32::try_from(offset).ok()?)?)),
        IpAddr::V6(network) => IpAddr::V6(Ipv6Addr::from(u128::from(network).checked_add(u128::from(offset))?)),
    };
    cidr.contains(&address).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_service_keeps_what_it_had() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.43.1.1", "clusterIPs": ["10.43.1.1"],
            "ports": [{"port": 80, "nodePort": 30080}]}});
        let mut new = json!({"spec": {"type": "NodePort", "ports": [{"port": 80}, {"port": 81}]}});
        keep_addresses(&old, &mut new);
        keep_node_ports(&old, &mut new);
        assert_eq!(new["spec"]["clusterIP"], "10.43.1.1");
        assert_eq!(new["spec"]["ports"][0]["nodePort"], 30080);
        let mut plain = json!({"spec": {"type": "ClusterIP", "ports": [{"port": 80, "nodePort": 30080}]}});
        keep_node_ports(&old, &mut plain);
        assert!(plain["spec"]["ports"][0].get("nodePort").is_none());
    }

    fn wanted<'t>(taken: &'t Taken, cidrs: &[&str]) -> Wanted<'t> {
        Wanted {
            name: "web".into(),
            cidrs: cidrs.iter().map(|text| text.parse().expect("a range")).collect(),
            port_range: (30_000, 32_767),
            taken,
            own_addresses: &[],
            own_ports: &[],
            addresses: Vec::new(),
            ports: Vec::new(),
            errors: Vec::new(),
        }
    }

    /// Families, policy and how many addresses a Service gets, or the first error.
    fn families_of(cidrs: &[&str], spec: Value) -> Result<(Value, String, Vec<String>), String> {
        let taken = Taken::default();
        let mut wanted = wanted(&taken, cidrs);
        let mut service = json!({"spec": spec});
        wanted.families(&mut service);
        wanted.cluster_addresses(&mut service);
        match wanted.errors.first() {
            Some(error) => Err(error.to_string()),
            None => Ok((
                service["spec"]["ipFamilies"].clone(),
                object::text(&service, "/spec/ipFamilyPolicy").to_owned(),
                object::strings(service.pointer("/spec/clusterIPs")).map(family_of_text).collect(),
            )),
        }
    }

    fn family_of_text(text: &str) -> String {
        text.parse().map_or_else(|_| text.to_owned(), |address| family_of(address).to_owned())
    }

    #[test]
    fn families_follow_the_policy_and_what_the_cluster_has() {
        const V4: &str = "10.43.0.0/16";
        const V6: &str = "fd43::/112";
        let selected = |more: Value| {
            let mut spec = json!({"selector": {"app": "web"}});
            spec.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            spec
        };
        let single = |family: &str| Ok((json!([family]), "SingleStack".to_owned(), vec![family.to_owned()]));
        assert_eq!(families_of(&[V4], selected(json!({}))), single("IPv4"));
        assert_eq!(families_of(&[V6, V4], selected(json!({}))), single("IPv6"), "the cluster's first family");
        assert_eq!(families_of(&[V4, V6], selected(json!({"ipFamilies": ["IPv6"]}))), single("IPv6"));
        assert_eq!(families_of(&[V4, V6], selected(json!({"clusterIP": "fd43::7"}))), single("IPv6"));
        let prefer = json!({"ipFamilyPolicy": "PreferDualStack"});
        let both = |policy: &str, first: &str, second: &str| {
            Ok((json!([first, second]), policy.to_owned(), vec![first.to_owned(), second.to_owned()]))
        };
        assert_eq!(families_of(&[V4, V6], selected(prefer.clone())), both("PreferDualStack", "IPv4", "IPv6"));
        let alone = Ok((json!(["IPv4"]), "PreferDualStack".to_owned(), vec!["IPv4".to_owned()]));
        assert_eq!(families_of(&[V4], selected(prefer)), alone);
        let asked = json!({"ipFamilies": ["IPv6", "IPv4"]});
        assert_eq!(families_of(&[V4, V6], selected(asked)), both("RequireDualStack", "IPv6", "IPv4"));
        let require = selected(json!({"ipFamilyPolicy": "RequireDualStack"}));
        assert!(families_of(&[V4], require).unwrap_err().contains("not configured for dual-stack"));
        assert!(
            families_of(&[V4], selected(json!({"ipFamilies": ["IPv6"]}))).unwrap_err().contains("not configured on")
        );
        let conflict = json!({"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "SingleStack"});
        assert!(families_of(&[V4, V6], selected(conflict)).unwrap_err().contains("when multiple IP families"));
        let anyones = Ok((json!(["IPv4", "IPv6"]), "RequireDualStack".to_owned(), vec!["None".to_owned()]));
        assert_eq!(families_of(&[V4], json!({"clusterIP": "None"})), anyones, "headless without a selector");
    }

    #[test]
    fn a_service_that_becomes_single_stack_keeps_its_first_family() {
        let old = json!({"spec": {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"],
            "clusterIP": "10.43.1.1", "clusterIPs": ["10.43.1.1", "fd43::7"]}});
        let mut new = json!({"spec": {"ipFamilyPolicy": "SingleStack"}});
        keep_addresses(&old, &mut new);
        drop_second_family(&old, &mut new);
        assert_eq!(new["spec"]["ipFamilies"], json!(["IPv4"]));
        assert_eq!(new["spec"]["clusterIPs"], json!(["10.43.1.1"]));
    }

    #[test]
    fn addresses_are_counted_from_the_start_of_the_range() {
        let cidr: IpNet = "10.43.0.0/16".parse().expect("a range");
        assert_eq!(nth_address(cidr, 1), Some("10.43.0.1".parse().expect("an address")));
        assert_eq!(range_size(cidr), 65536);
        assert_eq!(nth_address(cidr, 65536), None);
    }
}
