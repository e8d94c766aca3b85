//! Fetching from registries, through the places that are configured for them. What arrives is verified by the callers'
//! digests.

mod challenge;
mod clients;
mod connection;
mod endpoints;
mod hosts;
mod source;

pub(crate) use source::{Source, sources};
