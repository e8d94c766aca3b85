//! Bringing the kernel to what the ledger says, and keeping it there.
//!
//! ```text
//!            stage*                commit ok
//!  Starting ────────▶ establish ─────────────▶ Applied ──stage*, commit──▶ Applied   (one transaction of elements)
//!                     adopt what is there       │  ▲
//!                     or replace the table      │  └── repair: differences only
//!                                               ▼
//!                               commit or audit fails ──▶ repair ──fails──▶ establish
//! ```
//!
//! A table of ours that is there at the start keeps working until the first commit, which changes only what differs; a table
//! of another version is replaced in one transaction. Either way there is no moment without rules.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use oarlock_nft::{Bytes, Element, Kernel, NftError, Transaction, Value};
use tracing::{debug, info, warn};

use crate::element::{Dynamic, ElementKey, Entry, Map, Target};
use crate::ledger::{Delta, Ledger};
use crate::rules::{self, Settings};
use crate::service::{Protocol, ServiceName};

/// Elements are compared with the kernel at most this often, and only so often that it takes half a percent of the time; a
/// table or rules that are gone are noticed at once.
const FULL_AUDIT_INTERVAL: Duration = Duration::from_secs(2);
const FULL_AUDIT_SHARE: u32 = 200;

/// What a commit did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Some element for UDP or SCTP changed, so tracked flows may be stale.
    pub connectionless_changed: bool,
    /// Some endpoint went away, so clients may be bound to it.
    pub endpoints_removed: bool,
    /// Frontends of UDP and SCTP that went away.
    pub retired: Vec<ElementKey>,
}

/// The owner of one family's table.
pub struct Proxier<K> {
    kernel: K,
    settings: Settings,
    /// Reads the addresses of this node, whose own clients are not from outside.
    node_addresses: Box<dyn Fn() -> Vec<IpAddr> + Send>,
    ledger: Ledger,
    staged: Delta,
    /// The ledger has been in the kernel before.
    written: bool,
    /// The chains in the kernel that come and go; none before the first commit.
    present: Option<Vec<Dynamic>>,
    generation: Option<u32>,
    audited: Option<Instant>,
    /// How long the last comparison took.
    audit_cost: Duration,
    /// Clients can be bound to endpoints: some Service has session affinity, or had it since the bindings were last seen gone.
    may_be_bound: bool,
}

impl<K: Kernel> Proxier<K> {
    pub fn new(kernel: K, settings: Settings, node_addresses: impl Fn() -> Vec<IpAddr> + Send + 'static) -> Proxier<K> {
        Proxier {
            kernel,
            settings,
            node_addresses: Box::new(node_addresses),
            ledger: Ledger::default(),
            staged: Delta::default(),
            written: false,
            present: None,
            generation: None,
            audited: None,
            audit_cost: Duration::ZERO,
            may_be_bound: true,
        }
    }

    #[cfg(any(test, feature = "trial"))]
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Replaces the elements of one Service; [`Proxier::commit`] carries it out.
    pub fn stage(&mut self, service: &ServiceName, entries: &[Entry]) {
        if self.written {
            self.ledger.set(service, entries, &mut self.staged);
        } else {
            // The first commit writes everything, so what changes until then does not matter.
            self.ledger.set(service, entries, &mut Delta::default());
        }
    }

    /// Goes by other settings from the next commit on. The table stays the same one.
    pub fn configure(&mut self, settings: Settings) {
        let settings = Settings { table: self.settings.table.clone(), ..settings };
        if settings != self.settings {
            self.settings = settings;
            // Its rules are of another version now, and replaced as those of an older program are.
            self.present = None;
        }
    }

