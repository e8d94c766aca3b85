//! What the cluster's own names mean, after the Kubernetes DNS specification 1.1.0. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use ipnet::IpNet;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use crate::cluster::Cluster;
use crate::service::{Endpoint, Protocol, Service, ServiceName, Shape, Slice};

const TTL_SECONDS: u32 = 5;
const SCHEMA_VERSION: &str = "1.1.0";
/// What answers give for all targets alike: there is no preference among endpoints.
const SRV_WEIGHT: u16 = 100;

/// The part of the name space that this node answers for.
#[derive(Debug, Clone)]
pub struct Zone {
    pub domain: Name,
    pub cluster_cidrs: Vec<IpNet>,
    pub service_cidrs: Vec<IpNet>,
    pub dns_addresses: Vec<IpAddr>,
}

/// A question about a name.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub name: &'a Name,
    pub kind: RecordType,
    /// Seconds since 1970, for the SOA's serial.
    pub now_seconds: u32,
    /// More records than these have no room in the message.
    pub most: usize,
    /// Decides the order of addresses, so that not all askers go to the first.
    pub seed: u64,
}

/// Records, and what they are good for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Records {
    /// At least one.
    pub answers: Vec<Record>,
    /// The addresses that go with service records, so that the asker need not ask again.
    pub additional: Vec<Record>,
    /// There are more than were asked for at most.
    pub is_cut: bool,
}

/// What a question about the cluster's own names gets.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Records(Records),
    /// The name exists and has nothing of that type; the record is the zone's SOA.
    NoData(Record),
    /// The name does not exist.
    NoName(Record),
    /// Another name, which has to be looked up in turn.
    Alias(Record, Name),
    /// Not one of the cluster's names.
    NotOurs,
    /// One of the cluster's names, of which nothing was heard yet: not all Services and endpoints have been listed.
    Unknown,
}

/// What exists under a name, of the type that is asked for.
#[derive(Default)]
struct Found {
    exists: bool,
    addresses: Vec<IpAddr>,
    others: Vec<RData>,
    /// Ports and addresses by the label of an endpoint, or none for the Service itself.
    targets: Targets,
}

#[derive(Default)]
struct Targets {
    of: Name,
    by_label: BTreeMap<Option<String>, (BTreeSet<u16>, BTreeSet<IpAddr>)>,
}

impl Found {
    fn nothing() -> Found {
        Found::default()
    }

    fn empty() -> Found {
        Found { exists: true, ..Found::default() }
    }

    fn of(others: Vec<RData>) -> Found {
        Found { exists: !others.is_empty(), others, ..Found::default() }
    }

    fn addresses(addresses: impl IntoIterator<Item = IpAddr>) -> Found {
        let mut addresses: Vec<IpAddr> = addresses.into_iter().collect();
        addresses.sort_unstable();
        addresses.dedup();
        Found { exists: !addresses.is_empty(), addresses, ..Found::default() }
    }

    /// The records of the type that is asked for, as many as there is room for.
    fn records(mut self, asked: &Asked<'_>) -> Records {
        let wanted = |kind: RecordType| asked.kind == RecordType::ANY || asked.kind == kind;
        self.addresses.retain(|address| wanted(address_type(*address)));
        self.others.retain(|data| wanted(data.record_type()));
        let mut targets = 0;
        if wanted(RecordType::SRV) {
            targets = self.targets.by_label.values().map(|(ports, _)| ports.len()).sum();
        }
        let is_cut = self.addresses.len() + self.others.len() + targets > asked.most;
        let (addresses, _) = self.addresses.partial_shuffle(&mut SmallRng::seed_from_u64(asked.seed), asked.most);
        let addresses = addresses.iter().map(|address| address_record(*address));
        let record = |data| Record::from_rdata(asked.name.clone(), TTL_SECONDS, data);
        let mut answers: Vec<Record> = addresses.chain(self.others).take(asked.most).map(record).collect();
        let mut additional = Vec::new();
        if targets > 0 {
            let room = asked.most - answers.len();
            answers.extend(self.targets.records(asked.name, room));
            // What has no room in the message is looked up by itself.
            if !is_cut {
                additional = self.targets.additional();
            }
        }
        Records { answers, additional, is_cut }
    }
}

