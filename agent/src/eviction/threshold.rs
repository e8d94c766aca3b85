//! Eviction signals and thresholds, by the names and rules of KubeletConfiguration. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

/// What can run short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    MemoryAvailable,
    NodefsAvailable,
    NodefsInodesFree,
    ImagefsAvailable,
    ImagefsInodesFree,
    PidAvailable,
}

impl Signal {
    /// Every signal, memory first: the order in which shortages are dealt with.
    pub const ALL: [Signal; 6] = [
        Signal::MemoryAvailable,
        Signal::NodefsAvailable,
        Signal::NodefsInodesFree,
        Signal::ImagefsAvailable,
        Signal::ImagefsInodesFree,
        Signal::PidAvailable,
    ];

    /// The configuration's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Signal::MemoryAvailable => "memory.available",
            Signal::NodefsAvailable => "nodefs.available",
            Signal::NodefsInodesFree => "nodefs.inodesFree",
            Signal::ImagefsAvailable => "imagefs.available",
            Signal::ImagefsInodesFree => "imagefs.inodesFree",
            Signal::PidAvailable => "pid.available",
        }
    }

    fn parse(name: &str) -> Option<Signal> {
        Signal::ALL.into_iter().find(|signal| signal.name() == name)
    }

    /// The resource that messages name.
    pub(crate) fn resource(self) -> &'static str {
        match self {
            Signal::MemoryAvailable => "memory",
            Signal::NodefsAvailable | Signal::ImagefsAvailable => "ephemeral-storage",
            Signal::NodefsInodesFree | Signal::ImagefsInodesFree => "inodes",
            Signal::PidAvailable => "pids",
        }
    }

    /// Whether amounts are bytes rather than pieces.
    pub(crate) fn in_bytes(self) -> bool {
        matches!(self, Signal::MemoryAvailable | Signal::NodefsAvailable | Signal::ImagefsAvailable)
    }
}

/// A quantity, or a share of the capacity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    Absolute(i64),
    Percent(f64),
}

impl Amount {
    /// In units, of a capacity.
    pub(crate) fn of(self, capacity: i64) -> i64 {
        match self {
            Amount::Absolute(units) => units,
            Amount::Percent(percent) => (capacity as f64 * percent / 100.0) as i64,
        }
    }

    fn parse(signal: &str, text: &str) -> Result<Amount, EvictionConfigError> {
        let bad = |problem: &str| EvictionConfigError::Value {
            signal: signal.to_owned(),
            value: text.to_owned(),
            problem: problem.to_owned(),
        };
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.parse().map_err(|_| bad("is not a percentage"))?;
            return match percent {
                percent if !percent.is_finite() => Err(bad("is not a percentage")),
                percent if percent < 0.0 => Err(bad("must be >= 0%")),
                percent if percent > 100.0 => Err(bad("must be <= 100%")),
                percent => Ok(Amount::Percent(percent)),
            };
        }
        match oarlock_quantity::units(text) {
            Some(units) if units >= 0 => Ok(Amount::Absolute(units)),
            Some(_) => Err(bad("must be positive")),
            None => Err(bad("is not a quantity")),
        }
    }
}

/// Pods are ended when a signal is below `below`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    pub signal: Signal,
    pub below: Amount,
    /// A soft threshold must be met for so long; a hard one, with none, acts at once.
    pub grace: Option<Duration>,
    /// Once met, so much more than `below` must be free again before the shortage is over.
    pub min_reclaim: Option<Amount>,
}

/// When and how pods are ended for the node's sake.
#[derive(Debug, Clone, PartialEq)]
pub struct EvictionConfig {
    /// Hard ones and soft ones.
    pub thresholds: Vec<Threshold>,
    /// A pressure condition stays for so long after the pressure was last seen.
    pub transition_period: Duration,
    /// The longest grace that a pod gets at a soft threshold.
    pub max_pod_grace: Duration,
    /// How often the machine is looked at.
    pub period: Duration,
}

/// Eviction settings that make no sense. Display names the signal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvictionConfigError {
    #[error("unknown eviction signal {0}")]
    UnknownSignal(String),
    #[error("eviction threshold {signal}: {value:?} {problem}")]
    Value { signal: String, value: String, problem: String },
    #[error("grace period must be specified for the soft eviction threshold {0}")]
    NoGrace(String),
    #[error("soft eviction threshold grace period of {signal}: {value:?} is not a positive duration")]
    Grace { signal: String, value: String },
}

type Texts = BTreeMap<String, String>;

/// Upstream's defaults but for the disk: 5 % instead of 10 % of the node's and 15 % of the images' file system, as k3s has it.
/// On one disk, the rule on small machines, upstream's would leave a seventh of it unused.
impl Default for EvictionConfig {
    fn default() -> Self {
        let hard = [
            (Signal::MemoryAvailable, Amount::Absolute(100 << 20)),
            (Signal::NodefsAvailable, Amount::Percent(5.0)),
            (Signal::NodefsInodesFree, Amount::Percent(5.0)),
            (Signal::ImagefsAvailable, Amount::Percent(5.0)),
            (Signal::ImagefsInodesFree, Amount::Percent(5.0)),
        ];
        Self {
            thresholds: hard.map(|(signal, below)| Threshold { signal, below, grace: None, min_reclaim: None }).into(),
            transition_period: Duration::from_secs(300),
            max_pod_grace: Duration::ZERO,
            period: Duration::from_secs(10),
        }
    }
}

