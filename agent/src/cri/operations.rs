//! How often each call of the runtime was made, how often in vain, and how long it took.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use parking_lot::Mutex;

use crate::metrics::Histogram;

/// From five milliseconds to twelve minutes, each two and a half times the one before.
const BOUNDS_SECONDS: [f64; 14] = [
    0.005,
    0.0125,
    0.03125,
    0.078125,
    0.1953125,
    0.48828125,
    1.220703125,
    3.0517578125,
    7.62939453125,
    19.073486328125,
    47.6837158203125,
    119.20928955078125,
    298.0232238769531,
    745.0580596923828,
];

/// The calls that were made, by name.
#[derive(Default)]
pub(super) struct Operations {
    known: Mutex<BTreeMap<&'static str, Operation>>,
}

struct Operation {
    took: Histogram,
    errors: u64,
}

impl Operations {
    /// Counts a call that has ended.
    pub(super) fn ended(&self, call: &'static str, took: Duration, well: bool) {
        let mut known = self.known.lock();
        let new = || Operation { took: Histogram::new(&BOUNDS_SECONDS), errors: 0 };
        let operation = known.entry(call).or_insert_with(new);
        operation.took.observe(took.as_secs_f64());
        operation.errors += u64::from(!well);
    }

    /// Prometheus text.
    pub(super) fn metrics(&self) -> String {
        let known = self.known.lock();
        let mut text = String::new();
        let label = |call: &str| format!("operation_type=\"{}\"", operation_type(call));
        let name = "kubelet_runtime_operations_total";
        let _ = writeln!(text, "# HELP {name} Calls of the container runtime by type.\n# TYPE {name} counter");
        for (call, operation) in known.iter() {
            let _ = writeln!(text, "{name}{{{}}} {}", label(call), operation.took.count());
        }
        let name = "kubelet_runtime_operations_errors_total";
        let _ = writeln!(text, "# HELP {name} Calls of the container runtime that failed.\n# TYPE {name} counter");
        for (call, operation) in known.iter().filter(|(_, operation)| operation.errors > 0) {
            let _ = writeln!(text, "{name}{{{}}} {}", label(call), operation.errors);
        }
        let name = "kubelet_runtime_operations_duration_seconds";
        let _ = writeln!(text, "# HELP {name} Seconds that calls of the runtime took.\n# TYPE {name} histogram");
        for (call, operation) in known.iter() {
            operation.took.write(&mut text, name, &label(call));
        }
        text
    }
}

/// A call's name as the kubelet's metrics have it.
fn operation_type(call: &str) -> String {
    let mut name = String::new();
    for letter in call.chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    match name.as_str() {
        "update_container_resources" => "update_container".to_owned(),
        _ => name.replace("pod_sandbox", "podsandbox"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_under_the_kubelets_names() {
        for (call, name) in [
            ("Version", "version"),
            ("RunPodSandbox", "run_podsandbox"),
            ("ListPodSandboxStats", "list_podsandbox_stats"),
            ("UpdateContainerResources", "update_container"),
            ("ExecSync", "exec_sync"),
            ("ImageFsInfo", "image_fs_info"),
        ] {
            assert_eq!(operation_type(call), name);
        }
    }

    #[test]
    fn failures_are_counted_among_the_calls_and_by_themselves() {
        let operations = Operations::default();
        operations.ended("ExecSync", Duration::from_millis(1), true);
        operations.ended("ExecSync", Duration::from_secs(2), false);
        operations.ended("Status", Duration::ZERO, true);
        let text = operations.metrics();
        for line in [
            "kubelet_runtime_operations_total{operation_type=\"exec_sync\"} 2",
            "kubelet_runtime_operations_total{operation_type=\"status\"} 1",
            "kubelet_runtime_operations_errors_total{operation_type=\"exec_sync\"} 1",
            "kubelet_runtime_operations_duration_seconds_bucket{operation_type=\"exec_sync\",le=\"0.005\"} 1",
            "kubelet_runtime_operations_duration_seconds_count{operation_type=\"exec_sync\"} 2",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("errors_total{operation_type=\"status\"}"), "{text}");
    }
}
