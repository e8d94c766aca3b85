//! Probe life cycles in paused time, with exec probes whose results are scripted.

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::{advance, timeout};

use super::*;
use crate::model::InitialOutcomes;

/// Gives the next scripted result; the last one repeats. Notes when it was asked.
struct Script {
    results: Mutex<VecDeque<Result<i32, String>>>,
    asked: mpsc::UnboundedSender<(String, Duration)>,
    begun: Instant,
    takes: Duration,
}

#[async_trait]
impl ExecProbe for Script {
    async fn exec(&self, id: &str, command: &[String], _timeout: Duration) -> Result<(i32, Vec<u8>), String> {
        let _ = self.asked.send((format!("{id} {}", command.join(" ")), self.begun.elapsed()));
        tokio::time::sleep(self.takes).await;
        let mut results = self.results.lock();
        let result = if results.len() > 1 { results.pop_front() } else { results.front().cloned() };
        result.unwrap_or(Ok(0)).map(|code| (code, b"said so".to_vec()))
    }
}

struct Bench {
    manager: ProbeManager,
    updates: mpsc::Receiver<Update>,
    asked: mpsc::UnboundedReceiver<(String, Duration)>,
}

fn bench(results: &[Result<i32, &str>], takes: Duration) -> Bench {
    let (updates_sender, updates) = mpsc::channel(64);
    let (asked_sender, asked) = mpsc::unbounded_channel();
    let results = results.iter().map(|result| result.map_err(str::to_string)).collect();
    let script = Script { results: Mutex::new(results), asked: asked_sender, begun: Instant::now(), takes };
    Bench { manager: ProbeManager::new(Arc::new(script), updates_sender), updates, asked }
}

fn target(container: Value, id: &str) -> Target {
    let mut container = container;
    container["name"] = json!("c");
    Target {
        pod_uid: "u".into(),
        pod_ip: "127.0.0.1".parse().unwrap(),
        container: serde_json::from_value(container).unwrap(),
        container_id: id.into(),
        started_at: Timestamp::now(),
        initial: InitialOutcomes::default(),
    }
}

fn probe(name: &str, more: Value) -> Value {
    let mut probe = json!({"exec": {"command": [name]}, "periodSeconds": 10});
    for (key, value) in more.as_object().unwrap() {
        probe[key] = value.clone();
    }
    probe
}

impl Bench {
    async fn next(&mut self) -> Update {
        timeout(Duration::from_secs(600), self.updates.recv()).await.expect("an update").unwrap()
    }

    async fn quiet(&mut self, seconds: u64) {
        let update = timeout(Duration::from_secs(seconds), self.updates.recv()).await;
        assert!(update.is_err(), "{update:?}");
    }

