//! The structural pass over an object by its type in the catalogue.

use crate::Gvk;
use crate::catalogue::{Leaf, Property, Shape, TypeId, catalogue};
use crate::quantity::Quantity;
use base64::Engine;
use serde_json::{Map, Value};

/// A value of the wrong JSON type; Display words it as Go's decoder does.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{message}")]
pub struct TypeError {
    pub message: String,
}

/// Names at most this many unknown fields, as upstream does.
const MOST_MESSAGES: usize = 100;

/// Types `object` in place: unknown fields are removed and named (`unknown field "spec.foo"`), explicit nulls and
/// empty optional values are dropped, quantities and times become canonical, structs that the API always writes are
/// added empty. A value of the wrong type is an error. A kind that is not in the catalogue passes unchanged.
pub fn prune(gvk: Gvk<'_>, object: &mut Value) -> Result<Vec<String>, TypeError> {
    let Some(id) = catalogue().by_gvk(gvk) else { return Ok(Vec::new()) };
    let mut pass = Pass { path: String::new(), stack: Vec::new(), owner: None, unknown: Vec::new() };
    pass.leaf(Leaf::Object(id), None, object)?;
    Ok(pass.unknown)
}

/// What `prune` would say of `object`, which stays as it is.
pub fn check(gvk: Gvk<'_>, object: &Value) -> Result<Vec<String>, TypeError> {
    prune(gvk, &mut object.clone())
}

struct Pass {
    /// `spec.containers[0].image`, for unknown fields.
    path: String,
    /// JSON names without indexes, for type errors.
    stack: Vec<&'static str>,
    /// The struct that holds the current field.
    owner: Option<TypeId>,
    unknown: Vec<String>,
}

impl Pass {
    fn mismatch(&self, found: &str, expected: &str) -> TypeError {
        let place = match self.owner {
            Some(owner) => {
                let name = catalogue().info(owner).name;
                let name = name.rsplit('.').next().unwrap_or(name);
                format!("struct field {name}.{}", self.stack.join("."))
            }
            None => "value".to_owned(),
        };
        TypeError { message: format!("json: cannot unmarshal {found} into Go {place} of type {expected}") }
    }

    fn object(&mut self, id: TypeId, map: &mut Map<String, Value>) -> Result<(), TypeError> {
        let owner = self.owner.replace(id);
        let start = self.path.len();
        let mut failure = None;
        map.retain(|name, value| {
            if failure.is_some() {
                return true;
            }
            if start > 0 {
                self.path.push('.');
            }
            self.path.push_str(name);
            let kept = match catalogue().property(id, name) {
                Some(property) => match self.property(property, value) {
                    Ok(()) => !is_dropped(property, value),
                    Err(error) => {
                        failure = Some(error);
                        true
                    }
                },
                None => {
                    if self.unknown.len() < MOST_MESSAGES {
                        self.unknown.push(format!("unknown field \"{}\"", self.path));
                    }
                    false
                }
            };
            self.path.truncate(start);
            kept
        });
        if let Some(error) = failure {
            return Err(error);
        }
        for property in catalogue().properties(id) {
            let always = property.keep && !property.pointer && matches!(property.shape, Shape::One(Leaf::Object(_)));
            if always && !map.contains_key(property.name) {
                map.insert(property.name.to_owned(), empty_struct(property));
            }
        }
        self.owner = owner;
        Ok(())
    }

