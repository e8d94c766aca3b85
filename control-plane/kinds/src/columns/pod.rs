//! The columns of pods. STATUS is more than the phase: it names what holds the pod up.

use super::{AGE, NAME, age, column, name, or, time, wide};
use crate::access::{boolean, integer, list, text};
use crate::kind::Column;
use jiff::Timestamp;
use serde_json::Value;

pub(crate) const POD: &[Column] = &[
    NAME,
    column("Ready", "string", "Containers that are ready, of all containers."),
    column("Status", "string", "What the pod is doing, or what holds it up."),
    column("Restarts", "string", "How often containers were restarted, and when last."),
    AGE,
    wide("IP", "Address of the pod."),
    wide("Node", "Node that the pod runs on."),
    wide("Nominated Node", "Node that the pod is to run on after preemption."),
    wide("Readiness Gates", "Readiness gates that are true, of all gates."),
];

/// What the container statuses add up to.
struct Summary {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: Option<Timestamp>,
}

pub(crate) fn pod(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = summarise(pod);
    let restarts = match summary.last_restart {
        Some(last) if summary.restarts != 0 => {
            let ago = time::human_duration(now.as_millisecond() - last.as_millisecond());
            format!("{} ({ago} ago)", summary.restarts)
        }
        _ => summary.restarts.to_string(),
    };
    let address = or(text(pod, "/status/podIPs/0/ip"), text(pod, "/status/podIP"));
    vec![
        name(pod),
        Value::from(format!("{}/{}", summary.ready, summary.total)),
        Value::from(summary.reason),
        Value::from(restarts),
        age(pod, now),
        Value::from(or(address, "<none>")),
        Value::from(or(text(pod, "/spec/nodeName"), "<none>")),
        Value::from(or(text(pod, "/status/nominatedNodeName"), "<none>")),
        Value::from(readiness_gates(pod)),
    ]
}

fn readiness_gates(pod: &Value) -> String {
    let gates = list(pod, "/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let is_true = |gate: &&Value| condition(pod, text(gate, "/conditionType")) == Some("True");
    format!("{}/{}", gates.iter().filter(is_true).count(), gates.len())
}

fn condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a str> {
    let found = list(pod, "/status/conditions").iter().find(|condition| text(condition, "/type") == kind)?;
    Some(text(found, "/status"))
}

fn is_sidecar(pod: &Value, container: &str) -> bool {
    list(pod, "/spec/initContainers")
        .iter()
        .any(|spec| text(spec, "/name") == container && text(spec, "/restartPolicy") == "Always")
}

fn summarise(pod: &Value) -> Summary {
    let phase = text(pod, "/status/phase");
    let status_reason = text(pod, "/status/reason");
    let sidecars =
        list(pod, "/spec/initContainers").iter().filter(|spec| text(spec, "/restartPolicy") == "Always").count();
    let mut summary = Summary {
        reason: or(status_reason, phase).to_owned(),
        ready: 0,
        total: list(pod, "/spec/containers").len() + sidecars,
        restarts: 0,
        last_restart: None,
    };
    let gated = |condition: &&Value| {
        text(condition, "/type") == "PodScheduled" && text(condition, "/reason") == "SchedulingGated"
    };
    if list(pod, "/status/conditions").iter().any(|condition| gated(&condition)) {
        summary.reason = "SchedulingGated".to_owned();
    }
    let (sidecar_restarts, sidecar_last, initializing) = init_containers(pod, &mut summary);
    if !initializing || condition(pod, "Initialized") == Some("True") {
        summary.restarts = sidecar_restarts;
        summary.last_restart = sidecar_last;
        main_containers(pod, &mut summary);
    }
    if pod.pointer("/metadata/deletionTimestamp").is_some_and(|time| !time.is_null()) {
        if status_reason == "NodeLost" {
            summary.reason = "Unknown".to_owned();
        } else if !matches!(phase, "Succeeded" | "Failed") {
            summary.reason = "Terminating".to_owned();
        }
    }
    summary
}

fn last_restart(status: &Value) -> Option<Timestamp> {
    text(status, "/lastState/terminated/finishedAt").parse().ok()
}

/// Restarts of sidecars, when the last of them was, and whether initialisation goes on.
fn init_containers(pod: &Value, summary: &mut Summary) -> (i64, Option<Timestamp>, bool) {
    let (mut sidecar_restarts, mut sidecar_last) = (0, None);
    for (index, status) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
        let restarts = integer(status, "/restartCount").unwrap_or(0);
        summary.restarts += restarts;
        summary.last_restart = summary.last_restart.max(last_restart(status));
        let sidecar = is_sidecar(pod, text(status, "/name"));
        if sidecar {
            sidecar_restarts += restarts;
            sidecar_last = sidecar_last.max(last_restart(status));
        }
        let terminated = status.pointer("/state/terminated");
        if terminated.is_some_and(|state| integer(state, "/exitCode").unwrap_or(0) == 0) {
            continue;
        }
        if sidecar && boolean(status, "/started") == Some(true) {
            summary.ready += usize::from(boolean(status, "/ready") == Some(true));
            continue;
        }
        let waiting = text(status, "/state/waiting/reason");
        summary.reason = if let Some(state) = terminated {
            format!("Init:{}", terminated_reason(state))
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{index}/{}", list(pod, "/spec/initContainers").len())
        };
        return (sidecar_restarts, sidecar_last, true);
    }
    (sidecar_restarts, sidecar_last, false)
}

fn terminated_reason(state: &Value) -> String {
    let reason = text(state, "/reason");
    let signal = integer(state, "/signal").unwrap_or(0);
    if !reason.is_empty() {
        reason.to_owned()
    } else if signal != 0 {
        format!("Signal:{signal}")
    } else {
        format!("ExitCode:{}", integer(state, "/exitCode").unwrap_or(0))
    }
}

fn main_containers(pod: &Value, summary: &mut Summary) {
    let mut running = false;
    for status in list(pod, "/status/containerStatuses").iter().rev() {
        summary.restarts += integer(status, "/restartCount").unwrap_or(0);
        summary.last_restart = summary.last_restart.max(last_restart(status));
        let waiting = text(status, "/state/waiting/reason");
        if !waiting.is_empty() {
            summary.reason = waiting.to_owned();
        } else if let Some(state) = status.pointer("/state/terminated") {
            summary.reason = terminated_reason(state);
        } else if boolean(status, "/ready") == Some(true) && status.pointer("/state/running").is_some() {
            running = true;
            summary.ready += 1;
        }
    }
    if summary.reason == "Completed" && running {
        let ready = condition(pod, "Ready") == Some("True");
        summary.reason = if ready { "Running" } else { "NotReady" }.to_owned();
    }
}
