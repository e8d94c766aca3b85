//! Random writes against a plain model: every kept revision reads as it was, and every watch retells what happened.

use std::collections::BTreeMap;

use oarlock_store::{EventKind, Expect, MemoryStore, Op, Range, Store, Value};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Delete(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![(0u8..6, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)), (0u8..6).prop_map(Step::Delete)]
}

type State = BTreeMap<String, Vec<u8>>;

fn key(number: u8) -> String {
    format!("m/{number}")
}

async fn run(steps: Vec<Step>) {
    let store = MemoryStore::new().expect("a store");
    let start = store.current_revision();
    let mut state = State::new();
    let mut history: BTreeMap<u64, State> = BTreeMap::from([(start, state.clone())]);
    for step in steps {
        let op = match &step {
            Step::Put(number, value) => {
                state.insert(key(*number), vec![*value]);
                let value = Value::plain(vec![*value]);
                Op::Put { key: key(*number).into(), value, expect: Expect::Any, ttl_seconds: None }
            }
            Step::Delete(number) => {
                state.remove(&key(*number));
                Op::Delete { key: key(*number).into(), expect: Expect::Any }
            }
        };
        store.txn(vec![op]).await.expect("nothing is expected");
        history.insert(store.current_revision(), state.clone());
    }
    for (revision, wanted) in &history {
        let range = Range { prefix: "m/", at_revision: Some(*revision), ..Range::default() };
        let page = store.range(range).expect("everything is kept");
        let read: State = page.records.iter().map(|r| (r.key().to_string(), r.value().to_vec())).collect();
        assert_eq!(&read, wanted, "at revision {revision}");
        let mut replayed = wanted.clone();
        let mut watch = store.watch("m/", *revision).expect("everything is kept");
        for event in watch.poll_now(usize::MAX).expect("events") {
            let name = event.record.key().to_string();
            match event.kind {
                EventKind::Put => replayed.insert(name, event.record.value().to_vec()),
                EventKind::Delete => replayed.remove(&name),
            };
            assert_eq!(Some(&replayed), history.get(&event.revision()), "after revision {}", event.revision());
        }
        assert_eq!(replayed, state);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn the_store_behaves_as_a_map_with_a_memory(steps in prop::collection::vec(step(), 0..40)) {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(run(steps));
    }
}