    async fn asked_at(&mut self) -> (String, u64) {
        let (what, when) = timeout(Duration::from_secs(600), self.asked.recv()).await.expect("an attempt").unwrap();
        (what, when.as_secs())
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_probe_comes_at_once_and_then_each_period() {
    let mut bench = bench(&[Ok(0)], Duration::ZERO);
    bench.manager.start(target(json!({"readinessProbe": probe("r", json!({}))}), "id"));
    let update = bench.next().await;
    assert_eq!((update.kind, update.outcome, update.changed), (Kind::Readiness, Outcome::Success, true));
    assert_eq!(update.probe_failed, None);
    bench.quiet(35).await;
    let times = [bench.asked_at().await.1, bench.asked_at().await.1, bench.asked_at().await.1];
    assert_eq!(times, [0, 10, 20]);
}

#[tokio::test(start_paused = true)]
async fn the_initial_delay_is_counted_from_the_containers_start() {
    let mut bench = bench(&[Ok(0)], Duration::ZERO);
    let mut late = target(json!({"readinessProbe": probe("r", json!({"initialDelaySeconds": 30}))}), "id");
    late.started_at = Timestamp::now() - jiff::SignedDuration::from_secs(10);
    bench.manager.start(late);
    let (_, when) = bench.asked_at().await;
    assert!((19..=20).contains(&when), "{when}");
}

#[tokio::test(start_paused = true)]
async fn readiness_flips_only_at_its_thresholds_and_each_failure_is_told() {
    let mut bench = bench(&[Ok(0), Ok(1), Ok(1), Ok(0), Ok(1), Ok(1), Ok(1), Ok(0)], Duration::ZERO);
    bench.manager.start(target(json!({"readinessProbe": probe("r", json!({}))}), "id"));
    assert_eq!(bench.next().await.outcome, Outcome::Success);
    for _ in 0..4 {
        let update = bench.next().await;
        assert_eq!((update.outcome, update.changed), (Outcome::Success, false));
        assert_eq!(update.probe_failed.as_deref(), Some("Readiness probe failed: said so"));
    }
    let update = bench.next().await;
    assert_eq!((update.outcome, update.changed), (Outcome::Failure, true));
    let update = bench.next().await;
    assert_eq!((update.outcome, update.changed), (Outcome::Success, true));
}

#[tokio::test(start_paused = true)]
async fn startup_holds_the_others_back_and_then_ends() {
    let mut bench = bench(&[Ok(1), Ok(0)], Duration::ZERO);
    bench.manager.start(target(
        json!({"startupProbe": probe("s", json!({"periodSeconds": 5})), "readinessProbe": probe("r", json!({})),
            "livenessProbe": probe("l", json!({}))}),
        "id",
    ));
    assert_eq!(bench.asked_at().await, ("id s".into(), 0));
    assert_eq!(bench.asked_at().await, ("id s".into(), 5));
    let mut both = [bench.asked_at().await, bench.asked_at().await];
    both.sort();
    assert_eq!(both, [("id l".into(), 5), ("id r".into(), 5)]);
    for _ in 0..6 {
        assert!(!bench.asked_at().await.0.ends_with(" s"));
    }
}

#[tokio::test(start_paused = true)]
async fn liveness_failure_is_told_once_and_ends_until_the_next_container() {
    let mut bench = bench(&[Ok(7)], Duration::ZERO);
    let container = json!({"livenessProbe": probe("l", json!({"failureThreshold": 2}))});
    bench.manager.start(target(container.clone(), "one"));
    assert!(!bench.next().await.changed);
    let update = bench.next().await;
    assert_eq!((update.outcome, update.changed, &*update.container_id), (Outcome::Failure, true, "one"));
    bench.quiet(120).await;
    bench.manager.start(target(container.clone(), "one"));
    bench.quiet(120).await;
    bench.manager.start(target(container, "two"));
    assert_eq!(bench.next().await.container_id, "two");
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_is_away_changes_nothing() {
    let mut bench = bench(&[Err("connection refused")], Duration::ZERO);
    let mut carried = target(json!({"livenessProbe": probe("l", json!({"failureThreshold": 1}))}), "id");
    carried.initial.liveness = Some(Outcome::Success);
    bench.manager.start(carried);
    for _ in 0..5 {
        let update = bench.next().await;
        assert_eq!((update.outcome, update.changed), (Outcome::Success, false));
        assert!(update.probe_failed.unwrap().contains("errored"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_command_that_hangs_fails_by_its_timeout() {
    let mut bench = bench(&[Ok(0)], Duration::from_secs(3600));
    let probe = probe("l", json!({"failureThreshold": 1, "timeoutSeconds": 2}));
    bench.manager.start(target(json!({"livenessProbe": probe}), "id"));
    let update = bench.next().await;
    assert_eq!(update.outcome, Outcome::Failure);
    assert!(update.message.contains("timed out"), "{}", update.message);
}

#[tokio::test(start_paused = true)]
async fn carried_over_readiness_is_not_told_again() {
    let mut bench = bench(&[Ok(0)], Duration::ZERO);
    let mut carried = target(json!({"readinessProbe": probe("r", json!({}))}), "id");
    carried.initial.readiness = Some(Outcome::Success);
    bench.manager.start(carried);
    bench.quiet(60).await;
    assert!(bench.manager.metrics().contains("probe_type=\"Readiness\",result=\"successful\"} 6"));
}

#[tokio::test(start_paused = true)]
async fn stopped_probes_stay_silent() {
    let mut bench = bench(&[Ok(1)], Duration::ZERO);
    bench.manager.start(target(json!({"readinessProbe": probe("r", json!({}))}), "id"));
    bench.next().await;
    bench.manager.stop_pod("u");
    bench.quiet(60).await;
    bench.manager.stop("u", "c");
    advance(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_starting_container_is_asked_again_soon_and_its_failures_are_told_once_a_period() {
    let mut bench = bench(&[Ok(1), Ok(1), Ok(1), Ok(1), Ok(0)], Duration::ZERO);
    bench.manager.start(target(json!({"readinessProbe": probe("r", json!({}))}), "id"));
    let mut at = Vec::new();
    for _ in 0..6 {
        at.push(bench.asked.recv().await.expect("an attempt").1.as_millis());
    }
    // Ready after three quarters of a second; from then on each period.
    assert_eq!(at, [0, 50, 150, 350, 750, 10_750]);
    let first = bench.next().await;
    assert_eq!((first.outcome, first.probe_failed.is_some()), (Outcome::Unknown, true));
    let failed = bench.next().await;
    assert_eq!((failed.outcome, failed.probe_failed), (Outcome::Failure, None));
    assert_eq!(bench.next().await.outcome, Outcome::Success);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_stays_unready_is_asked_each_period_again() {
    let mut bench = bench(&[Ok(1)], Duration::ZERO);
    bench.manager.start(target(json!({"readinessProbe": probe("r", json!({"periodSeconds": 2}))}), "id"));
    let mut at = Vec::new();
    for _ in 0..8 {
        at.push(bench.asked.recv().await.expect("an attempt").1.as_millis());
    }
    assert_eq!(at, [0, 50, 150, 350, 750, 1550, 2000, 4000]);
}

#[tokio::test(start_paused = true)]
async fn fresh_containers_are_asked_at_once_however_many() {
    let mut bench = bench(&[Ok(0)], Duration::ZERO);
    for number in 0..100 {
        let mut one = target(json!({"readinessProbe": probe("r", json!({}))}), "id");
        one.pod_uid = format!("u{number}");
        bench.manager.start(one);
    }
    for _ in 0..100 {
        assert_eq!(bench.asked_at().await.1, 0);
        let _ = bench.updates.try_recv();
    }
}

#[tokio::test(start_paused = true)]
async fn a_crowd_is_spread_over_the_period() {
    let mut bench = bench(&[Ok(0)], Duration::ZERO);
    for number in 0..200 {
        let mut one = target(json!({"readinessProbe": probe("r", json!({}))}), "id");
        one.pod_uid = format!("u{number}");
        one.started_at = Timestamp::now() - jiff::SignedDuration::from_secs(60);
        bench.manager.start(one);
    }
    let mut at_once = 0;
    for _ in 0..200 {
        at_once += usize::from(bench.asked_at().await.1 == 0);
        let _ = bench.updates.try_recv();
    }
    assert!((20..100).contains(&at_once), "{at_once}");
}
