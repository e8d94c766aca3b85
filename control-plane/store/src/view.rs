//! The in-memory multi-version view: present records by key, and a bounded tail of events in each bucket.
//!
//! Pure data. A read as of an older revision is the present state with the later events undone.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use tokio::sync::watch;

use crate::StoreError;
use crate::record::Record;

/// Whether an event wrote or removed its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// The key was written.
    Put,
    /// The key was removed, by a delete or by expiry.
    Delete,
}

/// One committed change.
#[derive(Debug)]
pub struct Event {
    /// Written or removed.
    pub kind: EventKind,
    /// The new state, or the last one, spelled with the revision of its deletion.
    pub record: Arc<Record>,
    /// What was there before.
    pub previous: Previous,
}

/// What a key held before an event.
#[derive(Debug)]
pub enum Previous {
    /// Nothing: the event created the key.
    Absent,
    /// This record.
    Known(Arc<Record>),
    /// Something, of which only this is known: the event was read back after a restart.
    Forgotten,
}

impl Event {
    /// The revision of the change.
    pub fn revision(&self) -> u64 {
        self.record.revision()
    }
}

/// Which records to read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Range<'a> {
    /// Keys must begin with this; it names a bucket (the text before the first `/`).
    pub prefix: &'a str,
    /// Only keys after this one.
    pub after: Option<&'a str>,
    /// At most this many records; 0 means all.
    pub limit: usize,
    /// The state as of this revision instead of now.
    pub at_revision: Option<u64>,
}

/// The answer to a [`Range`].
#[derive(Debug)]
pub struct Page {
    /// The revision the records are the state of.
    pub revision: u64,
    /// The records in key order.
    pub records: Vec<Arc<Record>>,
    /// How many more would have followed.
    pub remaining: usize,
}

/// How much of the past is kept in each bucket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TailLimits {
    pub events: usize,
    pub bytes: usize,
    pub age_seconds: u64,
}

impl Default for TailLimits {
    fn default() -> Self {
        TailLimits { events: 4096, bytes: 8 << 20, age_seconds: 600 }
    }
}

struct Bucket {
    records: BTreeMap<Arc<str>, Arc<Record>>,
    tail: VecDeque<(u64, Arc<Event>)>,
    tail_bytes: usize,
    /// Watches resume from here or later.
    floor: u64,
    /// Reads of the past go back to here.
    undo_floor: u64,
    changed: watch::Sender<u64>,
}

/// Everything that is readable.
pub(crate) struct View {
    pub(crate) revision: u64,
    base_floor: u64,
    limits: TailLimits,
    buckets: HashMap<Box<str>, Bucket>,
    expiries: BTreeSet<(u64, Arc<str>)>,
}

/// The bucket of a key or prefix.
pub(crate) fn bucket_of(key: &str) -> &str {
    key.split_once('/').map_or(key, |(bucket, _)| bucket)
}

impl View {
    pub(crate) fn new(revision: u64, base_floor: u64, limits: TailLimits) -> View {
        View { revision, base_floor, limits, buckets: HashMap::new(), expiries: BTreeSet::new() }
    }

    /// Fills the view at start: present records, then the kept events in order of revision.
    pub(crate) fn load(&mut self, records: Vec<Arc<Record>>, tombstones: Vec<Arc<Record>>, now: u64) {
        let mut events: Vec<Arc<Event>> = Vec::new();
        for record in records {
            if record.revision() > self.base_floor {
                let created = record.created_revision() == record.revision();
                let previous = if created { Previous::Absent } else { Previous::Forgotten };
                events.push(Arc::new(Event { kind: EventKind::Put, record: record.clone(), previous }));
            }
            if let Some(at) = record.expires_at() {
                self.expiries.insert((at, record.key().clone()));
            }
            let key = record.key().clone();
            self.bucket_mut(bucket_of(&key)).records.insert(key.clone(), record);
        }
        for record in tombstones.into_iter().filter(|record| record.revision() > self.base_floor) {
            events.push(Arc::new(Event { kind: EventKind::Delete, record, previous: Previous::Forgotten }));
        }
        events.sort_by_key(|event| event.revision());
        let limits = self.limits;
        let revision = self.revision;
        for event in events {
            let bucket = self.bucket_mut(bucket_of(&event.record.key().clone()));
            bucket.push(now, event);
            bucket.trim(limits, now);
        }
        for bucket in self.buckets.values_mut() {
            bucket.undo_floor = revision;
        }
    }