    fn property(&mut self, property: &'static Property, value: &mut Value) -> Result<(), TypeError> {
        if value.is_null() {
            return Ok(());
        }
        self.stack.push(property.name);
        match (property.shape, &mut *value) {
            (Shape::One(leaf), value) => self.leaf(leaf, Some(property), value)?,
            (Shape::List(leaf), Value::Array(items)) => {
                let start = self.path.len();
                for (index, item) in items.iter_mut().enumerate() {
                    self.path.push_str(&format!("[{index}]"));
                    fill_null(leaf, item);
                    self.leaf(leaf, Some(property), item)?;
                    self.path.truncate(start);
                }
            }
            (Shape::Map(leaf), Value::Object(map)) => {
                let start = self.path.len();
                for (key, item) in map.iter_mut() {
                    self.path.push('.');
                    self.path.push_str(key);
                    fill_null(leaf, item);
                    self.leaf(leaf, Some(property), item)?;
                    self.path.truncate(start);
                }
            }
            (shape, value) => return Err(self.mismatch(found(value), &go_container(shape, property.go_type))),
        }
        self.stack.pop();
        Ok(())
    }

    fn leaf(&mut self, leaf: Leaf, property: Option<&Property>, value: &mut Value) -> Result<(), TypeError> {
        match leaf {
            Leaf::Object(id) => match value {
                Value::Object(map) => return self.object(id, map),
                other => return Err(self.mismatch(found(other), &go_leaf(leaf, None))),
            },
            Leaf::String if value.is_string() => {}
            Leaf::Bool if value.is_boolean() => {}
            Leaf::Double if value.is_number() => {}
            Leaf::Int32 => self.integer(value, "int32", i64::from(i32::MIN)..=i64::from(i32::MAX))?,
            Leaf::Int64 => self.integer(value, "int64", i64::MIN..=i64::MAX)?,
            Leaf::IntOrString if value.is_string() => {}
            Leaf::IntOrString => self.integer(value, "int32", i64::from(i32::MIN)..=i64::from(i32::MAX))?,
            Leaf::Bytes => match value {
                Value::String(text) => check_base64(text)?,
                other => return Err(self.mismatch(found(other), "[]uint8")),
            },
            Leaf::Quantity => {
                let quantity = Quantity::from_json(value).map_err(|error| TypeError { message: error.to_string() })?;
                *value = Value::String(quantity.to_string());
            }
            Leaf::Time | Leaf::MicroTime => self.time(leaf, value)?,
            Leaf::Duration if value.is_string() => {}
            Leaf::Fields if value.is_object() => {}
            Leaf::WrappedStrings if value.is_array() => {}
            Leaf::Raw | Leaf::SchemaOrBool | Leaf::SchemaOrArray | Leaf::SchemaOrStrings => {}
            _ => {
                let named = property.and_then(|property| property.go_type);
                return Err(self.mismatch(found(value), &go_leaf(leaf, named)));
            }
        }
        Ok(())
    }

    fn integer(
        &self,
        value: &mut Value,
        expected: &str,
        range: std::ops::RangeInclusive<i64>,
    ) -> Result<(), TypeError> {
        let Value::Number(number) = &*value else { return Err(self.mismatch(found(value), expected)) };
        match number.as_i64() {
            Some(number) if range.contains(&number) => Ok(()),
            _ => Err(self.mismatch(&format!("number {number}"), expected)),
        }
    }

    fn time(&self, leaf: Leaf, value: &mut Value) -> Result<(), TypeError> {
        let Value::String(text) = &*value else { return Err(self.mismatch(found(value), "string")) };
        let layout = if leaf == Leaf::Time { "2006-01-02T15:04:05Z07:00" } else { "2006-01-02T15:04:05.000000Z07:00" };
        let stamp: jiff::Timestamp = text.parse().map_err(|_| TypeError {
            message: format!("parsing time {text:?} as {layout:?}: cannot parse {text:?} as \"2006\""),
        })?;
        let stamp = if leaf == Leaf::Time {
            format!("{:.0}", jiff::Timestamp::from_second(stamp.as_second()).unwrap_or(stamp))
        } else {
            format!("{stamp:.6}")
        };
        *value = Value::String(stamp);
        Ok(())
    }
}

