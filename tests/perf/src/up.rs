//! `bench up`: what `oarlock up --demo` says of its own stages, over several cold starts.

use crate::cluster::Cluster;
use crate::table::{self, Row};

pub(crate) fn run(rounds: usize) -> anyhow::Result<()> {
    let mut rows: Vec<Row> = Vec::new();
    for _ in 0..rounds {
        let cluster = Cluster::start(true)?;
        for (seconds, stage) in cluster.output.lines().filter_map(stage) {
            match rows.iter_mut().find(|row| row.name == stage) {
                Some(row) => row.samples.push(seconds * 1000.0),
                None => rows.push(Row { name: stage, samples: vec![seconds * 1000.0] }),
            }
        }
    }
    table::print("cold start, time since `oarlock up` began", &rows);
    Ok(())
}

/// Reads a progress line such as `   0.21 s  API server ready`; names and addresses are cut off.
fn stage(line: &str) -> Option<(f64, String)> {
    let (seconds, what) = line.split_once(" s  ")?;
    let what = what.split(" http").next().unwrap_or(what);
    let what = if what.starts_with("node ") { "node Ready" } else { what };
    Some((seconds.trim().parse().ok()?, what.to_owned()))
}
