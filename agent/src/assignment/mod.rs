//! What containers get of the node for themselves: whole processors, memory of NUMA nodes, devices of plugins.
//!
//! Owns the admission of pods that ask for such things ([`Assignments::admit`]), the record of who has what, kept in upstream's
//! state files before a pod starts, and keeping running containers on the processors that are theirs ([`apply`]). What to choose
//! is decided in `oarlock-allocation`; plugins are reached through `oarlock-plugins`.

mod apply;
mod ask;
mod config;
mod files;
mod report;

pub(crate) use apply::keep_processors;
pub use config::{AssignmentConfig, AssignmentError};
pub(crate) use report::PodResources;

use std::collections::{BTreeMap, HashSet};

use k8s_openapi::api::core::v1::Pod;
use oarlock_allocation::devices::{Ids, Order};
use oarlock_allocation::hints::{Arbiter, Hint, Nodes, Policy, Wishes};
use oarlock_allocation::{CpuError, CpuPool, CpuSet, MemoryError, MemoryPool};
use oarlock_plugins::{Answer, DeviceLedger, DevicePlugins, Given, PluginError};
use parking_lot::Mutex;
use tokio::sync::Notify;

use self::ask::{Ask, Sort};
use crate::Config;
use crate::admission::Refusal;
use crate::node::capacity::Machine;
use crate::spec;
use crate::spec::resources::{Qos, qos_of};

/// Everything that is given out, and to whom.
#[derive(Debug, Clone, Default)]
struct Pools {
    /// None without the static policy.
    cpus: Option<CpuPool>,
    memory: Option<MemoryPool>,
    devices: DeviceLedger,
}

impl Pools {
    fn release(&mut self, pod: &str) {
        if let Some(cpus) = &mut self.cpus {
            cpus.release(pod);
        }
        if let Some(memory) = &mut self.memory {
            memory.release(pod);
        }
        self.devices.release(pod);
    }

    fn pods(&self) -> HashSet<String> {
        let cpus = self.cpus.iter().flat_map(CpuPool::pods);
        let memory = self.memory.iter().flat_map(MemoryPool::pods);
        cpus.chain(memory).chain(self.devices.pods()).map(str::to_owned).collect()
    }
}

struct Current {
    pools: Pools,
    /// Pods that ended while an admission was under way.
    released: Vec<String>,
}

/// The keeper of what is given out.
pub(crate) struct Assignments {
    config: AssignmentConfig,
    arbiter: Arbiter,
    files: files::Files,
    pub plugins: DevicePlugins,
    current: Mutex<Current>,
    /// One admission at a time: each must see what the one before took.
    turn: tokio::sync::Mutex<()>,
    /// Some container's processors may have changed.
    moved: Notify,
}

/// Why a pod cannot have what it asks for.
enum Failure {
    Affinity,
    Cpu(CpuError),
    Unexpected(String),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        let (reason, message) = match failure {
            Failure::Affinity => {
                ("TopologyAffinityError", "Resources cannot be allocated with Topology locality".to_owned())
            }
            Failure::Cpu(error) if error.is_alignment() => ("SMTAlignmentError", error.to_string()),
            Failure::Cpu(error) => return Failure::Unexpected(error.to_string()).into(),
            Failure::Unexpected(error) => {
                ("UnexpectedAdmissionError", format!("Allocate failed due to {error}, which is unexpected"))
            }
        };
        Refusal { reason: reason.to_owned(), message, ..Default::default() }
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        Failure::Unexpected(error.to_string())
    }
}

impl From<PluginError> for Failure {
    fn from(error: PluginError) -> Self {
        Failure::Unexpected(error.to_string())
    }
}

/// What a container is made with beside what its pod says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Assigned {
    pub cpus: String,
    pub memory_nodes: String,
    pub answers: Vec<Answer>,
}

