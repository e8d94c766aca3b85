//! What a pod says about nodes and other pods, compiled: node affinity, tolerations, pod affinity, spreading. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{
    NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinityTerm, Taint, Toleration,
    TopologySpreadConstraint,
};
use oarlock_machinery::Selector;

pub(crate) type Labels = BTreeMap<String, String>;

fn requirement_matches(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let number = |text: &str| text.parse::<i64>().ok();
    let compare = |wanted: fn(i64, i64) -> bool| {
        let limit = values.first().and_then(|text| number(text));
        value.and_then(number).zip(limit).is_some_and(|(value, limit)| wanted(value, limit))
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values.iter().any(|candidate| candidate == value)),
        "NotIn" => value.is_none_or(|value| values.iter().all(|candidate| candidate != value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|value, limit| value > limit),
        "Lt" => compare(|value, limit| value < limit),
        _ => false,
    }
}

/// Whether a node is what the term asks for; a term that asks for nothing matches nothing.
pub(crate) fn node_term_matches(term: &NodeSelectorTerm, name: &str, labels: &Labels) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let field = |key: &str| (key == "metadata.name").then_some(name);
    expressions.iter().all(|one| requirement_matches(one, labels.get(&one.key).map(String::as_str)))
        && fields.iter().all(|one| requirement_matches(one, field(&one.key)))
}

pub(crate) fn node_selector_matches(selector: &NodeSelector, name: &str, labels: &Labels) -> bool {
    selector.node_selector_terms.iter().any(|term| node_term_matches(term, name, labels))
}

pub(crate) fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        "" | "Equal" => {
            !key.is_empty()
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        _ => false,
    }
}

/// A term of pod affinity or anti-affinity.
#[derive(Clone, Debug)]
pub(crate) struct PodTerm {
    pub topology_key: String,
    selector: Selector,
    namespaces: BTreeSet<String>,
    namespace_selector: Selector,
}

impl PodTerm {
    pub fn compile(term: &PodAffinityTerm, pod: &Pod) -> Self {
        // A selector that cannot be understood matches nothing; the API server refuses such pods.
        let mut selector = Selector::compile(term.label_selector.as_ref()).unwrap_or(Selector::nothing());
        let labels = pod.metadata.labels.as_ref();
        for (keys, negate) in [(&term.match_label_keys, false), (&term.mismatch_label_keys, true)] {
            for key in keys.iter().flatten() {
                if let Some(value) = labels.and_then(|labels| labels.get(key)) {
                    selector = selector.and(key, value, negate);
                }
            }
        }
        let mut namespaces: BTreeSet<String> = term.namespaces.iter().flatten().cloned().collect();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.extend(pod.metadata.namespace.clone());
        }
        let namespace_selector = Selector::compile(term.namespace_selector.as_ref()).unwrap_or(Selector::nothing());
        Self { topology_key: term.topology_key.clone(), selector, namespaces, namespace_selector }
    }

    pub fn matches(&self, namespace: &str, labels: &Labels, namespaces: &Namespaces) -> bool {
        let in_namespace = self.namespaces.contains(namespace)
            || self.namespace_selector.is_everything()
            || self.namespace_selector.matches(namespaces.get(namespace));
        in_namespace && self.selector.matches(Some(labels))
    }
}

/// Labels of all namespaces.
pub(crate) type Namespaces = std::collections::HashMap<String, Labels>;

/// How pods are counted for a spread constraint.
#[derive(Clone, Debug)]
pub(crate) enum Counted {
    Selector(Selector),
    /// The pods of the same controller: the default when a pod says nothing.
    Controller(String),
}

/// A topology spread constraint.
#[derive(Clone, Debug)]
pub(crate) struct Spread {
    pub topology_key: String,
    pub max_skew: i64,
    pub min_domains: i64,
    pub hard: bool,
    pub counted: Counted,
    pub honours_affinity: bool,
    pub honours_taints: bool,
    /// One of the system's defaults: nodes without the key are not held against the pod.
    pub system_default: bool,
}

