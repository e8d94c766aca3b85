//! The Service proxy of a node, its cluster DNS, and the routes and CNI configuration of its pods' network.
//!
//! [`Netproxy`] watches Services, EndpointSlices and Nodes. `service` reduces the objects, `plan` says which elements of which
//! maps a Service means, `rules` holds the fixed chains, `ledger` puts all Services together and knows what a change changes:
//! all pure. `sync` carries it out as single transactions on the thread of `worker`, repairs what others break, and
//! `conntrack` forgets stale flows. `dns` answers names from the same state. `announce` answers for balancer addresses on the node's link. `node` writes the CNI configuration, `overlay` finds the
//! way to other nodes' pods, through `wireguard` where there is one. `policy` keeps NetworkPolicies in tables of their own, `hub` owns the cluster's state, and `proxy` puts the parts together.
//!
//! `trial`, for tests, makes random Services by seed and holds these rules against a model of what they mean.
//!
//! These tables are ours, and nothing else of the host's is touched.

mod announce;
mod balancer_health;
mod cluster;
mod config;
mod conntrack;
mod dns;
mod dns_service;
mod element;
mod health;
mod host;
mod hub;
mod ledger;
mod memory;
#[cfg(test)]
mod model_tests;
mod node;
mod overlay;
mod packet;
mod plan;
mod policy;
mod proxy;
mod rules;
mod service;
mod sync;
#[cfg(any(test, feature = "trial"))]
pub mod trial;
#[cfg(test)]
mod trial_tests;
mod watch;
mod wireguard;
mod worker;

pub use config::{Config, Network, Tunnel};
pub use host::SysctlError;
pub use proxy::{Error, Netproxy};

/// Why something stayed behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveError {
    #[error("cannot remove the nftables table {table}")]
    Table { table: String, source: oarlock_nft::NftError },
    #[error("cannot put kernel settings back")]
    Sysctl(#[source] host::SysctlError),
    #[error("cannot remove routes and the cluster DNS address")]
    Host(#[source] oarlock_netlink::NetlinkError),
}

/// Takes away everything that a proxy with this configuration has made in the kernel: the tables, routes, and the cluster
/// DNS addresses. For a reset; a restart keeps it all. What is gone already is fine.
pub fn remove_everything(config: &Config) -> Result<(), RemoveError> {
    use oarlock_nft::{Command, Kernel, Netlink, Transaction};
    // Of both families, whatever the configuration says now.
    for is_ipv4 in [true, false] {
        for table in [proxy::table(config, is_ipv4), policy::table(is_ipv4)] {
            let failed = |source| RemoveError::Table { table: table.name.clone(), source };
            let mut kernel = Netlink::open().map_err(failed)?;
            if kernel.table_comment(&table).map_err(failed)?.is_some() {
                let mut transaction = Transaction::new(table.clone());
                transaction.push(Command::DeleteTable);
                kernel.commit(&transaction).map_err(failed)?;
            }
        }
    }
    let dns: Vec<_> = config.networks.iter().map(|network| network.cluster_dns).collect();
    node::remove_leftovers(&dns).map_err(RemoveError::Host)?;
    config.sysctl_record.as_deref().map_or(Ok(()), |record| host::restore(record).map_err(RemoveError::Sysctl))
}
