//! Where the time of a call goes: the spans that the runtime logs when it is asked to, step by step.

use std::collections::BTreeMap;

use crate::table::Row;

/// What the runtime has to be told for it to log its spans.
pub(crate) const LOG_FILTER: &str = "info,oarlock_runtime=debug";

/// The time of each span in a log of the runtime, by call and step: `RunPodSandbox > network`.
pub(crate) fn read(log: &str) -> Vec<Row> {
    let mut rows: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, time) in log.lines().filter_map(line) {
        rows.entry(name).or_default().push(time);
    }
    rows.into_iter().map(|(name, samples)| Row { name, samples }).collect()
}

/// `<time> DEBUG rpc{method=/runtime.v1.RuntimeService/StopPodSandbox}:end shim: oarlock_…: close time.busy=26µs time.idle=1ms`
fn line(line: &str) -> Option<(String, f64)> {
    let (head, times) = line.split_once(" close time.busy=")?;
    let (_, chain) = head.split_once("DEBUG ")?;
    let (chain, _) = chain.rsplit_once(": oarlock_")?;
    let (busy, idle) = times.split_once(" time.idle=")?;
    // Only spans below a call; the name of its service adds nothing.
    let (call, steps) = chain.strip_prefix("rpc{method=")?.split_once('}')?;
    let call = call.trim_matches('"').rsplit('/').next()?;
    let name = format!("{call}{}", steps.replace(':', " > "));
    Some((name, milliseconds(busy)? + milliseconds(idle)?))
}

fn milliseconds(text: &str) -> Option<f64> {
    let text = text.trim();
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit);
    let factor = match unit {
        "ns" => 1e-6,
        "µs" => 1e-3,
        "ms" => 1.0,
        "s" => 1000.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_found_below_their_call() {
        let log = "\
2026-01-01T00:00:00.1Z DEBUG rpc{method=/runtime.v1.RuntimeService/StopPodSandbox}:end shim: oarlock_runtime::sandbox::stop: close time.busy=26.0µs time.idle=1.5ms
2026-01-01T00:00:00.2Z DEBUG rpc{method=/runtime.v1.RuntimeService/StopPodSandbox}: oarlock_runtime::serve: close time.busy=892ns time.idle=2s
2026-01-01T00:00:00.2Z DEBUG Connection{peer=Server}: h2::proto::connection: close time.busy=1ms time.idle=2s
2026-01-01T00:00:00.3Z INFO oarlock_runtime: nothing to close
";
        let rows = read(log);
        let found: Vec<(&str, f64)> = rows.iter().map(|row| (row.name.as_str(), row.samples[0])).collect();
        assert_eq!(found, [("StopPodSandbox", 2_000.000_892), ("StopPodSandbox > end shim", 1.526)]);
    }
}
