//! The index of sandboxes and containers in memory: what is on record, plus what only a living daemon has (the
//! connection to a shim, locks, waiters).
//!
//! Every change of a record goes to disk before it shows here. Makes no decisions and touches nothing but records.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arc_swap::ArcSwap;
use oarlock_shim_api::Shim;
use oci_spec::runtime::Process;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tracing::{Instrument, debug_span};

use crate::error::Error;
use crate::nri::Told;
use crate::record::{ContainerPhase, ContainerRecord, Kind, SandboxPhase, SandboxRecord, Store};

/// One sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    record: ArcSwap<SandboxRecord>,
    writing: Mutex<()>,
    shim: Mutex<Option<Shim>>,
    /// Held while the sandbox is stopped or removed, or a container is made in it.
    pub(crate) operation: tokio::sync::RwLock<()>,
    pub(crate) told: Told,
}

impl Sandbox {
    pub(crate) fn new(record: SandboxRecord) -> Arc<Sandbox> {
        Arc::new(Sandbox {
            told: Told::of(matches!(record.phase, SandboxPhase::NotReady | SandboxPhase::Removing)),
            record: ArcSwap::from_pointee(record),
            writing: Mutex::new(()),
            shim: Mutex::new(None),
            operation: tokio::sync::RwLock::new(()),
        })
    }

    pub(crate) fn record(&self) -> Arc<SandboxRecord> {
        self.record.load_full()
    }

    pub(crate) fn id(&self) -> String {
        self.record.load().id.clone()
    }

    pub(crate) fn phase(&self) -> SandboxPhase {
        self.record.load().phase
    }

    pub(crate) fn shim(&self) -> Option<Shim> {
        self.shim.lock().clone()
    }

    pub(crate) fn set_shim(&self, shim: Option<Shim>) {
        *self.shim.lock() = shim;
    }

    /// The shim, or why nothing can be asked of it.
    pub(crate) fn living_shim(&self, operation: &'static str) -> Result<Shim, Error> {
        self.shim().ok_or_else(|| Error::State { what: "sandbox", id: self.id(), state: "not ready", operation })
    }

    /// Changes the record, on disk first.
    pub(crate) async fn change(
        self: &Arc<Self>,
        store: &Arc<Store>,
        change: impl FnOnce(&mut SandboxRecord) + Send + 'static,
    ) -> Result<Arc<SandboxRecord>, Error> {
        let (sandbox, store) = (self.clone(), store.clone());
        let written = blocking("a record", move || {
            let _alone = sandbox.writing.lock();
            let mut record = SandboxRecord::clone(&sandbox.record.load());
            change(&mut record);
            store.write(Kind::Sandbox, &record.id, &record)?;
            let record = Arc::new(record);
            sandbox.record.store(record.clone());
            Ok(record)
        });
        written.instrument(debug_span!("record")).await
    }
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    record: ArcSwap<ContainerRecord>,
    writing: Mutex<()>,
    phase: watch::Sender<ContainerPhase>,
    /// Held while the container is started, updated or removed. Stopping needs no lock.
    pub(crate) operation: tokio::sync::Mutex<()>,
    /// Held while the engine deletes it: at its end and at its removal, which may coincide.
    pub(crate) deletion: tokio::sync::Mutex<()>,
    /// The container's own process once it has been asked for, so that a probe does not read the specification each time.
    pub(crate) process: std::sync::OnceLock<Arc<Process>>,
    /// The last measurement of CPU use, for rates: when, in nanoseconds, and how much.
    pub(crate) cpu_sample: Mutex<Option<(i64, u64)>>,
    pub(crate) told: Told,
}

impl Container {
    pub(crate) fn new(record: ContainerRecord) -> Arc<Container> {
        Arc::new(Container {
            told: Told::of(matches!(record.phase, ContainerPhase::Exited | ContainerPhase::Removing)),
            phase: watch::channel(record.phase).0,
            record: ArcSwap::from_pointee(record),
            writing: Mutex::new(()),
            operation: tokio::sync::Mutex::new(()),
            deletion: tokio::sync::Mutex::new(()),
            process: std::sync::OnceLock::new(),
            cpu_sample: Mutex::new(None),
        })
    }

    pub(crate) fn record(&self) -> Arc<ContainerRecord> {
        self.record.load_full()
    }

    pub(crate) fn id(&self) -> String {
        self.record.load().id.clone()
    }

    pub(crate) fn phase(&self) -> ContainerPhase {
        self.record.load().phase
    }

    /// Resolves when the container has ended, or at once if it has.
    pub(crate) async fn ended(&self) {
        let mut phase = self.phase.subscribe();
        // The sender lives as long as self.
        let _ = phase.wait_for(|phase| matches!(phase, ContainerPhase::Exited | ContainerPhase::Removing)).await;
    }

    /// Changes the record, on disk first.
    pub(crate) async fn change(
        self: &Arc<Self>,
        store: &Arc<Store>,
        change: impl FnOnce(&mut ContainerRecord) + Send + 'static,
    ) -> Result<Arc<ContainerRecord>, Error> {
        let (container, store) = (self.clone(), store.clone());
        let written = blocking("a record", move || container.change_blocking(&store, change, false));
        written.instrument(debug_span!("record")).await
    }

    /// As [`Container::change`], but what happened is told to readers even if the disk refuses it: the end of a
    /// process is a fact, and its shim has it on record too.
    pub(crate) async fn note(
        self: &Arc<Self>,
        store: &Arc<Store>,
        change: impl FnOnce(&mut ContainerRecord) + Send + 'static,
    ) -> Result<Arc<ContainerRecord>, Error> {
        let (container, store) = (self.clone(), store.clone());
        let written = blocking("a record", move || container.change_blocking(&store, change, true));
        written.instrument(debug_span!("record")).await
    }

