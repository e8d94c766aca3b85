//! Histograms and their Prometheus text. What is measured is others' business.

use std::fmt::Write;

/// How often values fell below each of some bounds.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    /// Of each bound alone, those above the last one at the end.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// `bounds` rise.
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    pub(crate) fn observe(&mut self, value: f64) {
        let place = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(place) {
            *count += 1;
        }
        self.sum += value;
    }

    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The lines of one series. `labels` are `name="value"`, separated by commas, or nothing.
    pub(crate) fn write(&self, text: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut below = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            below += count;
            let _ = writeln!(text, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {below}");
        }
        let count = self.count();
        let _ = writeln!(text, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}");
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _ = writeln!(text, "{name}_sum{braces} {}\n{name}_count{braces} {count}", self.sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_at_every_bound_that_they_do_not_pass() {
        let mut histogram = Histogram::new(&[0.5, 2.0]);
        [0.25, 0.5, 1.0, 8.0].into_iter().for_each(|value| histogram.observe(value));
        let mut text = String::new();
        histogram.write(&mut text, "x_seconds", "kind=\"a\"");
        assert_eq!(
            text,
            "x_seconds_bucket{kind=\"a\",le=\"0.5\"} 2\nx_seconds_bucket{kind=\"a\",le=\"2\"} 3\n\
             x_seconds_bucket{kind=\"a\",le=\"+Inf\"} 4\nx_seconds_sum{kind=\"a\"} 9.75\nx_seconds_count{kind=\"a\"} 4\n"
        );
        let mut bare = String::new();
        Histogram::new(&[]).write(&mut bare, "y", "");
        assert_eq!(bare, "y_bucket{le=\"+Inf\"} 0\ny_sum 0\ny_count 0\n");
    }
}
