//! Terms by which objects choose nodes: node affinity of pods and volumes, topologies of classes. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, TopologySelectorTerm};

type Labels = BTreeMap<String, String>;

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
pub fn node_term_matches(term: &NodeSelectorTerm, name: &str, labels: &Labels) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let field = |key: &str| (key == "metadata.name").then_some(name);
    expressions.iter().all(|one| requirement_matches(one, labels.get(&one.key).map(String::as_str)))
        && fields.iter().all(|one| requirement_matches(one, field(&one.key)))
}

/// Whether one of the selector's terms is met by the node.
pub fn node_selector_matches(selector: &NodeSelector, name: &str, labels: &Labels) -> bool {
    selector.node_selector_terms.iter().any(|term| node_term_matches(term, name, labels))
}

/// Whether a node with these labels is in one of the topologies; without any, every node is.
pub fn topologies_match(terms: &[TopologySelectorTerm], labels: &Labels) -> bool {
    let met = |term: &TopologySelectorTerm| {
        let all = term.match_label_expressions.as_deref().unwrap_or_default();
        !all.is_empty() && all.iter().all(|one| labels.get(&one.key).is_some_and(|value| one.values.contains(value)))
    };
    terms.is_empty() || terms.iter().any(met)
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
    fn a_topology_names_all_its_labels() {
        let terms: Vec<TopologySelectorTerm> = serde_json::from_value(json!([
            {"matchLabelExpressions": [{"key": "zone", "values": ["a", "b"]}, {"key": "rack", "values": ["7"]}]},
            {"matchLabelExpressions": [{"key": "zone", "values": ["c"]}]}, {}]))
        .unwrap();
        let in_one = |labels: Value| topologies_match(&terms, &serde_json::from_value(labels).unwrap());
        assert!(in_one(json!({"zone": "b", "rack": "7"})) && in_one(json!({"zone": "c"})));
        assert!(!in_one(json!({"zone": "a"})) && !in_one(json!({})));
        assert!(topologies_match(&[], &Labels::new()));
    }
}
