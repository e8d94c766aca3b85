//! An in-memory API server for tests, good enough for controllers and the scheduler: objects of the kinds in
//! [`store::KINDS`], list, watch, create, update, patch, delete with finalizers and propagation, status, binding and
//! finalize. It validates nothing and keeps every change for ever.

mod serve;
mod store;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::watch;

use store::Store;

/// How long [`FakeApi::until`] waits before it gives up and shows what there is.
const PATIENCE: Duration = Duration::from_secs(20);

/// The fake; clone the `Arc` freely.
pub struct FakeApi {
    store: Mutex<Store>,
    revision: watch::Sender<u64>,
    refusals: Mutex<Vec<Refusal>>,
    interruptions: Mutex<Vec<Interruption>>,
    held: Mutex<BTreeSet<String>>,
}

struct Interruption {
    method: String,
    resource: String,
    act: Box<dyn FnOnce(&FakeApi) + Send>,
}

struct Refusal {
    method: String,
    resource: String,
    left: usize,
    answer: Refused,
}

/// A refusal of a request, as the API words it.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    pub code: u16,
    pub reason: &'static str,
    pub message: String,
}

impl Refused {
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }
}

impl FakeApi {
    /// An empty cluster.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            store: Mutex::new(Store::default()),
            revision: watch::Sender::new(0),
            refusals: Mutex::new(Vec::new()),
            interruptions: Mutex::new(Vec::new()),
            held: Mutex::new(BTreeSet::new()),
        })
    }

    /// A client of the fake.
    pub fn client(self: &Arc<Self>) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request| {
            let api = api.clone();
            async move { Ok::<_, std::convert::Infallible>(api.serve(request).await) }
        });
        Client::new(service, "default")
    }

    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let (result, revision) = {
            let mut store = self.store.lock();
            let result = change(&mut store);
            (result, store.revision())
        };
        self.revision.send_if_modified(|current| std::mem::replace(current, revision) != revision);
        result
    }

    /// Creates `object` (with apiVersion and kind); panics if the fake refuses it.
    pub fn create(&self, object: Value) -> Value {
        self.change(|store| store.create_typed(object)).expect("the fake accepts the object")
    }

    /// Changes an object in place, as some other client would (spec and status alike).
    pub fn edit(&self, resource: &str, namespace: &str, name: &str, edit: impl FnOnce(&mut Value)) -> Value {
        self.change(|store| store.edit(resource, namespace, name, edit)).expect("the object is there")
    }

    /// Deletes an object, with `DeleteOptions` as JSON.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str, options: Value) {
        self.change(|store| store.delete(resource, namespace, name, &options)).expect("the object can be deleted");
    }

    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.store.lock().get(resource, namespace, name).cloned()
    }

    /// All objects of a resource ("pods"), in order of namespace and name.
    pub fn list(&self, resource: &str) -> Vec<Value> {
        self.store.lock().list(resource, None).cloned().collect()
    }

    /// Counts the changes of a resource by type ("ADDED", "MODIFIED", "DELETED") since the beginning.
    pub fn changes(&self, resource: &str, type_: &str) -> usize {
        self.store.lock().changes(resource, type_)
    }

    /// Gives this answer to the next `times` requests with this method on this resource ("pods", "pods/binding").
    pub fn refuse(&self, method: &str, resource: &str, times: usize, answer: Refused) {
        let (method, resource) = (method.to_owned(), resource.to_owned());
        self.refusals.lock().push(Refusal { method, resource, left: times, answer });
    }

    /// Refuses no further request with this method on this resource.
    pub fn allow(&self, method: &str, resource: &str) {
        self.refusals.lock().retain(|refusal| refusal.method != method || refusal.resource != resource);
    }

    /// Has others act just before the next request with this method on this resource ("pods", "pods/status") is answered.
    pub fn interrupt(&self, method: &str, resource: &str, act: impl FnOnce(&FakeApi) + Send + 'static) {
        let (method, resource) = (method.to_owned(), resource.to_owned());
        self.interruptions.lock().push(Interruption { method, resource, act: Box::new(act) });
    }

    fn interrupted(&self, method: &str, resource: &str) {
        let due = {
            let mut all = self.interruptions.lock();
            let at = all.iter().position(|one| one.method == method && one.resource == resource);
            at.map(|at| all.remove(at))
        };
        if let Some(due) = due {
            (due.act)(self);
        }
    }

    /// Watches of the resource fall behind until [`FakeApi::release`].
    pub fn hold(&self, resource: &str) {
        self.held.lock().insert(resource.to_owned());
    }

    /// Watches of the resource are told everything again.
    pub fn release(&self, resource: &str) {
        self.held.lock().remove(resource);
        self.revision.send_modify(|_| {});
    }

    /// Whether some object of the resource was ever so.
    pub fn ever(&self, resource: &str, check: impl Fn(&Value) -> bool) -> bool {
        self.store.lock().log.iter().any(|entry| entry.resource == resource && check(&entry.object))
    }

    fn refusal(&self, method: &str, resource: &str) -> Option<Refused> {
        let mut refusals = self.refusals.lock();
        let refusal = refusals.iter_mut().find(|r| r.left > 0 && r.method == method && r.resource == resource)?;
        refusal.left -= 1;
        Some(refusal.answer.clone())
    }

    /// Waits, change by change, until `check` answers; panics with the state of the fake if it never does.
    pub async fn until<T>(&self, what: &str, mut check: impl FnMut(&Self) -> Option<T>) -> T {
        let mut changes = self.revision.subscribe();
        let waiting = async {
            loop {
                changes.borrow_and_update();
                if let Some(found) = check(self) {
                    return found;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(found) => found,
            Err(_elapsed) => panic!("never happened: {what}\n{}", self.store.lock().dump()),
        }
    }

    /// Returns when the pods ADDED and MODIFIED so far are more than `known`; for stand-ins that follow pods.
    pub async fn wait_for_change(&self, known: usize) {
        let mut changes = self.revision.subscribe();
        loop {
            changes.borrow_and_update();
            if self.changes("pods", "ADDED") + self.changes("pods", "MODIFIED") != known {
                return;
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// As [`FakeApi::until`] for a plain condition.
    pub async fn until_true(&self, what: &str, mut check: impl FnMut(&Self) -> bool) {
        self.until(what, |api| check(api).then_some(())).await;
    }
}
