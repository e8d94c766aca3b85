//! Label and field selectors: parsing as clients write them, and matching.

use oarlock_kinds::Kind;

use crate::error::{ApiError, ApiResult};
use crate::object::Index;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Term {
    Equals(String, String),
    NotEquals(String, String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
    Greater(String, i64),
    Less(String, i64),
}

/// A conjunction of label terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LabelSelector(Vec<Term>);

impl LabelSelector {
    pub(crate) fn parse(text: &str) -> ApiResult<LabelSelector> {
        let mut terms = Vec::new();
        for part in split_terms(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    continue;
                }
                return Err(unparsable(text));
            }
            terms.push(parse_term(part).ok_or_else(|| unparsable(text))?);
        }
        Ok(LabelSelector(terms))
    }

    pub(crate) fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, labels: &[(Box<str>, Box<str>)]) -> bool {
        let value = |key: &str| labels.iter().find(|(name, _)| **name == *key).map(|(_, value)| &**value);
        self.0.iter().all(|term| match term {
            Term::Equals(key, wanted) => value(key) == Some(wanted),
            Term::NotEquals(key, wanted) => value(key) != Some(wanted),
            Term::In(key, set) => value(key).is_some_and(|value| set.iter().any(|one| one == value)),
            Term::NotIn(key, set) => !value(key).is_some_and(|value| set.iter().any(|one| one == value)),
            Term::Exists(key) => value(key).is_some(),
            Term::Absent(key) => value(key).is_none(),
            Term::Greater(key, limit) => value(key).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *limit),
            Term::Less(key, limit) => value(key).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *limit),
        })
    }
}

fn unparsable(text: &str) -> ApiError {
    ApiError::bad_request(format!("unable to parse requirement: {text:?} is not a valid label selector"))
}

/// Splits at commas that are not inside parentheses.
fn split_terms(text: &str) -> Vec<&str> {
    let mut depth = 0usize;
    text.split(|c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
    .collect()
}

fn parse_term(part: &str) -> Option<Term> {
    if let Some(key) = part.strip_prefix('!') {
        return label_key(key.trim()).map(Term::Absent);
    }
    if let Some((left, set)) = part.split_once('(') {
        let set: Vec<String> = set.strip_suffix(')')?.split(',').map(|value| value.trim().to_owned()).collect();
        if !set.iter().all(|value| is_label_value(value)) {
            return None;
        }
        let left = left.trim_end();
        let (key, operator) = left.rsplit_once(char::is_whitespace)?;
        let key = label_key(key.trim())?;
        return match operator {
            "in" => Some(Term::In(key, set)),
            "notin" => Some(Term::NotIn(key, set)),
            _ => None,
        };
    }
    let value = |text: &str| Some(text.trim().to_owned()).filter(|text| is_label_value(text));
    if let Some((key, wanted)) = part.split_once("!=") {
        return Some(Term::NotEquals(label_key(key.trim())?, value(wanted)?));
    }
    if let Some((key, wanted)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Some(Term::Equals(label_key(key.trim())?, value(wanted)?));
    }
    if let Some((key, limit)) = part.split_once('>') {
        return Some(Term::Greater(label_key(key.trim())?, limit.trim().parse().ok()?));
    }
    if let Some((key, limit)) = part.split_once('<') {
        return Some(Term::Less(label_key(key.trim())?, limit.trim().parse().ok()?));
    }
    label_key(part).map(Term::Exists)
}

fn label_key(text: &str) -> Option<String> {
    let (prefix, name) = text.split_once('/').unwrap_or(("", text));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let good = !name.is_empty() && name.len() <= 63 && name.chars().all(plain) && prefix.chars().all(plain);
    good.then(|| text.to_owned())
}

fn is_label_value(text: &str) -> bool {
    text.len() <= 63 && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// A conjunction of field comparisons.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FieldSelector(Vec<(String, String, bool)>);

impl FieldSelector {
    /// Parses, and refuses fields the kind does not select by.
    pub(crate) fn parse(text: &str, kind: &Kind) -> ApiResult<FieldSelector> {
        let mut terms = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (field, value, equal) = if let Some((field, value)) = part.split_once("!=") {
                (field, value, false)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, value, true)
            } else {
                return Err(ApiError::bad_request(format!("invalid selector: '{part}'; can't understand '{part}'")));
            };
            terms.push((field.to_owned(), value.to_owned(), equal));
        }
        let known = (kind.selectable)(&serde_json::json!({}));
        for (field, ..) in &terms {
            let own = matches!(&**field, "metadata.name" | "metadata.namespace");
            if !own && !known.iter().any(|(name, _)| name == field) {
                return Err(ApiError::bad_request(format!("field label not supported: {field}")));
            }
        }
        Ok(FieldSelector(terms))
    }

    pub(crate) fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, key: &str, namespaced: bool, index: &Index) -> bool {
        self.0.iter().all(|(field, wanted, equal)| {
            let actual = match &**field {
                "metadata.name" => key.rsplit('/').next().unwrap_or_default(),
                "metadata.namespace" if namespaced => key.split('/').nth(1).unwrap_or_default(),
                "metadata.namespace" => "",
                field => index.field(field),
            };
            (actual == wanted) == *equal
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selects(selector: &str, labels: &[(&str, &str)]) -> bool {
        let labels: Vec<_> = labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        LabelSelector::parse(selector).expect("parses").matches(&labels)
    }

    #[test]
    fn label_terms_select_as_clients_expect() {
        let labels = [("app", "web"), ("tier", "front"), ("example.com/n", "5")];
        for selector in
            ["", "app=web", "app==web,tier!=back", "app in (web, api)", "x notin (y)", "!x", "tier", "example.com/n>4"]
        {
            assert!(selects(selector, &labels), "{selector}");
        }
        for selector in ["app=api", "app notin (web)", "!app", "x", "x in (y)", "example.com/n<5"] {
            assert!(!selects(selector, &labels), "{selector}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for selector in ["app in web", "=x", "a b", "a,,b", "a=b=c d"] {
            assert!(LabelSelector::parse(selector).is_err(), "{selector}");
        }
    }

    #[test]
    fn unknown_fields_are_refused() {
        let kind = oarlock_kinds::find("", "v1", "configmaps").expect("a row");
        let refused = FieldSelector::parse("spec.nothing=1", kind).expect_err("not a field");
        assert_eq!(refused.code, 400);
        assert!(!FieldSelector::parse("metadata.name=a", kind).expect("parses").is_everything());
    }
}
