//! The proxy's own planning, writing to tables in memory, and packets traced through these.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::Service as ServiceObject;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use oarlock_nft::trace::{Outcome, Packet, trace};
use oarlock_nft::{Bytes, Fake, Kernel, Value as ElementValue};

use super::case::{Case, Ground, Probe, Source, Transport, node_name};
use super::generate::Trial;
use super::model::Verdict;
use super::objects::Objects;
use crate::cluster::{Cluster, SliceName};
use crate::config::Config;
use crate::element::Map;
use crate::plan::{self, Context};
use crate::proxy;
use crate::rules;
use crate::service::{Protocol, Service, ServiceName, Slice};
use crate::sync::Proxier;

/// How many differences are told at most.
const TOLD: usize = 12;
/// So many numbers are drawn, which is enough for every endpoint to have its turn.
const DRAWN: u32 = 24;

/// One family's tables in memory.
struct Side {
    proxier: Proxier<Fake>,
    context: Context,
    settings: rules::Settings,
    locals: Vec<IpAddr>,
}

/// The tables that a node's proxy would write.
pub struct Tracer {
    sides: Vec<Side>,
    cluster: Cluster,
    services: BTreeSet<ServiceName>,
    slices: BTreeSet<SliceName>,
}

impl Tracer {
    /// Of a node with this configuration. Tables that another one left are taken over, as by a proxy that starts anew.
    pub fn new(trial: &Trial, config: &Config, before: Option<Tracer>) -> Tracer {
        let mut kernels: Vec<Fake> = before
            .map(|mut tracer| tracer.sides.iter_mut().map(|side| side.proxier.kernel_mut().clone()).collect())
            .unwrap_or_default();
        kernels.resize_with(trial.grounds.len(), Fake::new);
        let side = |(ground, kernel): (&Ground, Fake)| {
            let settings = proxy::settings(config, &ground.network, trial.masquerade_bridged);
            let locals: Vec<IpAddr> = ground.node.into_iter().chain([ground.network.cluster_dns]).collect();
            let own = locals.clone();
            Side {
                proxier: Proxier::new(kernel, settings.clone(), move || own.clone()),
                context: Context::new(config, &ground.network),
                settings,
                locals,
            }
        };
        Tracer {
            sides: trial.grounds.iter().zip(kernels).map(side).collect(),
            cluster: Cluster::default(),
            services: BTreeSet::new(),
            slices: BTreeSet::new(),
        }
    }

    /// Takes the place of all objects that were there.
    pub fn apply(&mut self, objects: &Objects) {
        let mut changed = self.take_services(objects);
        self.take_slices(objects, &mut changed);
        let zone = objects.zone.map(str::to_owned);
        if self.sides.iter().any(|side| side.context.zone != zone) {
            self.sides.iter_mut().for_each(|side| side.context.zone = zone.clone());
            changed.extend(self.cluster.names());
        }
        let cluster = &self.cluster;
        for side in &mut self.sides {
            for name in &changed {
                let slices: Vec<_> = cluster.slices(name).collect();
                let service = cluster.service(name);
                let entries = service.map(|service| plan::service(service, &slices, &side.context));
                side.proxier.stage(name, &entries.unwrap_or_default());
            }
            let committed = side.proxier.commit().expect("tables in memory take what the kernel takes");
            if committed.endpoints_removed {
                side.proxier.release_clients().expect("tables in memory take what the kernel takes");
            }
        }
    }

    fn take_services(&mut self, objects: &Objects) -> HashSet<ServiceName> {
        let read = |object: &serde_json::Value| {
            let object: ServiceObject = serde_json::from_value(object.clone()).expect("a Service");
            Service::read(&object).expect("a Service with a name")
        };
        let services: Vec<Service> = objects.services.iter().map(read).collect();
        let names: BTreeSet<ServiceName> = services.iter().map(|service| service.name.clone()).collect();
        let mut changed = HashSet::new();
        for gone in self.services.difference(&names) {
            self.cluster.set_service(gone, None);
            changed.insert(gone.clone());
        }
        self.services = names;
        for service in services {
            let name = service.name.clone();
            if self.cluster.set_service(&name, Some(service)) {
                changed.insert(name);
            }
        }
        changed
    }

    fn take_slices(&mut self, objects: &Objects, changed: &mut HashSet<ServiceName>) {
        let read = |object: &serde_json::Value| {
            let object: EndpointSlice = serde_json::from_value(object.clone()).expect("an EndpointSlice");
            Slice::read(&object, node_name()).expect("a slice of a Service")
        };
        let slices: Vec<Slice> = objects.slices.iter().map(read).collect();
        let name = |slice: &Slice| -> SliceName { (slice.service.namespace.clone(), slice.name.clone()) };
        let names: BTreeSet<SliceName> = slices.iter().map(name).collect();
        for gone in self.slices.difference(&names) {
            self.cluster.set_slice(gone, None, changed);
        }
        self.slices = names;
        for slice in slices {
            self.cluster.set_slice(&name(&slice), Some(slice), changed);
        }
    }