    fn bucket_mut(&mut self, name: &str) -> &mut Bucket {
        if !self.buckets.contains_key(name) {
            let bucket = Bucket {
                records: BTreeMap::new(),
                tail: VecDeque::new(),
                tail_bytes: 0,
                floor: self.base_floor,
                undo_floor: self.base_floor,
                changed: watch::Sender::new(self.revision),
            };
            self.buckets.insert(name.into(), bucket);
        }
        self.buckets.get_mut(name).expect("the bucket was inserted above")
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Arc<Record>> {
        self.buckets.get(bucket_of(key))?.records.get(key)
    }

    pub(crate) fn oldest_revision(&self) -> u64 {
        self.buckets.values().map(|bucket| bucket.floor).max().unwrap_or(self.base_floor).max(self.base_floor)
    }

    pub(crate) fn last_change(&self, prefix: &str) -> u64 {
        self.buckets.get(bucket_of(prefix)).map_or(self.base_floor, Bucket::last_change)
    }

    pub(crate) fn count(&self, prefix: &str) -> usize {
        let Some(bucket) = self.buckets.get(bucket_of(prefix)) else { return 0 };
        if prefix.len() == bucket_of(prefix).len() + 1 {
            return bucket.records.len();
        }
        bucket.span(prefix, None).count()
    }

    pub(crate) fn range(&self, range: Range<'_>) -> Result<Page, StoreError> {
        let revision = range.at_revision.unwrap_or(self.revision);
        if revision > self.revision {
            return Err(StoreError::Future { requested: revision, current: self.revision });
        }
        let Some(bucket) = self.buckets.get(bucket_of(range.prefix)) else {
            if revision < self.base_floor {
                return Err(StoreError::Compacted { requested: revision, oldest: self.base_floor });
            }
            return Ok(Page { revision, records: Vec::new(), remaining: 0 });
        };
        let (records, remaining) = if bucket.last_change() <= revision {
            bucket.take_present(range)
        } else if revision < bucket.undo_floor {
            return Err(StoreError::Compacted { requested: revision, oldest: bucket.undo_floor });
        } else {
            bucket.take_past(range, revision)
        };
        Ok(Page { revision, records, remaining })
    }

    /// Where a watch would start, or why it cannot.
    pub(crate) fn subscribe(&mut self, prefix: &str, revision: u64) -> Result<watch::Receiver<u64>, StoreError> {
        if revision > self.revision {
            return Err(StoreError::Future { requested: revision, current: self.revision });
        }
        let bucket = self.bucket_mut(bucket_of(prefix));
        if revision < bucket.floor {
            return Err(StoreError::Compacted { requested: revision, oldest: bucket.floor });
        }
        Ok(bucket.changed.subscribe())
    }

    /// The events after `cursor` under a prefix, at most `limit`, and the revision up to which that is all of them.
    pub(crate) fn events(&self, prefix: &str, cursor: u64, limit: usize) -> Result<(Vec<Arc<Event>>, u64), StoreError> {
        let Some(bucket) = self.buckets.get(bucket_of(prefix)) else { return Ok((Vec::new(), self.revision)) };
        if cursor < bucket.floor {
            return Err(StoreError::Compacted { requested: cursor, oldest: bucket.floor });
        }
        let first = bucket.tail.partition_point(|(_, event)| event.revision() <= cursor);
        let mut events = Vec::new();
        for (_, event) in bucket.tail.range(first..) {
            if event.record.key().starts_with(prefix) {
                events.push(event.clone());
                if events.len() >= limit {
                    return Ok((events, event.revision()));
                }
            }
        }
        Ok((events, self.revision))
    }

    /// Makes committed events visible and wakes their watchers.
    pub(crate) fn apply(&mut self, events: Vec<Arc<Event>>, now: u64) {
        let Some(last) = events.last() else { return };
        self.revision = last.revision();
        let limits = self.limits;
        let mut touched: Vec<Box<str>> = Vec::new();
        for event in events {
            let key = event.record.key().clone();
            let name = bucket_of(&key);
            if let Previous::Known(previous) = &event.previous
                && let Some(at) = previous.expires_at()
            {
                self.expiries.remove(&(at, key.clone()));
            }
            if event.kind == EventKind::Put
                && let Some(at) = event.record.expires_at()
            {
                self.expiries.insert((at, key.clone()));
            }
            if !touched.iter().any(|known| &**known == name) {
                touched.push(name.into());
            }
            let bucket = self.bucket_mut(name);
            match event.kind {
                EventKind::Put => bucket.records.insert(key.clone(), event.record.clone()),
                EventKind::Delete => bucket.records.remove(&key),
            };
            bucket.push(now, event);
            bucket.trim(limits, now);
        }
        for name in touched {
            let revision = self.revision;
            self.bucket_mut(&name).changed.send_replace(revision);
        }
    }

    /// Forgets events up to a revision; returns the floor that results.
    pub(crate) fn compact(&mut self, revision: u64) -> u64 {
        self.base_floor = self.base_floor.max(revision.min(self.revision));
        let floor = self.base_floor;
        for bucket in self.buckets.values_mut() {
            while bucket.tail.front().is_some_and(|(_, event)| event.revision() <= floor) {
                bucket.pop();
            }
            bucket.floor = bucket.floor.max(floor);
            bucket.undo_floor = bucket.undo_floor.max(floor);
        }
        floor
    }

    /// Drops events that are too old in every bucket; returns the revision below which nothing is kept.
    pub(crate) fn sweep(&mut self, now: u64) -> u64 {
        let limits = self.limits;
        let mut kept_from = self.revision;
        for bucket in self.buckets.values_mut() {
            bucket.trim(limits, now);
            if let Some((_, event)) = bucket.tail.front() {
                kept_from = kept_from.min(event.revision().saturating_sub(1));
            }
        }
        self.base_floor = self.base_floor.max(kept_from);
        self.base_floor
    }

    /// Keys that expire at or before `now`, at most `limit`.
    pub(crate) fn expired(&self, now: u64, limit: usize) -> Vec<Arc<str>> {
        self.expiries.iter().take_while(|(at, _)| *at <= now).take(limit).map(|(_, key)| key.clone()).collect()
    }

    /// When the next record expires.
    pub(crate) fn next_expiry(&self) -> Option<u64> {
        self.expiries.first().map(|(at, _)| *at)
    }
}

impl Bucket {
    fn push(&mut self, now: u64, event: Arc<Event>) {
        self.tail_bytes += event.record.value().len();
        self.tail.push_back((now, event));
    }

