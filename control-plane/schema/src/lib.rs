//! What Kubernetes objects look like: a compact catalogue of the published types, and the pure operations that
//! it drives: strict decoding, protobuf decoding, the patch flavours, managed fields and server-side apply, and
//! the OpenAPI documents. It holds no state, does no I/O and knows no kind by name beyond what the data says;
//! defaults, validation and columns live in `oarlock-kinds`.

mod catalogue;
pub mod managed;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub use oarlock_quantity as quantity;
pub mod strict;

/// A group, version and kind. `group` is empty for the core group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gvk<'a> {
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
}

impl<'a> Gvk<'a> {
    pub const fn new(group: &'a str, version: &'a str, kind: &'a str) -> Self {
        Self { group, version, kind }
    }

    /// From an object's own `apiVersion` and `kind`; `None` when either is missing or not a string.
    pub fn of(object: &'a serde_json::Value) -> Option<Self> {
        let api_version = object.get("apiVersion")?.as_str()?;
        let kind = object.get("kind")?.as_str()?;
        Some(Self::from_api_version(api_version, kind))
    }

    /// From `apps/v1` or `v1` and a kind.
    pub fn from_api_version(api_version: &'a str, kind: &'a str) -> Self {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        Self { group, version, kind }
    }

    /// `apps/v1`, or `v1` for the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }
}

impl std::fmt::Display for Gvk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.group.is_empty() {
            write!(f, "{}, Kind={}", self.version, self.kind)
        } else {
            write!(f, "{}/{}, Kind={}", self.group, self.version, self.kind)
        }
    }
}
