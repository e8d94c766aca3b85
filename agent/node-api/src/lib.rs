//! The node's own HTTPS API on :10250: pods, logs, exec, attach, port-forward, run, stats, metrics, health.
//!
//! Owns TLS, authentication, the mapping of paths to `nodes/…` permissions, log reading and the relaying of upgrades. Does
//! not know pods or containers: those come from a [`NodeBackend`], and permission from an [`Authorizer`].

mod answer;
mod backend;
mod handlers;
mod logs;
mod permission;
mod query;
mod server;
mod summary;
mod tls;
mod upgrade;

pub use backend::{
    Authorizer, ContainerRef, ExecRequest, LogFile, MetricsPage, NodeBackend, NodeError, PodList, PortForwardRequest,
    User,
};
pub use server::{Config, NodeApi, NodeApiError};
