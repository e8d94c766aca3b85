//! The one writer: a thread that takes transactions off a queue, commits as many as are waiting in one go, and then
//! makes them visible.
//!
//! ```text
//! queue ─▶ check expectations against view + batch ─▶ durable commit ─▶ view.apply ─▶ answer
//!              │ conflict: answered after the batch        │ failed: all answered with the error, nothing changed
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::clock::now_seconds;
use crate::durable::Durable;
use crate::record::Record;
use crate::view::{Event, EventKind, Previous, View};
use crate::watch::Watch;
use crate::{Expect, Op, Outcome, Page, Range, StoreError};

const QUEUED_TRANSACTIONS: usize = 4096;
const BATCH_TRANSACTIONS: usize = 256;
const EXPIRY_BATCH: usize = 512;
const SWEEP_SECONDS: u64 = 60;
const EXPIRY_GRAIN_SECONDS: u64 = 5;

/// What readers, watchers and the writer share.
pub(crate) struct Shared {
    pub(crate) view: RwLock<View>,
}

type Reply = oneshot::Sender<Result<Vec<Outcome>, StoreError>>;

enum Command {
    Txn { ops: Vec<Op>, reply: Reply, _permit: OwnedSemaphorePermit },
    Compact { revision: u64, reply: oneshot::Sender<Result<(), StoreError>> },
}