    /// Carries out everything staged. After an error all of it is tried again with the next commit.
    pub fn commit(&mut self) -> Result<Committed, NftError> {
        let staged = std::mem::take(&mut self.staged);
        let committed = describe(&staged);
        self.may_be_bound |= self.ledger.has_affinity();
        let Some(mut present) = self.present.take() else {
            if let Err(error) = self.establish() {
                self.staged = staged;
                return Err(error);
            }
            self.written = true;
            return Ok(Committed { connectionless_changed: true, endpoints_removed: true, ..committed });
        };
        let transaction = self.ledger.change(&self.settings, &staged, &mut present);
        match self.kernel.commit(&transaction) {
            Ok(()) => {
                self.present = Some(present);
                self.note_generation(&transaction);
                Ok(committed)
            }
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "nftables refused a change; comparing with the kernel");
                if let Err(error) = self.repair() {
                    self.staged = staged;
                    return Err(error);
                }
                Ok(Committed { connectionless_changed: true, endpoints_removed: true, ..committed })
            }
        }
    }

    /// Looks whether others changed what is ours, and puts it right. Cheap while nobody commits to nftables at all.
    pub fn audit(&mut self, now: Instant) -> Result<bool, NftError> {
        if self.present.is_none() {
            return Ok(false);
        }
        let generation = self.kernel.generation()?;
        if self.generation == Some(generation) {
            return Ok(false);
        }
        let interval = FULL_AUDIT_INTERVAL.max(self.audit_cost * FULL_AUDIT_SHARE);
        let due = self.audited.is_none_or(|last| now.duration_since(last) >= interval);
        if !self.is_intact()? {
            warn!(table = self.settings.table.name, "table was changed or removed by someone else; restoring it");
            self.repair()?;
            return Ok(true);
        }
        if !due {
            // Somebody else's commit, as it looks; the elements get their turn.
            return Ok(false);
        }
        self.audited = Some(now);
        let begin = Instant::now();
        let repaired = self.repair()?;
        self.audit_cost = begin.elapsed();
        self.generation = Some(self.kernel.generation()?);
        Ok(repaired)
    }

    fn is_intact(&mut self) -> Result<bool, NftError> {
        let Some(present) = &self.present else { return Ok(false) };
        let expected = rules::rule_count(&self.settings, present.iter());
        Ok(self.kernel.table_comment(&self.settings.table)?.as_deref() == Some(self.settings.marker().as_str())
            && self.kernel.rule_count(&self.settings.table)? == expected)
    }

    /// The generation after our own commit, if nobody else committed in between.
    fn note_generation(&mut self, transaction: &Transaction) {
        if transaction.is_empty() {
            return;
        }
        self.generation = match (self.generation, self.kernel.generation()) {
            (Some(before), Ok(now)) if now == before.wrapping_add(1) => Some(now),
            // Whoever else it was, the next audit looks.
            _ => None,
        };
    }

    /// Adopts the table that is there, or replaces it.
    fn establish(&mut self) -> Result<(), NftError> {
        let comment = self.kernel.table_comment(&self.settings.table)?;
        if comment.as_deref() == Some(self.settings.marker().as_str()) && self.adopt()? {
            info!(table = self.settings.table.name, elements = self.ledger.element_count(), "table adopted");
            return Ok(());
        }
        let affinity = if comment.is_some() { self.valid_affinity()? } else { Vec::new() };
        let transaction = self.ledger.whole(&self.settings, comment.is_some(), affinity);
        self.kernel.commit(&transaction)?;
        self.present = Some(self.ledger.chains().copied().collect());
        self.generation = Some(self.kernel.generation()?);
        info!(table = self.settings.table.name, elements = self.ledger.element_count(), "table written");
        Ok(())
    }

    /// Changes what differs in a table of this version; says no when its rules are not what they should be.
    fn adopt(&mut self) -> Result<bool, NftError> {
        let chains = self.kernel.chains(&self.settings.table)?;
        let mut present: Vec<Dynamic> = chains.iter().filter_map(|name| Dynamic::of_chain(name)).collect();
        let expected = rules::rule_count(&self.settings, present.iter());
        if self.kernel.rule_count(&self.settings.table)? != expected || !self.has_classes_of(&present)? {
            return Ok(false);
        }
        let Some(transaction) = self.differences(&mut present)? else { return Ok(false) };
        match self.kernel.commit(&transaction) {
            Ok(()) => {}
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "existing table cannot be adopted; replacing it");
                return Ok(false);
            }
        }
        self.present = Some(present);
        self.generation = Some(self.kernel.generation()?);
        Ok(true)
    }

    /// Makes the kernel right whatever it holds; says whether anything had to be done.
    fn repair(&mut self) -> Result<bool, NftError> {
        let intact = self.present.is_none() || self.is_intact()?;
        if let (true, Some(mut present)) = (intact, self.present.take())
            && self.has_classes_of(&present)?
            && let Some(transaction) = self.differences(&mut present)?
        {
            let changed = !transaction.is_empty();
            if changed {
                debug!(commands = transaction.commands.len(), "elements differed from what they should be");
            }
            if self.kernel.commit(&transaction).is_ok() {
                self.present = Some(present);
                self.generation = Some(self.kernel.generation()?);
                return Ok(changed);
            }
        }
        self.present = None;
        self.establish()?;
        Ok(true)
    }

    /// Whether the classes are those of the chains that are there, no more and no less.
    fn has_classes_of(&mut self, present: &[Dynamic]) -> Result<bool, NftError> {
        let pair = |element: Element| (element.key, element.value);
        for classes in rules::CLASSES {
            let Some(observed) = self.kernel.elements(&self.settings.table, classes)? else { return Ok(false) };
            let observed: HashMap<Bytes, Option<Value>> = observed.into_iter().map(pair).collect();
            if observed != rules::classes(classes, present.iter()).into_iter().map(pair).collect() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What turns the kernel's elements into the ledger's; `None` when a map is missing.
    fn differences(&mut self, present: &mut Vec<Dynamic>) -> Result<Option<Transaction>, NftError> {
        let (mut removed, mut added) = (HashMap::new(), HashMap::new());
        for map in Map::ALL {
            let Some(observed) = self.kernel.elements(&self.settings.table, map.name())? else { return Ok(None) };
            let observed: HashMap<Bytes, Option<Value>> =
                observed.into_iter().map(|element| (element.key, element.value)).collect();
            let wanted: Vec<(&ElementKey, Target, Bytes)> = self
                .ledger
                .of_map(map)
                .map(|(key, target)| (key, target, rules::key_bytes(&self.settings, key, target)))
                .collect();
            let right: HashSet<Bytes> = wanted
                .iter()
                .filter(|(key, target, bytes)| {
                    observed.get(bytes).is_some_and(|value| *value == rules::value(key, *target))
                })
                .map(|(_, _, bytes)| *bytes)
                .collect();
            let gone: Vec<Bytes> = observed.into_keys().filter(|bytes| !right.contains(bytes)).collect();
            let new = wanted.iter().filter(|(_, _, bytes)| !right.contains(bytes));
            let new = new.map(|(key, target, _)| rules::element(&self.settings, key, *target));
            removed.insert(map, gone);
            added.insert(map, new.collect::<Vec<Element>>());
        }
        Ok(Some(self.ledger.patch(&self.settings, removed, added, present)))
    }

    /// The bindings of clients to endpoints that still exist.
    fn valid_affinity(&mut self) -> Result<Vec<Element>, NftError> {
        let elements = self.kernel.elements(&self.settings.table, rules::AFFINITY)?.unwrap_or_default();
        let node = (self.node_addresses)();
        Ok(elements.into_iter().filter(|element| self.is_bound_rightly(element, &node)).collect())
    }

    /// Releases clients from endpoints that are gone.
    pub fn release_clients(&mut self) -> Result<usize, NftError> {
        // A Service that gets session affinity again must not find clients bound as they were the last time.
        if !self.may_be_bound {
            return Ok(0);
        }
        let elements = self.kernel.elements(&self.settings.table, rules::AFFINITY)?.unwrap_or_default();
        let node = (self.node_addresses)();
        let wrong = elements.iter().filter(|element| !self.is_bound_rightly(element, &node));
        let keys: Vec<Bytes> = wrong.map(|element| element.key).collect();
        let count = keys.len();
        // One at a time, because each can expire meanwhile, and that must not keep the others.
        for key in keys {
            let mut transaction = Transaction::new(self.settings.table.clone());
            transaction.push(oarlock_nft::Command::DeleteElements { set: rules::AFFINITY.into(), keys: vec![key] });
            match self.kernel.commit(&transaction) {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        self.may_be_bound = self.ledger.has_affinity() || elements.len() > count;
        Ok(count)
    }

    /// Whether the affinity element `client . address . protocol . port → endpoint` names an endpoint of that frontend.
    fn is_bound_rightly(&self, element: &Element, node: &[IpAddr]) -> bool {
        let Some(Value::Data(endpoint)) = &element.value else { return false };
        let width = if self.settings.is_ipv4() { 4 } else { 16 };
        let bytes = element.key.as_slice();
        let (Some(address), Some([protocol, _, _, _, high, low, ..])) =
            (bytes.get(width..2 * width).and_then(oarlock_netlink::wire::read_address), bytes.get(2 * width..))
        else {
            return false;
        };
        let (protocol, port) = (Protocol(*protocol), u16::from_be_bytes([*high, *low]));
        let by_address = |map| ElementKey::by_address(map, address, protocol, port);
        let by_port = |map| ElementKey::by_port(map, protocol, port);
        let client = bytes.get(..width).and_then(oarlock_netlink::wire::read_address);
        let is_inside =
            client.is_some_and(|client| self.settings.cluster_cidr.contains(&client) || node.contains(&client));
        // Where those outside have endpoints of their own, one of the others would be a wrong one for them.
        let pairs = [
            (by_address(Map::LocalServices), by_address(Map::Services)),
            (by_port(Map::LocalNodePorts), by_port(Map::NodePorts)),
        ];
        let choose = |(local, all): (ElementKey, ElementKey)| {
            if !is_inside && self.ledger.target(&local).is_some() { local } else { all }
        };
        pairs
            .into_iter()
            .map(choose)
            .any(|key| has_endpoint(&self.ledger, key, |found| rules::endpoint_bytes(found.into()) == *endpoint))
    }
}

/// Whether some endpoint of the frontend `key` satisfies `test`.
pub fn has_endpoint(ledger: &Ledger, key: ElementKey, test: impl Fn(std::net::SocketAddr) -> bool) -> bool {
    let Some(Target::Balance(balancer)) = ledger.target(&key) else { return false };
    let numbered = |number: u32| ledger.target(&key.numbered(balancer.scope.endpoints(), number));
    (0..balancer.endpoints)
        .any(|number| matches!(numbered(number), Some(Target::Endpoint(endpoint)) if test(endpoint.socket())))
}

fn describe(delta: &Delta) -> Committed {
    let mut committed = Committed::default();
    for (key, old, new) in delta.iter() {
        if matches!(key.map, Map::Hairpin | Map::Affine | Map::AffineNodePorts | Map::Guarded | Map::Sources) {
            continue;
        }
        let is_frontend = matches!(key.map, Map::Services | Map::NodePorts);
        if is_frontend && key.protocol != Protocol::TCP && old.is_some() && new.is_none() {
            committed.retired.push(*key);
        }
        committed.connectionless_changed |= key.protocol != Protocol::TCP;
        // Also when those outside get endpoints of their own, the others are none of theirs any more.
        let is_local = matches!(key.map, Map::LocalServices | Map::LocalNodePorts);
        committed.endpoints_removed |= matches!(old, Some(Target::Endpoint(_))) || (is_local && old.is_none());
    }
    committed
}
