//! Which nodes a volume can be had on. Pure.

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, PersistentVolume};

/// Whether the volume's node affinity takes the node; one without takes any.
pub(super) fn reaches(volume: &PersistentVolume, node: &Node) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let Some(required) = affinity.and_then(|affinity| affinity.required.as_ref()) else { return true };
    required.node_selector_terms.iter().any(|term| fits(term, node))
}

/// A term without any requirement fits nothing.
fn fits(term: &NodeSelectorTerm, node: &Node) -> bool {
    let labels = node.metadata.labels.as_ref();
    let label = |key: &str| labels.and_then(|labels| labels.get(key)).map(String::as_str);
    let field = |key: &str| (key == "metadata.name").then_some(node.metadata.name.as_deref()).flatten();
    let (expressions, fields) = (term.match_expressions.as_deref(), term.match_fields.as_deref());
    let (expressions, fields) = (expressions.unwrap_or_default(), fields.unwrap_or_default());
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|requirement| holds(requirement, label(&requirement.key)))
        && fields.iter().all(|requirement| holds(requirement, field(&requirement.key)))
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let among = || value.is_some_and(|value| values.iter().any(|known| known == value));
    let number = || Some((value?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
    match requirement.operator.as_str() {
        "In" => among(),
        "NotIn" => !among(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => number().is_some_and(|(has, bound)| has > bound),
        "Lt" => number().is_some_and(|(has, bound)| has < bound),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_volume_is_had_where_one_of_its_terms_says() {
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {"zone": "a", "rack": "7"}}})).unwrap();
        let reached = |terms: serde_json::Value| {
            let spec = json!({"nodeAffinity": {"required": {"nodeSelectorTerms": terms}}});
            reaches(&serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": spec})).unwrap(), &node)
        };
        let label = |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        for (term, expected) in [
            (label("zone", "In", &["a", "b"]), true),
            (label("zone", "NotIn", &["a"]), false),
            (label("disk", "Exists", &[]), false),
            (label("disk", "DoesNotExist", &[]), true),
            (label("rack", "Gt", &["6"]), true),
            (label("rack", "Lt", &["7"]), false),
            (json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}), true),
            (json!({}), false),
        ] {
            assert_eq!(reached(json!([term])), expected, "{term}");
        }
        assert!(reached(json!([label("zone", "In", &["x"]), label("zone", "In", &["a"])])), "one term is enough");
        assert!(reaches(&PersistentVolume::default(), &node));
    }
}
