//! The thread that owns nftables: jobs in, transactions out, for each address family its own table.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use oarlock_nft::{Kernel, NftError};
use tokio::sync::mpsc::Receiver;
use tracing::{debug, error, warn};

use crate::conntrack;
use crate::element::Entry;
use crate::health::Status;
use crate::ledger::Ledger;
use crate::memory;
use crate::rules::Settings;
use crate::service::ServiceName;
use crate::sync::Proxier;

/// After so many Services the memory that they took on their way is worth giving back.
const LARGE: usize = 1000;

/// No packet is on its way through the tables for as long. One that met the old rules binds its client, or leaves its flow,
/// when it has come through: that can be after the first look for such things, but not after one that is so much later.
const IN_FLIGHT: Duration = Duration::from_secs(1);

/// More changes that wait for their commit are not timed.
pub const MAX_TRIGGERS: usize = 10_000;

/// The elements of a Service, for each family in turn.
pub type Planned = (ServiceName, Vec<Vec<Entry>>);

/// Services whose elements are to be replaced.
#[derive(Debug, Default)]
pub struct Change {
    pub services: Vec<Planned>,
    /// Of [`Status::queued`].
    pub number: u64,
    /// When that came about which these are for, as far as it is known.
    pub triggers: Vec<Timestamp>,
}

/// What the thread is asked to do.
#[derive(Debug)]
pub enum Job {
    /// Carry this out.
    Apply(Change),
    /// Go by this from now on, for each family in turn; the next `Apply` has every Service.
    Configure(Vec<Ground>),
    /// Look whether all is well, and try again what failed.
    Audit,
}

/// What one family's rules and flows go by.
#[derive(Debug, Clone)]
pub struct Ground {
    pub settings: Settings,
    pub scope: conntrack::Scope,
}

/// One family's table and what is left to do about it.
pub struct Family<K> {
    proxier: Proxier<K>,
    scope: conntrack::Scope,
    forget_flows: ForgetFlows,
    failed: bool,
    /// For clients that are bound to endpoints that are gone.
    bindings: Look,
    /// For flows that lead nowhere.
    flows: Look,
    retired: conntrack::Retired,
}

type ForgetFlows =
    Box<dyn FnMut(&Ledger, &conntrack::Scope, &conntrack::Retired) -> oarlock_netlink::Result<usize> + Send>;

impl<K: Kernel> Family<K> {
    pub fn new(proxier: Proxier<K>, scope: conntrack::Scope) -> Family<K> {
        Family::with(proxier, scope, Box::new(conntrack::clean))
    }

    fn with(proxier: Proxier<K>, scope: conntrack::Scope, forget_flows: ForgetFlows) -> Family<K> {
        Family {
            proxier,
            scope,
            forget_flows,
            failed: false,
            bindings: Look::default(),
            flows: Look::default(),
            retired: conntrack::Retired::new(),
        }
    }
}

/// A look for what a change left behind: at once, again when it failed, and once more when nothing of before can be on its
/// way any longer.
#[derive(Debug, Default)]
struct Look {
    owed: bool,
    last: Option<Instant>,
}

impl Look {
    fn changed(&mut self, now: Instant) {
        self.owed = true;
        self.last = Some(now + IN_FLIGHT);
    }

    fn is_due(&self, now: Instant) -> bool {
        self.owed || self.last.is_some_and(|last| last <= now)
    }

    /// After a look begun at `now`.
    fn done(&mut self, now: Instant) {
        self.owed = false;
        self.last = self.last.filter(|last| *last > now);
    }
}

/// Works until the sender is gone.
pub fn run<K: Kernel>(mut families: Vec<Family<K>>, status: &Arc<Status>, mut jobs: Receiver<Job>) {
    let mut unreturned = 0;
    let mut triggers = Vec::new();
    let mut last = 0;
    while let Some(job) = jobs.blocking_recv() {
        let started = Instant::now();
        let (mut apply, mut audit) = (false, false);
        // Everything that waits becomes one transaction.
        for job in std::iter::once(job).chain(std::iter::from_fn(|| jobs.try_recv().ok())) {
            match job {
                Job::Apply(change) => {
                    (apply, last) = (true, change.number);
                    unreturned += change.services.len();
                    change.services.iter().for_each(|planned| stage(&mut families, planned));
                    triggers.extend(change.triggers.into_iter().take(MAX_TRIGGERS - triggers.len()));
                }
                Job::Configure(grounds) => configure(&mut families, grounds),
                Job::Audit => audit = true,
            }
        }
        let mut committed = false;
        for family in families.iter_mut().filter(|family| apply || family.failed) {
            committed = true;
            commit(family, Instant::now(), status);
        }
        if committed && families.iter().all(|family| !family.failed) {
            note_commit(&families, status, last, started.elapsed());
            let now = Timestamp::now();
            triggers.drain(..).for_each(|trigger| status.programmed(trigger, now));
        }
        if unreturned >= LARGE {
            memory::give_back();
            unreturned = 0;
        }
        for family in families.iter_mut().filter(|family| !family.failed) {
            if audit {
                run_audit(&mut family.proxier, status);
            }
            look(family, Instant::now(), status);
        }
    }
}

