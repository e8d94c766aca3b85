//! Device plugins: who is there with which devices, and who has which of them.

mod endpoint;
mod ledger;
mod plugins;

pub use endpoint::PluginError;
pub use ledger::{DeviceLedger, Given};
pub use oarlock_proto::deviceplugin::ContainerAllocateResponse as Answer;
pub use plugins::DevicePlugins;
