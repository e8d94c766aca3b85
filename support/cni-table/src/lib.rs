//! The nftables table `oarlock-cni` of the CNI plugins: its rules, what each attachment has in it, and laying all of it again.
//!
//! Whoever flushes the node's ruleset (`nft flush ruleset`, which some distributions do when their nftables service starts)
//! takes masquerading, host ports and firewalls of all containers away. The plugins keep small records of what they
//! wrote ([`State`]), and [`restore`] compares them with the kernel and puts back what is missing, in one transaction a table,
//! or record by record where the kernel refuses that.
//! [`Restorer`] does so only when somebody changed nftables since it last looked.
//!
//! A [`Part`] is what one plugin has in the table for one attachment. It knows its [`Foundation`] (the sets, chains and
//! rules that it needs, which are the same however often they are laid) and its elements.
//!
//! What it does not own: attachments, addresses, links. Other tables are never touched.

mod change;
mod error;
pub mod firewall;
mod foundation;
pub mod host_ports;
pub mod masquerade;
mod owner;
mod part;
mod restore;
pub mod spoof_check;
mod state;

pub use change::{Holder, Missing, Place, add, keep_only, missing, remove};
pub use error::TableError;
pub use foundation::{Foundation, TABLE, address_field, table};
pub use owner::{Owner, stable_hash};
pub use part::{Entry, Part};
pub use restore::{Refusal, Restorer, restore};
pub use state::{STATE_DIR, State};

/// The result of every operation of this crate.
pub type Result<T, E = TableError> = std::result::Result<T, E>;
