//! The thread that owns nftables: jobs in, transactions out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use oarlock_nft::{Kernel, NftError};
use tokio::sync::mpsc::Receiver;
use tracing::{debug, error, warn};

use crate::conntrack;
use crate::health::Status;
use crate::plan::Entry;
use crate::service::ServiceName;
use crate::sync::{Committed, Proxier};

/// What the thread is asked to do.
#[derive(Debug)]
pub enum Job {
    /// Replace the elements of these Services.
    Apply(Vec<(ServiceName, Vec<Entry>)>),
    /// Look whether all is well, and try again what failed.
    Audit,
}

/// Works until the sender is gone.
pub fn run<K: Kernel>(
    mut proxier: Proxier<K>,
    scope: &conntrack::Scope,
    status: &Arc<Status>,
    mut jobs: Receiver<Job>,
) {
    let mut failed = false;
    let mut flows_pending = false;
    while let Some(job) = jobs.blocking_recv() {
        let started = Instant::now();
        let mut apply = failed;
        let mut audit = false;
        // Everything that waits becomes one transaction.
        for job in std::iter::once(job).chain(std::iter::from_fn(|| jobs.try_recv().ok())) {
            match job {
                Job::Apply(services) => {
                    apply = true;
                    services.into_iter().for_each(|(service, entries)| proxier.stage(&service, entries));
                }
                Job::Audit => audit = true,
            }
        }
        if apply {
            match proxier.commit() {
                Ok(committed) => {
                    failed = false;
                    note_commit(&proxier, status, started.elapsed());
                    flows_pending |= committed.connectionless_changed;
                    clean_up(&mut proxier, committed);
                }
                Err(problem) => {
                    failed = true;
                    status.failures.fetch_add(1, Ordering::Relaxed);
                    error!(error = &problem as &dyn std::error::Error, "rules cannot be written; trying again");
                }
            }
        }
        if audit && !failed {
            run_audit(&mut proxier, status);
        }
        if flows_pending && !failed {
            flows_pending = !clean_flows(&proxier, scope, status);
        }
    }
}

fn note_commit<K: Kernel>(proxier: &Proxier<K>, status: &Status, took: Duration) {
    status.synced(took);
    status.elements.store(proxier.ledger().element_count() as u64, Ordering::Relaxed);
    debug!(table = proxier.settings().table.name, took = ?took, elements = proxier.ledger().element_count(), "rules written");
}

fn clean_up<K: Kernel>(proxier: &mut Proxier<K>, committed: Committed) {
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
fn clean_flows<K: Kernel>(proxier: &Proxier<K>, scope: &conntrack::Scope, status: &Status) -> bool {
    match conntrack::clean(proxier.ledger(), scope) {
        Ok(count) => {
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
