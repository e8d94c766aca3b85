//! The node's own certificates: the first one by a bootstrap token, and new ones while the agent runs.
//!
//! Owns keys and certificates on disk ([`Store`]), asking for them by CertificateSigningRequests ([`Rotation`]), and a client whose
//! identity changes under it ([`LiveClient`]). Approves and signs nothing.

mod client;
mod live;
mod request;
mod rotation;
mod store;

pub use client::client;
pub use live::LiveClient;
pub use request::Purpose;
pub use rotation::{CredentialsError, Rotation};
pub use store::{Current, Store};
