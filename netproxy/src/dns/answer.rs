//! What the cluster's own names mean, after the Kubernetes DNS specification 1.1.0. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use ipnet::IpNet;

use crate::cluster::Cluster;
use crate::service::{Endpoint, Protocol, Service, ServiceName, Shape, Slice};

const TTL_SECONDS: u32 = 5;
const SCHEMA_VERSION: &str = "1.1.0";

/// The part of the name space that this node answers for.
#[derive(Debug, Clone)]
pub struct Zone {
    pub domain: Name,
    pub cluster_cidrs: Vec<IpNet>,
    pub service_cidrs: Vec<IpNet>,
    pub dns_addresses: Vec<IpAddr>,
}

/// What a question about the cluster's own names gets.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Records, at least one.
    Records(Vec<Record>),
    /// The name exists and has nothing of that type; the record is the zone's SOA.
    NoData(Record),
    /// The name does not exist.
    NoName(Record),
    /// Another name, which has to be looked up in turn.
    Alias(Record, Name),
    /// Not one of the cluster's names.
    NotOurs,
}

/// What exists under a name, before the type of the question is looked at.
#[derive(Default)]
struct Found {
    exists: bool,
    records: Vec<RData>,
    additional: Vec<(Name, IpAddr)>,
}

impl Found {
    fn nothing() -> Found {
        Found::default()
    }

    fn empty() -> Found {
        Found { exists: true, ..Found::default() }
    }

    fn of(records: Vec<RData>) -> Found {
        Found { exists: true, records, additional: Vec::new() }
    }

    fn addresses(addresses: impl IntoIterator<Item = IpAddr>) -> Found {
        let unique: BTreeSet<IpAddr> = addresses.into_iter().collect();
        Found {
            exists: !unique.is_empty(),
            records: unique.into_iter().map(address_record).collect(),
            additional: vec![],
        }
    }
}

