//! One suite of promises, run against every backend.

use std::sync::Arc;
use std::time::Duration;

use oarlock_store::{
    EventKind, Expect, MemoryStore, Op, Outcome, Previous, Range, Record, SqliteOptions, SqliteStore, Store,
    StoreError, Value,
};

fn put(key: &str, text: &str, expect: Expect) -> Op {
    Op::Put { key: key.into(), value: Value::plain(text.as_bytes().to_vec()), expect, ttl_seconds: None }
}

fn delete(key: &str, expect: Expect) -> Op {
    Op::Delete { key: key.into(), expect }
}

async fn write(store: &dyn Store, op: Op) -> Arc<Record> {
    let mut outcomes = store.txn(vec![op]).await.expect("the write is allowed");
    outcomes.remove(0).record().expect("the write has a record").clone()
}

fn keys(records: &[Arc<Record>]) -> Vec<&str> {
    records.iter().map(|record| &**record.key()).collect()
}

async fn expectations_are_checked(store: &dyn Store) {
    let first = write(store, put("a/x", "1", Expect::Absent)).await;
    let again = store.txn(vec![put("a/x", "2", Expect::Absent)]).await;
    assert!(matches!(again, Err(StoreError::Conflict { current: Some(_), .. })));
    let second = write(store, put("a/x", "2", Expect::Revision(first.revision()))).await;
    assert!(second.revision() > first.revision());
    assert_eq!(second.created_revision(), first.created_revision());
    let stale = store.txn(vec![delete("a/x", Expect::Revision(first.revision()))]).await;
    assert!(matches!(stale, Err(StoreError::Conflict { .. })));
    let gone = write(store, delete("a/x", Expect::Revision(second.revision()))).await;
    assert!(gone.revision() > second.revision());
    assert!(store.get("a/x").is_none());
    let none = store.txn(vec![delete("a/x", Expect::Any)]).await.expect("deleting nothing is a success");
    assert!(matches!(none[..], [Outcome::Absent]));
}

async fn transactions_are_all_or_none(store: &dyn Store) {
    let before = store.current_revision();
    let failed = store.txn(vec![put("b/1", "x", Expect::Absent), put("b/2", "x", Expect::Revision(1))]).await;
    assert!(matches!(failed, Err(StoreError::Conflict { .. })));
    assert!(store.get("b/1").is_none());
    assert_eq!(store.current_revision(), before);
    let outcomes = store.txn(vec![put("b/1", "x", Expect::Absent), put("b/2", "y", Expect::Absent)]).await;
    let outcomes = outcomes.expect("both are absent");
    let revisions: Vec<u64> = outcomes.iter().filter_map(|o| o.record()).map(|r| r.revision()).collect();
    assert_eq!(revisions, [before + 1, before + 2]);
}

async fn lists_page_at_one_revision(store: &dyn Store) {
    for name in ["p/1", "p/2", "p/3", "p/4"] {
        write(store, put(name, "v", Expect::Absent)).await;
    }
    let first = store.range(Range { prefix: "p/", limit: 2, ..Range::default() }).expect("a page");
    assert_eq!((keys(&first.records), first.remaining), (vec!["p/1", "p/2"], 2));
    write(store, delete("p/3", Expect::Any)).await;
    write(store, put("p/5", "v", Expect::Absent)).await;
    write(store, put("p/4", "changed", Expect::Any)).await;
    let rest = Range { prefix: "p/", after: Some("p/2"), limit: 0, at_revision: Some(first.revision) };
    let second = store.range(rest).expect("the revision is kept");
    assert_eq!(keys(&second.records), ["p/3", "p/4"]);
    assert_eq!(&second.records[1].value()[..], b"v");
    assert_eq!(keys(&store.range(Range { prefix: "p/", ..Range::default() }).expect("now").records).len(), 4);
    assert_eq!(store.count("p/"), 4);
}

async fn watches_resume_without_loss(store: &dyn Store) {
    let start = store.current_revision();
    let mut live = store.watch("w/", start).expect("a watch from now");
    write(store, put("w/ns/1", "a", Expect::Absent)).await;
    write(store, put("other/1", "a", Expect::Absent)).await;
    write(store, put("w/ns/1", "b", Expect::Any)).await;
    write(store, delete("w/ns/1", Expect::Any)).await;
    let mut kinds = Vec::new();
    while kinds.len() < 3 {
        for event in live.next(16).await.expect("events") {
            kinds.push((event.kind, matches!(event.previous, Previous::Absent)));
        }
    }
    assert_eq!(kinds, [(EventKind::Put, true), (EventKind::Put, false), (EventKind::Delete, false)]);
    let mut resumed = store.watch("w/ns/", start + 1).expect("the tail is kept");
    assert_eq!(resumed.next(16).await.expect("events").len(), 2);
    assert!(matches!(store.watch("w/", start + 100), Err(StoreError::Future { .. })));
}