    /// Whether the tables do to a packet what the model says.
    pub fn check(&mut self, trial: &Trial, case: &Case, probe: &Probe, wanted: &Verdict) -> Result<(), String> {
        let (ground, side) = (&trial.grounds[probe.ground], &mut self.sides[probe.ground]);
        let protocol = match probe.transport {
            Transport::Tcp => Protocol::TCP,
            Transport::Udp => Protocol::UDP,
            Transport::Sctp => Protocol::SCTP,
        };
        let packet = Packet {
            protocol: protocol.0,
            source: ground.source(probe.source),
            source_port: 40_000,
            destination: probe.to.ip(),
            destination_port: probe.to.port(),
            from_node: probe.source == Source::Node,
        };
        let mut seen: BTreeSet<SocketAddr> = BTreeSet::new();
        for number in 0..DRAWN {
            let outcome = trace(side.proxier.kernel_mut(), &side.locals, packet, |modulus| number % modulus);
            let told = || format!("the tracer says {outcome:?}, the model {wanted:?}, of {probe:?}");
            match (outcome, wanted) {
                (Outcome::Rejected, Verdict::Refused) | (Outcome::Dropped, Verdict::Dropped) => return Ok(()),
                (Outcome::Delivered { destination, port, masqueraded }, Verdict::Untouched) => {
                    let as_it_was = SocketAddr::new(destination, port) == probe.to && !masqueraded;
                    return if as_it_was { Ok(()) } else { Err(told()) };
                }
                (Outcome::Delivered { destination, port, masqueraded }, Verdict::Answered { any_of, .. }) => {
                    let to = SocketAddr::new(destination, port);
                    if any_of.get(&to).is_none_or(|answer| answer.masqueraded != masqueraded) {
                        return Err(told());
                    }
                    seen.insert(to);
                }
                _ => return Err(told()),
            }
        }
        let Verdict::Answered { any_of, sticky } = wanted else { return Ok(()) };
        if *sticky && seen.len() == 1 || !sticky && seen.len() == any_of.len() {
            return Ok(());
        }
        Err(format!("the tracer came to {seen:?} of {any_of:?}, of {probe:?} in {}", case.services.len()))
    }

    /// Everything that the tables here and those of a kernel do not have in common, but for what clients got.
    pub fn differences(&mut self, kernel: &mut impl Kernel) -> Vec<String> {
        let mut all = Vec::new();
        for side in &mut self.sides {
            let table = &side.settings.table;
            let fake = side.proxier.kernel_mut();
            let mut compare = |what: &str, here: Vec<String>, there: Vec<String>| {
                let (here, there): (BTreeSet<_>, BTreeSet<_>) =
                    (here.into_iter().collect(), there.into_iter().collect());
                let of = |set: &BTreeSet<String>, other: &BTreeSet<String>, who: &str| -> Vec<String> {
                    set.difference(other)
                        .map(|one| format!("{what} of {}: only {who} has {one}", table.family.name()))
                        .collect()
                };
                all.extend(of(&here, &there, "the tracer"));
                all.extend(of(&there, &here, "the kernel"));
            };
            let (here, there) = (fake.table_comment(table), kernel.table_comment(table));
            compare("marker", vec![format!("{:?}", here.ok())], vec![format!("{:?}", there.ok())]);
            compare("chains", fake.chains(table).unwrap_or_default(), kernel.chains(table).unwrap_or_default());
            let (here, there) = (fake.rule_count(table), kernel.rule_count(table));
            compare("rules", vec![format!("{:?}", here.ok())], vec![format!("{:?}", there.ok())]);
            for set in Map::ALL.iter().map(|map| map.name()).chain(rules::CLASSES) {
                compare(set, elements(fake, table, set), elements(kernel, table, set));
            }
        }
        all.truncate(TOLD);
        all
    }

    /// What every element of the tables is, map by map.
    pub fn elements(&mut self) -> Vec<HashMap<&'static str, BTreeSet<String>>> {
        let of = |side: &mut Side| {
            let (table, fake) = (&side.settings.table, side.proxier.kernel_mut());
            let names = Map::ALL.iter().map(|map| map.name()).chain(rules::CLASSES);
            let mut all: HashMap<&str, BTreeSet<String>> =
                names.map(|name| (name, elements(fake, table, name).into_iter().collect())).collect();
            all.insert("chains", fake.chains(table).unwrap_or_default().into_iter().collect());
            all
        };
        self.sides.iter_mut().map(of).collect()
    }
}

fn elements(kernel: &mut impl Kernel, table: &oarlock_nft::Table, set: &str) -> Vec<String> {
    let text = |(key, value): (Bytes, Option<ElementValue>)| format!("{key:?} {value:?}");
    let found = kernel.elements(table, set).ok().flatten().unwrap_or_default();
    found.into_iter().map(|element| text((element.key, element.value))).collect()
}
