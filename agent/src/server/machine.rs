//! What the node itself uses, read from /proc: processor time, network, process ids, start. Reading blocks for a moment only.

use std::time::Instant;

use parking_lot::Mutex;
use serde_json::{Value, json};

/// Ticks of /proc/stat: a hundredth of a second on every Linux architecture.
const NANOS_PER_TICK: u64 = 10_000_000;

/// Nanoseconds that all processors together have worked, and since when (in seconds of the epoch) the machine runs.
pub(super) fn processor() -> (Option<u64>, Option<i64>) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    (busy_nanos(&text), boot_second(&text))
}

fn busy_nanos(stat: &str) -> Option<u64> {
    let mut fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    // user, nice, system, idle, iowait, irq, softirq, steal: all but the two in which nothing is done.
    let values: Vec<u64> = fields.by_ref().take(8).map(|field| field.parse().unwrap_or(0)).collect();
    let busy: u64 =
        values.iter().enumerate().filter(|(place, _)| !matches!(place, 3 | 4)).map(|(_, value)| value).sum();
    (values.len() == 8).then_some(busy * NANOS_PER_TICK)
}

fn boot_second(stat: &str) -> Option<i64> {
    stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
}

/// Bytes of swap in use; None where that cannot be read.
pub(super) fn swap_used_bytes() -> Option<u64> {
    swap_used(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn swap_used(meminfo: &str) -> Option<u64> {
    let of = |name: &str| {
        let kib = meminfo.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
        kib.parse::<u64>().ok()
    };
    Some(of("SwapTotal:")?.saturating_sub(of("SwapFree:")?) * 1024)
}

/// Turns a growing count into a rate, from one look to the next.
#[derive(Default)]
pub(super) struct Rate {
    last: Mutex<Option<(Instant, u64)>>,
}

impl Rate {
    /// Units a second since the last look that is at least a second old; None at the first.
    pub(super) fn look(&self, now: Instant, count: u64) -> Option<u64> {
        let mut last = self.last.lock();
        let (then, before) = *last.get_or_insert((now, count));
        let seconds = now.duration_since(then).as_secs_f64();
        if seconds < 1.0 {
            return None;
        }
        *last = Some((now, count));
        Some((count.saturating_sub(before) as f64 / seconds) as u64)
    }
}

/// Bytes and errors of each interface, that of the default route first in `name`.
pub(super) fn network(time: &str) -> Option<Value> {
    let devices = std::fs::read_to_string("/proc/net/dev").ok()?;
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    network_of(&devices, &routes, time)
}

fn network_of(devices: &str, routes: &str, time: &str) -> Option<Value> {
    let default = routes.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let (name, destination) = (fields.next()?, fields.next()?);
        (destination == "00000000").then_some(name)
    });
    let mut interfaces = Vec::new();
    for line in devices.lines().skip(2) {
        let Some((name, counts)) = line.split_once(':') else { continue };
        let counts: Vec<u64> = counts.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        if counts.len() < 11 || name.trim() == "lo" {
            continue;
        }
        interfaces
            .push(json!({ "name": name.trim(), "rxBytes": counts[0], "rxErrors": counts[2], "txBytes": counts[8],
            "txErrors": counts[10] }));
    }
    let main = interfaces.iter().find(|one| one["name"].as_str() == default)?.clone();
    let mut network = main;
    network["time"] = time.into();
    network["interfaces"] = interfaces.into();
    Some(network)
}

/// How many processes there can be and are.
pub(super) fn processes(time: &str) -> Option<Value> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<i64>().ok();
    let most = [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")];
    let load = std::fs::read_to_string("/proc/loadavg").ok()?;
    let now: i64 = load.split_whitespace().nth(3)?.split('/').nth(1)?.parse().ok()?;
    Some(json!({ "time": time, "maxpid": most.into_iter().flatten().min()?, "curproc": now }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn swap_in_use_is_what_is_not_free() {
        assert_eq!(swap_used("MemTotal: 9 kB\nSwapTotal:  100 kB\nSwapFree:    60 kB\n"), Some(40 * 1024));
        assert_eq!(swap_used("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn the_interface_of_the_default_route_stands_for_the_node() {
        let devices = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 100 1 2 0 0 0 0 0 200 1 3 0 0 0 0 0\n veth1: 7 1 0 0 0 0 0 0 8 1 0 0 0 0 0 0\n";
        let routes = "Iface\tDestination\tGateway\neth0\t0000000A\t0\neth0\t00000000\t010000C0\n";
        let network = network_of(devices, routes, "t").expect("a network");
        assert_eq!(
            (&network["name"], &network["txBytes"], &network["txErrors"]),
            (&json!("eth0"), &json!(200), &json!(3))
        );
        assert_eq!(network["interfaces"].as_array().map(Vec::len), Some(2));
        assert_eq!(network_of(devices, "Iface\n", "t"), None);
    }

    #[test]
    fn idle_time_is_not_work() {
        let stat = "cpu  10 1 20 5000 300 2 3 4 0 0\ncpu0 1 1 1 1\nbtime 1700000000\n";
        assert_eq!(busy_nanos(stat), Some(40 * NANOS_PER_TICK));
        assert_eq!(boot_second(stat), Some(1_700_000_000));
    }

    #[test]
    fn a_rate_needs_two_looks_a_second_apart() {
        let (rate, start) = (Rate::default(), Instant::now());
        assert_eq!(rate.look(start, 100), None);
        assert_eq!(rate.look(start + Duration::from_millis(500), 200), None);
        assert_eq!(rate.look(start + Duration::from_secs(2), 500), Some(200));
    }
}
