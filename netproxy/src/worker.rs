//! The thread that owns nftables: jobs in, transactions out, for each address family its own table.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use oarlock_nft::{Kernel, NftError};
use tokio::sync::mpsc::Receiver;
use tracing::{debug, error, warn};

use crate::conntrack;
use crate::element::Entry;
use crate::health::Status;
use crate::memory;
use crate::service::ServiceName;
use crate::sync::{Committed, Proxier};

/// After so many Services the memory that they took on their way is worth giving back.
const LARGE: usize = 1000;

/// The elements of a Service, for each family in turn.
pub type Planned = (ServiceName, Vec<Vec<Entry>>);

/// What the thread is asked to do.
#[derive(Debug)]
pub enum Job {
    /// Replace the elements of these Services.
    Apply(Vec<Planned>),
    /// Look whether all is well, and try again what failed.
    Audit,
}

/// One family's table and what is left to do about it.
pub struct Family<K> {
    proxier: Proxier<K>,
    scope: conntrack::Scope,
    failed: bool,
    flows_pending: bool,
    retired: conntrack::Retired,
}

impl<K: Kernel> Family<K> {
    pub fn new(proxier: Proxier<K>, scope: conntrack::Scope) -> Family<K> {
        Family { proxier, scope, failed: false, flows_pending: false, retired: HashSet::new() }
    }
}

/// Works until the sender is gone.
pub fn run<K: Kernel>(mut families: Vec<Family<K>>, status: &Arc<Status>, mut jobs: Receiver<Job>) {
    let mut unreturned = 0;
    while let Some(job) = jobs.blocking_recv() {
        let started = Instant::now();
        let (mut apply, mut audit) = (false, false);
        // Everything that waits becomes one transaction.
        for job in std::iter::once(job).chain(std::iter::from_fn(|| jobs.try_recv().ok())) {
            match job {
                Job::Apply(services) => {
                    apply = true;
                    unreturned += services.len();
                    services.iter().for_each(|planned| stage(&mut families, planned));
                }
                Job::Audit => audit = true,
            }
        }
        let mut committed = false;
        for family in families.iter_mut().filter(|family| apply || family.failed) {
            committed = true;
            commit(family, status);
        }
        if committed && families.iter().all(|family| !family.failed) {
            note_commit(&families, status, started.elapsed());
        }
        if unreturned >= LARGE {
            memory::give_back();
            unreturned = 0;
        }
        for family in families.iter_mut().filter(|family| !family.failed) {
            if audit {
                run_audit(&mut family.proxier, status);
            }
            if family.flows_pending {
                family.flows_pending = !clean_flows(family, status);
            }
        }
    }
}

fn stage<K: Kernel>(families: &mut [Family<K>], (service, by_family): &Planned) {
    for (family, entries) in families.iter_mut().zip(by_family) {
        family.proxier.stage(service, entries);
    }
}

fn commit<K: Kernel>(family: &mut Family<K>, status: &Status) {
    match family.proxier.commit() {
        Ok(committed) => {
            family.failed = false;
            family.flows_pending |= committed.connectionless_changed;
            family.retired.extend(committed.retired.iter().copied());
            clean_up(&mut family.proxier, &committed);
        }
        Err(problem) => {
            family.failed = true;
            status.failures.fetch_add(1, Ordering::Relaxed);
            error!(error = &problem as &dyn std::error::Error, "rules cannot be written; trying again");
        }
    }
}

fn note_commit<K: Kernel>(families: &[Family<K>], status: &Status, took: Duration) {
    let elements = families.iter().map(|family| family.proxier.ledger().element_count()).sum::<usize>();
    status.elements.store(elements as u64, Ordering::Relaxed);
    status.synced(took);
    debug!(took = ?took, elements, "rules written");
}

fn clean_up<K: Kernel>(proxier: &mut Proxier<K>, committed: &Committed) {
    if committed.endpoints_removed
        && let Err(problem) = proxier.release_clients()
    {
        warn!(error = &problem as &dyn std::error::Error, "clients stay bound to endpoints that are gone");
    }
}

fn run_audit<K: Kernel>(proxier: &mut Proxier<K>, status: &Status) {
    let outcome: Result<bool, NftError> = proxier.audit(Instant::now());
    match outcome {
        Ok(true) => drop(status.repairs.fetch_add(1, Ordering::Relaxed)),
        Ok(false) => {}
        Err(problem) => warn!(error = &problem as &dyn std::error::Error, "rules cannot be audited"),
    }
}

/// Forgets flows that lead nowhere; says whether that worked.
fn clean_flows<K: Kernel>(family: &mut Family<K>, status: &Status) -> bool {
    match conntrack::clean(family.proxier.ledger(), &family.scope, &family.retired) {
        Ok(count) => {
            family.retired = HashSet::new();
            status.flows_removed.fetch_add(count as u64, Ordering::Relaxed);
            if count > 0 {
                debug!(flows = count, "stale flows forgotten");
            }
            true
        }
        Err(problem) => {
            warn!(error = &problem as &dyn std::error::Error, "stale flows cannot be looked for");
            false
        }
    }
}