fn address_record(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

impl Zone {
    /// Answers a question, given the time as seconds since 1970 for the SOA's serial.
    pub fn answer(&self, cluster: &Cluster, name: &Name, kind: RecordType, now_seconds: u32) -> Answer {
        let soa_owner;
        let found = if self.domain.zone_of(name) {
            soa_owner = self.domain.clone();
            let Some(labels) = self.labels(name) else { return Answer::NoName(self.soa(&soa_owner, now_seconds)) };
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            if let Some(target) = self.alias(cluster, &labels) {
                let record = Record::from_rdata(name.clone(), TTL_SECONDS, RData::CNAME(CNAME(target.clone())));
                return Answer::Alias(record, target);
            }
            self.find(cluster, &labels, now_seconds)
        } else {
            match reverse_address(name) {
                Some(address)
                    if self.service_cidrs.iter().chain(&self.cluster_cidrs).any(|net| net.contains(&address)) =>
                {
                    soa_owner = name.base_name();
                    self.reverse(cluster, address)
                }
                _ => return Answer::NotOurs,
            }
        };
        if !found.exists {
            return Answer::NoName(self.soa(&soa_owner, now_seconds));
        }
        let wanted = |data: &RData| kind == RecordType::ANY || data.record_type() == kind;
        let records: Vec<Record> = found
            .records
            .into_iter()
            .filter(wanted)
            .map(|data| Record::from_rdata(name.clone(), TTL_SECONDS, data))
            .collect();
        if records.is_empty() { Answer::NoData(self.soa(&soa_owner, now_seconds)) } else { Answer::Records(records) }
    }

    /// The addresses that go with a service record's answer, so that the asker need not ask again.
    pub fn additional(&self, cluster: &Cluster, name: &Name, now_seconds: u32) -> Vec<Record> {
        let labels = self.labels(name).unwrap_or_default();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let additional = self.find(cluster, &labels, now_seconds).additional;
        let record = |(name, address): (Name, IpAddr)| Record::from_rdata(name, TTL_SECONDS, address_record(address));
        additional.into_iter().map(record).collect()
    }

    fn soa(&self, owner: &Name, now_seconds: u32) -> Record {
        let (server, master) = (self.child("ns.dns"), self.child("hostmaster"));
        let soa = SOA::new(server, master, now_seconds, 7200, 1800, 86_400, TTL_SECONDS);
        Record::from_rdata(owner.clone(), TTL_SECONDS, RData::SOA(soa))
    }

    /// A name below the domain. All that come here are made of labels that were names already.
    fn child(&self, text: &str) -> Name {
        let relative = Name::from_ascii(text).unwrap_or_default();
        relative.append_domain(&self.domain).unwrap_or_else(|_| self.domain.clone())
    }

    /// The labels below the domain in lower case, leftmost first; `None` when one is not text.
    fn labels(&self, name: &Name) -> Option<Vec<String>> {
        let count = usize::from(name.num_labels()).checked_sub(usize::from(self.domain.num_labels()))?;
        name.iter().take(count).map(|label| Some(std::str::from_utf8(label).ok()?.to_ascii_lowercase())).collect()
    }

    fn alias(&self, cluster: &Cluster, labels: &[&str]) -> Option<Name> {
        let [service, namespace, "svc"] = labels else { return None };
        match &cluster.service(&ServiceName::new(namespace, service))?.shape {
            Shape::External(target) => {
                let mut name = Name::from_ascii(target).ok()?;
                name.set_fqdn(true);
                Some(name)
            }
            _ => None,
        }
    }

    fn find(&self, cluster: &Cluster, labels: &[&str], now_seconds: u32) -> Found {
        match labels {
            [] => {
                let soa = self.soa(&self.domain, now_seconds).data;
                Found::of(vec![soa, RData::NS(NS(self.child("ns.dns")))])
            }
            ["dns-version"] => Found::of(vec![RData::TXT(TXT::new(vec![SCHEMA_VERSION.to_owned()]))]),
            ["dns"] | ["svc"] | ["pod"] => Found::empty(),
            ["ns", "dns"] => Found::addresses(self.dns_addresses.iter().copied()),
            [namespace, "svc" | "pod"] => {
                if cluster.has_namespace(namespace) {
                    Found::empty()
                } else {
                    Found::nothing()
                }
            }
            [address, namespace, "pod"] => self.pod(cluster, address, namespace),
            [.., namespace, "svc"] => {
                let (below, service) = match &labels[..labels.len() - 2] {
                    [below @ .., service] => (below, service),
                    [] => return Found::nothing(),
                };
                let name = ServiceName::new(namespace, service);
                match cluster.service(&name) {
                    Some(service) => self.below_service(cluster, service, below),
                    None => Found::nothing(),
                }
            }
            _ => Found::nothing(),
        }
    }

    /// `a-b-c-d.<namespace>.pod`: the address itself, as long as pods can have it.
    fn pod(&self, cluster: &Cluster, label: &str, namespace: &str) -> Found {
        let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
        let v6 = || label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6);
        match v4.or_else(|_| v6()) {
            Ok(address)
                if self.cluster_cidrs.iter().any(|net| net.contains(&address)) && cluster.has_namespace(namespace) =>
            {
                Found::addresses([address])
            }
            _ => Found::nothing(),
        }
    }

    fn below_service(&self, cluster: &Cluster, service: &Service, below: &[&str]) -> Found {
        let slices: Vec<&Slice> = cluster.slices(&service.name).collect();
        match below {
            [] => {
                let addresses = match &service.shape {
                    Shape::Virtual(addresses) => addresses.to_vec(),
                    _ => published(service, &slices).map(|endpoint| endpoint.address).collect(),
                };
                let mut found = Found::addresses(addresses);
                // A headless Service without endpoints has no records, and its name does not exist.
                if found.exists {
                    let all = self.service_records(service, &slices, |_, _| true);
                    found.records.extend(all.records);
                    found.additional = all.additional;
                }
                found
            }
            [protocol @ ("_tcp" | "_udp" | "_sctp")] => {
                let exists =
                    service.ports.iter().any(|port| port.protocol.label() == &protocol[1..] && !port.name.is_empty());
                if exists { Found::empty() } else { Found::nothing() }
            }
            [port, protocol] => {
                let (Some(port), Some(protocol)) = (port.strip_prefix('_'), protocol.strip_prefix('_')) else {
                    return Found::nothing();
                };
                let is_wanted = |name: &str, of: Protocol| !name.is_empty() && name == port && of.label() == protocol;
                self.service_records(service, &slices, is_wanted)
            }
            [hostname] if service.shape == Shape::Headless => {
                let named = published(service, &slices).filter(|endpoint| endpoint_label(endpoint) == *hostname);
                Found::addresses(named.map(|endpoint| endpoint.address))
            }
            _ => Found::nothing(),
        }
    }

    /// SRV records of the ports that `is_wanted` chooses by name and protocol.
    fn service_records(
        &self,
        service: &Service,
        slices: &[&Slice],
        is_wanted: impl Fn(&str, Protocol) -> bool,
    ) -> Found {
        const WEIGHT: u16 = 100;
        let own = format!("{}.{}.svc", service.name.name, service.name.namespace);
        let mut found = Found::nothing();
        let mut add = |port: u16, target: Name, addresses: &[IpAddr]| {
            let record = RData::SRV(SRV::new(0, WEIGHT, port, target.clone()));
            if !found.records.contains(&record) {
                found.records.push(record);
                let additional = addresses.iter().map(|address| (target.clone(), *address));
                found.additional.extend(additional);
            }
        };
        if let Shape::Virtual(addresses) = &service.shape {
            for port in service.ports.iter().filter(|port| is_wanted(&port.name, port.protocol)) {
                add(port.number, self.child(&own), addresses);
            }
        } else {
            for slice in slices {
                for port in &slice.ports {
                    if is_wanted(&port.name, port.protocol) {
                        for endpoint in slice.endpoints.iter().filter(|endpoint| is_published(service, endpoint)) {
                            let target = self.child(&format!("{}.{own}", endpoint_label(endpoint)));
                            add(port.number, target, &[endpoint.address]);
                        }
                    }
                }
            }
        }
        found.exists = !found.records.is_empty();
        found
    }

    /// PTR: the Service with an address, or the named endpoint.
    fn reverse(&self, cluster: &Cluster, address: IpAddr) -> Found {
        let mut targets = BTreeSet::new();
        for name in cluster.services_at(address) {
            let Some(service) = cluster.service(name) else { continue };
            let own = format!("{}.{}.svc", name.name, name.namespace);
            if service.virtual_addresses().contains(&address) {
                targets.insert(own);
            } else {
                let slices: Vec<&Slice> = cluster.slices(name).collect();
                let here = published(service, &slices).filter(|endpoint| endpoint.address == address);
                targets.extend(here.map(|endpoint| format!("{}.{own}", endpoint_label(endpoint))));
            }
        }
        let records: Vec<RData> = targets.iter().map(|target| RData::PTR(PTR(self.child(target)))).collect();
        Found { exists: !records.is_empty(), records, additional: Vec::new() }
    }
}

