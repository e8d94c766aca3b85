//! NetworkPolicies, pods and selectors reduced to what filtering needs. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::service::Protocol;

/// An object by namespace and name.
pub type Name = (Arc<str>, Arc<str>);
pub type Labels = BTreeMap<String, String>;

/// A pod with addresses of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub namespace: Arc<str>,
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
    /// Container ports that have a name.
    pub ports: Vec<(Box<str>, Protocol, u16)>,
    /// Whether it runs on this node.
    pub local: bool,
}

impl Pod {
    /// `None` for pods without a network of their own, and for those that have ended: their addresses are another's.
    pub fn read(object: &core::Pod, own_node: &str) -> Option<Pod> {
        let (spec, status) = (object.spec.as_ref()?, object.status.as_ref()?);
        if spec.host_network == Some(true) || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let mut addresses: Vec<IpAddr> =
            status.pod_ips.iter().flatten().filter_map(|one| one.ip.parse().ok()).collect();
        if addresses.is_empty() {
            addresses.extend(status.pod_ip.as_ref().and_then(|ip| ip.parse::<IpAddr>().ok()));
        }
        let mut seen = std::collections::HashSet::new();
        addresses.retain(|address| seen.insert(*address));
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let named = |port: &core::ContainerPort| {
            let protocol = Protocol::parse(port.protocol.as_deref())?;
            Some((port.name.as_deref()?.into(), protocol, u16::try_from(port.container_port).ok()?))
        };
        Some(Pod {
            namespace: object.metadata.namespace.as_deref()?.into(),
            labels: object.metadata.labels.clone().unwrap_or_default(),
            addresses,
            ports: containers.flat_map(|container| container.ports.iter().flatten()).filter_map(named).collect(),
            local: spec.node_name.as_deref() == Some(own_node),
        })
    }
}

/// One requirement of a selector.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
    /// An operator that nobody knows selects nothing.
    Never,
}

#[cfg(test)]
thread_local! {
    /// How many selectors this thread has held against labels.
    pub static MATCHES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// A label selector; without requirements it selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(Vec<Requirement>);

impl Selector {
    pub fn read(selector: &LabelSelector) -> Selector {
        let equal = selector.match_labels.iter().flatten();
        let equal = equal.map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()]));
        let other = selector.match_expressions.iter().flatten().map(|term| {
            let key = term.key.clone();
            let mut values = term.values.clone().unwrap_or_default();
            values.sort();
            match term.operator.as_str() {
                "In" => Requirement::In(key, values),
                "NotIn" => Requirement::NotIn(key, values),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::DoesNotExist(key),
                _ => Requirement::Never,
            }
        });
        let mut all: Vec<Requirement> = equal.chain(other).collect();
        all.sort();
        Selector(all)
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        #[cfg(test)]
        MATCHES.set(MATCHES.get() + 1);
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
            Requirement::Never => false,
        })
    }
}

/// Pods by namespace and labels.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group {
    pub namespaces: Namespaces,
    pub pods: Selector,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Namespaces {
    One(Arc<str>),
    Selected(Selector),
}

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    Pods(Group),
    Block { net: IpNet, except: Vec<IpNet> },
}

/// What a connection is made to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortMatch {
    Any(Protocol),
    Range(Protocol, u16, u16),
    Named(Protocol, Box<str>),
}

/// Peers and ports that are allowed together; none of either means all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub peers: Option<Vec<Peer>>,
    pub ports: Option<Vec<PortMatch>>,
}