impl Targets {
    fn name(&self, label: Option<&String>) -> Option<Name> {
        match label {
            Some(label) => self.of.prepend_label(label.as_str()).ok(),
            None => Some(self.of.clone()),
        }
    }

    fn records(&self, owner: &Name, most: usize) -> Vec<Record> {
        let all = self.by_label.iter().filter_map(|(label, (ports, _))| Some((self.name(label.as_ref())?, ports)));
        let all = all.flat_map(|(target, ports)| ports.iter().map(move |port| (*port, target.clone())));
        let record = |(port, target)| {
            Record::from_rdata(owner.clone(), TTL_SECONDS, RData::SRV(SRV::new(0, SRV_WEIGHT, port, target)))
        };
        all.take(most).map(record).collect()
    }

    fn additional(&self) -> Vec<Record> {
        let all = self.by_label.iter().filter_map(|(label, (_, all))| Some((self.name(label.as_ref())?, all)));
        let record = |(name, address): (Name, IpAddr)| Record::from_rdata(name, TTL_SECONDS, address_record(address));
        all.flat_map(|(name, all)| all.iter().map(move |address| (name.clone(), *address))).map(record).collect()
    }
}

fn address_type(address: IpAddr) -> RecordType {
    if address.is_ipv4() { RecordType::A } else { RecordType::AAAA }
}

