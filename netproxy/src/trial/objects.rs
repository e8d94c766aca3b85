//! A case as the objects of the API that the proxy is told of, and as configuration.

use ipnet::IpNet;
use serde_json::{Value, json};

use super::case::{
    Case, EndpointCase, Ground, Kind, NodePorts, Place, Range, ServiceCase, State, Transport, far_node, node_name, zone,
};
use super::generate::Trial;
use crate::config::Config;

const SLICES: u8 = 2;

/// What the API server holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Objects {
    pub services: Vec<Value>,
    pub slices: Vec<Value>,
    pub zone: Option<&'static str>,
}

impl Trial {
    pub fn objects(&self, case: &Case) -> Objects {
        let mut slices = Vec::new();
        for service in &case.services {
            let grounds = self.grounds.iter().zip(&service.families).filter(|(_, has)| **has);
            for (ground, _) in grounds {
                slices.extend((0..SLICES).map(|number| slice(ground, service, number)));
            }
        }
        Objects {
            services: case.services.iter().map(|one| service(&self.grounds, one)).collect(),
            slices,
            zone: case.node.has_zone.then(zone),
        }
    }

    /// Sets up what the case says about the node.
    pub fn configure(&self, case: &Case, config: &mut Config) {
        config.node_port_addresses = match case.node.node_ports {
            NodePorts::Everywhere => Vec::new(),
            NodePorts::First => self.grounds.iter().map(|ground| ground.node[0].into()).collect(),
            NodePorts::Nowhere => self.grounds.iter().map(|ground| ground.outside.into()).collect(),
        };
        let external = self.grounds.iter().map(|ground| ground.external);
        config.external_ips_allowed = if case.node.external_allowed { external.collect() } else { Vec::new() };
    }
}

/// A Service in a few lines, for a failure.
pub fn describe(service: &ServiceCase) -> String {
    format!("{service:#?}")
}

fn protocol(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
        Transport::Sctp => "SCTP",
    }
}

fn service(grounds: &[Ground], service: &ServiceCase) -> Value {
    let mine = || grounds.iter().zip(&service.families).filter(|(_, has)| **has).map(|(ground, _)| ground);
    let cluster_ips: Vec<String> = match service.kind {
        Kind::Headless => vec!["None".to_owned()],
        _ => mine().map(|ground| ground.cluster_address(service.number).to_string()).collect(),
    };
    let has_node_port = matches!(service.kind, Kind::NodePort | Kind::LoadBalancer);
    let ports: Vec<Value> = service
        .ports
        .iter()
        .map(|port| {
            json!({
                "name": protocol(port.transport).to_lowercase(), "protocol": protocol(port.transport),
                "port": ServiceCase::PORT, "targetPort": port.target,
                "nodePort": has_node_port.then(|| service.node_port()),
            })
        })
        .collect();
    let policy = |local: bool| if local { "Local" } else { "Cluster" };
    let externals: Vec<String> = match service.external {
        true => mine().map(|ground| ground.external_address(service.number).to_string()).collect(),
        false => Vec::new(),
    };
    let seconds = service.affinity_seconds;
    let ingress = |ground: &Ground| {
        let mode = if service.balancer_is_proxy { "Proxy" } else { "VIP" };
        json!({"ip": ground.balancer_address(service.number).to_string(), "ipMode": mode})
    };
    let ingress: Vec<Value> =
        if service.kind == Kind::LoadBalancer { mine().map(ingress).collect() } else { Vec::new() };
    let labels = match (service.other_proxy, service.number % 2) {
        (false, _) => json!({}),
        (true, 0) => json!({"service.kubernetes.io/service-proxy-name": "other"}),
        (true, _) => json!({"service.kubernetes.io/headless": ""}),
    };
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": service.name(), "namespace": "default", "labels": labels},
        "spec": {
            "type": match service.kind {
                Kind::ClusterIp | Kind::Headless => "ClusterIP",
                Kind::NodePort => "NodePort",
                Kind::LoadBalancer => "LoadBalancer",
            },
            "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ports": ports,
            "internalTrafficPolicy": policy(service.internal_local),
            "externalTrafficPolicy": policy(service.external_local),
            "sessionAffinity": if seconds.is_some() { "ClientIP" } else { "None" },
            "sessionAffinityConfig": seconds.map(|seconds| json!({"clientIP": {"timeoutSeconds": seconds}})),
            "externalIPs": externals,
            "loadBalancerSourceRanges": ranges(grounds, service),
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn ranges(grounds: &[Ground], service: &ServiceCase) -> Vec<String> {
    let everybody = |is_ipv4: bool| if is_ipv4 { "0.0.0.0/0" } else { "::/0" }.to_owned();
    let of = |ground: &Ground, range: &Range| -> Vec<String> {
        let single = |address| IpNet::from(address).to_string();
        match range {
            Range::Everybody => vec![everybody(ground.is_ipv4())],
            Range::Nonsense => vec!["everywhere".to_owned()],
            Range::Pods => vec![ground.network.cluster_cidr.to_string()],
            Range::Node => vec![single(ground.node[0])],
            Range::Outside => vec![single(ground.outside)],
            Range::Nobody => vec!["198.18.0.0/15".to_owned(), "2001:db8:ffff::/48".to_owned()],
            // With both families there is no other one, and this lets nobody in either.
            Range::OtherFamily if grounds.len() > 1 => vec!["198.18.0.0/16".to_owned()],
            Range::OtherFamily => vec![everybody(!ground.is_ipv4())],
        }
    };
    service.ranges.iter().flat_map(|range| grounds.iter().flat_map(move |ground| of(ground, range))).collect()
}

fn slice(ground: &Ground, service: &ServiceCase, number: u8) -> Value {
    let family = if ground.is_ipv4() { "IPv4" } else { "IPv6" };
    let ports = service.ports.iter().take(if service.sparse && number == 1 { 1 } else { usize::MAX });
    let ports: Vec<Value> = ports
        .map(|port| {
            let protocol = protocol(port.transport);
            json!({"name": protocol.to_lowercase(), "port": port.target, "protocol": protocol})
        })
        .collect();
    let endpoints: Vec<Value> =
        service.endpoints.iter().filter(|one| one.slice == number).map(|one| endpoint(ground, one)).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{}-{}-{number}", service.name(), family.to_lowercase()), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service.name()},
        },
        "addressType": family, "ports": ports, "endpoints": endpoints,
    })
}

fn endpoint(ground: &Ground, endpoint: &EndpointCase) -> Value {
    let named = |names: &[&str]| -> Vec<Value> { names.iter().map(|name| json!({"name": name})).collect() };
    let is_terminating = matches!(endpoint.state, State::Leaving | State::Gone);
    let mut object = json!({
        "addresses": [ground.place(endpoint.place).to_string()],
        "nodeName": if endpoint.place == Place::Far { far_node() } else { node_name() },
        "conditions": {
            "ready": endpoint.state == State::Ready,
            "serving": matches!(endpoint.state, State::Ready | State::Leaving),
            "terminating": is_terminating,
        },
    });
    if !endpoint.for_zones.is_empty() || !endpoint.for_nodes.is_empty() {
        object["hints"] = json!({"forZones": named(&endpoint.for_zones), "forNodes": named(&endpoint.for_nodes)});
    }
    object
}
