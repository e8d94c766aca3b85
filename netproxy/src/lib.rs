//! The Service proxy of a node, its cluster DNS, and the routes and CNI configuration of its pods' network.
//!
//! [`Netproxy`] watches Services, EndpointSlices and Nodes. `service` reduces the objects, `plan` says which elements of which
//! maps a Service means, `rules` holds the fixed chains, `ledger` puts all Services together and knows what a change changes:
//! all pure. `sync` carries it out as single transactions on the thread of `worker`, repairs what others break, and
//! `conntrack` forgets stale flows. `dns` answers names from the same state. `announce` answers for balancer addresses on the node's link. `node` writes the CNI configuration, `overlay` finds the
//! way to other nodes' pods, through `wireguard` where there is one. `plugins` puts back what CNI
//! plugins wrote, `policy` keeps NetworkPolicies in tables of their own, `hub` owns the cluster's state, and `proxy` puts the parts together.
//!
//! `trial`, for tests, makes random Services by seed and holds these rules against a model of what they mean.
//!
//! These tables are ours, and nothing else of the host's is touched.

mod addresses;
mod announce;
mod balancer_health;
mod cluster;
mod config;
mod conntrack;
mod dns;
mod dns_service;
mod element;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod health;
mod histogram;
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
mod plugins;
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

/// Why a CNI configuration of before a boot could not be taken away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WithdrawError {
    #[error("cannot look for tables of nftables")]
    Kernel(#[source] oarlock_nft::NftError),
    #[error("cannot withdraw it")]
    Remove(#[source] node::WriteError),
}

/// Takes the CNI configuration of before a boot away, so that no pod starts before network policies hold: the proxy writes
/// it again as soon as they do. Says whether it did. A boot is known by the missing tables, which nothing else takes away
/// while pods run. To be called by whatever may start pods before the proxy runs.
pub fn withdraw_stale_configuration(config: &Config) -> Result<bool, WithdrawError> {
    use oarlock_nft::{Kernel, Netlink};
    let Some(directory) = config.cni_conf_dir.as_ref().filter(|directory| directory.join(node::CONFLIST).exists())
    else {
        return Ok(false);
    };
    let mut kernel = Netlink::open().map_err(WithdrawError::Kernel)?;
    for network in &config.networks {
        let table = proxy::table(config, network.is_ipv4());
        if kernel.table_comment(&table).map_err(WithdrawError::Kernel)?.is_some() {
            return Ok(false);
        }
    }
    node::remove_conflist(directory).map_err(WithdrawError::Remove)?;
    tracing::info!("CNI configuration of before the boot withdrawn: pods wait for network policies");
    Ok(true)
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
