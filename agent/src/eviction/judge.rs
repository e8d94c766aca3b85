//! What follows from a look at the node: which thresholds act now and which conditions the node has. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use super::threshold::{EvictionConfig, Signal, Threshold};
use crate::plan::later;

/// How much of something is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    pub available: i64,
    pub capacity: i64,
}

/// What a look at the node showed. A signal that could not be read is absent, and is no reason for anything.
pub(super) type Readings = BTreeMap<Signal, Reading>;

/// The node's pressure conditions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub memory: bool,
    pub disk: bool,
    pub pid: bool,
}

impl Pressure {
    fn of(signal: Signal) -> Pressure {
        match signal {
            Signal::MemoryAvailable => Pressure { memory: true, ..Default::default() },
            Signal::PidAvailable => Pressure { pid: true, ..Default::default() },
            _ => Pressure { disk: true, ..Default::default() },
        }
    }

    fn or(self, other: Pressure) -> Pressure {
        Pressure { memory: self.memory || other.memory, disk: self.disk || other.disk, pid: self.pid || other.pid }
    }
}

/// What is remembered from look to look.
#[derive(Debug, Default)]
pub(super) struct Judge {
    /// Thresholds met at the last look, by their place in the configuration, and since when.
    met: BTreeMap<usize, Timestamp>,
    /// When each signal's pressure was last seen.
    last_pressure: BTreeMap<Signal, Timestamp>,
}

/// The verdict of one look.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Verdict {
    pub pressure: Pressure,
    /// Thresholds that act now, the most urgent first.
    pub acting: Vec<Threshold>,
    /// When a soft threshold that is met now would act.
    pub act_at: Option<Timestamp>,
}

impl Judge {
    /// Takes a look in.
    pub(super) fn judge(&mut self, config: &EvictionConfig, readings: &Readings, now: Timestamp) -> Verdict {
        let mut met = BTreeMap::new();
        for (place, threshold) in config.thresholds.iter().enumerate() {
            let since = self.met.get(&place).copied();
            let Some(reading) = readings.get(&threshold.signal) else { continue };
            if is_met(threshold, *reading, since.is_some()) {
                // A clock that was set back must not make a grace endless.
                met.insert(place, since.map_or(now, |since| since.min(now)));
                self.last_pressure.insert(threshold.signal, now);
            }
        }
        self.met = met;
        let period = config.transition_period;
        self.last_pressure.retain(|_, seen| *seen <= now && later(*seen, period) > now || *seen == now);
        let pressure = self.last_pressure.keys().fold(Pressure::default(), |all, signal| all.or(Pressure::of(*signal)));
        let mut verdict = Verdict { pressure, ..Default::default() };
        for (place, since) in &self.met {
            let threshold = config.thresholds[*place];
            let act_at = later(*since, threshold.grace.unwrap_or(Duration::ZERO));
            if act_at <= now {
                verdict.acting.push(threshold);
            } else {
                verdict.act_at = Some(verdict.act_at.map_or(act_at, |earlier| earlier.min(act_at)));
            }
        }
        verdict.acting.sort_by_key(|threshold| (threshold.signal, threshold.grace.is_some()));
        verdict
    }
}

/// Whether a threshold is met; one that was met before needs its minimum reclaim too.
fn is_met(threshold: &Threshold, reading: Reading, before: bool) -> bool {
    let mut below = threshold.below.of(reading.capacity);
    if let Some(more) = threshold.min_reclaim.filter(|_| before) {
        below = below.saturating_add(more.of(reading.capacity));
    }
    reading.available < below
}

#[cfg(test)]
mod tests {
    use super::super::threshold::Amount;
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a small number")
    }

    fn memory(available: i64) -> Readings {
        Readings::from([(Signal::MemoryAvailable, Reading { available, capacity: 1000 })])
    }

    fn config(grace: Option<u64>, min_reclaim: Option<i64>) -> EvictionConfig {
        let threshold = Threshold {
            signal: Signal::MemoryAvailable,
            below: Amount::Percent(10.0),
            grace: grace.map(Duration::from_secs),
            min_reclaim: min_reclaim.map(Amount::Absolute),
        };
        EvictionConfig {
            thresholds: vec![threshold],
            transition_period: Duration::from_secs(300),
            ..Default::default()
        }
    }

    #[test]
    fn a_hard_threshold_acts_at_once_and_its_condition_lasts_for_the_transition_period() {
        let (config, mut judge) = (config(None, None), Judge::default());
        assert_eq!(judge.judge(&config, &memory(100), at(0)), Verdict::default());
        let verdict = judge.judge(&config, &memory(99), at(10));
        assert!(verdict.pressure.memory && verdict.acting.len() == 1);
        let after = judge.judge(&config, &memory(500), at(20));
        assert!(after.pressure.memory && after.acting.is_empty(), "the condition stays, nothing acts");
        assert!(judge.judge(&config, &memory(500), at(309)).pressure.memory);
        assert!(!judge.judge(&config, &memory(500), at(310)).pressure.memory);
    }

    #[test]
    fn a_soft_threshold_waits_for_its_grace_and_starts_over_when_it_was_not_met_between() {
        let (config, mut judge) = (config(Some(60), None), Judge::default());
        let first = judge.judge(&config, &memory(50), at(0));
        assert!(first.acting.is_empty() && first.pressure.memory);
        assert_eq!(first.act_at, Some(at(60)));
        assert!(judge.judge(&config, &memory(200), at(30)).acting.is_empty());
        assert!(judge.judge(&config, &memory(50), at(40)).acting.is_empty());
        assert!(judge.judge(&config, &memory(50), at(99)).acting.is_empty());
        assert_eq!(judge.judge(&config, &memory(50), at(100)).acting.len(), 1);
    }

    #[test]
    fn a_met_threshold_asks_for_its_minimum_reclaim() {
        let (config, mut judge) = (config(None, Some(50)), Judge::default());
        assert!(judge.judge(&config, &memory(120), at(0)).acting.is_empty());
        assert_eq!(judge.judge(&config, &memory(99), at(10)).acting.len(), 1);
        assert_eq!(judge.judge(&config, &memory(149), at(20)).acting.len(), 1, "not yet enough more");
        assert!(judge.judge(&config, &memory(150), at(30)).acting.is_empty());
        assert!(judge.judge(&config, &memory(120), at(40)).acting.is_empty(), "over means over");
    }

    #[test]
    fn what_cannot_be_read_is_no_reason() {
        assert_eq!(Judge::default().judge(&EvictionConfig::default(), &Readings::new(), at(0)), Verdict::default());
    }

    #[test]
    fn memory_comes_before_disk_before_process_ids() {
        let mut config = EvictionConfig::default();
        let pids =
            Threshold { signal: Signal::PidAvailable, below: Amount::Absolute(10), grace: None, min_reclaim: None };
        config.thresholds.insert(0, pids);
        let none = Reading { available: 0, capacity: 1 << 40 };
        let readings = Signal::ALL.map(|signal| (signal, none)).into();
        let verdict = Judge::default().judge(&config, &readings, at(0));
        let order: Vec<&str> = verdict.acting.iter().map(|threshold| threshold.signal.resource()).collect();
        assert_eq!(order, ["memory", "ephemeral-storage", "inodes", "ephemeral-storage", "inodes", "pids"]);
        assert_eq!(verdict.pressure, Pressure { memory: true, disk: true, pid: true });
    }
}