/// A NetworkPolicy; without rules for a direction it is not about that direction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    pub pods: Selector,
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    pub fn read(object: &networking::NetworkPolicy) -> Option<Policy> {
        let namespace: Arc<str> = object.metadata.namespace.as_deref()?.into();
        let spec = object.spec.clone().unwrap_or_default();
        let types = spec.policy_types.clone().unwrap_or_default();
        let (ingress, egress) = (spec.ingress.unwrap_or_default(), spec.egress.unwrap_or_default());
        let is_about = |direction: &str, by_default: bool| {
            if types.is_empty() { by_default } else { types.iter().any(|one| one == direction) }
        };
        let read = |ports: &Option<Vec<_>>, peers: &Option<Vec<_>>| Rule {
            peers: filled(peers).map(|all| all.iter().filter_map(|peer| read_peer(peer, &namespace)).collect()),
            ports: filled(ports).map(|all| all.iter().filter_map(read_port).collect()),
        };
        Some(Policy {
            pods: spec.pod_selector.as_ref().map(Selector::read).unwrap_or_default(),
            ingress: is_about("Ingress", true)
                .then(|| ingress.iter().map(|rule| read(&rule.ports, &rule.from)).collect()),
            egress: is_about("Egress", !egress.is_empty())
                .then(|| egress.iter().map(|rule| read(&rule.ports, &rule.to)).collect()),
        })
    }
}

fn filled<T>(list: &Option<Vec<T>>) -> Option<&Vec<T>> {
    list.as_ref().filter(|list| !list.is_empty())
}

fn read_peer(peer: &networking::NetworkPolicyPeer, own: &Arc<str>) -> Option<Peer> {
    if let Some(block) = &peer.ip_block {
        // What cannot be read allows nobody.
        let net: IpNet = block.cidr.parse().ok()?;
        let except = block.except.iter().flatten().map(|text| text.parse::<IpNet>()).collect::<Result<Vec<_>, _>>();
        let except = except.ok()?.iter().map(IpNet::trunc).collect();
        return Some(Peer::Block { net: net.trunc(), except });
    }
    let namespaces = match &peer.namespace_selector {
        Some(selector) => Namespaces::Selected(Selector::read(selector)),
        None => Namespaces::One(own.clone()),
    };
    let pods = peer.pod_selector.as_ref().map(Selector::read).unwrap_or_default();
    Some(Peer::Pods(Group { namespaces, pods }))
}

fn read_port(port: &networking::NetworkPolicyPort) -> Option<PortMatch> {
    let protocol = Protocol::parse(port.protocol.as_deref())?;
    Some(match &port.port {
        None => PortMatch::Any(protocol),
        Some(IntOrString::String(name)) => PortMatch::Named(protocol, name.as_str().into()),
        Some(IntOrString::Int(first)) => {
            let first = u16::try_from(*first).ok()?;
            let last = port.end_port.map_or(Some(first), |last| u16::try_from(last).ok())?;
            PortMatch::Range(protocol, first, last)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selectors_know_all_operators() {
        let read = |value| Selector::read(&serde_json::from_value(value).unwrap());
        let labels: Labels = [("app".to_owned(), "web".to_owned())].into();
        let one = |operator: &str, key: &str, values: &[&str]| {
            read(json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})).matches(&labels)
        };
        assert!(read(json!({})).matches(&labels) && read(json!({"matchLabels": {"app": "web"}})).matches(&labels));
        assert!(one("In", "app", &["a", "web"]) && !one("In", "tier", &["web"]));
        assert!(!one("NotIn", "app", &["web"]) && one("NotIn", "tier", &["web"]));
        assert!(one("Exists", "app", &[]) && !one("DoesNotExist", "app", &[]));
        assert!(!one("Unknown", "app", &[]));
    }

    #[test]
    fn without_policy_types_egress_counts_only_where_it_has_rules() {
        let read = |spec| {
            let object = json!({"metadata": {"namespace": "ns", "name": "p"}, "spec": spec});
            Policy::read(&serde_json::from_value(object).unwrap()).unwrap()
        };
        let silent = read(json!({"podSelector": {}}));
        assert_eq!((silent.ingress, silent.egress), (Some(vec![]), None));
        assert!(read(json!({"podSelector": {}, "egress": [{}]})).egress.is_some());
        let deny = read(json!({"podSelector": {}, "policyTypes": ["Egress"]}));
        assert_eq!((deny.ingress, deny.egress), (None, Some(vec![])));
    }
}