/// What containers of the pod that are done by then leave to the next.
#[derive(Default)]
struct Reusable {
    cpus: CpuSet,
    devices: BTreeMap<String, Ids>,
    done: Vec<String>,
}

impl Reusable {
    /// An init container's part can be used again; what another one takes is gone.
    fn after(&mut self, ask: &Ask, pools: &Pools) {
        let cpus = pools.cpus.as_ref().and_then(|cpus| cpus.of(&ask.pod, &ask.container)).cloned().unwrap_or_default();
        let devices: BTreeMap<String, Ids> = pools
            .devices
            .container(&ask.pod, &ask.container)
            .map(|(resource, given)| (resource.to_owned(), given.ids()))
            .collect();
        if ask.sort == Sort::Init {
            self.cpus = self.cpus.union(&cpus);
            for (resource, ids) in devices {
                self.devices.entry(resource).or_default().extend(ids);
            }
            self.done.push(ask.container.clone());
        } else {
            self.cpus = self.cpus.minus(&cpus);
            for (resource, ids) in devices {
                self.devices.entry(resource).or_default().retain(|id| !ids.contains(id));
            }
        }
    }

    fn ids(&self, resource: &str) -> Ids {
        self.devices.get(resource).cloned().unwrap_or_default()
    }
}

impl Assignments {
    /// Reads the state files. Blocks. Fails where they are of another policy or machine: what runs cannot be told apart then.
    pub(crate) fn open(config: &Config, machine: &Machine) -> Result<Self, AssignmentError> {
        let own = config.assignment.clone();
        let files = files::Files::below(&config.kubelet_dir);
        let topology = oarlock_allocation::Topology::read(&own.sys);
        own.check(config, machine, &topology)?;
        let cpus = files.cpu_pool(&own, config, &topology)?;
        let memory = files.memory_pool(&own, &topology)?;
        let plugins = DevicePlugins::new(config.kubelet_dir.join("device-plugins"));
        let (devices, registered) = files.devices();
        plugins.expect(registered);
        let arbiter = Arbiter {
            policy: own.topology_policy,
            nodes: topology.nodes(),
            prefer_closest: own.prefer_closest,
            distances: topology.distances.clone(),
        };
        let pools = Pools { cpus, memory, devices };
        let assignments = Self {
            config: own,
            arbiter,
            files,
            plugins,
            current: Mutex::new(Current { pools, released: Vec::new() }),
            turn: tokio::sync::Mutex::default(),
            moved: Notify::new(),
        };
        if assignments.config.cpu_static || assignments.config.memory_static {
            assignments.files.write(&assignments.current.lock().pools, &assignments.plugins)?;
        }
        Ok(assignments)
    }

    /// Whether containers may have processors of their own.
    pub(crate) fn cpu_static(&self) -> bool {
        self.config.cpu_static
    }

    /// Whether the pod asks for anything that is given out here.
    pub(crate) fn concerns(&self, pod: &Pod) -> bool {
        self.asks(pod).iter().any(|ask| !ask.is_empty())
    }

    fn asks(&self, pod: &Pod) -> Vec<Ask> {
        ask::of(pod, &self.config, |resource| self.plugins.knows(resource))
    }

