//! Version: who answers, and which interface it speaks.

use oarlock_proto::cri;

/// The name and interface version that clients check.
pub(super) fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        version: "0.1.0".to_owned(),
        runtime_name: "oarlock".to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}
