//! The loop: looks, judges, tells the node's conditions, frees what is of no use to a pod, and ends pods one at a time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::judge::{Judge, Reading, Readings};
use super::threshold::{Signal, Threshold};
use super::usage::{self, Places, PodUsage};
use super::{local_storage, message, rank};
use crate::images::ImageCollector;
use crate::model::PodUid;
use crate::pods::News;
use crate::recorder::Level;
use crate::shared::{PodEntry, Shared};
use crate::spec;

/// An ended pod gets so long to go before the node is looked at again.
const CLEAN_UP: Duration = Duration::from_secs(30);
/// A pod ended at a hard threshold, or for its own disk use, gets no more than this.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Counting files may take one part in so many of the time.
const COUNT_SHARE: u32 = 20;

/// The loop's state.
struct Manager {
    shared: Arc<Shared>,
    news: mpsc::Sender<News>,
    images: Arc<ImageCollector>,
    judge: Judge,
    image_dir: Option<PathBuf>,
    count_not_before: Instant,
    helpless: bool,
}

/// Watches over the node until `shutdown`.
pub(crate) async fn run(
    shared: Arc<Shared>,
    images: Arc<ImageCollector>,
    news: mpsc::Sender<News>,
    shutdown: CancellationToken,
) {
    let mut manager = Manager {
        shared,
        news,
        images,
        judge: Judge::default(),
        image_dir: None,
        count_not_before: Instant::now(),
        helpless: false,
    };
    loop {
        let pause = tokio::select! {
            () = shutdown.cancelled() => return,
            pause = manager.pass() => pause,
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Pods that may be ended: neither done nor on their way out.
fn active(shared: &Shared) -> Vec<PodEntry> {
    let mut entries = shared.table.all();
    entries.retain(|entry| {
        let over =
            matches!(entry.status.phase.as_deref(), Some("Succeeded" | "Failed")) || entry.status.reason.is_some();
        !over && entry.pod.metadata.deletion_timestamp.is_none()
    });
    entries
}

impl Manager {
    /// One look and what follows; gives the time until the next.
    async fn pass(&mut self) -> Duration {
        let period = self.shared.config.eviction.period;
        let Some((readings, split)) = self.look().await else { return period };
        let now = Timestamp::now();
        let verdict = self.judge.judge(&self.shared.config.eviction, &readings, now);
        self.shared.set_pressure(verdict.pressure);
        if let Some(uid) = self.end_one_over_its_limits().await {
            self.wait_until_gone(&uid).await;
            return Duration::ZERO;
        }
        if let Some(threshold) = verdict.acting.first() {
            if let Some(uid) = self.relieve(threshold, &readings, split).await {
                self.wait_until_gone(&uid).await;
                return Duration::ZERO;
            }
            return period;
        }
        self.helpless = false;
        let until = verdict.act_at.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
        until.map_or(period, |until| until.min(period))
    }

    async fn look(&mut self) -> Option<(Readings, bool)> {
        if self.image_dir.is_none() {
            self.image_dir = usage::image_dir(&self.shared).await;
        }
        let (node_dir, image_dir) = (self.shared.config.data_dir.clone(), self.image_dir.clone());
        tokio::task::spawn_blocking(move || usage::read_node(&node_dir, image_dir.as_deref())).await.ok()
    }

    /// Counts the files of pods that have limits, as often as that is cheap, and ends one that is over them.
    async fn end_one_over_its_limits(&mut self) -> Option<PodUid> {
        if Instant::now() < self.count_not_before {
            return None;
        }
        let mut limited = active(&self.shared);
        limited.retain(|entry| local_storage::is_limited(&entry.pod));
        if limited.is_empty() {
            return None;
        }
        let began = Instant::now();
        let measured = self.measure(limited).await;
        self.count_not_before = Instant::now() + began.elapsed() * COUNT_SHARE;
        for (entry, usage) in measured {
            let Some(message) = usage.and_then(|usage| local_storage::exceeded(&entry.pod, &usage)) else { continue };
            if !rank::is_critical(&entry.pod) {
                return Some(self.end(&entry, message, AT_ONCE).await);
            }
        }
        None
    }

    /// Frees what is of no use; ends a pod if that does not help.
    async fn relieve(&mut self, threshold: &Threshold, readings: &Readings, split: bool) -> Option<PodUid> {
        let (signal, node) = (threshold.signal, &self.shared.config.node_name);
        if !self.helpless {
            tracing::warn!(signal = signal.name(), "the node is short of a resource");
            let text = format!("Attempting to reclaim {}", signal.resource());
            self.shared.recorder.node(node, Level::Warning, "EvictionThresholdMet", text);
        }
        if self.free_unused(signal, split).await
            && let Some((again, _)) = self.look().await
        {
            let verdict = self.judge.judge(&self.shared.config.eviction, &again, Timestamp::now());
            if !verdict.acting.iter().any(|acting| acting.signal == signal) {
                tracing::info!(signal = signal.name(), "the node has enough again without ending a pod");
                return None;
            }
        }
        let mut candidates = active(&self.shared);
        candidates.retain(|entry| !rank::is_critical(&entry.pod));
        let measured = self.measure(candidates).await;
        let mut ranked: Vec<_> = measured
            .into_iter()
            .map(|(entry, usage)| {
                let share = rank::share(&entry.pod, usage.as_ref(), signal, split);
                ((entry, usage), share)
            })
            .collect();
        rank::order(signal, &mut ranked, |(entry, _)| (*entry.pod).clone());
        let Some(((entry, usage), _)) = ranked.into_iter().next() else {
            if !std::mem::replace(&mut self.helpless, true) {
                tracing::error!(signal = signal.name(), "the node is short of a resource and no pod can be ended");
            }
            return None;
        };
        self.helpless = false;
        let reading: Option<Reading> = readings.get(&signal).copied();
        let text = message::shortage(&entry.pod, usage.as_ref(), threshold, reading);
        let grace = threshold.grace.map_or(AT_ONCE, |_| self.soft_grace(&entry));
        Some(self.end(&entry, text, grace).await)
    }

    fn soft_grace(&self, entry: &PodEntry) -> Duration {
        let own = entry.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        let own = Duration::from_secs(u64::try_from(own).unwrap_or(0));
        own.min(self.shared.config.eviction.max_pod_grace).max(AT_ONCE)
    }

    /// Dead containers, and images that no container uses; true when something may have been freed.
    async fn free_unused(&self, signal: Signal, split: bool) -> bool {
        let on_images = matches!(signal, Signal::ImagefsAvailable | Signal::ImagefsInodesFree);
        let on_node = matches!(signal, Signal::NodefsAvailable | Signal::NodefsInodesFree);
        if !on_images && (!on_node || split) {
            return false;
        }
        let dead = pods_with_dead(&self.shared);
        let _ = self.news.send(News::ReclaimDead).await;
        self.shared
            .table
            .wait_for(CLEAN_UP, |shared| shared.all().iter().all(|e| !dead.contains(&uid(e)) || !has_dead(e)))
            .await;
        let freed = self.images.remove_unused().await;
        tracing::info!(bytes = freed, pods = dead.len(), "removed dead containers and unused images");
        true
    }

    /// Usage of each pod, counted now.
    async fn measure(&self, entries: Vec<PodEntry>) -> Vec<(PodEntry, Option<PodUsage>)> {
        let mut known = usage::from_runtime(&self.shared).await;
        let work = entries.into_iter().map(|entry| {
            let usage = known.remove(spec::pod_uid(&entry.pod));
            let places = Places::of(&self.shared, &entry.pod);
            (entry, usage, places)
        });
        let work: Vec<_> = work.collect();
        let count = move || {
            let counted = work.into_iter().map(|(entry, usage, places)| {
                let usage = usage.map(|mut usage| {
                    usage::add_places(&mut usage, &places);
                    usage
                });
                (entry, usage)
            });
            counted.collect()
        };
        tokio::task::spawn_blocking(count).await.unwrap_or_default()
    }

    async fn end(&self, entry: &PodEntry, message: String, grace: Duration) -> PodUid {
        let uid = uid(entry);
        tracing::warn!(pod = usage::shown(&entry.pod), pod.uid = %uid, reason = message, "ending a pod for the node's sake");
        self.shared.recorder.pod(&entry.pod, Level::Warning, message::REASON, message.clone());
        let reason = message::REASON.to_owned();
        let _ = self.news.send(News::End { uid: uid.clone(), reason, message, grace }).await;
        uid
    }

    /// Waits until the pod has no process any more.
    async fn wait_until_gone(&self, uid: &PodUid) {
        let gone = |table: &crate::shared::PodTable| {
            table.get(uid).is_none_or(|entry| !entry.observed.containers.iter().any(|container| container.live()))
        };
        self.shared.table.wait_for(CLEAN_UP, gone).await;
    }
}

fn uid(entry: &PodEntry) -> PodUid {
    PodUid::from(spec::pod_uid(&entry.pod))
}

fn has_dead(entry: &PodEntry) -> bool {
    entry.observed.containers.iter().any(|container| !container.live())
}

/// Pods that are over and still have containers in the runtime.
fn pods_with_dead(shared: &Shared) -> Vec<PodUid> {
    let entries = shared.table.all();
    let over = entries.iter().filter(|entry| matches!(entry.status.phase.as_deref(), Some("Succeeded" | "Failed")));
    over.filter(|entry| has_dead(entry)).map(uid).collect()
}