    fn change_blocking(
        &self,
        store: &Store,
        change: impl FnOnce(&mut ContainerRecord),
        whatever: bool,
    ) -> Result<Arc<ContainerRecord>, Error> {
        let _alone = self.writing.lock();
        let mut record = ContainerRecord::clone(&self.record.load());
        change(&mut record);
        let written = store.write(Kind::Container, &record.id, &record);
        match written {
            Err(error) if whatever => {
                tracing::warn!(container.id = %record.id, %error, "a container's end could not be put on record");
            }
            other => other?,
        }
        let record = Arc::new(record);
        self.record.store(record.clone());
        self.phase.send_if_modified(|phase| {
            let changed = *phase != record.phase;
            *phase = record.phase;
            changed
        });
        Ok(record)
    }
}

/// All sandboxes and containers, and the names taken.
#[derive(Debug, Default)]
pub(crate) struct Index {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sandboxes: BTreeMap<String, Arc<Sandbox>>,
    containers: BTreeMap<String, Arc<Container>>,
    names: HashMap<String, String>,
}

impl Index {
    /// Adds a sandbox under its name; gives back the id that has the name already.
    pub(crate) fn insert_sandbox(&self, sandbox: Arc<Sandbox>) -> Result<(), String> {
        let record = sandbox.record();
        let mut inner = self.inner.write();
        reserve(&mut inner.names, record.name(), &record.id)?;
        inner.sandboxes.insert(record.id.clone(), sandbox);
        Ok(())
    }

    /// Adds a container under its name; gives back the id that has the name already.
    pub(crate) fn insert_container(&self, container: Arc<Container>) -> Result<(), String> {
        let record = container.record();
        let mut inner = self.inner.write();
        reserve(&mut inner.names, record.name(), &record.id)?;
        inner.containers.insert(record.id.clone(), container);
        Ok(())
    }

    pub(crate) fn remove_sandbox(&self, id: &str) {
        let mut inner = self.inner.write();
        if let Some(sandbox) = inner.sandboxes.remove(id) {
            inner.names.remove(&sandbox.record().name());
        }
    }

    pub(crate) fn remove_container(&self, id: &str) {
        let mut inner = self.inner.write();
        if let Some(container) = inner.containers.remove(id) {
            inner.names.remove(&container.record().name());
        }
    }

    /// A sandbox by id or an unambiguous start of one.
    pub(crate) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        find(&self.inner.read().sandboxes, "sandbox", id)
    }

    /// A container by id or an unambiguous start of one.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        find(&self.inner.read().containers, "container", id)
    }

    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.inner.read().sandboxes.values().cloned().collect()
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.inner.read().containers.values().cloned().collect()
    }

    pub(crate) fn containers_of(&self, sandbox_id: &str) -> Vec<Arc<Container>> {
        let inner = self.inner.read();
        inner
            .containers
            .values()
            .filter(|container| container.record.load().sandbox_id == sandbox_id)
            .cloned()
            .collect()
    }
}

fn reserve(names: &mut HashMap<String, String>, name: String, id: &str) -> Result<(), String> {
    match names.get(&name) {
        Some(owner) if owner != id => Err(owner.clone()),
        _ => {
            names.insert(name, id.to_owned());
            Ok(())
        }
    }
}

fn find<T>(all: &BTreeMap<String, Arc<T>>, what: &'static str, id: &str) -> Result<Arc<T>, Error> {
    if let Some(exact) = all.get(id) {
        return Ok(exact.clone());
    }
    let not_found = || Error::NotFound { what, id: id.to_owned() };
    if id.is_empty() {
        return Err(not_found());
    }
    let mut starting = all.range(id.to_owned()..).take_while(|(known, _)| known.starts_with(id));
    match (starting.next(), starting.next()) {
        (Some((_, only)), None) => Ok(only.clone()),
        (Some(_), Some(_)) => Err(Error::Ambiguous { what, id: id.to_owned() }),
        (None, _) => Err(not_found()),
    }
}

/// Runs blocking work off the asynchronous threads.
pub(crate) async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Worker { operation })?
}

/// Nanoseconds since the Unix epoch.
pub(crate) fn now_nanos() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A fresh id: 32 random bytes in hexadecimal, as users of other runtimes know them.
pub(crate) fn new_id() -> String {
    rand::random::<[u8; 32]>().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_can_be_shortened_while_it_is_clear() {
        let all: BTreeMap<String, Arc<u8>> =
            [("abc1".to_owned(), Arc::new(1)), ("abd2".to_owned(), Arc::new(2))].into_iter().collect();
        assert_eq!(*find(&all, "sandbox", "abc").unwrap(), 1);
        assert!(matches!(find(&all, "sandbox", "ab"), Err(Error::Ambiguous { .. })));
        assert!(matches!(find(&all, "sandbox", "x"), Err(Error::NotFound { .. })));
        assert!(matches!(find(&all, "sandbox", ""), Err(Error::NotFound { .. })));
    }

    #[test]
    fn a_name_belongs_to_one_id() {
        let mut names = HashMap::new();
        assert_eq!(reserve(&mut names, "n".into(), "a"), Ok(()));
        assert_eq!(reserve(&mut names, "n".into(), "a"), Ok(()));
        assert_eq!(reserve(&mut names, "n".into(), "b"), Err("a".to_owned()));
    }

    #[test]
    fn ids_are_64_hexadecimal_digits() {
        let id = new_id();
        assert!(id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) && id != new_id());
    }
}