/// The handle on a running store.
pub(crate) struct Engine {
    pub(crate) shared: Arc<Shared>,
    queue: Mutex<Option<Sender<Command>>>,
    permits: Arc<Semaphore>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    pub(crate) fn start(view: View, durable: impl Durable) -> Result<Engine, StoreError> {
        let shared = Arc::new(Shared { view: RwLock::new(view) });
        let (queue, commands) = channel();
        let writer = Writer { shared: shared.clone(), durable, last_sweep: now_seconds() };
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(&commands))
            .map_err(|source| StoreError::Spawn { source })?;
        Ok(Engine {
            shared,
            queue: Mutex::new(Some(queue)),
            permits: Arc::new(Semaphore::new(QUEUED_TRANSACTIONS)),
            thread: Mutex::new(Some(thread)),
        })
    }

    fn send(&self, command: Command) -> Result<(), StoreError> {
        let queue = self.queue.lock();
        queue.as_ref().and_then(|queue| queue.send(command).ok()).ok_or(StoreError::Closed)
    }

    pub(crate) async fn txn(&self, ops: Vec<Op>) -> Result<Vec<Outcome>, StoreError> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.send(Command::Txn { ops, reply, _permit: permit })?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    pub(crate) async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Compact { revision, reply })?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    pub(crate) fn range(&self, range: Range<'_>) -> Result<Page, StoreError> {
        self.shared.view.read().range(range)
    }

    pub(crate) fn watch(&self, prefix: &str, revision: u64) -> Result<Watch, StoreError> {
        let changed = self.shared.view.write().subscribe(prefix, revision)?;
        Ok(Watch { shared: self.shared.clone(), prefix: prefix.into(), cursor: revision, changed })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.queue.lock().take();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

struct Writer<D> {
    shared: Arc<Shared>,
    durable: D,
    last_sweep: u64,
}

/// What a key will hold once the batch is committed.
type Pending = Option<Arc<Record>>;

/// The batch being put together: what has been decided but is not yet committed.
#[derive(Default)]
struct Batch {
    events: Vec<Arc<Event>>,
    overlay: HashMap<Arc<str>, Pending>,
    replies: Vec<(Reply, Result<Vec<Outcome>, StoreError>)>,
}

impl<D: Durable> Writer<D> {
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            match self.receive(commands) {
                Ok(Some(first)) => self.serve(first, commands),
                Ok(None) => {}
                Err(()) => break,
            }
            self.expire();
            self.sweep();
        }
        self.durable.close();
    }

    /// Waits for a command or for the next expiry; `Err` when the store is closed.
    fn receive(&self, commands: &Receiver<Command>) -> Result<Option<Command>, ()> {
        let next_expiry = self.shared.view.read().next_expiry();
        let Some(at) = next_expiry else { return commands.recv().map(Some).map_err(|_| ()) };
        let wait = at.saturating_sub(now_seconds()).max(EXPIRY_GRAIN_SECONDS);
        match commands.recv_timeout(Duration::from_secs(wait)) {
            Ok(command) => Ok(Some(command)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(()),
        }
    }

    fn serve(&mut self, first: Command, commands: &Receiver<Command>) {
        let mut batch = Batch::default();
        let mut permits = Vec::new();
        let mut next = Some(first);
        let mut taken = 0;
        while let Some(command) = next {
            match command {
                Command::Txn { ops, reply, _permit } => {
                    permits.push(_permit);
                    self.plan(&mut batch, ops, reply);
                }
                Command::Compact { revision, reply } => {
                    self.finish(std::mem::take(&mut batch));
                    let floor = self.shared.view.write().compact(revision);
                    let _ = reply.send(self.durable.forget(floor));
                }
            }
            taken += 1;
            next = if taken < BATCH_TRANSACTIONS { commands.try_recv().ok() } else { None };
        }
        self.finish(batch);
    }

    /// Checks one transaction against the view and the batch so far, and adds its events if all expectations hold.
    fn plan(&self, batch: &mut Batch, ops: Vec<Op>, reply: Reply) {
        let view = self.shared.view.read();
        let first_event = batch.events.len();
        let mut outcomes = Vec::with_capacity(ops.len());
        let mut undo: Vec<(Arc<str>, Option<Pending>)> = Vec::new();
        for op in ops {
            let key = op.key().clone();
            let current = match batch.overlay.get(&key) {
                Some(pending) => pending.clone(),
                None => view.get(&key).cloned(),
            };
            let revision = view.revision + batch.events.len() as u64 + 1;
            let expect = match &op {
                Op::Put { expect, .. } | Op::Delete { expect, .. } => *expect,
            };
            let holds = match expect {
                Expect::Any => true,
                Expect::Absent => current.is_none(),
                Expect::Revision(wanted) => current.as_ref().is_some_and(|record| record.revision() == wanted),
            };
            if !holds {
                batch.events.truncate(first_event);
                for (key, before) in undo.into_iter().rev() {
                    match before {
                        Some(pending) => batch.overlay.insert(key, pending),
                        None => batch.overlay.remove(&key),
                    };
                }
                batch.replies.push((reply, Err(StoreError::Conflict { key, current })));
                return;
            }
            let Some((event, after)) = change(op, current, revision) else {
                outcomes.push(Outcome::Absent);
                continue;
            };
            outcomes.push(match event.kind {
                EventKind::Put => Outcome::Written(event.record.clone()),
                EventKind::Delete => Outcome::Deleted(event.record.clone()),
            });
            batch.events.push(Arc::new(event));
            undo.push((key.clone(), batch.overlay.insert(key, after)));
        }
        batch.replies.push((reply, Ok(outcomes)));
    }

    fn finish(&mut self, batch: Batch) {
        let Batch { events, replies, .. } = batch;
        let committed = if events.is_empty() { Ok(()) } else { self.durable.commit(&events) };
        match committed {
            Ok(()) => {
                self.shared.view.write().apply(events, now_seconds());
                for (reply, result) in replies {
                    let _ = reply.send(result);
                }
            }
            Err(error) => {
                tracing::error!(%error, "commit failed; the writes were refused");
                for (reply, result) in replies {
                    let _ = reply.send(result.and_then(|_| Err(error.again())));
                }
            }
        }
    }

    fn expire(&mut self) {
        let now = now_seconds();
        let keys = self.shared.view.read().expired(now, EXPIRY_BATCH);
        if keys.is_empty() {
            return;
        }
        let ops = keys.into_iter().map(|key| Op::Delete { key, expect: Expect::Any }).collect();
        let mut batch = Batch::default();
        let (reply, _) = oneshot::channel();
        self.plan(&mut batch, ops, reply);
        self.finish(batch);
    }

    fn sweep(&mut self) {
        let now = now_seconds();
        if now < self.last_sweep + SWEEP_SECONDS {
            return;
        }
        self.last_sweep = now;
        let floor = self.shared.view.write().sweep(now);
        if let Err(error) = self.durable.forget(floor) {
            tracing::warn!(%error, "old events could not be removed; they will be next time");
        }
    }
}

/// The event an operation makes of the present state, and the state after it. None when there is nothing to delete.
fn change(op: Op, current: Option<Arc<Record>>, revision: u64) -> Option<(Event, Option<Arc<Record>>)> {
    match op {
        Op::Put { key, value, ttl_seconds, .. } => {
            let created = current.as_ref().map_or(revision, |record| record.created_revision());
            let expires_at = ttl_seconds.map(|ttl| now_seconds() + u64::from(ttl));
            let record = Arc::new(value.into_record(key, revision, created, expires_at));
            let previous = current.map_or(Previous::Absent, Previous::Known);
            Some((Event { kind: EventKind::Put, record: record.clone(), previous }, Some(record)))
        }
        Op::Delete { .. } => {
            let current = current?;
            let record = Arc::new(current.at_revision(revision));
            Some((Event { kind: EventKind::Delete, record, previous: Previous::Known(current) }, None))
        }
    }
}
