//! Adjustments of a container that is being made.

use std::collections::BTreeMap;

use crate::api::{
    Container, ContainerAdjustment, ContainerEviction, CreateContainerRequest, CreateContainerResponse, Field, Hooks,
    KeyValue, LinuxContainer, LinuxContainerAdjustment, LinuxRdt, PluginInstance, ValidateContainerAdjustmentRequest,
};
use crate::error::Error;
use crate::owners::Owners;

use super::update::Updates;
use super::{mark, marked_for_removal, resources};

/// A request to make a container on its way round the plugins.
#[derive(Debug)]
pub(crate) struct Creation {
    /// What the next plugin is asked: the container as it is by now.
    pub(crate) request: CreateContainerRequest,
    pub(crate) adjust: ContainerAdjustment,
    pub(crate) updates: Updates,
    pub(crate) evictions: Vec<ContainerEviction>,
    owners: Owners,
    id: String,
}

impl Creation {
    pub(crate) fn new(mut request: CreateContainerRequest) -> Creation {
        let id = request.container.get_or_insert_default().id.clone();
        Creation {
            request,
            adjust: ContainerAdjustment::default(),
            updates: Updates::default(),
            evictions: Vec::new(),
            owners: Owners::default(),
            id,
        }
    }

    /// Adds one plugin's answer.
    pub(crate) fn add(&mut self, answer: CreateContainerResponse, plugin: &str) -> Result<(), Error> {
        if let Some(adjust) = answer.adjust {
            self.adjust(adjust, plugin)?;
        }
        if let Some(update) = answer.update.iter().find(|update| update.container_id == self.id) {
            let problem = format!("asked update of {:?} during creation", update.container_id);
            return Err(Error::Answer { plugin: plugin.to_owned(), problem });
        }
        self.updates.add(&mut self.owners, answer.update, plugin)?;
        self.evictions.extend(answer.evict);
        Ok(())
    }

    /// What validators are asked, who are shown the container as it was before.
    pub(crate) fn validation(
        &self,
        pristine: Container,
        plugins: Vec<PluginInstance>,
    ) -> ValidateContainerAdjustmentRequest {
        ValidateContainerAdjustmentRequest {
            pod: self.request.pod.clone(),
            container: Some(pristine),
            adjust: Some(self.adjust.clone()),
            update: self.updates.list().to_vec(),
            owners: Some(self.owners.record()),
            plugins,
        }
    }

    fn adjust(&mut self, wanted: ContainerAdjustment, plugin: &str) -> Result<(), Error> {
        let mut claims = Claims { owners: &mut self.owners, id: &self.id, plugin };
        let container = self.request.container.get_or_insert_default();
        let total = &mut self.adjust;
        claims.map(Field::Annotations, wanted.annotations, &mut container.annotations, &mut total.annotations)?;
        claims
            .list(Field::Mounts, wanted.mounts, &mut container.mounts, &mut total.mounts, |mount| &mount.destination)?;
        claims.env(wanted.env, &mut container.env, &mut total.env)?;
        claims.args(wanted.args, container, total)?;
        if let Some(hooks) = wanted.hooks {
            claims.hooks(hooks, container.hooks.get_or_insert_default(), total.hooks.get_or_insert_default());
        }
        for limit in wanted.rlimits {
            claims.entry(Field::Rlimits, &limit.r#type)?;
            container.rlimits.push(limit.clone());
            total.rlimits.push(limit);
        }
        // References that only the runtime can resolve: they can be added, not taken away.
        for device in wanted.cdi_devices {
            claims.entry(Field::CdiDevices, &device.name)?;
            total.cdi_devices.push(device);
        }
        match wanted.linux {
            Some(linux) => {
                claims.linux(linux, container.linux.get_or_insert_default(), total.linux.get_or_insert_default())
            }
            None => Ok(()),
        }
    }
}

/// One plugin's claims on the container that is being made.
struct Claims<'a> {
    owners: &'a mut Owners,
    id: &'a str,
    plugin: &'a str,
}

