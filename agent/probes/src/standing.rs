//! Thresholds: how single attempts add up to an outcome. Pure.

use crate::model::Outcome;

/// A probe's standing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    success_threshold: u32,
    failure_threshold: u32,
    outcome: Outcome,
    /// The last attempt and how many like it came in a row.
    last: Option<bool>,
    run: u32,
}

impl Standing {
    /// `outcome` is what is known from before.
    pub fn new(success_threshold: u32, failure_threshold: u32, outcome: Outcome) -> Self {
        Self { success_threshold, failure_threshold, outcome, last: None, run: 0 }
    }

    pub fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// Counts an attempt; gives whether the outcome changed.
    pub fn record(&mut self, succeeded: bool) -> bool {
        if self.last == Some(succeeded) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(succeeded);
            self.run = 1;
        }
        let (threshold, outcome) = if succeeded {
            (self.success_threshold, Outcome::Success)
        } else {
            (self.failure_threshold, Outcome::Failure)
        };
        if self.run < threshold || self.outcome == outcome {
            return false;
        }
        self.outcome = outcome;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_change_only_at_their_thresholds() {
        let mut standing = Standing::new(2, 3, Outcome::Unknown);
        let changes: Vec<bool> =
            [true, true, true, false, false, true, false, false, false, false].map(|ok| standing.record(ok)).into();
        assert_eq!(changes, [false, true, false, false, false, false, false, false, true, false]);
        assert_eq!(standing.outcome(), Outcome::Failure);
    }

    #[test]
    fn a_carried_over_success_survives_single_failures() {
        let mut standing = Standing::new(1, 3, Outcome::Success);
        assert!(!standing.record(true));
        assert!(!standing.record(false));
        assert!(!standing.record(false));
        assert_eq!(standing.outcome(), Outcome::Success);
        assert!(standing.record(false));
    }
}
