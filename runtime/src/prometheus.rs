//! The daemon's own metrics in Prometheus' text form: calls by method, code and time, under the names that gRPC servers
//! have upstream; what it holds; and what it costs as a process.
//!
//! They are read at `GET /metrics` of the CRI socket, which root alone can open: nothing listens on a network for them.
//! Metrics of pods and containers are a call of the interface and not here.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::time::Duration;

use parking_lot::Mutex;

use crate::core::Core;
use crate::state::now_nanos;

/// Upper bounds of the times that are told apart, in seconds.
const BOUNDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Methods come from clients; there are fewer in the interface.
const METHODS_MAX: usize = 128;

#[derive(Debug, Default)]
struct Method {
    started: u64,
    by_code: BTreeMap<u16, u64>,
    /// Calls at most as long as each bound; not added up.
    within: [u64; BOUNDS.len()],
    seconds: f64,
    finished: u64,
}

/// Calls so far, by the path of their method.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    methods: Mutex<BTreeMap<String, Method>>,
}

impl Calls {
    pub(crate) fn begin(&self, path: &str) {
        self.with(path, |method| method.started += 1);
    }

    pub(crate) fn end(&self, path: &str, code: u16, time: Duration) {
        let seconds = time.as_secs_f64();
        self.with(path, |method| {
            *method.by_code.entry(code).or_default() += 1;
            method.finished += 1;
            method.seconds += seconds;
            if let Some(at) = BOUNDS.iter().position(|bound| seconds <= *bound) {
                method.within[at] += 1;
            }
        });
    }

    fn with(&self, path: &str, change: impl FnOnce(&mut Method)) {
        let mut methods = self.methods.lock();
        if let Some(method) = methods.get_mut(path) {
            change(method);
        } else if methods.len() < METHODS_MAX {
            change(methods.entry(path.to_owned()).or_default());
        }
    }
}

/// All metrics as text. Reads `/proc`: not for the asynchronous threads.
pub(crate) fn text(core: &Core) -> String {
    let mut text = String::new();
    calls(&mut text, &core.calls);
    let sandboxes = core.index.sandboxes().len();
    let containers = core.index.containers();
    let running = containers.iter().filter(|one| one.phase() == crate::record::ContainerPhase::Running).count();
    gauge(&mut text, "oarlock_runtime_sandboxes", "Sandboxes on record.", sandboxes as f64);
    gauge(&mut text, "oarlock_runtime_containers", "Containers on record.", containers.len() as f64);
    gauge(&mut text, "oarlock_runtime_containers_running", "Containers that run.", running as f64);
    gauge(&mut text, "oarlock_runtime_plugins", "NRI plugins connected.", core.plugins.count() as f64);
    let spans = oarlock_telemetry::exported();
    counter(&mut text, "oarlock_runtime_spans_sent_total", "Spans that a collector took.", spans.sent);
    counter(&mut text, "oarlock_runtime_spans_dropped_total", "Spans that no collector took.", spans.dropped);
    gauge(&mut text, "oarlock_runtime_images", "Images in the store.", core.images.list().len() as f64);
    process(&mut text);
    text
}

