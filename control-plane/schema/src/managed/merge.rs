//! The merge of an applied configuration into the live object, and the removal of what is no longer applied.

use super::form::{Form, Place};
use super::set::FieldSet;
use serde_json::Value;

/// `applied` wins; lists that are shared keep the items of both, in the order of `applied` where it says one.
pub(super) fn merge(place: Place, live: &Value, applied: &Value) -> Value {
    let form = place.form(applied);
    if form != place.form(live) {
        return applied.clone();
    }
    match (form, live, applied) {
        (Form::Fields, Value::Object(live), Value::Object(applied)) => {
            let mut merged = live.clone();
            for (name, value) in applied {
                let value = match live.get(name) {
                    Some(before) => merge(place.field(name).0, before, value),
                    None => value.clone(),
                };
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Form::Set | Form::Keyed, Value::Array(live), Value::Array(applied)) => {
            match (place.elements(form, live), place.elements(form, applied)) {
                (Some(live), Some(applied)) => Value::Array(merge_items(place, form, &live, &applied)),
                _ => Value::Array(applied.clone()),
            }
        }
        _ => applied.clone(),
    }
}

fn merge_items(place: Place, form: Form, live: &[(String, &Value)], applied: &[(String, &Value)]) -> Vec<Value> {
    let is_in = |items: &[(String, &Value)], element: &str| items.iter().any(|(other, _)| other == element);
    let mut merged = Vec::with_capacity(live.len() + applied.len());
    let (mut next_live, mut next_applied) = (live.iter().peekable(), applied.iter().peekable());
    loop {
        // Items that only the live list has come first, then the applied ones; an item of both stands where applied has it.
        while let Some((_, item)) = next_live.next_if(|(element, _)| !is_in(applied, element)) {
            merged.push((*item).clone());
        }
        let Some((element, item)) = next_applied.next() else {
            if next_live.next().is_none() {
                return merged;
            }
            continue;
        };
        next_live.next_if(|(other, _)| other == element);
        let before = live.iter().find(|(other, _)| other == element);
        merged.push(match before {
            Some((_, before)) if form == Form::Keyed => merge(place.item(), before, item),
            _ => (*item).clone(),
        });
    }
}

/// Takes out of `object` what `last` owned and nobody owns any more.
pub(super) fn prune(place: Place, object: &mut Value, last: &FieldSet, owned: &FieldSet) {
    match object {
        Value::Object(map) => {
            for (element, inner) in &last.children {
                let Some(name) = element.strip_prefix("f:") else { continue };
                match owned.children.get(element) {
                    None => {
                        map.shift_remove(name);
                    }
                    Some(owned) => {
                        if let Some(value) = map.get_mut(name) {
                            prune(place.field(name).0, value, inner, owned);
                        }
                    }
                }
            }
        }
        Value::Array(items) => {
            let form =
                if last.children.keys().any(|element| element.starts_with("v:")) { Form::Set } else { Form::Keyed };
            items.retain_mut(|item| {
                let Some(element) = place.element(form, item) else { return true };
                let Some(inner) = last.children.get(&element) else { return true };
                let Some(owned) = owned.children.get(&element) else { return false };
                prune(place.item(), item, inner, owned);
                true
            });
        }
        _ => {}
    }
}