fn is_published(service: &Service, endpoint: &Endpoint) -> bool {
    endpoint.ready || service.publish_not_ready
}

fn published<'a>(service: &'a Service, slices: &'a [&'a Slice]) -> impl Iterator<Item = &'a Endpoint> {
    slices.iter().flat_map(|slice| &slice.endpoints).filter(|endpoint| is_published(service, endpoint))
}

/// The endpoint's own label: its hostname, or its address with dashes.
fn endpoint_label(endpoint: &Endpoint) -> String {
    match &endpoint.hostname {
        Some(hostname) if !hostname.is_empty() => hostname.to_ascii_lowercase(),
        _ => endpoint.address.to_string().replace(['.', ':'], "-"),
    }
}

/// The address that a name under `in-addr.arpa` or `ip6.arpa` stands for, if it is a whole one.
fn reverse_address(name: &Name) -> Option<IpAddr> {
    let net = name.parse_arpa_name().ok()?;
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr().to_string().parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn zone() -> Zone {
        Zone {
            domain: Name::from_ascii("cluster.local.").unwrap(),
            cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap(), "fd42::/48".parse().unwrap()],
            service_cidrs: vec!["10.43.0.0/16".parse().unwrap(), "fd43::/112".parse().unwrap()],
            dns_addresses: vec!["10.43.0.10".parse().unwrap(), "fd43::a".parse().unwrap()],
        }
    }

    fn service(name: &str, shape: Shape) -> Service {
        Service {
            name: ServiceName::new("default", name),
            shape,
            ports: Box::new([crate::service::Port {
                name: "http".into(),
                protocol: Protocol::TCP,
                number: 80,
                node_port: None,
            }]),
            affinity_seconds: None,
            internal_local: false,
            external_local: false,
            ingress: Box::default(),
            external_ips: Box::default(),
            source_ranges: Box::default(),
            health_check_port: None,
            publish_not_ready: false,
            other_proxy: false,
            balancer_class: None,
        }
    }

    fn endpoint(address: &str, hostname: Option<&str>, ready: bool) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            ready,
            serving: ready,
            terminating: false,
            local: true,
            node: None,
            hostname: hostname.map(Into::into),
            hints: None,
        }
    }

    fn cluster() -> Cluster {
        let mut cluster = Cluster::default();
        let addresses = Box::new(["10.43.0.5".parse().unwrap(), "fd43::5".parse().unwrap()]);
        let all = [
            service("web", Shape::Virtual(addresses)),
            service("db", Shape::Headless),
            service("empty", Shape::Headless),
            service("elsewhere", Shape::External("example.org".into())),
        ];
        for one in all {
            cluster.set_service(&one.name.clone(), Some(one));
        }
        let slice = Slice {
            service: ServiceName::new("default", "db"),
            name: "db-1".into(),
            ports: Box::new([crate::service::SlicePort { name: "http".into(), protocol: Protocol::TCP, number: 8080 }]),
            endpoints: Box::new([
                endpoint("10.42.0.2", Some("db-0"), true),
                endpoint("10.42.0.3", None, true),
                endpoint("10.42.0.4", Some("db-2"), false),
            ]),
        };
        cluster.set_slice(&("default".into(), "db-1".into()), Some(slice), &mut HashSet::new());
        cluster
    }

    fn ask(name: &str, kind: RecordType) -> Answer {
        zone().answer(&cluster(), &Name::from_ascii(name).unwrap(), kind, 1)
    }

    fn data(name: &str, kind: RecordType) -> Vec<String> {
        match ask(name, kind) {
            Answer::Records(records) => records.iter().map(|record| record.data.to_string()).collect(),
            other => panic!("{name} {kind}: {other:?}"),
        }
    }

    #[test]
    fn a_service_has_its_addresses_by_family() {
        assert_eq!(data("web.default.svc.cluster.local.", RecordType::A), ["10.43.0.5"]);
        assert_eq!(data("WEB.Default.svc.cluster.local.", RecordType::AAAA), ["fd43::5"]);
    }

    #[test]
    fn a_headless_service_has_its_ready_endpoints() {
        assert_eq!(data("db.default.svc.cluster.local.", RecordType::A), ["10.42.0.2", "10.42.0.3"]);
        assert_eq!(data("db-0.db.default.svc.cluster.local.", RecordType::A), ["10.42.0.2"]);
        assert_eq!(data("10-42-0-3.db.default.svc.cluster.local.", RecordType::A), ["10.42.0.3"]);
        assert!(matches!(ask("db-2.db.default.svc.cluster.local.", RecordType::A), Answer::NoName(_)));
        assert!(matches!(ask("empty.default.svc.cluster.local.", RecordType::A), Answer::NoName(_)));
    }

    #[test]
    fn ports_have_service_records() {
        assert_eq!(
            data("_http._tcp.web.default.svc.cluster.local.", RecordType::SRV),
            ["0 100 80 web.default.svc.cluster.local."]
        );
        assert_eq!(
            data("_http._tcp.db.default.svc.cluster.local.", RecordType::SRV),
            ["0 100 8080 db-0.db.default.svc.cluster.local.", "0 100 8080 10-42-0-3.db.default.svc.cluster.local."]
        );
        let name = Name::from_ascii("_http._tcp.db.default.svc.cluster.local.").unwrap();
        assert_eq!(zone().additional(&cluster(), &name, 1).len(), 2);
        assert!(matches!(ask("_http._udp.web.default.svc.cluster.local.", RecordType::SRV), Answer::NoName(_)));
    }

    #[test]
    fn a_name_without_the_type_is_told_from_a_name_that_does_not_exist() {
        for name in [
            "web.default.svc.cluster.local.",
            "default.svc.cluster.local.",
            "svc.cluster.local.",
            "_tcp.web.default.svc.cluster.local.",
        ] {
            assert!(matches!(ask(name, RecordType::MX), Answer::NoData(_)), "{name}");
        }
        for name in [
            "nope.default.svc.cluster.local.",
            "web.other.svc.cluster.local.",
            "other.svc.cluster.local.",
            "x.cluster.local.",
            "a.b.c.web.default.svc.cluster.local.",
        ] {
            assert!(matches!(ask(name, RecordType::A), Answer::NoName(_)), "{name}");
        }
        assert_eq!(ask("example.org.", RecordType::A), Answer::NotOurs);
    }

    #[test]
    fn addresses_have_names() {
        assert_eq!(data("5.0.43.10.in-addr.arpa.", RecordType::PTR), ["web.default.svc.cluster.local."]);
        assert_eq!(data("2.0.42.10.in-addr.arpa.", RecordType::PTR), ["db-0.db.default.svc.cluster.local."]);
        let in_ipv6 = "5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.4.d.f.ip6.arpa.";
        assert_eq!(data(in_ipv6, RecordType::PTR), ["web.default.svc.cluster.local."]);
        assert!(matches!(ask("9.0.43.10.in-addr.arpa.", RecordType::PTR), Answer::NoName(_)));
        assert_eq!(ask("1.1.168.192.in-addr.arpa.", RecordType::PTR), Answer::NotOurs);
    }

    #[test]
    fn the_rest_of_the_specification() {
        assert_eq!(data("dns-version.cluster.local.", RecordType::TXT), ["1.1.0"]);
        assert_eq!(data("10-42-0-9.default.pod.cluster.local.", RecordType::A), ["10.42.0.9"]);
        assert_eq!(data("fd42--9.default.pod.cluster.local.", RecordType::AAAA), ["fd42::9"]);
        assert_eq!(data("ns.dns.cluster.local.", RecordType::AAAA), ["fd43::a"]);
        assert!(matches!(ask("8-8-8-8.default.pod.cluster.local.", RecordType::A), Answer::NoName(_)));
        assert!(
            matches!(ask("elsewhere.default.svc.cluster.local.", RecordType::A), Answer::Alias(_, target) if target.to_ascii() == "example.org.")
        );
        assert!(matches!(ask("cluster.local.", RecordType::SOA), Answer::Records(_)));
    }
}