impl Spread {
    pub fn compile(constraint: &TopologySpreadConstraint, pod: &Pod) -> Self {
        let mut selector = Selector::compile(constraint.label_selector.as_ref()).unwrap_or(Selector::nothing());
        let labels = pod.metadata.labels.as_ref();
        for key in constraint.match_label_keys.iter().flatten() {
            if let Some(value) = labels.and_then(|labels| labels.get(key)) {
                selector = selector.and(key, value, false);
            }
        }
        Self {
            topology_key: constraint.topology_key.clone(),
            max_skew: i64::from(constraint.max_skew),
            min_domains: i64::from(constraint.min_domains.unwrap_or(1)),
            hard: constraint.when_unsatisfiable == "DoNotSchedule",
            counted: Counted::Selector(selector),
            honours_affinity: constraint.node_affinity_policy.as_deref() != Some("Ignore"),
            honours_taints: constraint.node_taints_policy.as_deref() == Some("Honor"),
            system_default: false,
        }
    }

    /// The system's defaults: soft spreading of a controller's pods over nodes and zones.
    pub fn defaults(controller_uid: &str) -> Vec<Self> {
        let one = |topology_key: &str, max_skew| Self {
            topology_key: topology_key.to_owned(),
            max_skew,
            min_domains: 1,
            hard: false,
            counted: Counted::Controller(controller_uid.to_owned()),
            honours_affinity: true,
            honours_taints: false,
            system_default: true,
        };
        vec![one("kubernetes.io/hostname", 3), one("topology.kubernetes.io/zone", 5)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn term_matches(expressions: Value, labels: Value) -> bool {
        let term: NodeSelectorTerm = serde_json::from_value(json!({ "matchExpressions": expressions })).unwrap();
        node_term_matches(&term, "n1", &serde_json::from_value(labels).unwrap())
    }

    #[test]
    fn node_selector_operators() {
        let one = |operator: &str, values: Value| json!([{"key": "k", "operator": operator, "values": values}]);
        assert!(term_matches(one("In", json!(["a", "b"])), json!({"k": "b"})));
        assert!(term_matches(one("NotIn", json!(["a"])), json!({})));
        assert!(term_matches(one("Exists", json!([])), json!({"k": ""})));
        assert!(!term_matches(one("DoesNotExist", json!([])), json!({"k": ""})));
        assert!(term_matches(one("Gt", json!(["4"])), json!({"k": "5"})));
        assert!(!term_matches(one("Gt", json!(["4"])), json!({"k": "x"})));
        assert!(term_matches(one("Lt", json!(["4"])), json!({"k": "-1"})));
        assert!(!term_matches(json!([]), json!({"k": "a"})), "an empty term matches nothing");
    }

    #[test]
    fn match_fields_name_the_node() {
        let selector: NodeSelector = serde_json::from_value(json!({"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]},
            {"matchExpressions": [{"key": "k", "operator": "Exists"}]},
        ]}))
        .unwrap();
        assert!(node_selector_matches(&selector, "n2", &Labels::new()));
        assert!(!node_selector_matches(&selector, "n1", &Labels::new()));
    }

    #[test]
    fn a_pod_term_without_namespaces_means_the_pods_own() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"namespace": "a", "labels": {"v": "1"}}})).unwrap();
        let compile = |value: Value| PodTerm::compile(&serde_json::from_value(value).unwrap(), &pod);
        let selector = json!({"matchLabels": {"app": "x"}});
        let labels: Labels = serde_json::from_value(json!({"app": "x", "v": "2"})).unwrap();
        let namespaces = Namespaces::from([("b".to_owned(), Labels::from([("team".to_owned(), "t".to_owned())]))]);
        let own = compile(json!({"topologyKey": "k", "labelSelector": selector}));
        assert!(own.matches("a", &labels, &namespaces) && !own.matches("b", &labels, &namespaces));
        let by_label = compile(json!({"topologyKey": "k", "labelSelector": selector,
            "namespaceSelector": {"matchLabels": {"team": "t"}}}));
        assert!(by_label.matches("b", &labels, &namespaces) && !by_label.matches("a", &labels, &namespaces));
        let same_version = compile(json!({"topologyKey": "k", "labelSelector": selector, "matchLabelKeys": ["v"]}));
        assert!(!same_version.matches("a", &labels, &namespaces));
    }
}