async fn compaction_expires_the_past(store: &dyn Store) {
    let old = store.current_revision();
    write(store, put("c/1", "a", Expect::Any)).await;
    let mut slow = store.watch("c/", old).expect("kept so far");
    store.compact(store.current_revision()).await.expect("compacts");
    assert!(matches!(slow.next(1).await, Err(StoreError::Compacted { .. })));
    assert!(matches!(store.watch("c/", old), Err(StoreError::Compacted { .. })));
    let past = Range { prefix: "c/", at_revision: Some(old), ..Range::default() };
    assert!(matches!(store.range(past), Err(StoreError::Compacted { .. })));
}

async fn records_expire(store: &dyn Store) {
    let start = store.current_revision();
    let mut watch = store.watch("t/", start).expect("a watch from now");
    let op = Op::Put { key: "t/1".into(), value: Value::plain("x"), expect: Expect::Absent, ttl_seconds: Some(0) };
    write(store, op).await;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let events = tokio::time::timeout(Duration::from_secs(20), watch.next(4)).await.expect("it expires in time");
        seen.extend(events.expect("events").iter().map(|event| event.kind));
    }
    assert_eq!(seen, [EventKind::Put, EventKind::Delete]);
}

async fn concurrent_writers_are_serialised(store: Arc<dyn Store>) {
    let writers = (0..64).map(|n| {
        let store = store.clone();
        tokio::spawn(async move { store.txn(vec![put(&format!("g/{n:02}"), "v", Expect::Absent)]).await })
    });
    let mut revisions = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        let outcomes = writer.await.expect("no panic").expect("all keys differ");
        revisions.extend(outcomes.iter().filter_map(|o| o.record()).map(|r| r.revision()));
    }
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!(revisions.len(), 64);
    assert_eq!(store.count("g/"), 64);
}

async fn the_whole_contract(store: Arc<dyn Store>) {
    expectations_are_checked(&*store).await;
    transactions_are_all_or_none(&*store).await;
    lists_page_at_one_revision(&*store).await;
    watches_resume_without_loss(&*store).await;
    concurrent_writers_are_serialised(store.clone()).await;
    records_expire(&*store).await;
    compaction_expires_the_past(&*store).await;
}

#[tokio::test]
async fn the_memory_store_keeps_the_contract() {
    the_whole_contract(Arc::new(MemoryStore::new().expect("a store"))).await;
}

#[tokio::test]
async fn the_sqlite_store_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = SqliteStore::open(SqliteOptions::new(dir.path().join("store.db"))).expect("a store");
    the_whole_contract(Arc::new(store)).await;
}

#[tokio::test]
async fn what_was_committed_survives_losing_the_process() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.db");
    let copy = dir.path().join("copy.db");
    let store = SqliteStore::open(SqliteOptions::new(&path)).expect("a store");
    let start = store.current_revision();
    write(&store, put("s/1", "a", Expect::Absent)).await;
    write(&store, put("s/2", "b", Expect::Absent)).await;
    write(&store, put("s/1", "c", Expect::Any)).await;
    let last = write(&store, delete("s/2", Expect::Any)).await.revision();
    // What a crash leaves is the files as they are now: the log is not folded in and nothing is closed.
    std::fs::copy(&path, &copy).expect("copies the database");
    std::fs::copy(dir.path().join("store.db-wal"), dir.path().join("copy.db-wal")).expect("copies the log");
    let again = SqliteStore::open(SqliteOptions::new(&copy)).expect("opens what the crash left");
    assert_eq!(again.current_revision(), last);
    assert_eq!(&again.get("s/1").expect("kept").value()[..], b"c");
    assert!(again.get("s/2").is_none());
    let mut resumed = again.watch("s/", start).expect("a watch resumes over the restart");
    let events = resumed.next(16).await.expect("events");
    let seen: Vec<_> = events.iter().map(|event| (event.kind, &**event.record.key())).collect();
    assert_eq!(seen, [(EventKind::Put, "s/1"), (EventKind::Delete, "s/2")]);
    assert!(write(&again, put("s/3", "d", Expect::Absent)).await.revision() > last);
}

#[tokio::test]
async fn only_the_owner_can_read_the_database() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    let store = SqliteStore::open(SqliteOptions::new(dir.path().join("store.db"))).expect("a store");
    write(&store, put("secrets/1", "a", Expect::Absent)).await;
    for name in ["store.db", "store.db-wal"] {
        let mode = std::fs::metadata(dir.path().join(name)).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[tokio::test]
async fn a_second_process_cannot_open_the_same_database() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.db");
    let store = SqliteStore::open(SqliteOptions::new(&path)).expect("a store");
    write(&store, put("s/1", "a", Expect::Absent)).await;
    assert!(matches!(SqliteStore::open(SqliteOptions::new(&path)), Err(StoreError::Open { .. })));
}

#[tokio::test]
async fn a_small_tail_makes_old_watches_expire_but_keeps_the_state() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = SqliteOptions { tail_events: 4, ..SqliteOptions::new(dir.path().join("store.db")) };
    let store = SqliteStore::open(options).expect("a store");
    let start = store.current_revision();
    for n in 0..20 {
        write(&store, put(&format!("s/{n:02}"), "v", Expect::Absent)).await;
    }
    assert!(matches!(store.watch("s/", start), Err(StoreError::Compacted { .. })));
    assert!(store.watch("s/", store.current_revision() - 4).is_ok());
    assert_eq!(store.count("s/"), 20);
}
