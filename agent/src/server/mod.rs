//! The agent's side of the :10250 API: pods, logs, streaming addresses, statistics; and who may ask.

mod auth;
mod backend;
mod cadvisor;
mod machine;
mod metrics;
mod stats;

pub(crate) use auth::ApiAuthorizer;
pub(crate) use backend::Backend;
