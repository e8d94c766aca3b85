//! The kinds that the API server serves, one row each: names, scope, verbs and subresources, defaults, the create
//! and update strategies, validation, printer columns and selectable fields. Everything is a pure function over
//! JSON objects; storage, admission, identity and the wire are the API server's.

mod access;
mod columns;
mod defaults;
mod event_views;
mod field_error;
mod kind;
mod selectable;
mod strategy;
mod table;
mod validate;

pub use field_error::{FieldError, FieldErrorKind};
pub use kind::{Column, Kind, SubresourceType};
pub use table::{all, by_kind, default_columns, default_row, find};
pub use validate::pod_ephemeral_containers_update;