    fn pop(&mut self) {
        if let Some((_, event)) = self.tail.pop_front() {
            self.tail_bytes -= event.record.value().len();
            self.floor = self.floor.max(event.revision());
            self.undo_floor = self.undo_floor.max(event.revision());
        }
    }

    fn trim(&mut self, limits: TailLimits, now: u64) {
        while let Some((at, _)) = self.tail.front() {
            let aged = at.saturating_add(limits.age_seconds) < now;
            if !aged && self.tail.len() <= limits.events && self.tail_bytes <= limits.bytes {
                break;
            }
            self.pop();
        }
    }

    fn last_change(&self) -> u64 {
        self.tail.back().map_or(self.floor, |(_, event)| event.revision())
    }

    fn span<'s>(
        &'s self,
        prefix: &'s str,
        after: Option<&'s str>,
    ) -> impl Iterator<Item = (&'s Arc<str>, &'s Arc<Record>)> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        self.records.range::<str, _>((start, Bound::Unbounded)).take_while(move |(key, _)| key.starts_with(prefix))
    }

    fn take_present(&self, range: Range<'_>) -> (Vec<Arc<Record>>, usize) {
        let mut span = self.span(range.prefix, range.after);
        let limit = if range.limit == 0 { usize::MAX } else { range.limit };
        let records = span.by_ref().take(limit).map(|(_, record)| record.clone()).collect();
        (records, span.count())
    }

    fn take_past(&self, range: Range<'_>, revision: u64) -> (Vec<Arc<Record>>, usize) {
        let mut undone: BTreeMap<&str, Option<&Arc<Record>>> = BTreeMap::new();
        for (_, event) in self.tail.iter().rev().take_while(|(_, event)| event.revision() > revision) {
            let key: &str = event.record.key();
            if key.starts_with(range.prefix) && range.after.is_none_or(|after| key > after) {
                let before = match &event.previous {
                    Previous::Known(record) => Some(record),
                    Previous::Absent | Previous::Forgotten => None,
                };
                undone.insert(key, before);
            }
        }
        let mut state: BTreeMap<&str, &Arc<Record>> =
            self.span(range.prefix, range.after).map(|(key, record)| (&**key, record)).collect();
        for (key, before) in undone {
            match before {
                Some(record) => state.insert(key, record),
                None => state.remove(key),
            };
        }
        let limit = if range.limit == 0 { usize::MAX } else { range.limit };
        let total = state.len();
        let records: Vec<_> = state.into_values().take(limit).cloned().collect();
        let remaining = total - records.len();
        (records, remaining)
    }
}
