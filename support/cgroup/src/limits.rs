//! Limits, and which file takes which value. Pure: writing them is [`crate::Cgroup`]'s work.

use std::collections::BTreeMap;

/// Limits to set; what is None stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Relative CPU weight on the version 1 scale (2 to 262144; 1024 is the default).
    pub cpu_shares: Option<u64>,
    /// CPU time per period in microseconds; -1 is no limit.
    pub cpu_quota_us: Option<i64>,
    /// Length of a period in microseconds.
    pub cpu_period_us: Option<u64>,
    /// CPUs, as a list of ranges.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes, as a list of ranges.
    pub cpuset_mems: Option<String>,
    /// Most memory in bytes; -1 is no limit.
    pub memory_limit_bytes: Option<i64>,
    /// Most memory and swap together in bytes; -1 is no limit.
    pub memory_swap_bytes: Option<i64>,
    /// Memory the kernel tries to leave to the group, in bytes.
    pub memory_reservation_bytes: Option<i64>,
    /// Most processes and threads; -1 is no limit.
    pub pids_max: Option<i64>,
    /// Most bytes in huge pages of a size, which is named as the kernel names it: `2MB`, `1GB`.
    pub hugepages: BTreeMap<String, u64>,
    /// Further version 2 files by name.
    pub unified: BTreeMap<String, String>,
}

/// In names of files about huge pages that a process reserved.
pub(crate) const RESERVED: &str = "rsvd.";

/// One write: controller, file, value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Write {
    pub controller: &'static str,
    pub file: String,
    pub value: String,
}

fn write(controller: &'static str, file: &str, value: impl ToString) -> Write {
    Write { controller, file: file.to_owned(), value: value.to_string() }
}

fn max_or(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// The version 2 weight (1 to 10000, default 100) for version 1 shares (2 to 262144, default 1024), as runc, crun and
/// libcontainer map them: a curve through both ends and the defaults. 0 stays 0, which is to leave it as it is.
pub fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1..=2 => 1,
        262_144.. => 10_000,
        shares => {
            let log = (shares as f64).log2();
            let weight = 10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil();
            (weight as u64).clamp(1, 10_000)
        }
    }
}

impl Limits {
    /// The writes for version 1, in an order the kernel takes when `memory_now` is the present memory limit:
    /// memory with swap may never be under memory alone.
    pub(crate) fn writes_v1(&self, memory_now: Option<u64>) -> Vec<Write> {
        let mut writes = Vec::new();
        if let Some(shares) = self.cpu_shares {
            writes.push(write("cpu", "cpu.shares", shares.clamp(2, 262_144)));
        }
        self.cpu_time("cpu", &mut writes);
        if let Some(cpus) = &self.cpuset_cpus {
            writes.push(write("cpuset", "cpuset.cpus", cpus));
        }
        if let Some(mems) = &self.cpuset_mems {
            writes.push(write("cpuset", "cpuset.mems", mems));
        }
        if let Some(reservation) = self.memory_reservation_bytes {
            writes.push(write("memory", "memory.soft_limit_in_bytes", reservation));
        }
        let memory = self.memory_limit_bytes.map(|bytes| write("memory", "memory.limit_in_bytes", bytes));
        let swap = self.memory_swap_bytes.map(|bytes| write("memory", "memory.memsw.limit_in_bytes", bytes));
        let as_unsigned = |bytes: i64| u64::try_from(bytes).unwrap_or(u64::MAX);
        let grows = match (self.memory_limit_bytes, memory_now) {
            (Some(wanted), Some(now)) => as_unsigned(wanted) > now,
            _ => false,
        };
        if grows {
            writes.extend(swap.into_iter().chain(memory));
        } else {
            writes.extend(memory.into_iter().chain(swap));
        }
        if let Some(pids) = self.pids_max {
            writes.push(write("pids", "pids.max", max_or(pids)));
        }
        self.huge_pages("limit_in_bytes", &mut writes);
        writes
    }

    /// Both what is in use and what is reserved for use; older kernels count the former only.
    fn huge_pages(&self, file: &str, writes: &mut Vec<Write>) {
        for (size, bytes) in &self.hugepages {
            writes.push(write("hugetlb", &format!("hugetlb.{size}.{file}"), bytes));
            writes.push(write("hugetlb", &format!("hugetlb.{size}.{RESERVED}{file}"), bytes));
        }
    }

