//! Owns the wire protocols that Oarlock's processes speak to each other and to their upstream counterparts:
//! the Container Runtime Interface v1 and Oarlock's own image calls, as generated clients and servers.
//! Holds no logic.

/// The Container Runtime Interface, version 1 (protobuf package `runtime.v1`).
pub mod cri {
    #![allow(clippy::all, missing_docs, deprecated, rust_2018_idioms)]
    tonic::include_proto!("runtime.v1");
}

/// Image calls that the Container Runtime Interface lacks (protobuf package `oarlock.v1`).
pub mod images {
    #![allow(clippy::all, missing_docs, rust_2018_idioms)]
    tonic::include_proto!("oarlock.v1");
}
