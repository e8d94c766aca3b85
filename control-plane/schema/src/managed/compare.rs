//! Which fields a value holds, and which fields differ between two.

use super::form::{Form, Place};
use super::set::FieldSet;
use serde_json::{Map, Value};

/// The fields that an applied configuration owns.
pub(super) fn fields_of(place: Place, value: &Value) -> FieldSet {
    let form = place.form(value);
    let mut set = FieldSet::default();
    match (form, value) {
        (Form::Fields, Value::Object(map)) => {
            for (name, value) in map {
                let (child, declared) = place.field(name);
                let mut fields = fields_of(child, value);
                let is_empty_map = value.as_object().is_some_and(Map::is_empty);
                fields.member |= !declared || value.is_null() || is_empty_map;
                set.push(format!("f:{name}"), fields);
            }
        }
        (Form::Set | Form::Keyed, Value::Array(items)) => match place.elements(form, items) {
            Some(items) => {
                for (element, item) in items {
                    let mut fields = if form == Form::Set { FieldSet::leaf() } else { fields_of(place.item(), item) };
                    fields.member = true;
                    set.push(element, fields);
                }
            }
            None => set.member = true,
        },
        _ => set.member = true,
    }
    set
}

/// Every node of a value that was not there before, or is no more.
fn whole(place: Place, value: &Value) -> FieldSet {
    let form = place.form(value);
    let mut set = FieldSet::leaf();
    match (form, value) {
        (Form::Fields, Value::Object(map)) => {
            for (name, value) in map.iter().filter(|(_, value)| !value.is_null()) {
                set.push(format!("f:{name}"), whole(place.field(name).0, value));
            }
        }
        (Form::Set | Form::Keyed, Value::Array(items)) => {
            for (element, item) in place.elements(form, items).unwrap_or_default() {
                set.push(element, if form == Form::Set { FieldSet::leaf() } else { whole(place.item(), item) });
            }
        }
        _ => {}
    }
    set
}

/// What differs between two values.
#[derive(Debug, Default)]
pub(super) struct Difference {
    pub(super) added: FieldSet,
    pub(super) changed: FieldSet,
    pub(super) removed: FieldSet,
}

impl Difference {
    fn push(&mut self, element: &str, inner: Self) {
        self.added.push(element.to_owned(), inner.added);
        self.changed.push(element.to_owned(), inner.changed);
        self.removed.push(element.to_owned(), inner.removed);
    }

    pub(super) fn written(&self) -> FieldSet {
        self.added.clone().union(&self.changed)
    }
}

pub(super) fn compare(place: Place, old: Option<&Value>, new: Option<&Value>) -> Difference {
    let (old, new) = (old.filter(|value| !value.is_null()), new.filter(|value| !value.is_null()));
    let mut difference = Difference::default();
    match (old, new) {
        (None, None) => {}
        (None, Some(new)) if place.is_always_there() && !matches!(place.form(new), Form::Leaf) => {
            let empty = if new.is_array() { Value::Array(Vec::new()) } else { Value::Object(Map::new()) };
            difference = compare(place, Some(&empty), Some(new));
        }
        (None, Some(new)) => difference.added = whole(place, new),
        (Some(old), None) => difference.removed = whole(place, old),
        (Some(old), Some(new)) => {
            let form = place.form(new);
            if form == Form::Leaf || form != place.form(old) {
                difference.changed.member = old != new;
            } else {
                compare_inside(place, form, old, new, &mut difference);
            }
        }
    }
    difference
}

fn compare_inside(place: Place, form: Form, old: &Value, new: &Value, difference: &mut Difference) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let gone = old.keys().filter(|name| !new.contains_key(*name));
            for name in new.keys().chain(gone) {
                let inner = compare(place.field(name).0, old.get(name), new.get(name));
                difference.push(&format!("f:{name}"), inner);
            }
        }
        (Value::Array(old), Value::Array(new)) => {
            let (Some(old_items), Some(new_items)) = (place.elements(form, old), place.elements(form, new)) else {
                difference.changed.member = old != new;
                return;
            };
            let item_place = place.item();
            let find = |items: &[(String, &Value)], element: &str| -> Option<Value> {
                items.iter().find(|(other, _)| other == element).map(|(_, item)| (*item).clone())
            };
            for (element, item) in &new_items {
                let before = find(&old_items, element);
                let inner = match (form, before) {
                    (Form::Set, Some(_)) => Difference::default(),
                    (Form::Set, None) => Difference { added: FieldSet::leaf(), ..Difference::default() },
                    (_, before) => compare(item_place, before.as_ref(), Some(item)),
                };
                difference.push(element, inner);
            }
            for (element, item) in &old_items {
                if new_items.iter().all(|(other, _)| other != element) {
                    let removed = if form == Form::Set { FieldSet::leaf() } else { whole(item_place, item) };
                    difference.removed.push(element.clone(), removed);
                }
            }
        }
        _ => {}
    }
}