fn calls(text: &mut String, calls: &Calls) {
    let methods = calls.methods.lock();
    let labels = |path: &str| {
        let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or((path, ""));
        format!("grpc_service=\"{}\",grpc_method=\"{}\"", escape(service), escape(method))
    };
    head(text, "grpc_server_started_total", "counter", "Calls that began.");
    for (path, method) in methods.iter() {
        let _ = writeln!(text, "grpc_server_started_total{{{}}} {}", labels(path), method.started);
    }
    head(text, "grpc_server_handled_total", "counter", "Calls that ended, by code.");
    for (path, method) in methods.iter() {
        for (code, count) in &method.by_code {
            let name = code_name(*code);
            let _ = writeln!(text, "grpc_server_handled_total{{{},grpc_code=\"{name}\"}} {count}", labels(path));
        }
    }
    let name = "grpc_server_handling_seconds";
    head(text, name, "histogram", "Time from a call's arrival to its answer, or to the start of a stream.");
    for (path, method) in methods.iter() {
        let labels = labels(path);
        let mut sum = 0;
        for (bound, count) in BOUNDS.iter().zip(&method.within) {
            sum += count;
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {sum}");
        }
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {}", method.finished);
        let _ = writeln!(text, "{name}_sum{{{labels}}} {}", method.seconds);
        let _ = writeln!(text, "{name}_count{{{labels}}} {}", method.finished);
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn counter(text: &mut String, name: &str, help: &str, value: u64) {
    head(text, name, "counter", help);
    let _ = writeln!(text, "{name} {value}");
}

fn gauge(text: &mut String, name: &str, help: &str, value: f64) {
    head(text, name, "gauge", help);
    let _ = writeln!(text, "{name} {value}");
}

/// What the kernel counts processor time in, on every machine Linux runs on today.
const TICKS_A_SECOND: f64 = 100.0;

fn size_of_page() -> f64 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    size.ok().flatten().map_or(4096.0, |bytes| bytes as f64)
}

fn process(text: &mut String) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name may hold anything; what follows its bracket is numbers.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|value| value.parse::<f64>().ok()).unwrap_or(0.0);
    let page = size_of_page();
    head(text, "process_cpu_seconds_total", "counter", "CPU time spent.");
    let _ = writeln!(text, "process_cpu_seconds_total {}", (field(14) + field(15)) / TICKS_A_SECOND);
    gauge(text, "process_resident_memory_bytes", "Memory mapped and present.", field(24) * page);
    gauge(text, "process_virtual_memory_bytes", "Memory mapped.", field(23));
    let open = fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or(0);
    gauge(text, "process_open_fds", "Open file descriptors.", open as f64);
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let up: f64 = uptime.split_ascii_whitespace().next().and_then(|value| value.parse().ok()).unwrap_or(0.0);
    let started = now_nanos() as f64 / 1e9 - up + field(22) / TICKS_A_SECOND;
    gauge(text, "process_start_time_seconds", "When it started, in seconds since the epoch.", started.round());
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn code_name(code: u16) -> &'static str {
    match code {
        0 => "OK",
        1 => "Canceled",
        2 => "Unknown",
        3 => "InvalidArgument",
        4 => "DeadlineExceeded",
        5 => "NotFound",
        6 => "AlreadyExists",
        7 => "PermissionDenied",
        8 => "ResourceExhausted",
        9 => "FailedPrecondition",
        10 => "Aborted",
        11 => "OutOfRange",
        12 => "Unimplemented",
        13 => "Internal",
        14 => "Unavailable",
        15 => "DataLoss",
        16 => "Unauthenticated",
        _ => "Unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_method_and_code_and_their_times_add_up() {
        let seen = Calls::default();
        for (code, milliseconds) in [(0, 3), (0, 30), (5, 20_000)] {
            seen.begin("/runtime.v1.RuntimeService/Version");
            seen.end("/runtime.v1.RuntimeService/Version", code, Duration::from_millis(milliseconds));
        }
        let mut text = String::new();
        calls(&mut text, &seen);
        let labels = "grpc_service=\"runtime.v1.RuntimeService\",grpc_method=\"Version\"";
        for line in [
            format!("grpc_server_started_total{{{labels}}} 3"),
            format!("grpc_server_handled_total{{{labels},grpc_code=\"OK\"}} 2"),
            format!("grpc_server_handled_total{{{labels},grpc_code=\"NotFound\"}} 1"),
            format!("grpc_server_handling_seconds_bucket{{{labels},le=\"0.0025\"}} 0"),
            format!("grpc_server_handling_seconds_bucket{{{labels},le=\"0.005\"}} 1"),
            format!("grpc_server_handling_seconds_bucket{{{labels},le=\"10\"}} 2"),
            format!("grpc_server_handling_seconds_bucket{{{labels},le=\"+Inf\"}} 3"),
            format!("grpc_server_handling_seconds_count{{{labels}}} 3"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn what_clients_make_up_does_not_fill_the_memory() {
        let seen = Calls::default();
        for number in 0..10_000 {
            seen.begin(&format!("/x/{number}"));
        }
        assert_eq!(seen.methods.lock().len(), METHODS_MAX);
    }
}
