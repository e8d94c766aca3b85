//! Services and EndpointSlices reduced to what routing and names need: pure, and small enough to keep tens of thousands.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

use crate::announce::{NodeId, node_id};

/// Labels of Services whose packets are none of this proxy's business: another's, or nobody's.
const OTHER_PROXY_LABELS: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// A Service by namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ServiceName {
    pub fn new(namespace: &str, name: &str) -> ServiceName {
        ServiceName { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A transport protocol by its IP number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Protocol(pub u8);

impl Protocol {
    pub const TCP: Protocol = Protocol(libc::IPPROTO_TCP as u8);
    pub const UDP: Protocol = Protocol(libc::IPPROTO_UDP as u8);
    pub const SCTP: Protocol = Protocol(libc::IPPROTO_SCTP as u8);

    pub fn parse(text: Option<&str>) -> Option<Protocol> {
        match text.unwrap_or("TCP") {
            "TCP" => Some(Protocol::TCP),
            "UDP" => Some(Protocol::UDP),
            "SCTP" => Some(Protocol::SCTP),
            _ => None,
        }
    }

    /// As DNS service records name it.
    pub fn label(self) -> &'static str {
        match self {
            Protocol::UDP => "udp",
            Protocol::SCTP => "sctp",
            _ => "tcp",
        }
    }
}

/// How a Service is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// By virtual addresses.
    Virtual(Box<[IpAddr]>),
    /// By its endpoints' own addresses.
    Headless,
    /// By another name.
    External(String),
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub number: u16,
    pub node_port: Option<u16>,
}

/// A Service as far as packets and names are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: ServiceName,
    pub shape: Shape,
    pub ports: Box<[Port]>,
    /// How long a client keeps its endpoint; none without session affinity.
    pub affinity_seconds: Option<u32>,
    pub internal_local: bool,
    pub external_local: bool,
    /// Addresses of load balancers that pass packets on unchanged.
    pub ingress: Box<[IpAddr]>,
    /// Addresses that somebody else leads to the nodes.
    pub external_ips: Box<[IpAddr]>,
    /// Who may use a load balancer's addresses; everybody without.
    pub source_ranges: Box<[IpNet]>,
    /// Where load balancers ask whether this node has endpoints.
    pub health_check_port: Option<u16>,
    pub publish_not_ready: bool,
    /// Another proxy takes care of the Service's packets, or none is to.
    pub other_proxy: bool,
    /// Whose balancer the Service asks for; nobody's in particular without.
    pub balancer_class: Option<Box<str>>,
}

impl Service {
    /// `None` when the object has no name or no specification, which the API server does not let happen.
    pub fn read(object: &core::Service) -> Option<Service> {
        let metadata = &object.metadata;
        let spec = object.spec.as_ref()?;
        let labels = metadata.labels.as_ref();
        let local = |policy: &Option<String>| policy.as_deref() == Some("Local");
        Some(Service {
            name: ServiceName::new(metadata.namespace.as_deref()?, metadata.name.as_deref()?),
            shape: shape(spec),
            ports: spec.ports.iter().flatten().filter_map(port).collect(),
            affinity_seconds: affinity_seconds(spec),
            internal_local: local(&spec.internal_traffic_policy),
            external_local: local(&spec.external_traffic_policy),
            ingress: ingress(object),
            external_ips: spec.external_ips.iter().flatten().filter_map(|text| text.parse().ok()).collect(),
            source_ranges: source_ranges(spec),
            health_check_port: health_check_port(spec),
            publish_not_ready: spec.publish_not_ready_addresses == Some(true),
            other_proxy: labels
                .is_some_and(|labels| OTHER_PROXY_LABELS.iter().any(|label| labels.contains_key(*label))),
            balancer_class: spec.load_balancer_class.as_deref().map(Into::into),
        })
    }

    pub fn virtual_addresses(&self) -> &[IpAddr] {
        match &self.shape {
            Shape::Virtual(addresses) => addresses,
            _ => &[],
        }
    }
}

fn shape(spec: &core::ServiceSpec) -> Shape {
    if spec.type_.as_deref() == Some("ExternalName") {
        return Shape::External(spec.external_name.clone().unwrap_or_default());
    }
    let all = spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.iter().filter(|_| spec.cluster_ips.is_none()));
    let addresses: Box<[IpAddr]> = all.filter_map(|text| text.parse().ok()).collect();
    if addresses.is_empty() { Shape::Headless } else { Shape::Virtual(addresses) }
}

fn port(port: &core::ServicePort) -> Option<Port> {
    Some(Port {
        name: port.name.as_deref().unwrap_or_default().into(),
        protocol: Protocol::parse(port.protocol.as_deref())?,
        number: u16::try_from(port.port).ok()?,
        node_port: port.node_port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0),
    })
}

