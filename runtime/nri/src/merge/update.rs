//! Updates of containers that exist, asked for in answer to any request.

use crate::api::{ContainerEviction, ContainerUpdate, LinuxContainerUpdate, LinuxResources, UpdateContainerRequest};
use crate::error::Error;
use crate::owners::Owners;

use super::resources;

/// Updates of several containers, one each, in the order in which they were first asked for.
#[derive(Debug, Default)]
pub(crate) struct Updates {
    updates: Vec<ContainerUpdate>,
}

impl Updates {
    pub(crate) fn into_inner(self) -> Vec<ContainerUpdate> {
        self.updates
    }

    pub(crate) fn list(&self) -> &[ContainerUpdate] {
        &self.updates
    }

    /// Adds what one plugin asks for. What is in conflict but may fail is left out.
    pub(crate) fn add(&mut self, owners: &mut Owners, wanted: Vec<ContainerUpdate>, plugin: &str) -> Result<(), Error> {
        for update in wanted {
            let Some(resources) = update.linux.as_ref().and_then(|linux| linux.resources.as_ref()) else { continue };
            match resources::claim(owners, &update.container_id, resources, plugin) {
                Err(_) if update.ignore_failure => continue,
                other => other?,
            }
            let known = self.updates.iter_mut().find(|known| known.container_id == update.container_id);
            match known {
                Some(known) => {
                    known.ignore_failure &= update.ignore_failure;
                    let linux = known.linux.get_or_insert_default();
                    resources::lay_over(linux.resources.get_or_insert_default(), resources);
                }
                None => self.updates.push(update),
            }
        }
        Ok(())
    }
}

/// A request to update one container on its way round the plugins.
#[derive(Debug)]
pub(crate) struct Update {
    /// What the next plugin is asked.
    pub(crate) request: UpdateContainerRequest,
    pub(crate) others: Updates,
    pub(crate) evictions: Vec<ContainerEviction>,
    own: Updates,
    owners: Owners,
}

impl Update {
    pub(crate) fn new(request: UpdateContainerRequest) -> Update {
        Update {
            request,
            others: Updates::default(),
            evictions: Vec::new(),
            own: Updates::default(),
            owners: Owners::default(),
        }
    }

    /// Adds one plugin's answer.
    pub(crate) fn add(
        &mut self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
        plugin: &str,
    ) -> Result<(), Error> {
        let id = self.request.container.as_ref().map(|container| container.id.clone()).unwrap_or_default();
        let (own, others): (Vec<_>, Vec<_>) = updates.into_iter().partition(|update| update.container_id == id);
        self.own.add(&mut self.owners, own, plugin)?;
        if let Some(changed) = self.changed() {
            resources::lay_over(self.request.linux_resources.get_or_insert_default(), &changed);
        }
        self.others.add(&mut self.owners, others, plugin)?;
        self.evictions.extend(evictions);
        Ok(())
    }

    /// What plugins changed of the update that was asked for; None where they left it alone.
    pub(crate) fn changed(&self) -> Option<LinuxResources> {
        self.own.list().first()?.linux.clone()?.resources
    }
}

/// An update of one container, for tests and for the runtime's own.
impl ContainerUpdate {
    /// An update of `container` to `resources`.
    pub fn of(container: impl Into<String>, resources: LinuxResources) -> ContainerUpdate {
        ContainerUpdate {
            container_id: container.into(),
            linux: Some(LinuxContainerUpdate { resources: Some(resources) }),
            ignore_failure: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Container, LinuxCpu, LinuxMemory, OptionalInt64, OptionalUInt64};

    fn shares(value: u64) -> LinuxResources {
        let cpu = LinuxCpu { shares: Some(OptionalUInt64 { value }), ..LinuxCpu::default() };
        LinuxResources { cpu: Some(cpu), ..LinuxResources::default() }
    }

    fn memory(value: i64) -> LinuxResources {
        let memory = LinuxMemory { limit: Some(OptionalInt64 { value }), ..LinuxMemory::default() };
        LinuxResources { memory: Some(memory), ..LinuxResources::default() }
    }

    fn asked() -> Update {
        let container = Container { id: "c".into(), ..Container::default() };
        Update::new(UpdateContainerRequest {
            container: Some(container),
            linux_resources: Some(shares(2)),
            ..UpdateContainerRequest::default()
        })
    }

    #[test]
    fn two_plugins_updates_of_one_container_become_one_and_the_next_plugin_sees_them() {
        let mut update = asked();
        assert_eq!(update.changed(), None);
        update
            .add(vec![ContainerUpdate::of("c", shares(10)), ContainerUpdate::of("d", shares(4))], vec![], "00-a")
            .unwrap();
        update
            .add(vec![ContainerUpdate::of("c", memory(7)), ContainerUpdate::of("d", memory(8))], vec![], "10-b")
            .unwrap();
        let changed = update.changed().unwrap();
        assert_eq!((changed.cpu, changed.memory), (shares(10).cpu, memory(7).memory));
        assert_eq!(update.request.linux_resources.as_ref().unwrap().cpu, shares(10).cpu);
        assert_eq!(update.others.into_inner().len(), 1);
    }

    #[test]
    fn a_conflict_refuses_the_request_unless_the_update_may_fail() {
        let mut update = asked();
        update.add(vec![ContainerUpdate::of("d", shares(4))], vec![], "00-a").unwrap();
        assert!(update.add(vec![ContainerUpdate::of("d", shares(5))], vec![], "10-b").is_err());
        let may_fail = ContainerUpdate { ignore_failure: true, ..ContainerUpdate::of("d", shares(5)) };
        update.add(vec![may_fail], vec![], "10-b").unwrap();
        assert_eq!(update.others.into_inner()[0], ContainerUpdate::of("d", shares(4)));
    }
}