fn address_record(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

impl Zone {
    /// Answers a question.
    pub fn answer(&self, cluster: &Cluster, asked: &Asked<'_>) -> Answer {
        let is_ours = self.domain.zone_of(asked.name);
        let soa = || {
            let owner = if is_ours { self.domain.clone() } else { asked.name.base_name() };
            self.soa(&owner, asked.now_seconds)
        };
        let (found, is_certain) = if is_ours {
            let Some(labels) = self.labels(asked.name) else { return Answer::NoName(soa()) };
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            if let Some(target) = self.alias(cluster, &labels) {
                let record = RData::CNAME(CNAME(target.clone()));
                return Answer::Alias(Record::from_rdata(asked.name.clone(), TTL_SECONDS, record), target);
            }
            (self.find(cluster, &labels, asked), is_certain(cluster, &labels))
        } else {
            let Some(address) = reverse_address(asked.name) else { return Answer::NotOurs };
            let found = self.reverse(cluster, address);
            // Endpoints may be anywhere; of the other addresses there, those know who gave them out.
            if !found.exists && !self.is_own(address) {
                return Answer::NotOurs;
            }
            let is_certain = cluster.is_listed() || found.exists;
            (found, is_certain)
        };
        if !is_certain {
            return Answer::Unknown;
        }
        if !found.exists {
            return Answer::NoName(soa());
        }
        let records = found.records(asked);
        if records.answers.is_empty() && !records.is_cut {
            return Answer::NoData(soa());
        }
        Answer::Records(records)
    }

    /// Whether nobody else gives out an address.
    fn is_own(&self, address: IpAddr) -> bool {
        self.service_cidrs.iter().chain(&self.cluster_cidrs).any(|net| net.contains(&address))
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

    fn find(&self, cluster: &Cluster, labels: &[&str], asked: &Asked<'_>) -> Found {
        match labels {
            [] => {
                let soa = self.soa(&self.domain, asked.now_seconds).data;
                Found::of(vec![soa, RData::NS(NS(self.child("ns.dns")))])
            }
            ["dns-version"] => Found::of(vec![RData::TXT(TXT::new(vec![SCHEMA_VERSION.to_owned()]))]),
            ["dns"] | ["svc"] | ["pod"] => Found::empty(),
            ["ns", "dns"] => Found::addresses(self.dns_addresses.iter().copied()),
            [namespace, "svc"] => {
                if cluster.has_namespace(namespace) {
                    Found::empty()
                } else {
                    Found::nothing()
                }
            }
            [_, "pod"] => Found::empty(),
            [address, _, "pod"] => pod(address),
            [.., namespace, "svc"] => {
                let (below, service) = match &labels[..labels.len() - 2] {
                    [below @ .., service] => (below, service),
                    [] => return Found::nothing(),
                };
                let name = ServiceName::new(namespace, service);
                match cluster.service(&name) {
                    Some(service) => self.below_service(cluster, service, below, asked.kind),
                    None => Found::nothing(),
                }
            }
            _ => Found::nothing(),
        }
    }

    fn below_service(&self, cluster: &Cluster, service: &Service, below: &[&str], kind: RecordType) -> Found {
        let slices: Vec<&Slice> = cluster.slices(&service.name).collect();
        match below {
            [] => {
                let mut found = match &service.shape {
                    Shape::Virtual(addresses) => Found::addresses(addresses.iter().copied()),
                    _ => Found::addresses(published(service, &slices).map(|endpoint| endpoint.address)),
                };
                // A headless Service without endpoints has no records, and its name does not exist.
                if found.exists {
                    found.targets = self.service_records(service, &slices, kind, |_, _| true).targets;
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
                self.service_records(service, &slices, kind, is_wanted)
            }
            [hostname] if service.shape == Shape::Headless => {
                let address = label_address(hostname);
                let is_named = |endpoint: &&Endpoint| match endpoint.hostname.as_deref() {
                    Some(own) if !own.is_empty() => own.eq_ignore_ascii_case(hostname),
                    _ => Some(endpoint.address) == address,
                };
                Found::addresses(published(service, &slices).filter(is_named).map(|endpoint| endpoint.address))
            }
            _ => Found::nothing(),
        }
    }

    /// SRV records of the ports that `is_wanted` chooses by name and protocol; for another type only whether there are any.
    fn service_records(
        &self,
        service: &Service,
        slices: &[&Slice],
        kind: RecordType,
        is_wanted: impl Fn(&str, Protocol) -> bool,
    ) -> Found {
        let is_asked = matches!(kind, RecordType::SRV | RecordType::ANY);
        let mut found = Found::nothing();
        found.targets.of = self.child(&format!("{}.{}.svc", service.name.name, service.name.namespace));
        if let Shape::Virtual(addresses) = &service.shape {
            for port in service.ports.iter().filter(|port| is_wanted(&port.name, port.protocol)) {
                let (ports, all) = found.targets.by_label.entry(None).or_default();
                ports.insert(port.number);
                all.extend(addresses);
            }
            found.exists = !found.targets.by_label.is_empty();
            return found;
        }
        for slice in slices {
            for port in slice.ports.iter().filter(|port| is_wanted(&port.name, port.protocol)) {
                for endpoint in slice.endpoints.iter().filter(|endpoint| is_published(service, endpoint)) {
                    found.exists = true;
                    if !is_asked {
                        return found;
                    }
                    let label = Some(endpoint_label(endpoint));
                    let (ports, all) = found.targets.by_label.entry(label).or_default();
                    ports.insert(port.number);
                    all.insert(endpoint.address);
                }
            }
        }
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
        Found::of(targets.iter().map(|target| RData::PTR(PTR(self.child(target)))).collect())
    }
}

/// Whether what was heard so far is enough to say what is at a name, and above all that nothing is.
fn is_certain(cluster: &Cluster, labels: &[&str]) -> bool {
    if cluster.is_listed() {
        return true;
    }
    match labels {
        [.., service, namespace, "svc"] => {
            let service = cluster.service(&ServiceName::new(namespace, service));
            service.is_some_and(|service| service.shape != Shape::Headless)
        }
        [_, "svc"] => false,
        _ => true,
    }
}

/// `a-b-c-d.<namespace>.pod`: the address itself, whether or not somebody has it, as CoreDNS answers with `pods insecure`.
fn pod(label: &str) -> Found {
    label_address(label).map_or_else(Found::nothing, |address| Found::addresses([address]))
}

/// The address that is written with dashes.
fn label_address(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
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
mod tests;
