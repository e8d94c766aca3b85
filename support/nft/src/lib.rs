//! nf_tables by netlink: tables, chains, rules, sets and maps, written as one atomic [`Transaction`] and read back.
//!
//! Everything, the fixed part of a ruleset included, goes through the kernel's own interface: one transaction holds chains,
//! rules and elements together, costs microseconds instead of the milliseconds of an `nft` process, and needs no `nft` of a
//! certain version on the node. What is written here is listed by `nft list ruleset` as if nft had written it.
//!
//! [`Kernel`] is the seam: [`Netlink`] is the real one, [`Fake`] holds tables in memory under the same rules, and
//! [`trace`] sends a virtual packet through a fake's tables.
//!
//! What it does not own: any ruleset. The Service proxy's and the CNI plugins' tables are theirs.

mod encode;
mod error;
mod expression;
mod fake;
mod kernel;
mod key;
mod model;
mod netlink;
mod text;
pub mod trace;

pub use error::NftError;
pub use expression::{CtKey, Expr, FibResult, MetaKey, NatKind, PayloadBase, Reg, Rule};
pub use fake::Fake;
pub use kernel::Kernel;
pub use key::{Bytes, Field, Key};
pub use model::{
    Chain, ChainKind, Command, Element, Family, Hook, HookPoint, Policy, Set, SetData, Table, Transaction, Value,
    Verdict,
};
pub use netlink::Netlink;

/// The result of every operation of this crate.
pub type Result<T, E = NftError> = std::result::Result<T, E>;
