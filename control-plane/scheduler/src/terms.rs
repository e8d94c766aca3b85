//! What a pod says about nodes and other pods, compiled: tolerations, pod affinity, spreading. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm, Taint, Toleration, TopologySpreadConstraint};
use oarlock_machinery::Selector;

pub(crate) type Labels = BTreeMap<String, String>;

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
