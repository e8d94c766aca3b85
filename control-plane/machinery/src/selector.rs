//! Label selectors, compiled once and matched against labels without allocation.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

type Labels = BTreeMap<String, String>;

/// A selector that cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{operator:?} is not a valid label selector operator")]
pub struct SelectorError {
    pub operator: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
}

impl Requirement {
    fn matches(&self, labels: Option<&Labels>) -> bool {
        let get = |key: &str| labels.and_then(|labels| labels.get(key));
        match self {
            Self::In(key, values) => get(key).is_some_and(|value| values.contains(value)),
            Self::NotIn(key, values) => get(key).is_none_or(|value| !values.contains(value)),
            Self::Exists(key) => get(key).is_some(),
            Self::DoesNotExist(key) => get(key).is_none(),
        }
    }
}

/// A compiled selector; `None` inside matches nothing, an empty list everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Selector(Option<Vec<Requirement>>);

impl Selector {
    pub const fn nothing() -> Self {
        Self(None)
    }

    pub const fn everything() -> Self {
        Self(Some(Vec::new()))
    }

    /// A missing selector matches nothing, an empty one everything.
    pub fn compile(selector: Option<&LabelSelector>) -> Result<Self, SelectorError> {
        selector.map_or(Ok(Self::nothing()), Self::from_label_selector)
    }

    pub fn from_label_selector(selector: &LabelSelector) -> Result<Self, SelectorError> {
        let mut requirements: Vec<Requirement> = equalities(selector.match_labels.iter().flatten());
        for expression in selector.match_expressions.iter().flatten() {
            let key = expression.key.clone();
            let values = || expression.values.clone().unwrap_or_default();
            requirements.push(match expression.operator.as_str() {
                "In" => Requirement::In(key, values()),
                "NotIn" => Requirement::NotIn(key, values()),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::DoesNotExist(key),
                other => return Err(SelectorError { operator: other.to_owned() }),
            });
        }
        Ok(Self(Some(requirements)))
    }

    /// A Service's selector: all labels must be equal.
    pub fn from_map(map: &Labels) -> Self {
        Self(Some(equalities(map.iter())))
    }

    /// Adds "`key` is `value`" (or, negated, "is not").
    #[must_use]
    pub fn and(mut self, key: &str, value: &str, negate: bool) -> Self {
        if let Some(requirements) = &mut self.0 {
            let (key, values) = (key.to_owned(), vec![value.to_owned()]);
            requirements.push(if negate { Requirement::NotIn(key, values) } else { Requirement::In(key, values) });
        }
        self
    }

    /// Whether it selects every object.
    pub fn is_everything(&self) -> bool {
        self.0.as_ref().is_some_and(Vec::is_empty)
    }

    pub fn matches(&self, labels: Option<&Labels>) -> bool {
        self.0.as_ref().is_some_and(|all| all.iter().all(|requirement| requirement.matches(labels)))
    }
}

fn equalities<'a>(pairs: impl Iterator<Item = (&'a String, &'a String)>) -> Vec<Requirement> {
    pairs.map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(json: serde_json::Value) -> Selector {
        Selector::from_label_selector(&serde_json::from_value(json).unwrap()).unwrap()
    }

    fn labels(json: serde_json::Value) -> Labels {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn missing_selects_nothing_and_empty_selects_everything() {
        let some = labels(serde_json::json!({"a": "b"}));
        assert!(!Selector::compile(None).unwrap().matches(Some(&some)));
        assert!(selector(serde_json::json!({})).matches(Some(&some)));
        assert!(selector(serde_json::json!({})).matches(None));
    }

    #[test]
    fn operators_follow_the_api() {
        let app = labels(serde_json::json!({"app": "web", "tier": "front"}));
        let matches = |expression: serde_json::Value, labels: Option<&Labels>| {
            selector(serde_json::json!({ "matchExpressions": [expression] })).matches(labels)
        };
        let cases = [
            (serde_json::json!({"key": "app", "operator": "In", "values": ["web", "db"]}), true, false),
            (serde_json::json!({"key": "app", "operator": "NotIn", "values": ["web"]}), false, true),
            (serde_json::json!({"key": "tier", "operator": "Exists"}), true, false),
            (serde_json::json!({"key": "tier", "operator": "DoesNotExist"}), false, true),
        ];
        for (expression, on_app, on_nothing) in cases {
            assert_eq!(matches(expression.clone(), Some(&app)), on_app, "{expression}");
            assert_eq!(matches(expression.clone(), None), on_nothing, "{expression}");
        }
    }

    #[test]
    fn an_unknown_operator_is_an_error() {
        let bad = serde_json::from_value(serde_json::json!({"matchExpressions": [{"key": "a", "operator": "Like"}]}));
        let error = Selector::from_label_selector(&bad.unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "\"Like\" is not a valid label selector operator");
    }
}