/// Looks for what changes left behind, where that is due.
fn look<K: Kernel>(family: &mut Family<K>, now: Instant, status: &Status) {
    if family.bindings.is_due(now) {
        release_clients(family, now);
    }
    if family.flows.is_due(now) {
        forget_flows(family, now, status);
    }
}

fn stage<K: Kernel>(families: &mut [Family<K>], (service, by_family): &Planned) {
    for (family, entries) in families.iter_mut().zip(by_family) {
        family.proxier.stage(service, entries);
    }
}

fn configure<K: Kernel>(families: &mut [Family<K>], grounds: Vec<Ground>) {
    for (family, ground) in families.iter_mut().zip(grounds) {
        family.proxier.configure(ground.settings);
        family.scope = ground.scope;
    }
}

fn commit<K: Kernel>(family: &mut Family<K>, now: Instant, status: &Status) {
    match family.proxier.commit() {
        Ok(committed) => {
            family.failed = false;
            family.retired.extend(committed.retired.iter().map(|key| (*key, now)));
            if committed.connectionless_changed {
                family.flows.changed(now);
            }
            if committed.endpoints_removed {
                family.bindings.changed(now);
                release_clients(family, now);
            }
        }
        Err(problem) => {
            family.failed = true;
            status.failed();
            error!(error = &problem as &dyn std::error::Error, "rules cannot be written; trying again");
        }
    }
}

fn note_commit<K: Kernel>(families: &[Family<K>], status: &Status, last: u64, took: Duration) {
    let elements = families.iter().map(|family| family.proxier.ledger().element_count()).sum::<usize>();
    status.elements.store(elements as u64, Ordering::Relaxed);
    status.synced(last, took);
    debug!(took = ?took, elements, "rules written");
}

