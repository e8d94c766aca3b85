//! JSON patch, with the error texts that clients of the API know.

use super::PatchError;
use serde_json::Value;

/// More operations than this are refused, as upstream refuses them.
const MOST_OPERATIONS: usize = 10_000;
/// A patch of copies may not grow a document beyond this many JSON values.
const MOST_VALUES: usize = 1_000_000;

/// Applies an RFC 6902 patch. On error `doc` is left as it was.
pub fn json_patch(doc: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let Value::Array(operations) = patch else {
        return Err(PatchError::Invalid(format!(
            "error decoding patch: json: cannot unmarshal {} into Go value of type jsonpatch.Patch",
            type_name(patch)
        )));
    };
    if operations.len() > MOST_OPERATIONS {
        return Err(PatchError::Invalid(format!(
            "The allowed maximum operations in a JSON patch is {MOST_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let mut changed = doc.clone();
    let mut budget = MOST_VALUES;
    for operation in operations {
        apply(&mut changed, operation, &mut budget)?;
    }
    *doc = changed;
    Ok(())
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn missing(operation: &str, what: &str, path: &str) -> PatchError {
    PatchError::Unprocessable(format!(
        "{operation} operation does not apply: doc is missing {what}: {path}: missing value"
    ))
}

fn apply(doc: &mut Value, operation: &Value, budget: &mut usize) -> Result<(), PatchError> {
    let field = |name: &str| operation.get(name).and_then(Value::as_str);
    let kind = field("op").unwrap_or_default();
    let path = field("path")
        .ok_or_else(|| PatchError::Invalid(format!("{kind} operation is missing its path")))
        .and_then(|path| checked_path(path))?;
    let value = operation.get("value");
    let needs_value = || {
        value.cloned().ok_or_else(|| PatchError::Invalid(format!("{kind} operation at {path} is missing its value")))
    };
    match kind {
        "add" => add(doc, path, needs_value()?, "add"),
        "remove" => remove(doc, path, "remove").map(|_| ()),
        "replace" => {
            let target = doc.pointer_mut(path).ok_or_else(|| missing("replace", "key", path))?;
            *target = needs_value()?;
            Ok(())
        }
        "move" => {
            let from = checked_path(field("from").unwrap_or_default())?;
            if path.strip_prefix(from).is_some_and(|rest| rest.starts_with('/')) {
                return Err(PatchError::Unprocessable(format!("move operation cannot put {from} inside itself")));
            }
            let moved = remove(doc, from, "move")?;
            add(doc, path, moved, "move")
        }
        "copy" => {
            let from = checked_path(field("from").unwrap_or_default())?;
            let copied = doc.pointer(from).cloned().ok_or_else(|| missing("copy", "from path", from))?;
            *budget = budget
                .checked_sub(count_values(&copied))
                .ok_or_else(|| PatchError::Unprocessable("copy operations make the document too large".to_owned()))?;
            add(doc, path, copied, "copy")
        }
        "test" => {
            let found = doc.pointer(path);
            let holds = match (found, value) {
                (None, None | Some(Value::Null)) => true,
                (found, value) => found == value,
            };
            if holds {
                Ok(())
            } else {
                Err(PatchError::Unprocessable(format!("testing value {path} failed: test failed")))
            }
        }
        other => Err(PatchError::Invalid(format!("Unexpected kind: {other}"))),
    }
}

fn count_values(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(count_values).sum::<usize>(),
        Value::Object(map) => 1 + map.values().map(count_values).sum::<usize>(),
        _ => 1,
    }
}

fn checked_path(path: &str) -> Result<&str, PatchError> {
    if path.is_empty() || path.starts_with('/') {
        Ok(path)
    } else {
        Err(PatchError::Invalid(format!("JSON pointer {path:?} does not start with a slash")))
    }
}

/// The parent's pointer and the last token, unescaped.
fn split(path: &str) -> Option<(&str, String)> {
    let (parent, token) = path.rsplit_once('/')?;
    Some((parent, token.replace("~1", "/").replace("~0", "~")))
}

fn index(token: &str, length: usize) -> Option<usize> {
    if token.len() > 1 && token.starts_with('0') {
        return None;
    }
    if token.starts_with('+') {
        return None;
    }
    let index: usize = token.parse().ok()?;
    (index <= length).then_some(index)
}

fn add(doc: &mut Value, path: &str, value: Value, operation: &str) -> Result<(), PatchError> {
    let Some((parent, token)) = split(path) else {
        *doc = value;
        return Ok(());
    };
    match doc.pointer_mut(parent) {
        Some(Value::Object(map)) => {
            map.insert(token, value);
            Ok(())
        }
        Some(Value::Array(items)) => {
            let at = if token == "-" { Some(items.len()) } else { index(&token, items.len()) };
            let at = at.ok_or_else(|| {
                PatchError::Unprocessable(format!("error in {operation} for path: '{path}': Unable to access invalid index: {token}: invalid index referenced"))
            })?;
            items.insert(at, value);
            Ok(())
        }
        _ => Err(missing(operation, "path", path)),
    }
}

fn remove(doc: &mut Value, path: &str, operation: &str) -> Result<Value, PatchError> {
    let Some((parent, token)) = split(path) else {
        return Ok(doc.take());
    };
    let removed = match doc.pointer_mut(parent) {
        Some(Value::Object(map)) => map.shift_remove(&token),
        Some(Value::Array(items)) => {
            index(&token, items.len()).filter(|at| *at < items.len()).map(|at| items.remove(at))
        }
        _ => None,
    };
    removed.ok_or_else(|| missing(operation, "path", path))
}
