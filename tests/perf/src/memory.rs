//! `bench memory`: proportional set size and CPU time of each process of an idle cluster with the demo.

use std::time::Duration;

use procfs::process::Process;
use serde_json::json;

use crate::cluster::Cluster;

struct Sample {
    pid: i32,
    name: String,
    pss_bytes: u64,
    private_bytes: u64,
    cpu_ticks: u64,
}

pub(crate) fn run(seconds: u64) -> anyhow::Result<()> {
    let cluster = Cluster::start(true)?;
    std::thread::park_timeout(Duration::from_secs(5));
    let before = samples(&cluster);
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(seconds) {
        std::thread::park_timeout(Duration::from_secs(seconds).saturating_sub(started.elapsed()));
    }
    let after = samples(&cluster);
    let ticks = procfs::ticks_per_second() as f64;
    println!(
        "\nidle cluster with the demo\n{:<28} {:>8} {:>12} {:>12} {:>8}",
        "", "pid", "PSS kB", "private kB", "CPU %"
    );
    let mut total = 0;
    let mut total_cpu = 0.0;
    for sample in &after {
        let earlier = before.iter().find(|other| other.pid == sample.pid).map_or(0, |other| other.cpu_ticks);
        let cpu = (sample.cpu_ticks - earlier) as f64 / ticks / seconds as f64 * 100.0;
        total += sample.pss_bytes;
        total_cpu += cpu;
        println!(
            "{:<28} {:>8} {:>12} {:>12} {:>8.2}",
            sample.name,
            sample.pid,
            sample.pss_bytes / 1024,
            sample.private_bytes / 1024,
            cpu
        );
    }
    println!("{:<28} {:>8} {:>12} {:>12} {:>8.2}", "sum", "", total / 1024, "", total_cpu);
    for program in ["oarlock", "oarlock-shim", "oarlock-cni-plugins"] {
        let size = std::fs::metadata(oarlock_testkit::binary(program))?.len();
        println!("{program:<28} {:>8} {:>12} kB on disk", "", size / 1024);
    }
    println!("{}", json!({ "bench": "memory", "pss_bytes": total, "cpu_percent": total_cpu, "seconds": seconds }));
    Ok(())
}

/// Proportional set size of a process.
pub(crate) fn pss_kib(pid: i32) -> anyhow::Result<u64> {
    let rollup = Process::new(pid)?.smaps_rollup()?;
    let map = rollup.memory_map_rollup.0.first().map(|map| map.extension.map.clone()).unwrap_or_default();
    Ok(map.get("Pss").copied().unwrap_or(0) / 1024)
}

/// CPU time that a process has used.
pub(crate) fn cpu_seconds(pid: i32) -> anyhow::Result<f64> {
    let stat = Process::new(pid)?.stat()?;
    Ok((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
}

/// Every process that has the cluster's directory in its command line.
fn samples(cluster: &Cluster) -> Vec<Sample> {
    let directory = cluster.path().to_string_lossy().into_owned();
    let mut samples: Vec<Sample> = procfs::process::all_processes()
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|process| sample(&process, &directory))
        .collect();
    samples.sort_by_key(|sample| sample.pid);
    samples
}

fn sample(process: &Process, directory: &str) -> Option<Sample> {
    let words = process.cmdline().ok()?;
    let program = std::path::Path::new(words.first()?).file_name()?.to_string_lossy().into_owned();
    if !program.starts_with("oarlock") || !words.iter().any(|word| word.contains(directory)) {
        return None;
    }
    let rollup = process.smaps_rollup().ok()?;
    let memory = rollup.memory_map_rollup.0.first()?.extension.map.clone();
    let of = |key: &str| memory.get(key).copied().unwrap_or(0);
    let stat = process.stat().ok()?;
    let part = words.get(3).filter(|_| program == "oarlock").cloned().unwrap_or_default();
    Some(Sample {
        pid: process.pid,
        name: format!("{program} {part}"),
        pss_bytes: of("Pss"),
        private_bytes: of("Private_Clean") + of("Private_Dirty"),
        cpu_ticks: stat.utime + stat.stime,
    })
}