fn release_clients<K: Kernel>(family: &mut Family<K>, now: Instant) {
    match family.proxier.release_clients() {
        Ok(count) => {
            family.bindings.done(now);
            if count > 0 {
                debug!(clients = count, "clients released from endpoints that are gone");
            }
        }
        Err(problem) => {
            warn!(
                error = &problem as &dyn std::error::Error,
                "clients stay bound to endpoints that are gone; trying again"
            );
        }
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

fn forget_flows<K: Kernel>(family: &mut Family<K>, now: Instant, status: &Status) {
    match (family.forget_flows)(family.proxier.ledger(), &family.scope, &family.retired) {
        Ok(count) => {
            family.flows.done(now);
            family.retired.retain(|_, since| now.saturating_duration_since(*since) < IN_FLIGHT);
            status.flows_removed.fetch_add(count as u64, Ordering::Relaxed);
            if count > 0 {
                // What was under way on one of them may have begun it anew.
                family.flows.last = Some(now + IN_FLIGHT);
                debug!(flows = count, "stale flows forgotten");
            }
        }
        Err(problem) => {
            warn!(error = &problem as &dyn std::error::Error, "stale flows cannot be looked for");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use oarlock_nft::{Bytes, Command, Element, Fake, Family as NftFamily, Key, Table, Transaction};

    use super::*;
    use crate::element::{Balancer, ElementKey, Map, Scope, Target};
    use crate::rules;
    use crate::service::Protocol;

    const SERVICE: [u8; 4] = [10, 43, 1, 1];

    fn settings() -> Settings {
        Settings {
            table: Table::new(NftFamily::Ip, "oarlock-netproxy"),
            cluster_cidr: "10.42.0.0/16".parse().unwrap(),
            service_cidr: "10.43.0.0/16".parse().unwrap(),
            dns_address: None,
            balancer_pools: Vec::new(),
            node_port_addresses: None,
            masquerade_bridged: false,
        }
    }

    fn scope() -> conntrack::Scope {
        conntrack::Scope {
            service_cidr: settings().service_cidr,
            cluster_cidr: settings().cluster_cidr,
            dns_address: None,
            node_ports: (30_000, 32_767),
            external: Vec::new(),
        }
    }

    /// A Service with session affinity and these endpoints.
    fn affine(endpoints: &[SocketAddr]) -> Planned {
        let name = ServiceName::new("default", "web");
        let key = |map| ElementKey::by_address(map, SERVICE.into(), Protocol::UDP, 80);
        let balancer = Balancer { scope: Scope::Cluster, endpoints: endpoints.len() as u32, affinity: true };
        let mut entries = vec![
            Entry { key: key(Map::Services), target: Target::Balance(balancer) },
            Entry { key: key(Map::Affine), target: Target::Remember(60) },
        ];
        entries.extend(endpoints.iter().zip(0..).map(|(endpoint, number)| Entry {
            key: key(Map::Services).numbered(Scope::Cluster.endpoints(), number),
            target: Target::Endpoint((*endpoint).into()),
        }));
        entries.sort();
        (name, vec![entries])
    }

    fn bind(family: &mut Family<Fake>, endpoint: SocketAddr) {
        let client = [10, 42, 0, 99];
        let key = Key::new().address(client.into()).address(SERVICE.into()).protocol(Protocol::UDP.0).port(80).bytes();
        let element = Element::data(key, rules::endpoint_bytes(endpoint.into()));
        let mut transaction = Transaction::new(settings().table);
        let set = rules::AFFINITY.to_owned();
        transaction.push(Command::AddElements { set, elements: vec![element], exclusive: false });
        family.proxier.kernel_mut().commit(&transaction).unwrap();
    }

    fn bound(family: &mut Family<Fake>) -> Vec<Bytes> {
        let elements = family.proxier.kernel_mut().elements(&settings().table, rules::AFFINITY).unwrap().unwrap();
        elements.into_iter().map(|element| element.key).collect()
    }

    /// A packet that met the old rules can bind its client after the clients of those rules were released.
    #[test]
    fn what_a_late_packet_leaves_behind_is_found_by_a_second_look() {
        let (gone, stays) = (SocketAddr::from(([10, 42, 0, 2], 8080)), SocketAddr::from(([10, 42, 0, 3], 8080)));
        let looks = Arc::new(Mutex::new((0, Ok(()))));
        let told = Arc::clone(&looks);
        let forget: ForgetFlows = Box::new(move |_, _, _| {
            let mut looks = told.lock().unwrap();
            looks.0 += 1;
            std::mem::replace(&mut looks.1, Ok(())).map(|()| 0)
        });
        let proxier = Proxier::new(Fake::new(), settings(), Vec::new);
        let mut families = vec![Family::with(proxier, scope(), forget)];
        let status = Status::default();
        let now = Instant::now();
        for endpoints in [&[gone, stays][..], &[stays]] {
            stage(&mut families, &affine(endpoints));
            commit(&mut families[0], now, &status);
        }
        let family = &mut families[0];
        looks.lock().unwrap().1 = Err(oarlock_netlink::NetlinkError::Malformed { operation: "list flows" });
        look(family, now, &status);
        look(family, now, &status);
        assert_eq!(looks.lock().unwrap().0, 2, "what fails is tried again");
        bind(family, gone);
        look(family, now, &status);
        assert_eq!((bound(family).len(), looks.lock().unwrap().0), (1, 2), "nobody looks without a cause");
        look(family, now + 2 * IN_FLIGHT, &status);
        assert_eq!((bound(family), looks.lock().unwrap().0), (Vec::new(), 3));
        bind(family, gone);
        look(family, now + 4 * IN_FLIGHT, &status);
        assert_eq!((bound(family).len(), looks.lock().unwrap().0), (1, 3), "the second look is the last one");
    }

    #[test]
    fn flows_are_looked_for_until_none_is_stale() {
        let found = Arc::new(Mutex::new(vec![0, 1, 2]));
        let left = Arc::clone(&found);
        let forget: ForgetFlows = Box::new(move |_, _, _| Ok(left.lock().unwrap().pop().expect("nobody looks again")));
        let mut family = Family::with(Proxier::new(Fake::new(), settings(), Vec::new), scope(), forget);
        let (status, now) = (Status::default(), Instant::now());
        family.flows.owed = true;
        for step in 0..8 {
            look(&mut family, now + step * IN_FLIGHT, &status);
        }
        assert!(found.lock().unwrap().is_empty());
    }
}
