//! The order of merged lists: patched items follow the patch, the others keep their place among them as well as they can.

use serde_json::Value;

/// What tells two items of a list apart: the item itself, or its merge key.
pub(super) fn identity<'a>(item: &'a Value, merge_key: Option<&str>) -> Option<&'a Value> {
    match merge_key {
        Some(key) => item.get(key),
        None => Some(item),
    }
}

fn position(order: &[Value], item: &Value, merge_key: Option<&str>) -> Option<usize> {
    let wanted = identity(item, merge_key)?;
    order.iter().position(|other| identity(other, merge_key) == Some(wanted))
}

/// Orders `merged`: items named in `wanted` as there, the others as in `before`, interleaved by `before`.
pub(super) fn arrange(merged: Vec<Value>, wanted: &[Value], before: &[Value], merge_key: Option<&str>) -> Vec<Value> {
    let (mut named, mut others): (Vec<_>, Vec<_>) =
        merged.into_iter().partition(|item| position(wanted, item, merge_key).is_some());
    named.sort_by_key(|item| position(wanted, item, merge_key));
    let place = |item: &Value| position(before, item, merge_key);
    others.sort_by_key(|item| place(item).unwrap_or(usize::MAX));

    let mut arranged = Vec::with_capacity(named.len() + others.len());
    let mut named = named.into_iter().peekable();
    let mut others = others.into_iter().peekable();
    loop {
        let other_first = match (others.peek(), named.peek()) {
            (None, None) => return arranged,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(other), Some(named)) => match (place(other), place(named)) {
                (Some(_), None) => true,
                (Some(other), Some(named)) => other < named,
                (None, _) => false,
            },
        };
        arranged.extend(if other_first { others.next() } else { named.next() });
    }
}
