//! How appliers share a value: as one leaf, field by field, as a set or as a list with keys.

use crate::Gvk;
use crate::catalogue::{Leaf, ListType, Property, Shape, TypeId, catalogue};
use serde_json::{Map, Value};

/// Where in the types a value stands.
#[derive(Clone, Copy)]
pub(super) enum Place {
    Struct(TypeId),
    Property(&'static Property),
    /// A value of a map or an item of a list.
    Item(Leaf),
    /// Nothing is known: objects are shared by field, lists are leaves.
    Untyped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Leaf,
    Fields,
    Set,
    Keyed,
}

impl Place {
    pub(super) fn root(gvk: Gvk<'_>) -> Self {
        catalogue().by_gvk(gvk).map_or(Self::Untyped, Self::Struct)
    }

    fn type_id(self) -> Option<TypeId> {
        match self {
            Self::Struct(id) | Self::Item(Leaf::Object(id)) => Some(id),
            Self::Property(property) => match property.shape {
                Shape::One(Leaf::Object(id)) => Some(id),
                _ => None,
            },
            _ => None,
        }
    }

    pub(super) fn form(self, value: &Value) -> Form {
        match (self, value) {
            (Self::Property(property), Value::Array(_)) if matches!(property.shape, Shape::List(_)) => {
                match property.list_type {
                    ListType::Atomic => Form::Leaf,
                    ListType::Set => Form::Set,
                    ListType::Map(_) => Form::Keyed,
                }
            }
            (Self::Property(property), Value::Object(_)) if property.atomic_map => Form::Leaf,
            (Self::Property(property), Value::Object(_)) if matches!(property.shape, Shape::Map(_)) => Form::Fields,
            (Self::Untyped, Value::Object(_)) => Form::Fields,
            (_, Value::Object(_)) => match self.type_id() {
                Some(id) if !catalogue().info(id).atomic => Form::Fields,
                _ => Form::Leaf,
            },
            _ => Form::Leaf,
        }
    }

    /// The place of a field, and whether the type declares it by name.
    pub(super) fn field(self, name: &str) -> (Self, bool) {
        if let Some(id) = self.type_id() {
            return match catalogue().property(id, name) {
                Some(property) => (Self::Property(property), true),
                None => (Self::Untyped, false),
            };
        }
        match self {
            Self::Property(Property { shape: Shape::Map(leaf), .. }) => (Self::Item(*leaf), false),
            _ => (Self::Untyped, false),
        }
    }

    pub(super) fn item(self) -> Self {
        match self {
            Self::Property(property) => Self::Item(property.shape.leaf()),
            _ => Self::Untyped,
        }
    }

    /// Whether the API always writes the field, so that its absence is an empty value.
    pub(super) fn is_always_there(self) -> bool {
        matches!(self, Self::Property(property) if property.keep && !property.pointer)
    }

    /// The path element of a list item; `None` when it lacks a key that has no default.
    pub(super) fn element(self, form: Form, item: &Value) -> Option<String> {
        let Self::Property(property) = self else { return None };
        if form == Form::Set {
            return Some(format!("v:{item}"));
        }
        let mut names: Vec<&str> = property.list_keys().collect();
        names.sort_unstable();
        let mut keys = Map::new();
        for name in names {
            let given = item.get(name).filter(|value| !value.is_null()).cloned();
            let value = given.or_else(|| self.key_default(name));
            if let Some(value) = value {
                keys.insert(name.to_owned(), value);
            }
        }
        let complete = item.is_object() && !keys.is_empty();
        complete.then(|| format!("k:{}", Value::Object(keys)))
    }

    fn key_default(self, name: &str) -> Option<Value> {
        let Self::Property(property) = self else { return None };
        let Leaf::Object(id) = property.shape.leaf() else { return None };
        serde_json::from_str(catalogue().property(id, name)?.default?).ok()
    }

    /// The items of a shared list by path element; `None` when an item has no element or two have the same.
    pub(super) fn elements(self, form: Form, items: &[Value]) -> Option<Vec<(String, &Value)>> {
        let mut seen = std::collections::HashSet::new();
        items
            .iter()
            .map(|item| {
                let element = self.element(form, item)?;
                seen.insert(element.clone()).then_some((element, item))
            })
            .collect()
    }
}
