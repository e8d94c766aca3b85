//! What a running pod's worker keeps going beside its containers: probes, and the contents of volumes.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use oarlock_probes::Target;

use super::{Ended, Worker};
use crate::model::RunState;
use crate::{plan, spec};

/// How often a running pod's volumes are brought up to date when nothing tells of a change.
const REFRESH: Duration = Duration::from_secs(60);

/// A time until the next refresh, so that those of many pods do not fall together.
pub(super) fn jittered() -> Duration {
    REFRESH.mul_f64(0.8 + 0.4 * rand::random::<f64>())
}

impl Worker {
    /// Notes how long a pod took that runs now for the first time.
    pub(super) fn note_start(&self, next: &PodStatus, now: Timestamp) {
        let before = self.report.current().phase.as_deref();
        let starts = matches!(before, None | Some("" | "Pending")) && next.phase.as_deref() == Some("Running");
        if let Some(since) = self.state.started_at.filter(|_| starts) {
            let took = now.duration_since(since).as_secs_f64().max(0.0);
            self.shared.pod_starts.lock().observe(took);
        }
    }

    /// Starts the probes of containers that have started, with what the API last knew of those taken over.
    pub(super) fn run_probes(&mut self) {
        let Some(observed) = &self.state.observed else { return };
        self.probing.retain(|id| {
            let running = observed.containers.iter().find(|c| c.id == *id).filter(|c| c.state == RunState::Running);
            running.is_some()
        });
        let Some(spec) = self.pod.spec.as_ref().filter(|_| self.state.end.is_none()) else { return };
        for record in observed.containers.iter().filter(|c| c.state == RunState::Running) {
            if self.probing.contains(&record.id) || self.state.starting(&record.name) {
                continue;
            }
            let Some((container, _)) = spec::find_container(spec, &record.name) else { continue };
            let probed = container.startup_probe.is_some()
                || container.readiness_probe.is_some()
                || container.liveness_probe.is_some();
            let host_network = spec.host_network.unwrap_or(false);
            let sandbox_ip = observed.current_sandbox().and_then(|sandbox| sandbox.ips.first());
            let ip =
                if host_network { Some(self.shared.config.node_ip) } else { sandbox_ip.and_then(|ip| ip.parse().ok()) };
            let (true, Some(pod_ip)) = (probed, ip) else { continue };
            let initial = self.report.outcomes_before(&record.name, &record.id, &self.shared.id_scheme.load());
            let carried = self.saved.probes.get(record.id.as_str()).copied().unwrap_or(initial);
            self.state.probes.entry(record.id.clone()).or_insert(plan::ProbeView {
                startup: carried.startup,
                readiness: carried.readiness,
                liveness: None,
            });
            self.shared.probes.start(Target {
                pod_uid: self.uid.to_string(),
                pod_ip,
                container,
                container_id: record.id.to_string(),
                started_at: record.started_at.unwrap_or(record.created_at),
                initial: carried,
            });
            self.probing.insert(record.id.clone());
        }
    }

    /// Brings the volumes up to date, in the background.
    pub(super) fn refresh(&mut self) {
        let now = tokio::time::Instant::now();
        if now >= self.refresh_at {
            self.refresh_at = now + jittered();
            self.refresh_wanted = true;
        }
        if !self.refresh_wanted || self.refreshing || !self.state.volumes_ready || self.state.end.is_some() {
            return;
        }
        self.refreshing = true;
        self.refresh_wanted = false;
        let (shared, pod) = (self.shared.clone(), self.pod.clone());
        let ip = self.report.current().pod_ip.clone();
        self.tasks.spawn(async move {
            let facts = shared.pod_facts(ip.as_deref());
            match tokio::time::timeout(Duration::from_secs(60), shared.volumes.refresh(&pod, &facts)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(
                    pod.namespace = spec::pod_namespace(&pod),
                    pod.name = spec::pod_name(&pod),
                    error = error.full_message(),
                    "volumes were not brought up to date"
                ),
                Err(_) => tracing::debug!(pod.name = spec::pod_name(&pod), "bringing volumes up to date timed out"),
            }
            Ended::Refreshed
        });
    }
}
