//! Sets of field paths, as `fieldsV1` writes them.
//!
//! Keys are path elements in their wire form: `f:name` a field, `k:{"name":"a"}` an item of a keyed list,
//! `v:"a"` an item of a set, `i:0` an index. `.` says that the node itself is in the set.

use serde_json::{Map, Value};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FieldSet {
    pub(super) member: bool,
    pub(super) children: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    pub(super) fn leaf() -> Self {
        Self { member: true, children: BTreeMap::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.member && self.children.is_empty()
    }

    /// Adds a child that holds something.
    pub(super) fn push(&mut self, element: String, child: Self) {
        if !child.is_empty() {
            self.children.insert(element, child);
        }
    }

    pub(super) fn from_json(value: &Value) -> Self {
        let Value::Object(map) = value else { return Self::default() };
        let mut set = Self { member: map.is_empty() || map.contains_key("."), children: BTreeMap::new() };
        for (element, child) in map.iter().filter(|(element, _)| *element != ".") {
            set.children.insert(element.clone(), Self::from_json(child));
        }
        set
    }

    /// The root's own membership has no form of its own.
    pub(super) fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.children.is_empty() {
            map.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (element, child) in &self.children {
            map.insert(element.clone(), child.to_json());
        }
        Value::Object(map)
    }

    pub(super) fn union(mut self, other: &Self) -> Self {
        self.member |= other.member;
        for (element, child) in &other.children {
            let own = self.children.remove(element).unwrap_or_default();
            self.children.insert(element.clone(), own.union(child));
        }
        self
    }

    pub(super) fn difference(&self, other: &Self) -> Self {
        let mut result = Self { member: self.member && !other.member, children: BTreeMap::new() };
        for (element, child) in &self.children {
            match other.children.get(element) {
                Some(taken) => result.push(element.clone(), child.difference(taken)),
                None => result.push(element.clone(), child.clone()),
            }
        }
        result
    }

    pub(super) fn intersection(&self, other: &Self) -> Self {
        let mut result = Self { member: self.member && other.member, children: BTreeMap::new() };
        for (element, child) in &self.children {
            if let Some(common) = other.children.get(element) {
                result.push(element.clone(), child.intersection(common));
            }
        }
        result
    }

    /// Takes out a path of fields with all below it.
    pub(super) fn remove(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else { return };
        let element = format!("f:{first}");
        if rest.is_empty() {
            self.children.remove(&element);
        } else if let Some(child) = self.children.get_mut(&element) {
            child.remove(rest);
            if child.is_empty() {
                self.children.remove(&element);
            }
        }
    }

    /// The members as clients read paths: `.spec.containers[name="a"].image`.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.collect(&mut String::new(), &mut found);
        found
    }

    fn collect(&self, path: &mut String, found: &mut Vec<String>) {
        if self.member {
            found.push(path.clone());
        }
        for (element, child) in &self.children {
            let length = path.len();
            path.push_str(&readable(element));
            child.collect(path, found);
            path.truncate(length);
        }
    }
}

fn readable(element: &str) -> String {
    let Some((kind, rest)) = element.split_once(':') else { return element.to_owned() };
    match kind {
        "f" => format!(".{rest}"),
        "v" => format!("[={rest}]"),
        "i" => format!("[{rest}]"),
        _ => {
            let keys: Map<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let keys: Vec<String> = keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!("[{}]", keys.join(","))
        }
    }
}