impl Claims<'_> {
    fn field(&mut self, field: Field) -> Result<(), Error> {
        self.owners.claim(self.id, field, self.plugin)
    }

    fn entry(&mut self, field: Field, entry: &str) -> Result<(), Error> {
        self.owners.claim_entry(self.id, field, entry, self.plugin)
    }

    fn cleared(&mut self, field: Field, entry: &str) {
        self.owners.clear_entry(self.id, field, entry, self.plugin);
    }

    /// Entries by key. What is removed and set anew is in the total once with its mark and once without.
    fn map<T: Clone + Default>(
        &mut self,
        field: Field,
        wanted: BTreeMap<String, T>,
        container: &mut BTreeMap<String, T>,
        total: &mut BTreeMap<String, T>,
    ) -> Result<(), Error> {
        for key in wanted.keys().filter_map(|key| marked_for_removal(key)) {
            self.cleared(field, key);
            container.remove(key);
            total.remove(key);
            total.insert(mark(key), T::default());
        }
        for (key, value) in wanted.into_iter().filter(|(key, _)| marked_for_removal(key).is_none()) {
            self.entry(field, &key)?;
            container.insert(key.clone(), value.clone());
            total.insert(key, value);
        }
        Ok(())
    }

    /// Entries in a list, by a key of theirs. What is set replaces what the container has under the key.
    fn list<T: Clone>(
        &mut self,
        field: Field,
        wanted: Vec<T>,
        container: &mut Vec<T>,
        total: &mut Vec<T>,
        key: impl Fn(&T) -> &String,
    ) -> Result<(), Error> {
        let (removed, set): (Vec<T>, Vec<T>) =
            wanted.into_iter().partition(|item| marked_for_removal(key(item)).is_some());
        for item in removed {
            let Some(gone) = marked_for_removal(key(&item)) else { continue };
            if total.iter().any(|known| key(known) == gone) {
                self.cleared(field, gone);
            }
            container.retain(|known| key(known) != gone);
            total.retain(|known| key(known) != gone);
            if !set.iter().any(|new| key(new) == gone) {
                total.push(item);
            }
        }
        for item in set {
            self.entry(field, key(&item))?;
            container.retain(|known| key(known) != key(&item));
            container.push(item.clone());
            total.push(item);
        }
        Ok(())
    }

    fn env(
        &mut self,
        wanted: Vec<KeyValue>,
        container: &mut Vec<String>,
        total: &mut Vec<KeyValue>,
    ) -> Result<(), Error> {
        let mut variables: Vec<KeyValue> = container
            .iter()
            .map(|variable| {
                let (key, value) = variable.split_once('=').unwrap_or((variable, ""));
                KeyValue { key: key.to_owned(), value: value.to_owned() }
            })
            .collect();
        self.list(Field::Env, wanted, &mut variables, total, |variable| &variable.key)?;
        *container = variables.into_iter().map(|KeyValue { key, value }| format!("{key}={value}")).collect();
        Ok(())
    }

    /// An empty first word says that the plugin knows that it overrides another.
    fn args(
        &mut self,
        mut wanted: Vec<String>,
        container: &mut Container,
        total: &mut ContainerAdjustment,
    ) -> Result<(), Error> {
        if wanted.is_empty() {
            return Ok(());
        }
        if wanted[0].is_empty() {
            self.owners.clear(self.id, Field::Args, self.plugin);
            wanted.remove(0);
        }
        self.field(Field::Args)?;
        container.args.clone_from(&wanted);
        total.args = wanted;
        Ok(())
    }

    fn hooks(&mut self, wanted: Hooks, container: &mut Hooks, total: &mut Hooks) {
        if wanted == Hooks::default() {
            return;
        }
        for target in [container, total] {
            target.prestart.extend(wanted.prestart.iter().cloned());
            target.create_runtime.extend(wanted.create_runtime.iter().cloned());
            target.create_container.extend(wanted.create_container.iter().cloned());
            target.start_container.extend(wanted.start_container.iter().cloned());
            target.poststart.extend(wanted.poststart.iter().cloned());
            target.poststop.extend(wanted.poststop.iter().cloned());
        }
        self.owners.add(self.id, Field::OciHooks, self.plugin);
    }

    fn linux(
        &mut self,
        wanted: LinuxContainerAdjustment,
        container: &mut LinuxContainer,
        total: &mut LinuxContainerAdjustment,
    ) -> Result<(), Error> {
        self.list(Field::Devices, wanted.devices, &mut container.devices, &mut total.devices, |device| &device.path)?;
        if let Some(resources) = &wanted.resources {
            resources::claim(self.owners, self.id, resources, self.plugin)?;
            resources::lay_over(container.resources.get_or_insert_default(), resources);
            resources::lay_over(total.resources.get_or_insert_default(), resources);
        }
        if !wanted.cgroups_path.is_empty() {
            self.field(Field::CgroupsPath)?;
            container.cgroups_path.clone_from(&wanted.cgroups_path);
            total.cgroups_path = wanted.cgroups_path;
        }
        self.single(
            Field::OomScoreAdj,
            wanted.oom_score_adj,
            Some(&mut container.oom_score_adj),
            &mut total.oom_score_adj,
        )?;
        self.single(Field::IoPriority, wanted.io_priority, Some(&mut container.io_priority), &mut total.io_priority)?;
        self.single(
            Field::SeccompPolicy,
            wanted.seccomp_policy,
            Some(&mut container.seccomp_policy),
            &mut total.seccomp_policy,
        )?;
        for namespace in wanted.namespaces {
            let kind = super::clear_marker(&namespace.r#type).to_owned();
            self.entry(Field::Namespace, &kind)?;
            container.namespaces.retain(|known| known.r#type != kind);
            if namespace.r#type == kind {
                container.namespaces.push(namespace.clone());
            }
            total.namespaces.push(namespace);
        }
        self.map(Field::Sysctl, wanted.sysctl, &mut container.sysctl, &mut total.sysctl)?;
        self.map(Field::LinuxNetDevices, wanted.net_devices, &mut container.net_devices, &mut total.net_devices)?;
        self.single(Field::LinuxSched, wanted.scheduler, Some(&mut container.scheduler), &mut total.scheduler)?;
        if let Some(rdt) = wanted.rdt {
            self.rdt(rdt, total.rdt.get_or_insert_default())?;
        }
        self.single(Field::MemoryPolicy, wanted.memory_policy, None, &mut total.memory_policy)
    }

    fn single<T: Clone>(
        &mut self,
        field: Field,
        wanted: Option<T>,
        container: Option<&mut Option<T>>,
        total: &mut Option<T>,
    ) -> Result<(), Error> {
        if wanted.is_some() {
            self.field(field)?;
            if let Some(container) = container {
                container.clone_from(&wanted);
            }
            *total = wanted;
        }
        Ok(())
    }

    fn rdt(&mut self, wanted: LinuxRdt, total: &mut LinuxRdt) -> Result<(), Error> {
        if wanted.remove {
            for field in [Field::RdtClosId, Field::RdtSchemata, Field::RdtEnableMonitoring] {
                self.owners.clear(self.id, field, self.plugin);
            }
            *total = LinuxRdt { remove: true, ..LinuxRdt::default() };
        }
        self.single(Field::RdtClosId, wanted.clos_id, None, &mut total.clos_id)?;
        self.single(Field::RdtSchemata, wanted.schemata, None, &mut total.schemata)?;
        self.single(Field::RdtEnableMonitoring, wanted.enable_monitoring, None, &mut total.enable_monitoring)?;
        let set = total.clos_id.is_some() || total.schemata.is_some() || total.enable_monitoring.is_some();
        total.remove &= !set;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Mount, OptionalInt};

    fn creation() -> Creation {
        let container = Container {
            id: "c".into(),
            args: vec!["own".into()],
            env: vec!["HOME=/".into(), "PATH=/bin".into()],
            mounts: vec![Mount { destination: "/proc".into(), ..Mount::default() }],
            ..Container::default()
        };
        Creation::new(CreateContainerRequest { pod: None, container: Some(container) })
    }

    fn asking(adjust: ContainerAdjustment) -> CreateContainerResponse {
        CreateContainerResponse { adjust: Some(adjust), ..CreateContainerResponse::default() }
    }

    fn variable(key: &str, value: &str) -> ContainerAdjustment {
        let env = vec![KeyValue { key: key.into(), value: value.into() }];
        ContainerAdjustment { env, ..ContainerAdjustment::default() }
    }

    #[test]
    fn the_next_plugin_sees_what_the_one_before_it_asked_for() {
        let mut creation = creation();
        creation.add(asking(variable("HOME", "/root")), "00-a").unwrap();
        creation.add(asking(variable("-PATH", "")), "10-b").unwrap();
        assert_eq!(creation.request.container.as_ref().unwrap().env, ["HOME=/root"]);
        let keys: Vec<&str> = creation.adjust.env.iter().map(|variable| variable.key.as_str()).collect();
        assert_eq!(keys, ["HOME", "-PATH"]);
    }

    #[test]
    fn a_second_plugin_cannot_override_unless_it_removes_first() {
        let mut creation = creation();
        creation.add(asking(variable("X", "1")), "00-a").unwrap();
        assert!(creation.add(asking(variable("X", "2")), "10-b").is_err());
        let mut both = variable("-X", "");
        both.env.extend(variable("X", "3").env);
        creation.add(asking(both), "20-c").unwrap();
        assert_eq!(creation.adjust.env, variable("X", "3").env);
    }

    #[test]
    fn annotations_are_removed_with_what_another_plugin_set() {
        let annotated = |key: &str| ContainerAdjustment {
            annotations: [(key.to_owned(), "v".to_owned())].into(),
            ..ContainerAdjustment::default()
        };
        let mut creation = creation();
        creation.add(asking(annotated("k")), "00-a").unwrap();
        creation.add(asking(annotated("-k")), "10-b").unwrap();
        assert_eq!(creation.adjust.annotations, [("-k".to_owned(), String::new())].into());
        assert!(creation.request.container.as_ref().unwrap().annotations.is_empty());
    }

    #[test]
    fn arguments_are_overridden_only_with_intent() {
        let args = |words: &[&str]| ContainerAdjustment {
            args: words.iter().map(|word| (*word).to_owned()).collect(),
            ..ContainerAdjustment::default()
        };
        let mut creation = creation();
        creation.add(asking(args(&["first"])), "00-a").unwrap();
        assert!(creation.add(asking(args(&["second"])), "10-b").is_err());
        creation.add(asking(args(&["", "third"])), "20-c").unwrap();
        assert_eq!(creation.adjust.args, ["third"]);
        assert_eq!(creation.request.container.as_ref().unwrap().args, ["third"]);
    }

    #[test]
    fn a_score_is_one_plugins_to_set_and_an_update_of_the_container_itself_is_refused() {
        let scored = |value| ContainerAdjustment {
            linux: Some(LinuxContainerAdjustment {
                oom_score_adj: Some(OptionalInt { value }),
                ..LinuxContainerAdjustment::default()
            }),
            ..ContainerAdjustment::default()
        };
        let mut creation = creation();
        creation.add(asking(scored(5)), "00-a").unwrap();
        assert!(creation.add(asking(scored(6)), "10-b").is_err());
        let own = crate::api::ContainerUpdate::of("c", crate::api::LinuxResources::default());
        let answer = CreateContainerResponse { update: vec![own], ..CreateContainerResponse::default() };
        assert!(creation.add(answer, "20-c").unwrap_err().to_string().contains("during creation"));
    }
}
