//! The shape of a row in the table of kinds.

use crate::FieldError;
use jiff::Timestamp;
use serde_json::Value;

/// One printer column as a Table's columnDefinitions carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    pub name: &'static str,
    /// `string`, `integer`, `number`, `boolean` or `date`
    pub kind: &'static str,
    /// `name` for the name column, else empty.
    pub format: &'static str,
    /// 0 is always shown, 1 only with `-o wide`.
    pub priority: i32,
    pub description: &'static str,
}

/// The type that a subresource speaks, and its verbs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubresourceType {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub verbs: &'static [&'static str],
}

/// One kind. The functions are pure; `default` and `prepare_*` change the object in place.
///
/// Order on create: `default`, `prepare_create`, metadata by the server (uid, creationTimestamp …), `validate`.
/// Order on update: `default`, `prepare_update` (or `prepare_status_update`), `validate_update`, which includes what
/// `validate` checks.
#[derive(Clone, Copy)]
pub struct Kind {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
    pub singular: &'static str,
    pub short_names: &'static [&'static str],
    pub categories: &'static [&'static str],
    pub namespaced: bool,
    /// `status`, `scale`, `log` … ; what each speaks is `subresource_type`.
    pub subresources: &'static [&'static str],
    pub verbs: &'static [&'static str],
    /// Whether objects are kept; a review or a binding only answers.
    pub stored: bool,
    /// Key of the store collection. Two rows with one value are two views of the same objects (events).
    pub storage: &'static str,
    /// From this row's view to the stored view and back; identity for all but events.k8s.io.
    pub to_stored: fn(&mut Value),
    pub from_stored: fn(&mut Value),
    pub default: fn(&mut Value),
    pub prepare_create: fn(&mut Value),
    pub prepare_update: fn(&mut Value, &Value),
    pub prepare_status_update: fn(&mut Value, &Value),
    pub validate: fn(&Value) -> Vec<FieldError>,
    pub validate_update: fn(&Value, &Value) -> Vec<FieldError>,
    /// For the status subresource; metadata and what the kind checks of a status.
    pub validate_status_update: fn(&Value, &Value) -> Vec<FieldError>,
    pub columns: &'static [Column],
    /// The cells of `columns` for one object.
    pub row: fn(&Value, Timestamp) -> Vec<Value>,
    /// Field-selector fields beside metadata.name and metadata.namespace, with their values (empty when unset).
    pub selectable: fn(&Value) -> Vec<(&'static str, String)>,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kind({}/{} {})", self.group, self.version, self.kind)
    }
}

impl Kind {
    /// `apps/v1`, or `v1` for the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `deployments.apps`, or `pods` for the core group, as it stands in error messages.
    pub fn qualified_plural(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// What the named subresource speaks; `None` when the kind has no such subresource.
    pub fn subresource_type(&self, name: &str) -> Option<SubresourceType> {
        if !self.subresources.contains(&name) {
            return None;
        }
        let own = |verbs| SubresourceType { group: self.group, version: self.version, kind: self.kind, verbs };
        let core = |kind, verbs| SubresourceType { group: "", version: "v1", kind, verbs };
        const CONNECT: &[&str] = &["create", "get"];
        const PROXY: &[&str] = &["create", "delete", "get", "patch", "update"];
        const EDIT: &[&str] = &["get", "patch", "update"];
        Some(match (self.kind, name) {
            (_, "scale") => SubresourceType { group: "autoscaling", version: "v1", kind: "Scale", verbs: EDIT },
            ("ServiceAccount", "token") => SubresourceType {
                group: "authentication.k8s.io",
                version: "v1",
                kind: "TokenRequest",
                verbs: &["create"],
            },
            ("Pod", "binding") => core("Binding", &["create"]),
            ("Pod", "eviction") => {
                SubresourceType { group: "policy", version: "v1", kind: "Eviction", verbs: &["create"] }
            }
            ("Pod", "log") => own(&["get"]),
            ("Pod", "exec") => core("PodExecOptions", CONNECT),
            ("Pod", "attach") => core("PodAttachOptions", CONNECT),
            ("Pod", "portforward") => core("PodPortForwardOptions", CONNECT),
            ("Pod", "proxy") => core("PodProxyOptions", PROXY),
            ("Service", "proxy") => core("ServiceProxyOptions", PROXY),
            ("Node", "proxy") => core("NodeProxyOptions", PROXY),
            ("Namespace", "finalize") => own(&["update"]),
            _ => own(EDIT),
        })
    }
}
