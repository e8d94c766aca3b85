//! Netlink, as far as a node's network needs it: links, addresses, routes, neighbours, rates and connection tracking entries,
//! each change one message with its acknowledgement, synchronous and without a runtime.
//!
//! [`wire`] writes and reads messages of any netlink family, [`Connection`] sends them; oarlock-nft builds on both.
//! Everything is here because the CNI plugins live for a millisecond and are a few hundred kilobytes: a general
//! rtnetlink model parses every attribute of every link, which costs both.
//!
//! What it does not own: namespaces (oarlock-netns), nf_tables (oarlock-nft), and any decision.

mod address;
mod address_news;
mod bridge;
mod connection;
pub mod conntrack;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod link;
mod neighbour;
mod qdisc;
mod route;
mod sockopt;
mod vlan;
pub mod wire;
mod wireguard;

pub use address::Address;
pub use address_news::AddressNews;
pub use bridge::Bridge;
pub use connection::{Connection, Protocol, Refusal};
pub use error::NetlinkError;
pub use link::{InvalidMac, Link, LinkChange, Mac, VethPair, Vxlan};
pub use neighbour::Neighbour;
pub use qdisc::TokenBucket;
pub use route::Route;
pub use vlan::PortVlan;
pub use wireguard::{Key as WireguardKey, Wireguard, WireguardDevice, WireguardPeer};

/// The result of every operation of this crate.
pub type Result<T, E = NetlinkError> = std::result::Result<T, E>;
