//! How durations are spread, as Prometheus counts them: [`Histogram`].

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Durations counted by upper bounds.
#[derive(Debug)]
pub struct Histogram {
    /// Each bound in microseconds, with how many durations are up to it.
    buckets: Box<[(u64, AtomicU64)]>,
    count: AtomicU64,
    sum_microseconds: AtomicU64,
}

impl Histogram {
    /// With these upper bounds in microseconds, the lowest first.
    pub fn new(bounds: impl IntoIterator<Item = u64>) -> Histogram {
        let buckets = bounds.into_iter().map(|bound| (bound, AtomicU64::new(0))).collect();
        Histogram { buckets, count: AtomicU64::new(0), sum_microseconds: AtomicU64::new(0) }
    }

    pub fn observe(&self, duration: Duration) {
        let microseconds = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        for (_, count) in self.buckets.iter().filter(|(bound, _)| microseconds <= *bound) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_microseconds.fetch_add(microseconds, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds it to an answer of `/metrics`, in seconds.
    pub fn tell(&self, text: &mut String, name: &str, help: &str) {
        let seconds = |microseconds: u64| microseconds as f64 / 1e6;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (bound, count) in &self.buckets {
            let _ = writeln!(text, "{name}_bucket{{le=\"{}\"}} {}", seconds(*bound), read(count));
        }
        let count = read(&self.count);
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum {}\n{name}_count {count}", seconds(read(&self.sum_microseconds)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_for_every_bound_that_it_is_not_above() {
        let histogram = Histogram::new([250_000, 1_000_000, 2_000_000]);
        for milliseconds in [100, 1000, 1500, 5000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let mut text = String::new();
        histogram.tell(&mut text, "x_seconds", "Help.");
        let values: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            values,
            [
                "x_seconds_bucket{le=\"0.25\"} 1",
                "x_seconds_bucket{le=\"1\"} 2",
                "x_seconds_bucket{le=\"2\"} 3",
                "x_seconds_bucket{le=\"+Inf\"} 4",
                "x_seconds_sum 7.6",
                "x_seconds_count 4",
            ]
        );
    }
}
