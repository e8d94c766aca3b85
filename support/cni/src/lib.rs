//! The Container Network Interface, specification 0.3.1 to 1.1.0: its types for both sides, and the runtime's side.
//!
//! [`types`] are results and errors as they travel between a runtime and a plugin, [`config`] loads network
//! configuration lists, and [`CniClient`] runs the plugins of a list: ADD, DEL, CHECK, STATUS and GC, with the results
//! cached in the layout that libcni uses. It knows no plugin and makes no network itself.

#[cfg(feature = "client")]
mod cache;
#[cfg(feature = "client")]
mod client;
pub mod config;
#[cfg(feature = "client")]
mod error;
#[cfg(feature = "client")]
mod exec;
pub mod names;
pub mod types;
pub mod version;

#[cfg(feature = "client")]
pub use client::{Attachment, CniClient, PortMapping};
pub use config::NetworkList;
#[cfg(feature = "client")]
pub use error::CniError;
pub use types::{CniResult, Dns, ErrorCode, ErrorObject, Interface, IpConfig, Route, ValidAttachment};
pub use version::Version;
