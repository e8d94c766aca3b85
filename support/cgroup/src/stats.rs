//! What a group uses, in the same units from either version.

use crate::{Cgroup, CgroupError};

/// Use of CPU, memory and processes. Counters only grow during a group's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu_usage_nanos: u64,
    pub cpu_user_nanos: u64,
    pub cpu_system_nanos: u64,
    /// Times the group was held back by its CPU quota.
    pub cpu_throttled_periods: u64,
    /// All memory charged, page cache included.
    pub memory_usage_bytes: u64,
    /// Usage without file pages the kernel would drop first.
    pub memory_working_set_bytes: u64,
    /// Anonymous memory.
    pub memory_rss_bytes: u64,
    /// The group's limit; None when there is none.
    pub memory_limit_bytes: Option<u64>,
    pub memory_swap_bytes: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// Processes and threads now.
    pub pids: u64,
    pub oom_kills: u64,
}

/// Version 1 says "no limit" with the largest multiple of a page.
const UNLIMITED_V1: u64 = 0x7fff_ffff_ffff_f000;
/// Ticks of `cpuacct.stat`: USER_HZ is 100 on every Linux architecture.
const NANOS_PER_TICK: u64 = 10_000_000;

pub(crate) fn read(group: &Cgroup<'_>) -> Result<Stats, CgroupError> {
    let mut stats = if group.layout().is_v2() { read_v2(group) } else { read_v1(group) };
    stats.oom_kills = group.oom_kills();
    stats.pids = match group.read_number("pids", "pids.current") {
        Some(pids) => pids,
        None => group.pids()?.len() as u64,
    };
    Ok(stats)
}

fn read_v1(group: &Cgroup<'_>) -> Stats {
    let number = |controller, file| group.read_number(controller, file).unwrap_or(0);
    let ticks = group.read_text("cpuacct", "cpuacct.stat").unwrap_or_default();
    let throttling = group.read_text("cpu", "cpu.stat").unwrap_or_default();
    let memory = group.read_text("memory", "memory.stat").unwrap_or_default();
    let of = |key| keyed(&memory, key).unwrap_or(0);
    let usage = number("memory", "memory.usage_in_bytes");
    Stats {
        cpu_usage_nanos: number("cpuacct", "cpuacct.usage"),
        cpu_user_nanos: keyed(&ticks, "user").unwrap_or(0) * NANOS_PER_TICK,
        cpu_system_nanos: keyed(&ticks, "system").unwrap_or(0) * NANOS_PER_TICK,
        cpu_throttled_periods: keyed(&throttling, "nr_throttled").unwrap_or(0),
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.saturating_sub(of("total_inactive_file")),
        memory_rss_bytes: of("total_rss"),
        memory_limit_bytes: keyed(&memory, "hierarchical_memory_limit").filter(|bytes| *bytes < UNLIMITED_V1),
        memory_swap_bytes: of("total_swap"),
        page_faults: of("total_pgfault"),
        major_page_faults: of("total_pgmajfault"),
        pids: 0,
        oom_kills: 0,
    }
}

fn read_v2(group: &Cgroup<'_>) -> Stats {
    // `cpu.stat` counts time even where the cpu controller is not enabled; look beside any controller.
    let cpu = group.read_text("cpu", "cpu.stat").unwrap_or_default();
    let memory = group.read_text("memory", "memory.stat").unwrap_or_default();
    let of = |key| keyed(&memory, key).unwrap_or(0);
    let micros = |key| keyed(&cpu, key).unwrap_or(0) * 1000;
    let usage = group.read_number("memory", "memory.current").unwrap_or(0);
    Stats {
        cpu_usage_nanos: micros("usage_usec"),
        cpu_user_nanos: micros("user_usec"),
        cpu_system_nanos: micros("system_usec"),
        cpu_throttled_periods: keyed(&cpu, "nr_throttled").unwrap_or(0),
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.saturating_sub(of("inactive_file")),
        memory_rss_bytes: of("anon"),
        memory_limit_bytes: group.read_number("memory", "memory.max"),
        memory_swap_bytes: group.read_number("memory", "memory.swap.current").unwrap_or(0),
        page_faults: of("pgfault"),
        major_page_faults: of("pgmajfault"),
        pids: 0,
        oom_kills: 0,
    }
}

/// The number after a key at the start of a line.
pub(crate) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_whole_words() {
        let text = "oom 3\noom_kill 2\noom_kill_disable 0\n";
        assert_eq!(keyed(text, "oom_kill"), Some(2));
        assert_eq!(keyed(text, "oom"), Some(3));
        assert_eq!(keyed(text, "kill"), None);
    }
}
