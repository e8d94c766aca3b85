//! What the runtime does for plugins: tells them its state, and carries out updates and evictions that they ask for.

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use oarlock_nri::{Host, api};
use tracing::Instrument;

use super::events::{described, pod_of};
use super::resources::{to_cri, to_further};
use crate::container;
use crate::core::Core;
use crate::error::Error;
use crate::record::{ContainerPhase, SandboxPhase};

/// Reaches the runtime for as long as there is one.
#[derive(Debug)]
pub(crate) struct Carrier {
    core: Weak<Core>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Core")
    }
}

impl Carrier {
    pub(crate) fn new(core: &Arc<Core>) -> Arc<Carrier> {
        Arc::new(Carrier { core: Arc::downgrade(core) })
    }
}

#[async_trait]
impl Host for Carrier {
    async fn state(&self) -> (Vec<api::PodSandbox>, Vec<api::Container>) {
        let Some(core) = self.core.upgrade() else { return (Vec::new(), Vec::new()) };
        let sandboxes = core.index.sandboxes().into_iter().map(|sandbox| sandbox.record());
        let shown = sandboxes.filter(|record| record.phase != SandboxPhase::Creating);
        let pods = shown.map(|record| pod_of(&core, &record)).collect();
        let mut containers = Vec::new();
        for known in core.index.containers() {
            let record = known.record();
            let lives =
                matches!(record.phase, ContainerPhase::Created | ContainerPhase::Starting | ContainerPhase::Running);
            if lives {
                containers.push(described(&core, &record).await);
            }
        }
        (pods, containers)
    }

    async fn update(&self, updates: Vec<api::ContainerUpdate>) -> Vec<api::ContainerUpdate> {
        let mut failed = Vec::new();
        for update in updates {
            let Some(core) = self.core.upgrade() else { return failed };
            let span = tracing::debug_span!("update by plugin", container.id = %update.container_id);
            if let Err(error) = carry_out(&core, &update).instrument(span).await
                && !update.ignore_failure
            {
                let error = error.full_message();
                tracing::warn!(container.id = %update.container_id, error, "update asked for by an NRI plugin failed");
                failed.push(update);
            }
        }
        failed
    }

    async fn evict(&self, evictions: Vec<api::ContainerEviction>) {
        for eviction in evictions {
            let Some(core) = self.core.upgrade() else { return };
            let Ok(container) = core.index.container(&eviction.container_id) else { continue };
            tracing::info!(container.id = %eviction.container_id, reason = %eviction.reason, "container is evicted by an NRI plugin");
            // Its end is told to the plugins, which are busy with whoever asked for it.
            tokio::spawn(async move {
                let id = container.id();
                if let Err(error) = container::stop(core, container, Duration::ZERO).await {
                    tracing::warn!(container.id = %id, error = %error.full_message(), "eviction by an NRI plugin failed");
                }
            });
        }
    }
}

async fn carry_out(core: &Arc<Core>, update: &api::ContainerUpdate) -> Result<(), Error> {
    let Some(resources) = update.linux.as_ref().and_then(|linux| linux.resources.as_ref()) else { return Ok(()) };
    let known = match core.index.container(&update.container_id) {
        Err(Error::NotFound { .. }) => return Ok(()),
        other => other?,
    };
    container::update(core, &known, &to_cri(resources), to_further(resources)?).await
}