    /// Why a resize of the pod is out of question; None where it is not.
    pub(crate) fn resize_refused(&self, pod: &Pod) -> Option<&'static str> {
        if qos_of(pod) != Qos::Guaranteed {
            return None;
        }
        let cpu = "Resize is infeasible for Guaranteed Pods alongside CPU Manager static policy";
        let memory = "Resize is infeasible for Guaranteed Pods alongside Memory Manager static policy";
        let cpu = self.config.cpu_static.then_some(cpu);
        cpu.or_else(|| self.config.memory_static.then_some(memory))
    }

    /// Gives the pod's containers what they ask for, all of them or none. What they have already, they keep.
    pub(crate) async fn admit(&self, pod: &Pod) -> Result<(), Refusal> {
        let asks = self.asks(pod);
        if asks.iter().all(Ask::is_empty) {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
        let mut draft = {
            let mut current = self.current.lock();
            current.released.clear();
            current.pools.clone()
        };
        self.give(&asks, &mut draft).await?;
        let mut current = self.current.lock();
        for ended in std::mem::take(&mut current.released) {
            draft.release(&ended);
        }
        // On disk before any of it is used.
        self.files.write(&draft, &self.plugins).map_err(|error| Failure::Unexpected(error.to_string()))?;
        current.pools = draft;
        drop(current);
        tracing::info!(pod.name = spec::pod_name(pod), pod.uid = spec::pod_uid(pod), "gave a pod its own resources");
        self.moved.notify_one();
        Ok(())
    }

    async fn give(&self, asks: &[Ask], draft: &mut Pools) -> Result<(), Failure> {
        let mut reusable = Reusable::default();
        let whole = match self.config.topology_scope_pod {
            true => Some(self.place(&ask::together(asks), draft, &Reusable::default())?),
            false => None,
        };
        for ask in asks {
            let hint = match whole {
                Some(hint) => hint,
                None => self.place(ask, draft, &reusable)?,
            };
            self.give_one(ask, hint.nodes, draft, &reusable).await?;
            reusable.after(ask, draft);
        }
        Ok(())
    }

    /// Where everything that is asked for should come from.
    fn place(&self, ask: &Ask, pools: &Pools, reusable: &Reusable) -> Result<Hint, Failure> {
        if self.arbiter.policy == Policy::None {
            return Ok(Hint { nodes: None, preferred: true });
        }
        let mut wishes: Vec<Wishes> = Vec::new();
        if let Some((pool, count)) = pools.cpus.as_ref().zip(ask.cpus) {
            wishes.push(Some(pool.hints(&ask.pod, &ask.container, count, &reusable.cpus)));
        }
        if let Some(pool) = pools.memory.as_ref().filter(|_| !ask.memory.is_empty()) {
            let done: Vec<&str> = reusable.done.iter().map(String::as_str).collect();
            wishes.push(Some(pool.hints(&ask.pod, &ask.container, &ask.memory, &done)));
        }
        for (resource, count) in &ask.devices {
            let in_use = pools.devices.in_use(resource);
            let own = pools.devices.of(&ask.pod, &ask.container, resource).map(Given::ids);
            let ids = own.unwrap_or_else(|| reusable.ids(resource));
            let order = Order { resource, count: *count, in_use: &in_use, reusable: &ids, affinity: None };
            wishes.push(self.plugins.devices(resource).hints(&order, &self.arbiter.nodes));
        }
        let (hint, accepted) = self.arbiter.merge(&wishes);
        if accepted { Ok(hint) } else { Err(Failure::Affinity) }
    }

    async fn give_one(
        &self,
        ask: &Ask,
        nodes: Option<Nodes>,
        draft: &mut Pools,
        reusable: &Reusable,
    ) -> Result<(), Failure> {
        if let Some((pool, count)) = draft.cpus.as_mut().zip(ask.cpus) {
            pool.allocate(&ask.pod, &ask.container, count, nodes, &reusable.cpus).map_err(Failure::Cpu)?;
        }
        if let Some(pool) = &mut draft.memory {
            let done: Vec<&str> = reusable.done.iter().map(String::as_str).collect();
            pool.allocate(&ask.pod, &ask.container, &ask.memory, nodes, &done)?;
        }
        for (resource, count) in &ask.devices {
            if draft.devices.of(&ask.pod, &ask.container, resource).is_some() {
                continue;
            }
            let given = self.devices(resource, *count, nodes, draft, reusable).await?;
            draft.devices.give(&ask.pod, &ask.container, resource, given);
        }
        Ok(())
    }

    async fn devices(
        &self,
        resource: &str,
        count: usize,
        affinity: Option<Nodes>,
        draft: &Pools,
        reusable: &Reusable,
    ) -> Result<Given, Failure> {
        let devices = self.plugins.devices(resource);
        let (in_use, reusable) = (draft.devices.in_use(resource), reusable.ids(resource));
        let order = Order { resource, count, in_use: &in_use, reusable: &reusable, affinity };
        let unexpected = |error: oarlock_allocation::devices::DeviceError| Failure::Unexpected(error.to_string());
        let preferred = match devices.choices(&order).map_err(unexpected)? {
            Some((among, must)) => self.plugins.preferred(resource, &among, &must, count).await,
            None => Ids::new(),
        };
        let chosen = devices.choose(&order, &preferred).map_err(unexpected)?;
        let answer = self.plugins.allocate(resource, &chosen).await?;
        let mut by_node: BTreeMap<i64, Ids> = BTreeMap::new();
        for id in chosen {
            let nodes = devices.nodes.get(&id).cloned().unwrap_or_default();
            let places: Vec<i64> = if nodes.is_empty() { vec![-1] } else { nodes.into_iter().map(i64::from).collect() };
            for node in places {
                by_node.entry(node).or_default().insert(id.clone());
            }
        }
        Ok(Given { by_node, answer })
    }

    /// Takes back what pods have that are over.
    pub(crate) fn keep_only(&self, holds: impl Fn(&str) -> bool) {
        let mut current = self.current.lock();
        let over: Vec<String> = current.pools.pods().into_iter().filter(|pod| !holds(pod)).collect();
        if over.is_empty() {
            return;
        }
        for pod in &over {
            current.pools.release(pod);
        }
        if let Err(error) = self.files.write(&current.pools, &self.plugins) {
            tracing::warn!(%error, "what pods gave back could not be written down; it is at the next change");
        }
        current.released.extend(over);
        drop(current);
        self.moved.notify_one();
    }

    /// What the container is to be made with.
    pub(crate) fn assigned(&self, pod: &str, container: &str) -> Assigned {
        let current = self.current.lock();
        let pools = &current.pools;
        let nodes = pools.memory.as_ref().map(|memory| memory.nodes_of(pod, container)).unwrap_or_default();
        Assigned {
            cpus: cpus_of(pools, pod, container).map(|cpus| cpus.to_string()).unwrap_or_default(),
            memory_nodes: nodes.into_iter().collect::<CpuSet>().to_string(),
            answers: pools.devices.container(pod, container).map(|(_, given)| given.answer.clone()).collect(),
        }
    }

    /// As [`Self::assigned`], once the plugins know that the container starts.
    pub(crate) async fn prepare(&self, pod: &str, container: &str) -> Result<Assigned, String> {
        let devices: Vec<(String, Ids)> = {
            let current = self.current.lock();
            let all = current.pools.devices.container(pod, container);
            all.map(|(resource, given)| (resource.to_owned(), given.ids())).collect()
        };
        for (resource, ids) in devices {
            if self.plugins.wants_pre_start(&resource) {
                let told = self.plugins.pre_start(&resource, &ids).await;
                told.map_err(|error| format!("device plugin PreStartContainer rpc failed with err: {error}"))?;
            }
        }
        Ok(self.assigned(pod, container))
    }

    /// Follows the plugins: every change of theirs is kept, and told by `tell`.
    pub(crate) async fn follow_plugins(&self, tell: impl Fn()) {
        loop {
            self.plugins.changed().await;
            if let Err(error) = self.files.write_devices(&self.current.lock().pools.devices, &self.plugins) {
                tracing::warn!(%error, "the devices that plugins registered could not be written down");
            }
            tell();
        }
    }
}

/// The processors that the container may run on; None where no policy says.
fn cpus_of(pools: &Pools, pod: &str, container: &str) -> Option<CpuSet> {
    let cpus = pools.cpus.as_ref()?;
    Some(cpus.of(pod, container).unwrap_or(cpus.shared()).clone())
}

#[cfg(test)]
mod tests;