fn check_base64(text: &str) -> Result<(), TypeError> {
    use base64::DecodeError;
    let Err(error) = base64::engine::general_purpose::STANDARD.decode(text) else { return Ok(()) };
    let at = match error {
        DecodeError::InvalidByte(at, _) | DecodeError::InvalidLastSymbol(at, _) => at,
        DecodeError::InvalidLength(_) | DecodeError::InvalidPadding => text.len() / 4 * 4,
    };
    Err(TypeError { message: format!("illegal base64 data at input byte {at}") })
}

/// A null element or map value is the zero value.
fn fill_null(leaf: Leaf, item: &mut Value) {
    if item.is_null() {
        *item = match leaf {
            Leaf::Object(_) => Value::Object(Map::new()),
            Leaf::String | Leaf::Bytes => Value::String(String::new()),
            Leaf::Bool => Value::Bool(false),
            Leaf::Int32 | Leaf::Int64 => Value::from(0),
            Leaf::Quantity => Value::String("0".to_owned()),
            Leaf::WrappedStrings => Value::Array(Vec::new()),
            _ => return,
        };
    }
}

/// Whether the API would leave this value out when it writes the object.
fn is_dropped(property: &Property, value: &Value) -> bool {
    match (property.shape, value) {
        (_, Value::Null) => true,
        _ if property.keep => false,
        (Shape::List(_), Value::Array(items)) => items.is_empty(),
        (Shape::Map(_), Value::Object(map)) => map.is_empty(),
        _ if property.pointer => false,
        (Shape::One(Leaf::String | Leaf::Bytes), Value::String(text)) => text.is_empty(),
        (Shape::One(Leaf::Bool), Value::Bool(set)) => !set,
        (Shape::One(Leaf::Int32 | Leaf::Int64 | Leaf::Double), Value::Number(number)) => number.as_f64() == Some(0.0),
        _ => false,
    }
}

/// An always-written struct with its own always-written structs.
fn empty_struct(property: &Property) -> Value {
    let mut map = Map::new();
    if let Leaf::Object(id) = property.shape.leaf() {
        for inner in catalogue().properties(id) {
            if inner.keep && !inner.pointer && matches!(inner.shape, Shape::One(Leaf::Object(_))) {
                map.insert(inner.name.to_owned(), empty_struct(inner));
            }
        }
    }
    Value::Object(map)
}

