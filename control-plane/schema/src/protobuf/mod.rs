//! Decodes Kubernetes protobuf request bodies into JSON objects. Encoding is not done here: every client takes JSON.
//!
//! A body is `k8s\0` and an `Unknown` message that names a kind and carries its message. The catalogue gives each tag
//! its JSON name. Go writes zero values of fields that are not pointers; those are dropped where JSON would leave
//! them out. Nothing in a body can make the decoder panic, recurse without end or allocate more than a small
//! multiple of the body's size.

mod message;
mod special;
mod wire;

use crate::Gvk;
use crate::catalogue::catalogue;
use serde_json::{Map, Value};
use wire::{Reader, WireValue};

const MAGIC: &[u8] = b"k8s\0";
/// Deeper than any schema of a CRD that clients write, shallow enough for a worker's stack.
const DEPTH_LIMIT: usize = 64;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    #[error("the body does not start with the Kubernetes protobuf magic number")]
    Magic,
    #[error("protobuf message {message} is malformed: {reason}")]
    Malformed { message: String, reason: &'static str },
    #[error("no kind \"{kind}\" is registered for version \"{api_version}\"")]
    UnknownKind { api_version: String, kind: String },
    #[error("protobuf message is nested more than {limit} levels deep")]
    TooDeep { limit: usize },
    #[error("the envelope says content type {0:?}, which is not supported")]
    ContentType(String),
}

/// Decodes a body in the `k8s\0` envelope to an object that carries `apiVersion` and `kind`.
pub fn decode(body: &[u8]) -> Result<Value, DecodeError> {
    decode_at(body, DEPTH_LIMIT)
}

fn decode_at(body: &[u8], depth: usize) -> Result<Value, DecodeError> {
    let envelope = body.strip_prefix(MAGIC).ok_or(DecodeError::Magic)?;
    let malformed = |reason| DecodeError::Malformed { message: "Unknown".to_owned(), reason };
    let (mut api_version, mut kind) = (String::new(), String::new());
    let mut raw: &[u8] = &[];
    let mut reader = Reader::new(envelope);
    while let Some((tag, value)) = reader.next_field().map_err(malformed)? {
        match (tag, value) {
            (1, WireValue::Bytes(type_meta)) => {
                let mut inner = Reader::new(type_meta);
                while let Some((tag, value)) = inner.next_field().map_err(malformed)? {
                    match (tag, value) {
                        (1, WireValue::Bytes(text)) => api_version = message::text(text).map_err(malformed)?,
                        (2, WireValue::Bytes(text)) => kind = message::text(text).map_err(malformed)?,
                        _ => {}
                    }
                }
            }
            (2, WireValue::Bytes(bytes)) => raw = bytes,
            (4, WireValue::Bytes(text)) => {
                let content_type = message::text(text).map_err(malformed)?;
                if !content_type.is_empty() && !content_type.contains("protobuf") {
                    return Err(DecodeError::ContentType(content_type));
                }
            }
            _ => {}
        }
    }
    let Some(id) = catalogue().by_gvk(Gvk::from_api_version(&api_version, &kind)) else {
        return Err(DecodeError::UnknownKind { api_version, kind });
    };
    let mut object = Map::new();
    object.insert("apiVersion".to_owned(), Value::String(api_version));
    object.insert("kind".to_owned(), Value::String(kind));
    message::read_into(&mut object, id, raw, depth)?;
    Ok(Value::Object(object))
}