    fn cpu_time(&self, controller: &'static str, writes: &mut Vec<Write>) {
        if let Some(period) = self.cpu_period_us.filter(|period| *period > 0) {
            writes.push(write(controller, "cpu.cfs_period_us", period));
        }
        if let Some(quota) = self.cpu_quota_us.filter(|quota| *quota != 0) {
            writes.push(write(controller, "cpu.cfs_quota_us", quota.max(-1)));
        }
    }

    /// The writes for version 2.
    pub(crate) fn writes_v2(&self) -> Vec<Write> {
        let mut writes = Vec::new();
        if let Some(shares) = self.cpu_shares.filter(|shares| *shares > 0) {
            writes.push(write("cpu", "cpu.weight", weight_of_shares(shares)));
        }
        if self.cpu_quota_us.is_some_and(|quota| quota != 0) || self.cpu_period_us.is_some() {
            let quota = self.cpu_quota_us.filter(|quota| *quota != 0).map_or_else(|| "max".to_owned(), max_or);
            let period = self.cpu_period_us.filter(|period| *period > 0).unwrap_or(100_000);
            writes.push(write("cpu", "cpu.max", format!("{quota} {period}")));
        }
        if let Some(cpus) = &self.cpuset_cpus {
            writes.push(write("cpuset", "cpuset.cpus", cpus));
        }
        if let Some(mems) = &self.cpuset_mems {
            writes.push(write("cpuset", "cpuset.mems", mems));
        }
        if let Some(memory) = self.memory_limit_bytes {
            writes.push(write("memory", "memory.max", max_or(memory)));
        }
        if let Some(both) = self.memory_swap_bytes {
            let swap = if both < 0 { -1 } else { (both - self.memory_limit_bytes.unwrap_or(0).max(0)).max(0) };
            writes.push(write("memory", "memory.swap.max", max_or(swap)));
        }
        if let Some(reservation) = self.memory_reservation_bytes {
            writes.push(write("memory", "memory.low", max_or(reservation)));
        }
        if let Some(pids) = self.pids_max {
            writes.push(write("pids", "pids.max", max_or(pids)));
        }
        self.huge_pages("max", &mut writes);
        for (file, value) in &self.unified {
            writes.push(write("unified", file, value));
        }
        writes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(writes: &[Write]) -> Vec<(&str, &str)> {
        writes.iter().map(|write| (write.file.as_str(), write.value.as_str())).collect()
    }

    #[test]
    fn a_growing_memory_limit_raises_swap_first_and_a_shrinking_one_last() {
        let limits = Limits { memory_limit_bytes: Some(200), memory_swap_bytes: Some(200), ..Limits::default() };
        assert_eq!(files(&limits.writes_v1(Some(100)))[0].0, "memory.memsw.limit_in_bytes");
        assert_eq!(files(&limits.writes_v1(Some(300)))[0].0, "memory.limit_in_bytes");
    }

    #[test]
    fn version_2_has_its_own_scales() {
        let limits = Limits {
            cpu_shares: Some(1024),
            cpu_quota_us: Some(50_000),
            cpu_period_us: Some(100_000),
            memory_limit_bytes: Some(1000),
            memory_swap_bytes: Some(1500),
            pids_max: Some(-1),
            ..Limits::default()
        };
        let expected = [
            ("cpu.weight", "100"),
            ("cpu.max", "50000 100000"),
            ("memory.max", "1000"),
            ("memory.swap.max", "500"),
            ("pids.max", "max"),
        ];
        assert_eq!(files(&limits.writes_v2()), expected);
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(22_000), 1204, "as libcontainer has it");
    }

    #[test]
    fn huge_pages_are_limited_in_use_and_in_reserve() {
        let limits = Limits { hugepages: BTreeMap::from([("2MB".to_owned(), 4 << 20)]), ..Limits::default() };
        let bytes = "4194304";
        assert_eq!(files(&limits.writes_v2()), [("hugetlb.2MB.max", bytes), ("hugetlb.2MB.rsvd.max", bytes)]);
        let expected = [("hugetlb.2MB.limit_in_bytes", bytes), ("hugetlb.2MB.rsvd.limit_in_bytes", bytes)];
        assert_eq!(files(&limits.writes_v1(None)), expected);
    }

    #[test]
    fn an_unlimited_quota_keeps_the_period() {
        let limits = Limits { cpu_quota_us: Some(-1), cpu_period_us: Some(50_000), ..Limits::default() };
        assert_eq!(files(&limits.writes_v2()), [("cpu.max", "max 50000")]);
        assert_eq!(files(&limits.writes_v1(None)), [("cpu.cfs_period_us", "50000"), ("cpu.cfs_quota_us", "-1")]);
    }
}
