//! Owns the wire protocols that Oarlock's processes speak to each other and to their upstream counterparts:
//! the Container Runtime Interface v1, as generated client and server. Holds no logic.

/// The Container Runtime Interface, version 1 (protobuf package `runtime.v1`).
pub mod cri {
    #![allow(clippy::all, missing_docs, deprecated, rust_2018_idioms)]
    tonic::include_proto!("runtime.v1");
}
