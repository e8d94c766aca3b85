//! Request bodies: reading with a limit, and decoding by content type.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body::Body as _;
use http_body_util::BodyExt;
use oarlock_kinds::Kind;
use oarlock_schema::{Gvk, protobuf, strict};
use serde_json::Value;

use crate::error::{ApiError, ApiResult};
use crate::request::Query;
use crate::wire::Body;

/// Larger bodies are refused.
pub(crate) const LIMIT_BYTES: usize = 3 << 20;
const DEPTH_LIMIT: usize = 128;
const ACCEPTED: &[&str] = &["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];

/// What happens to unknown and repeated fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

impl FieldValidation {
    pub(crate) fn parse(query: &Query) -> ApiResult<FieldValidation> {
        match query.get("fieldValidation") {
            None | Some("Warn") => Ok(FieldValidation::Warn),
            Some("Strict") => Ok(FieldValidation::Strict),
            Some("Ignore") => Ok(FieldValidation::Ignore),
            Some(other) => Err(ApiError::new(
                http::StatusCode::UNPROCESSABLE_ENTITY,
                "Invalid",
                format!(
                    "CreateOptions.meta.k8s.io \"\" is invalid: fieldValidation: Unsupported value: {other:?}: \
                     supported values: \"Ignore\", \"Strict\", \"Warn\""
                ),
            )),
        }
    }
}

/// The content type without parameters; JSON when absent.
pub(crate) fn content_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("application/json");
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

pub(crate) async fn read(mut body: Body) -> ApiResult<Bytes> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| ApiError::bad_request(format!("the request body could not be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if whole.len() + data.len() > LIMIT_BYTES {
            return Err(ApiError::too_large(LIMIT_BYTES));
        }
        if whole.is_empty() && body.is_end_stream() {
            return Ok(data);
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

/// A decoded body and the messages about repeated fields.
pub(crate) struct Decoded {
    pub(crate) object: Value,
    pub(crate) duplicates: Vec<String>,
}

/// Decodes an object body of any accepted type. An empty body is `None`.
pub(crate) fn decode(content_type: &str, body: &[u8]) -> ApiResult<Option<Decoded>> {
    if body.is_empty() {
        return Ok(None);
    }
    let parsed = match content_type {
        "application/json" | "" | "*/*" => strict::parse_json(body),
        "application/yaml" | "application/vnd.yaml" | "text/yaml" => strict::parse_yaml(body),
        "application/vnd.kubernetes.protobuf" => {
            let object = protobuf::decode(body).map_err(|error| ApiError::bad_request(error.to_string()))?;
            return Ok(Some(Decoded { object, duplicates: Vec::new() }));
        }
        _ => return Err(ApiError::unsupported_media_type(ACCEPTED)),
    };
    let (object, duplicates) = parsed.map_err(|error| ApiError::bad_request(error.to_string()))?;
    check_depth(&object)?;
    Ok(Some(Decoded { object, duplicates }))
}

fn check_depth(object: &Value) -> ApiResult<()> {
    let mut waiting = vec![(object, 0usize)];
    while let Some((value, depth)) = waiting.pop() {
        if depth > DEPTH_LIMIT {
            return Err(ApiError::bad_request(format!("the object is nested more than {DEPTH_LIMIT} levels deep")));
        }
        match value {
            Value::Array(items) => waiting.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => waiting.extend(fields.values().map(|item| (item, depth + 1))),
            _ => {}
        }
    }
    Ok(())
}

/// Fills in or checks `apiVersion` and `kind`.
pub(crate) fn check_type(object: &mut Value, group: &str, version: &str, kind: &str) -> ApiResult<()> {
    if !object.is_object() {
        return Err(ApiError::bad_request(format!(
            "couldn't get version/kind; json parse error: json: cannot unmarshal {} into Go value of type struct {{ \
             APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \"json:\\\"kind,omitempty\\\"\" }}",
            go_type(object)
        )));
    }
    let expected = Gvk { group, version, kind };
    let api_version = expected.api_version();
    let found_version = object.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    let found_kind = object.get("kind").and_then(Value::as_str).unwrap_or_default();
    if !found_kind.is_empty() && found_kind != kind {
        let version = found_version.rsplit('/').next().unwrap_or_default();
        return Err(ApiError::bad_request(format!(
            "{found_kind} in version \"{version}\" cannot be handled as a {kind}: the object provided is of another kind"
        )));
    }
    if !found_version.is_empty() && found_version != api_version {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({found_version}) does not match the expected API version ({api_version})"
        )));
    }
    if found_version.is_empty() || found_kind.is_empty() {
        let Value::Object(rest) = std::mem::take(object) else { return Ok(()) };
        let mut fields = serde_json::Map::new();
        fields.insert("apiVersion".into(), api_version.into());
        fields.insert("kind".into(), kind.into());
        fields.extend(rest.into_iter().filter(|(name, _)| name != "apiVersion" && name != "kind"));
        *object = Value::Object(fields);
    }
    Ok(())
}

fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Types an object by its schema. Unknown and repeated fields are an error, warnings or nothing, as asked.
pub(crate) fn type_object(
    gvk: Gvk<'_>,
    object: &mut Value,
    duplicates: Vec<String>,
    validation: FieldValidation,
) -> ApiResult<Vec<String>> {
    let handled = |why: &dyn std::fmt::Display| {
        ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: {why}",
            gvk.kind, gvk.version, gvk.kind
        ))
    };
    let mut messages = strict::prune(gvk, object).map_err(|error| handled(&error))?;
    messages.extend(duplicates);
    match validation {
        FieldValidation::Ignore => Ok(Vec::new()),
        FieldValidation::Warn => Ok(messages),
        FieldValidation::Strict if messages.is_empty() => Ok(messages),
        FieldValidation::Strict => Err(handled(&format_args!("strict decoding error: {}", messages.join(", ")))),
    }
}

/// The type of a kind's own objects.
pub(crate) fn gvk_of(kind: &Kind) -> Gvk<'static> {
    Gvk { group: kind.group, version: kind.version, kind: kind.kind }
}
