//! Owns the wire protocols that Oarlock's processes speak to each other and to their upstream counterparts:
//! the Container Runtime Interface v1, Oarlock's own image calls, and what a kubelet's plugins speak, as generated clients and
//! servers. Holds no logic.

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

/// The device plugin protocol (protobuf package `v1beta1`).
pub mod deviceplugin {
    #![allow(clippy::all, missing_docs, rust_2018_idioms)]
    tonic::include_proto!("v1beta1");
}

/// The pod resources API (protobuf package `v1`).
pub mod podresources {
    #![allow(clippy::all, missing_docs, rust_2018_idioms)]
    tonic::include_proto!("v1");
}

/// How a kubelet learns of plugins (protobuf package `pluginregistration`).
pub mod pluginregistration {
    #![allow(clippy::all, missing_docs, rust_2018_idioms)]
    tonic::include_proto!("pluginregistration");
}

/// The Container Storage Interface as a node calls it (protobuf package `csi.v1`).
pub mod csi {
    #![allow(clippy::all, missing_docs, rust_2018_idioms)]
    tonic::include_proto!("csi.v1");
}
