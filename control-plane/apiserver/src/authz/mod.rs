//! Who may do what: the node rules and RBAC, asked in that order; `system:masters` may do everything.

pub(crate) mod node;
pub(crate) mod policy;
pub(crate) mod rbac;

use crate::core::Core;
use crate::error::ApiError;
use crate::request::RequestInfo;
use crate::user::{MASTERS, User};

/// What is asked for, in the terms that rules are written in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Action {
    pub(crate) verb: String,
    pub(crate) group: String,
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Set for paths that are not resources.
    pub(crate) path: Option<String>,
}

impl Action {
    pub(crate) fn of(info: &RequestInfo) -> Action {
        match &info.resource {
            Some(resource) => Action {
                verb: info.verb.into(),
                group: resource.group.clone(),
                resource: resource.resource.clone(),
                subresource: resource.subresource.clone().unwrap_or_default(),
                namespace: resource.namespace.clone().unwrap_or_default(),
                name: resource.name.clone().unwrap_or_default(),
                path: None,
            },
            None => Action { verb: info.verb.into(), path: Some(info.path.clone()), ..Action::default() },
        }
    }

    /// The resource with its subresource, as rules write it.
    pub(crate) fn full_resource(&self) -> String {
        match &*self.subresource {
            "" => self.resource.clone(),
            subresource => format!("{}/{subresource}", self.resource),
        }
    }
}

/// The answer, with the reason that reviews show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    Allowed(String),
    /// No rule allows it.
    NoOpinion(String),
}

/// Decides whether a user may do something.
pub(crate) fn decide(core: &Core, user: &User, action: &Action) -> Decision {
    if user.is_in(MASTERS) {
        return Decision::Allowed(String::new());
    }
    let mut why = String::new();
    if let Some(node) = user.node_name() {
        match node::decide(core, node, action) {
            Decision::NoOpinion(reason) => why = reason,
            allowed => return allowed,
        }
    }
    match core.rbac.decide(&*core.store, user, action) {
        Decision::NoOpinion(reason) if why.is_empty() => Decision::NoOpinion(reason),
        Decision::NoOpinion(_) => Decision::NoOpinion(why),
        allowed => allowed,
    }
}

/// The 403 for a refused action, worded as upstream words it.
pub(crate) fn refusal(user: &User, action: &Action, reason: &str) -> ApiError {
    let suffix = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    let Some(path) = &action.path else {
        let scope = match &*action.namespace {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace \"{namespace}\""),
        };
        let qualified = match &*action.group {
            "" => action.resource.clone(),
            group => format!("{}.{group}", action.resource),
        };
        let object = match &*action.name {
            "" => qualified,
            name => format!("{qualified} \"{name}\""),
        };
        let message = format!(
            "{object} is forbidden: User \"{}\" cannot {} resource \"{}\" in API group \"{}\" {scope}{suffix}",
            user.name,
            action.verb,
            action.full_resource(),
            action.group
        );
        let mut details = serde_json::Map::new();
        for (key, value) in [("name", &action.name), ("group", &action.group), ("kind", &action.resource)] {
            if !value.is_empty() {
                details.insert(key.into(), value.as_str().into());
            }
        }
        return ApiError::new(http::StatusCode::FORBIDDEN, "Forbidden", message).with_details(details.into());
    };
    let message = format!("forbidden: User \"{}\" cannot {} path \"{path}\"{suffix}", user.name, action.verb);
    ApiError::new(http::StatusCode::FORBIDDEN, "Forbidden", message).with_details(serde_json::json!({}))
}
