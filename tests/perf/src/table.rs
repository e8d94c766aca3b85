//! Percentiles and their printing.

use serde_json::{Value, json};

/// Measurements of one thing, in milliseconds.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) samples: Vec<f64>,
}

impl Row {
    pub(crate) fn percentile(&self, part: f64) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        sorted.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
    }
}

/// Prints p50, p90, p99 and the extremes of each row, then the same as one line of JSON.
pub(crate) fn print(title: &str, rows: &[Row]) {
    println!("\n{title} (ms)\n{:<34} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9}", "", "n", "min", "p50", "p90", "p99", "max");
    for row in rows {
        let at = |part| row.percentile(part);
        println!(
            "{:<34} {:>5} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
            row.name,
            row.samples.len(),
            at(0.0),
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0)
        );
    }
    let document: Vec<Value> = rows
        .iter()
        .map(|row| json!({ "name": row.name, "n": row.samples.len(), "p50": row.percentile(0.5), "p90": row.percentile(0.9), "p99": row.percentile(0.99) }))
        .collect();
    println!("{}", json!({ "bench": title, "unit": "ms", "rows": document }));
}
