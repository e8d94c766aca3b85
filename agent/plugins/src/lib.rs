//! The node's plugins: device plugins, and what registers itself by a socket in the registration directory.
//!
//! Owns the plugin protocols: finding plugins ([`watcher`]), following their devices ([`DevicePlugins`]), the ledger of which
//! container has which devices ([`DeviceLedger`]), and the pod resources API ([`pod_resources`]). Does not choose devices
//! (that is `oarlock-allocation`) and knows no pods but by UID and name.

mod devices;
pub mod pod_resources;
pub mod socket;
pub mod watcher;

pub use devices::{Answer, DeviceLedger, DevicePlugins, Given, PluginError};