fn affinity_seconds(spec: &core::ServiceSpec) -> Option<u32> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let configured =
        spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    Some(configured.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(DEFAULT_AFFINITY_SECONDS))
}

fn is_load_balancer(spec: &core::ServiceSpec) -> bool {
    spec.type_.as_deref() == Some("LoadBalancer")
}

/// Ranges that cannot be read let nobody in who is not in another one, so they are no reason to let everybody in.
fn source_ranges(spec: &core::ServiceSpec) -> Box<[IpNet]> {
    let texts = spec.load_balancer_source_ranges.iter().flatten().filter(|_| is_load_balancer(spec));
    let nowhere = || IpNet::from(IpAddr::from([0; 4]));
    texts.map(|text| text.trim().parse().map_or_else(|_| nowhere(), |net: IpNet| net.trunc())).collect()
}

fn health_check_port(spec: &core::ServiceSpec) -> Option<u16> {
    let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let port = spec.health_check_node_port.filter(|_| is_local && is_load_balancer(spec))?;
    u16::try_from(port).ok().filter(|port| *port != 0)
}

fn ingress(object: &core::Service) -> Box<[IpAddr]> {
    let is_load_balancer = object.spec.as_ref().is_some_and(is_load_balancer);
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref()).filter(|_| is_load_balancer);
    let entries = status.into_iter().flat_map(|status| status.ingress.iter().flatten());
    // With mode Proxy the balancer sends to node ports or pods, and its address must not be short-circuited.
    let direct = entries.filter(|entry| entry.ip_mode.as_deref() != Some("Proxy"));
    direct.filter_map(|entry| entry.ip.as_ref()?.parse().ok()).collect()
}

/// One endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// Whether it runs on this node.
    pub local: bool,
    pub node: Option<NodeId>,
    pub hostname: Option<Box<str>>,
    pub hints: Option<Box<Hints>>,
}

/// Whom an endpoint is meant for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hints {
    pub zones: Vec<String>,
    pub nodes: Vec<String>,
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    pub service: ServiceName,
    pub name: Arc<str>,
    pub ports: Box<[SlicePort]>,
    pub endpoints: Box<[Endpoint]>,
}

/// A port of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub number: u16,
}

impl Slice {
    /// `None` for slices that belong to no Service or have names for addresses.
    pub fn read(object: &discovery::EndpointSlice, own_node: &str) -> Option<Slice> {
        let metadata = &object.metadata;
        let service = metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
        if object.address_type == "FQDN" {
            return None;
        }
        let port = |port: &discovery::EndpointPort| {
            let protocol = Protocol::parse(port.protocol.as_deref())?;
            let number = u16::try_from(port.port?).ok()?;
            Some(SlicePort { name: port.name.as_deref().unwrap_or_default().into(), protocol, number })
        };
        let endpoints = object.endpoints.iter().flatten().filter_map(|endpoint| read_endpoint(endpoint, own_node));
        Some(Slice {
            service: ServiceName::new(metadata.namespace.as_deref()?, service),
            name: metadata.name.as_deref()?.into(),
            ports: object.ports.iter().flatten().filter_map(port).collect(),
            endpoints: endpoints.collect(),
        })
    }

    /// When that came about which the slice was written for, where it says so and its packets are this proxy's business.
    pub fn trigger(object: &discovery::EndpointSlice) -> Option<Timestamp> {
        let labels = object.metadata.labels.as_ref();
        if labels.is_some_and(|labels| OTHER_PROXY_LABELS.iter().any(|label| labels.contains_key(*label))) {
            return None;
        }
        object.metadata.annotations.as_ref()?.get(TRIGGER_ANNOTATION)?.parse().ok()
    }

    /// The number of the port of a name and protocol.
    pub fn port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        self.ports.iter().find(|port| &*port.name == name && port.protocol == protocol).map(|port| port.number)
    }
}

fn read_endpoint(endpoint: &discovery::Endpoint, own_node: &str) -> Option<Endpoint> {
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
    Some(Endpoint {
        // The addresses of one endpoint are interchangeable by the API's definition, and consumers take the first.
        address: endpoint.addresses.first()?.parse().ok()?,
        ready,
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(ready),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        local: endpoint.node_name.as_deref() == Some(own_node),
        node: endpoint.node_name.as_deref().map(node_id),
        hostname: endpoint.hostname.as_deref().map(Into::into),
        hints: hints(endpoint),
    })
}

fn hints(endpoint: &discovery::Endpoint) -> Option<Box<Hints>> {
    let hints = endpoint.hints.as_ref()?;
    let zones: Vec<String> = hints.for_zones.iter().flatten().map(|zone| zone.name.clone()).collect();
    let nodes: Vec<String> = hints.for_nodes.iter().flatten().map(|node| node.name.clone()).collect();
    (!zones.is_empty() || !nodes.is_empty()).then(|| Box::new(Hints { zones, nodes }))
}