impl EvictionConfig {
    /// The hard threshold of a signal, which is kept away from pods.
    pub(crate) fn hard(&self, signal: Signal) -> Option<Amount> {
        self.thresholds.iter().find(|t| t.signal == signal && t.grace.is_none()).map(|t| t.below)
    }

    /// Takes over `evictionHard`, `evictionSoft`, `evictionSoftGracePeriod` (`parse_duration` reads them) and
    /// `evictionMinimumReclaim`. A hard map that is given replaces all defaults, as upstream's does.
    pub fn set(
        &mut self,
        hard: Option<&Texts>,
        soft: &Texts,
        soft_grace: &Texts,
        min_reclaim: &Texts,
        parse_duration: impl Fn(&str) -> Option<Duration>,
    ) -> Result<(), EvictionConfigError> {
        if let Some(hard) = hard {
            self.thresholds = thresholds(hard, |_| Ok(None))?;
        }
        let grace = |signal: &str| match soft_grace.get(signal) {
            None => Err(EvictionConfigError::NoGrace(signal.to_owned())),
            Some(text) => match parse_duration(text) {
                Some(grace) if !grace.is_zero() => Ok(Some(grace)),
                _ => Err(EvictionConfigError::Grace { signal: signal.to_owned(), value: text.clone() }),
            },
        };
        if let Some(unknown) = soft_grace.keys().find(|name| Signal::parse(name).is_none()) {
            return Err(EvictionConfigError::UnknownSignal(unknown.clone()));
        }
        self.thresholds.extend(thresholds(soft, grace)?);
        for (name, text) in min_reclaim {
            let signal = Signal::parse(name).ok_or_else(|| EvictionConfigError::UnknownSignal(name.clone()))?;
            let amount = Amount::parse(name, text)?;
            for threshold in self.thresholds.iter_mut().filter(|threshold| threshold.signal == signal) {
                threshold.min_reclaim = Some(amount);
            }
        }
        Ok(())
    }
}

fn thresholds(
    texts: &Texts,
    grace: impl Fn(&str) -> Result<Option<Duration>, EvictionConfigError>,
) -> Result<Vec<Threshold>, EvictionConfigError> {
    let mut found = Vec::new();
    for (name, text) in texts {
        let signal = Signal::parse(name).ok_or_else(|| EvictionConfigError::UnknownSignal(name.clone()))?;
        // These two switch a threshold off.
        if matches!(text.as_str(), "0%" | "100%") {
            continue;
        }
        let below = Amount::parse(name, text)?;
        found.push(Threshold { signal, below, grace: grace(name)?, min_reclaim: None });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(pairs: &[(&str, &str)]) -> Texts {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn set(hard: &[(&str, &str)], soft: &[(&str, &str)], grace: &[(&str, &str)]) -> Result<EvictionConfig, String> {
        let mut config = EvictionConfig::default();
        let seconds = |text: &str| text.strip_suffix('s')?.parse().ok().map(Duration::from_secs);
        config
            .set(Some(&texts(hard)), &texts(soft), &texts(grace), &texts(&[]), seconds)
            .map(|()| config)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_hard_map_replaces_the_defaults_and_0_and_100_percent_switch_off() {
        let config =
            set(&[("memory.available", "1Gi"), ("nodefs.available", "0%"), ("pid.available", "10%")], &[], &[]);
        let config = config.expect("valid");
        assert_eq!(config.hard(Signal::MemoryAvailable), Some(Amount::Absolute(1 << 30)));
        assert_eq!(config.hard(Signal::PidAvailable), Some(Amount::Percent(10.0)));
        assert_eq!(config.thresholds.len(), 2);
    }

    #[test]
    fn wrong_settings_are_named() {
        for (hard, soft, grace, expected) in [
            (("disk.free", "1Gi"), None, None, "unknown eviction signal disk.free"),
            (("memory.available", "110%"), None, None, "must be <= 100%"),
            (("memory.available", "-1Gi"), None, None, "must be positive"),
            (("memory.available", "much"), None, None, "is not a quantity"),
            (("memory.available", "NaN%"), None, None, "is not a percentage"),
            (
                ("memory.available", "1Gi"),
                Some(("nodefs.available", "20%")),
                None,
                "grace period must be specified for the soft eviction threshold nodefs.available",
            ),
            (
                ("memory.available", "1Gi"),
                Some(("nodefs.available", "20%")),
                Some(("nodefs.available", "0s")),
                "is not a positive duration",
            ),
        ] {
            let list = |pair: Option<(&'static str, &'static str)>| pair.into_iter().collect::<Vec<_>>();
            let error = set(&[hard], &list(soft), &list(grace)).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}
