//! Limits as properties of units, so that systemd sets what we set whenever it sets anything. Pure.
//!
//! A limit without a property (huge pages, most of the version 2 files) is only written to the unit's group, which systemd
//! then leaves as it is.

use oarlock_cgroup::{Limits, weight_of_shares};

use crate::Value;

/// Name and value of a unit's property.
pub type Property = (&'static str, Value);

const INFINITY: u64 = u64::MAX;
/// systemd keeps a quota as a whole percentage of a processor: 10 ms of each second.
const QUOTA_STEP_US: u64 = 10_000;
const PERIOD_US: u64 = 100_000;
/// No machine has more.
const NUMBERS_MAX: usize = 1 << 16;

fn or_infinity(value: i64) -> Value {
    Value::U64(u64::try_from(value).unwrap_or(INFINITY))
}

/// The properties for what is set in `limits`.
pub fn of_limits(limits: &Limits) -> Vec<Property> {
    let mut properties = Vec::new();
    if let Some(shares) = limits.cpu_shares.filter(|shares| *shares > 0) {
        properties.push(("CPUWeight", Value::U64(weight_of_shares(shares))));
    }
    let quota = limits.cpu_quota_us.filter(|quota| *quota != 0);
    let period = limits.cpu_period_us.filter(|period| *period > 0);
    if quota.is_some() || period.is_some() {
        properties.extend(quota_of(quota.unwrap_or(-1), period.unwrap_or(PERIOD_US)));
    }
    if let Some(bytes) = limits.memory_limit_bytes {
        properties.push(("MemoryMax", or_infinity(bytes)));
    }
    if let Some(both) = limits.memory_swap_bytes {
        let swap = if both < 0 { -1 } else { (both - limits.memory_limit_bytes.unwrap_or(0).max(0)).max(0) };
        properties.push(("MemorySwapMax", or_infinity(swap)));
    }
    if let Some(bytes) = limits.memory_reservation_bytes {
        properties.push(("MemoryLow", or_infinity(bytes)));
    }
    if let Some(most) = limits.pids_max {
        properties.push(("TasksMax", or_infinity(most)));
    }
    let sets = [("AllowedCPUs", &limits.cpuset_cpus), ("AllowedMemoryNodes", &limits.cpuset_mems)];
    for (name, list) in sets {
        properties.extend(list.as_deref().and_then(mask).map(|mask| (name, Value::Bytes(mask))));
    }
    for (file, value) in &limits.unified {
        let ours = of_file(file, value);
        properties.retain(|(name, _)| ours.iter().all(|(other, _)| other != name));
        properties.extend(ours);
    }
    properties
}

/// Rounded up, as who is limited inside of the unit must find what it was promised.
fn quota_of(quota_us: i64, period_us: u64) -> [Property; 2] {
    let each_second = match u64::try_from(quota_us) {
        Ok(quota) => (quota.saturating_mul(1_000_000) / period_us).max(1).next_multiple_of(QUOTA_STEP_US),
        Err(_) => INFINITY,
    };
    [("CPUQuotaPeriodUSec", Value::U64(period_us)), ("CPUQuotaPerSecUSec", Value::U64(each_second))]
}

/// The properties that stand for a version 2 file; none for a file that has none.
fn of_file(file: &str, value: &str) -> Vec<Property> {
    let value = value.trim();
    let bytes = |name| match (value, value.parse()) {
        ("max", _) => vec![(name, Value::U64(INFINITY))],
        (_, Ok(number)) => vec![(name, Value::U64(number))],
        _ => Vec::new(),
    };
    let list = |name| mask(value).map(|mask| (name, Value::Bytes(mask))).into_iter().collect();
    match file {
        "cpu.weight" => bytes("CPUWeight"),
        "cpu.max" => {
            let mut words = value.split_ascii_whitespace();
            let quota = words.next().map(|word| word.parse().unwrap_or(-1)).filter(|quota| *quota != 0);
            let period = words.next().map_or(Some(PERIOD_US), |word| word.parse().ok()).filter(|period| *period > 0);
            quota.zip(period).map_or_else(Vec::new, |(quota, period)| quota_of(quota, period).into())
        }
        "cpuset.cpus" => list("AllowedCPUs"),
        "cpuset.mems" => list("AllowedMemoryNodes"),
        "memory.high" => bytes("MemoryHigh"),
        "memory.low" => bytes("MemoryLow"),
        "memory.max" => bytes("MemoryMax"),
        "memory.min" => bytes("MemoryMin"),
        "memory.swap.max" => bytes("MemorySwapMax"),
        "pids.max" => bytes("TasksMax"),
        _ => Vec::new(),
    }
}

/// A list of ranges such as `0-2,5` as bits, the lowest first. None for what is not one.
fn mask(list: &str) -> Option<Vec<u8>> {
    let mut bits = Vec::new();
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= NUMBERS_MAX {
            return None;
        }
        for number in first..=last {
            if bits.len() <= number / 8 {
                bits.resize(number / 8 + 1, 0);
            }
            bits[number / 8] |= 1 << (number % 8);
        }
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_limit_that_has_a_property_is_one() {
        let limits = Limits {
            cpu_shares: Some(1024),
            cpu_quota_us: Some(20_500),
            cpu_period_us: Some(100_000),
            cpuset_cpus: Some("0-2,9".into()),
            cpuset_mems: Some("0".into()),
            memory_limit_bytes: Some(1000),
            memory_swap_bytes: Some(1500),
            memory_reservation_bytes: Some(10),
            pids_max: Some(-1),
            hugepages: BTreeMap::from([("2MB".to_owned(), 0)]),
            unified: BTreeMap::new(),
        };
        let expected = [
            ("CPUWeight", Value::U64(100)),
            ("CPUQuotaPeriodUSec", Value::U64(100_000)),
            // 20.5 % cannot be said: 21 % is what holds at least as much.
            ("CPUQuotaPerSecUSec", Value::U64(210_000)),
            ("MemoryMax", Value::U64(1000)),
            ("MemorySwapMax", Value::U64(500)),
            ("MemoryLow", Value::U64(10)),
            ("TasksMax", Value::U64(INFINITY)),
            ("AllowedCPUs", Value::Bytes(vec![0b111, 0b10])),
            ("AllowedMemoryNodes", Value::Bytes(vec![1])),
        ];
        assert_eq!(of_limits(&limits), expected);
        assert_eq!(of_limits(&Limits::default()), []);
    }

    #[test]
    fn no_limit_is_infinity() {
        let limits = Limits {
            cpu_quota_us: Some(-1),
            memory_limit_bytes: Some(-1),
            memory_swap_bytes: Some(-1),
            ..Limits::default()
        };
        let values: Vec<Value> = of_limits(&limits).into_iter().map(|(_, value)| value).collect();
        assert_eq!(values[1..], [Value::U64(INFINITY), Value::U64(INFINITY), Value::U64(INFINITY)]);
    }

    #[test]
    fn a_file_of_version_2_wins_over_the_limit_and_one_without_a_property_is_left_to_the_files() {
        let files = [("memory.max", "max"), ("memory.high", "5"), ("cpu.max", "5000 10000"), ("io.max", "8:0 rbps=1")];
        let limits = Limits {
            memory_limit_bytes: Some(7),
            unified: files.into_iter().map(|(file, value)| (file.to_owned(), value.to_owned())).collect(),
            ..Limits::default()
        };
        let expected = [
            ("CPUQuotaPeriodUSec", Value::U64(10_000)),
            ("CPUQuotaPerSecUSec", Value::U64(500_000)),
            ("MemoryHigh", Value::U64(5)),
            ("MemoryMax", Value::U64(INFINITY)),
        ];
        assert_eq!(of_limits(&limits), expected);
    }

    #[test]
    fn senseless_lists_are_no_masks() {
        for list in ["x", "3-1", "0-99999999999", "1-"] {
            assert_eq!(mask(list), None, "{list}");
        }
    }
}
