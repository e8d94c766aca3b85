//! Validation, with the paths and texts that clients know from upstream. Objects are typed and defaulted before.
//!
//! One function a kind for create, one for update (which checks the whole new object too) and, where a status has
//! rules, one for status. Functions of parts take the collector, the part and its path.

mod affinity;
mod certificates;
mod cluster;
mod config;
mod container;
mod endpoints;
mod event;
mod handler;
mod metadata;
mod names;
mod net;
mod network_policy;
mod pod;
mod pod_update;
mod policy;
mod rbac;
mod resources;
mod security;
mod service;
mod storage;
mod volume;
mod workload;

pub(crate) use certificates::*;
pub(crate) use cluster::*;
pub(crate) use config::*;
pub(crate) use endpoints::*;
pub(crate) use event::*;
pub(crate) use network_policy::*;
pub(crate) use pod::pod;
pub use pod_update::pod_ephemeral_containers_update;
pub(crate) use pod_update::{pod_status_update, pod_update};
pub(crate) use policy::*;
pub(crate) use rbac::*;
pub(crate) use service::*;
pub(crate) use storage::*;
pub(crate) use workload::*;

use crate::FieldError;
use crate::access::{equal, text};
use serde_json::Value;

const IMMUTABLE: &str = "field is immutable";
const NOT_NEGATIVE: &str = "must be greater than or equal to 0";

/// Collects the problems of one object.
#[derive(Default)]
struct Errors(Vec<FieldError>);

impl Errors {
    fn invalid(&mut self, path: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) {
        self.0.push(FieldError::invalid(path, value, detail));
    }

    fn required(&mut self, path: impl Into<String>) {
        self.0.push(FieldError::required(path, ""));
    }

    fn required_as(&mut self, path: impl Into<String>, detail: impl Into<String>) {
        self.0.push(FieldError::required(path, detail));
    }

    fn forbidden(&mut self, path: impl Into<String>, detail: impl Into<String>) {
        self.0.push(FieldError::forbidden(path, detail));
    }

    fn not_supported(&mut self, path: impl Into<String>, value: impl Into<Value>, supported: &[&str]) {
        self.0.push(FieldError::not_supported(path, value, supported));
    }

    fn duplicate(&mut self, path: impl Into<String>, value: impl Into<Value>) {
        self.0.push(FieldError::duplicate(path, value));
    }

    fn not_found(&mut self, path: impl Into<String>, value: impl Into<Value>) {
        self.0.push(FieldError::not_found(path, value));
    }

    fn push(&mut self, error: FieldError) {
        self.0.push(error);
    }

    /// One error for each message about a value.
    fn each(&mut self, path: &str, value: &str, messages: Vec<String>) {
        for message in messages {
            self.invalid(path, value, message);
        }
    }

    /// An enumerated value that must be set.
    fn one_of(&mut self, path: String, value: &str, supported: &[&str]) {
        if value.is_empty() {
            self.required(path);
        } else if !supported.contains(&value) {
            self.not_supported(path, value, supported);
        }
    }

    fn not_negative(&mut self, path: String, value: Option<i64>) {
        if let Some(value) = value.filter(|value| *value < 0) {
            self.invalid(path, value, NOT_NEGATIVE);
        }
    }

    fn immutable(&mut self, path: &str, new: Option<&Value>, old: Option<&Value>) {
        if !equal(new, old) {
            self.invalid(path, new.cloned().unwrap_or_default(), IMMUTABLE);
        }
    }
}

/// A field of `object` by name; null when absent.
fn part<'a>(object: &'a Value, name: &str) -> &'a Value {
    static NULL: Value = Value::Null;
    object.get(name).filter(|value| !value.is_null()).unwrap_or(&NULL)
}

fn is_set(object: &Value, name: &str) -> bool {
    object.get(name).is_some_and(|value| !value.is_null())
}

fn field<'a>(object: &'a Value, name: &str) -> &'a str {
    text(object, &format!("/{name}"))
}

/// `1 to 65535`, as every range is worded.
fn range(low: i64, high: i64) -> String {
    format!("must be between {low} and {high}, inclusive")
}

fn check_range(errors: &mut Errors, path: String, value: Option<i64>, low: i64, high: i64) {
    if let Some(value) = value.filter(|value| !(low..=high).contains(value)) {
        errors.invalid(path, value, range(low, high));
    }
}

fn check_port(errors: &mut Errors, path: String, value: i64) {
    check_range(errors, path, Some(value), 1, 65_535);
}

/// An int-or-string that names a port.
fn check_port_or_name(errors: &mut Errors, path: &str, value: &Value) {
    match value {
        Value::String(name) => errors.each(path, name, names::port_name(name)),
        other => check_port(errors, path.to_owned(), other.as_i64().unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests;
