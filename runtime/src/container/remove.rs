//! Removes containers. Every step is tried; what is gone already is as good.

use std::sync::Arc;
use std::time::Duration;

use oarlock_failpoint::step;
use oarlock_proto::cri;

use super::stop::{delete_in_engine, stop};
use super::volumes::image_key;
use crate::core::Core;
use crate::error::Error;
use crate::groups;
use crate::mounts;
use crate::nri;
use crate::record::{ContainerPhase, ContainerRecord, Kind};
use crate::state::{Container, blocking};
use crate::view;

/// Removes a container, killing it first if it runs.
pub(crate) async fn remove(core: Arc<Core>, container: Arc<Container>) -> Result<(), Error> {
    stop(core.clone(), container.clone(), Duration::ZERO).await?;
    nri::container_removed(&core, &container).await;
    let _alone = container.operation.lock().await;
    let id = container.id();
    if core.index.container(&id).is_err() {
        return Ok(());
    }
    let record = container.change(&core.records, |record| record.phase = ContainerPhase::Removing).await?;
    take_away(&core, &container, &record).await?;
    view::publish_container(&core, &container, cri::ContainerEventType::ContainerDeletedEvent);
    core.index.remove_container(&id);
    tracing::info!(container.id = %id, "container removed");
    Ok(())
}

/// Takes away a container that was never finished. A failure leaves the record, so that the next start tries again.
pub(crate) async fn undo(core: &Arc<Core>, container: &Arc<Container>) {
    let record = container.record();
    if let Err(error) = take_away(core, container, &record).await {
        tracing::error!(container.id = %record.id, error = %error.full_message(), "container could not be undone; the next start tries again");
    }
    core.index.remove_container(&record.id);
}

async fn take_away(core: &Arc<Core>, container: &Container, record: &ContainerRecord) -> Result<(), Error> {
    let id = record.id.clone();
    let mut failures: Vec<String> =
        delete_in_engine(core, container).await.err().map(|error| error.full_message()).into_iter().collect();
    step("the engine has forgotten the container");
    let (group, bundle, volumes) =
        (record.cgroup.clone(), core.paths.bundle(&id).root, core.paths.container_volumes(&id));
    let local = blocking("removing a container", move || {
        let steps = [groups::remove(&group), mounts::remove_own_tree(&bundle), mounts::remove_tree(&volumes)];
        Ok(steps.into_iter().filter_map(Result::err).map(|error| error.full_message()).collect::<Vec<_>>())
    });
    failures.extend(local.await?);
    step("the container's bundle is gone");
    let images = record.config.mounts.iter().enumerate().filter(|(_, mount)| mount.image.is_some());
    let keys = images.map(|(index, _)| image_key(&id, index)).chain([id.clone()]);
    for key in keys {
        failures.extend(core.images.release_rootfs(&key).await.err().map(|error| Error::from(error).full_message()));
        step("the container's layer is gone");
    }
    if !failures.is_empty() {
        return Err(Error::Teardown { operation: format!("remove container {id}"), failures });
    }
    let records = core.records.clone();
    blocking("a record", move || Ok(records.remove(Kind::Container, &id)?)).await
}