fn found(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn go_container(shape: Shape, named: Option<&str>) -> String {
    if let Some(named) = named {
        return named.to_owned();
    }
    match shape {
        Shape::One(leaf) => go_leaf(leaf, named),
        Shape::List(leaf) => format!("[]{}", go_leaf(leaf, None)),
        Shape::Map(leaf) => format!("map[string]{}", go_leaf(leaf, None)),
    }
}

fn go_leaf(leaf: Leaf, named: Option<&str>) -> String {
    if let Some(named) = named {
        return named.trim_start_matches("[]").to_owned();
    }
    match leaf {
        Leaf::String => "string".to_owned(),
        Leaf::Bool => "bool".to_owned(),
        Leaf::Int32 => "int32".to_owned(),
        Leaf::Int64 => "int64".to_owned(),
        Leaf::Double => "float64".to_owned(),
        Leaf::Bytes => "[]uint8".to_owned(),
        Leaf::Quantity => "resource.Quantity".to_owned(),
        Leaf::IntOrString => "intstr.IntOrString".to_owned(),
        Leaf::Time => "v1.Time".to_owned(),
        Leaf::MicroTime => "v1.MicroTime".to_owned(),
        Leaf::Duration => "string".to_owned(),
        Leaf::Raw | Leaf::Fields => "map[string]interface {}".to_owned(),
        Leaf::WrappedStrings => "[]string".to_owned(),
        Leaf::SchemaOrArray | Leaf::SchemaOrBool | Leaf::SchemaOrStrings => "v1.JSONSchemaProps".to_owned(),
        Leaf::Object(id) => {
            let name = catalogue().info(id).name;
            let mut parts = name.rsplitn(3, '.');
            let kind = parts.next().unwrap_or_default();
            let version = parts.next().unwrap_or_default();
            format!("{version}.{kind}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DEPLOYMENT: Gvk<'static> = Gvk::new("apps", "v1", "Deployment");
    const POD: Gvk<'static> = Gvk::new("", "v1", "Pod");

    #[test]
    fn unknown_fields_are_named_by_path_and_removed() {
        let mut object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "foo": 1, "metadata": {"name": "a", "bar": 1},
            "spec": {"replica": 1, "template": {"spec": {"containers": [{"name": "a", "imagePullPolice": "Always"}]}}}});
        let messages = prune(DEPLOYMENT, &mut object).expect("typed");
        assert_eq!(
            messages,
            [
                "unknown field \"foo\"",
                "unknown field \"metadata.bar\"",
                "unknown field \"spec.replica\"",
                "unknown field \"spec.template.spec.containers[0].imagePullPolice\""
            ]
        );
        assert_eq!(object["spec"]["template"]["spec"]["containers"][0]["name"], "a");
        assert!(object["spec"].get("replica").is_none());
    }

    #[test]
    fn type_errors_read_as_go_words_them() {
        for (gvk, object, message) in [
            (
                DEPLOYMENT,
                json!({"spec": {"replicas": "3"}}),
                "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                DEPLOYMENT,
                json!({"spec": {"replicas": 1.5}}),
                "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                POD,
                json!({"metadata": {"labels": {"a": 1}}}),
                "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels of type string",
            ),
            (
                POD,
                json!({"spec": {"containers": {"name": "a"}}}),
                "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
            ),
            (
                POD,
                json!({"spec": {"containers": [{"imagePullPolicy": true}]}}),
                "json: cannot unmarshal bool into Go struct field Container.spec.containers.imagePullPolicy of type v1.PullPolicy",
            ),
            (
                POD,
                json!({"spec": {"containers": [{"resources": {"limits": {"cpu": "a lot"}}}]}}),
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            ),
            (POD, json!([]), "json: cannot unmarshal array into Go value of type v1.Pod"),
            (Gvk::new("", "v1", "Secret"), json!({"data": {"a": "b*"}}), "illegal base64 data at input byte 1"),
        ] {
            let error = check(gvk, &object).expect_err(message);
            assert_eq!(error.message, message);
        }
    }

    #[test]
    fn values_take_the_form_in_which_the_api_writes_them() {
        let mut object = json!({"metadata": {"name": "a", "creationTimestamp": null, "labels": {}},
            "spec": {"hostNetwork": false, "terminationGracePeriodSeconds": 0, "nodeName": "",
                "containers": [{"name": "a", "resources": {"limits": {"cpu": 0.5, "memory": "1024Mi"}}}],
                "volumes": [{"name": "v", "emptyDir": {}}]}});
        prune(POD, &mut object).expect("typed");
        assert_eq!(
            object,
            json!({"metadata": {"name": "a"}, "spec": {"terminationGracePeriodSeconds": 0,
                "containers": [{"name": "a", "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}}}],
                "volumes": [{"name": "v", "emptyDir": {}}]}, "status": {}})
        );
    }

    #[test]
    fn a_second_pass_changes_nothing() {
        let mut object = json!({"spec": {"template": {"spec": {"containers": [{"name": "a"}]}}}});
        prune(DEPLOYMENT, &mut object).expect("typed");
        let once = object.clone();
        prune(DEPLOYMENT, &mut object).expect("typed");
        assert_eq!(object, once);
        assert_eq!(object["spec"]["template"]["spec"]["containers"][0]["resources"], json!({}));
    }

    #[test]
    fn unserved_kinds_pass_unchanged() {
        let mut object = json!({"spec": {"anything": null}});
        assert!(prune(Gvk::new("example.com", "v1", "Thing"), &mut object).expect("typed").is_empty());
        assert_eq!(object, json!({"spec": {"anything": null}}));
    }
}
