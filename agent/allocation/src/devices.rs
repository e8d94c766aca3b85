//! Which of a plugin's devices a container gets. Pure: what the plugin itself prefers comes in as an argument.

use std::collections::{BTreeMap, BTreeSet};

use crate::hints::{Nodes, Wishes, places};

/// Device identifiers.
pub type Ids = BTreeSet<String>;

/// One resource's devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// The NUMA nodes of each device; empty where the plugin does not tell.
    pub nodes: BTreeMap<String, Vec<u32>>,
    pub healthy: Ids,
}

/// Why devices could not be given. Display is what users read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error("no healthy devices present; cannot allocate unhealthy devices {resource}")]
    NoneHealthy { resource: String },
    #[error("requested number of devices unavailable for {resource}. Requested: {requested}, Available: {available}")]
    NotEnough { resource: String, requested: usize, available: usize },
}

/// What is wanted of one resource, and what others have of it.
#[derive(Debug, Clone)]
pub struct Order<'a> {
    pub resource: &'a str,
    pub count: usize,
    /// In use by any container.
    pub in_use: &'a Ids,
    /// Had by containers of the pod that are done by then.
    pub reusable: &'a Ids,
    pub affinity: Option<Nodes>,
}

impl Devices {
    fn on(&self, id: &str, nodes: Nodes) -> bool {
        self.nodes.get(id).is_some_and(|own| own.iter().any(|node| nodes.contains(*node)))
    }

    fn free(&self, order: &Order<'_>) -> Ids {
        let free = self.healthy.difference(order.in_use).filter(|id| !order.reusable.contains(*id));
        free.cloned().collect()
    }

    /// Where the devices could come from.
    pub fn hints(&self, order: &Order<'_>, all_nodes: &BTreeSet<u32>) -> Wishes {
        if self.nodes.values().all(Vec::is_empty) {
            return None;
        }
        let free = self.free(order);
        if free.len() + order.reusable.len() < order.count {
            return Some(Vec::new());
        }
        let count =
            |ids: &mut dyn Iterator<Item = &String>, nodes: Nodes| ids.filter(|id| self.on(id, nodes)).count() as u64;
        Some(places(
            all_nodes,
            order.count as u64,
            |nodes| count(&mut self.nodes.keys(), nodes),
            |nodes| {
                let reused = count(&mut order.reusable.iter(), nodes);
                (reused == order.reusable.len() as u64).then(|| reused + count(&mut free.iter(), nodes))
            },
        ))
    }

    /// What the plugin is asked to choose from: all it may choose, and what it must. None when there is nothing to choose.
    pub fn choices(&self, order: &Order<'_>) -> Result<Option<(Ids, Ids)>, DeviceError> {
        let (must, pools) = self.sorted(order)?;
        let needed = order.count - must.len();
        if needed == 0 {
            return Ok(None);
        }
        // Where the near ones are more than enough, the plugin chooses among them.
        let among: Ids =
            if needed < pools[0].len() { pools[0].clone() } else { pools.iter().flatten().cloned().collect() };
        Ok(Some((among.union(&must).cloned().collect(), must)))
    }

    /// The devices to give; `preferred` ones first, as far as they are on offer.
    pub fn choose(&self, order: &Order<'_>, preferred: &Ids) -> Result<Ids, DeviceError> {
        let (mut chosen, pools) = self.sorted(order)?;
        let [near, far, anywhere] = &pools;
        let needed = order.count - chosen.len();
        let first: Vec<&String> = if needed < near.len() {
            near.intersection(preferred).chain(near).collect()
        } else {
            let rest = far.iter().chain(anywhere).filter(|id| preferred.contains(*id));
            near.iter().chain(rest).chain(far).chain(anywhere).collect()
        };
        for id in first {
            if chosen.len() == order.count {
                break;
            }
            chosen.insert(id.clone());
        }
        Ok(chosen)
    }

    /// Devices that are taken in any case, and those on the wanted nodes, on others, and on none.
    fn sorted(&self, order: &Order<'_>) -> Result<(Ids, [Ids; 3]), DeviceError> {
        let resource = || order.resource.to_owned();
        if self.healthy.is_empty() {
            return Err(DeviceError::NoneHealthy { resource: resource() });
        }
        let must: Ids = order.reusable.iter().take(order.count).cloned().collect();
        let free = self.free(order);
        let requested = order.count - must.len();
        if free.len() < requested {
            return Err(DeviceError::NotEnough { resource: resource(), requested, available: free.len() });
        }
        let mut pools = [Ids::new(), Ids::new(), Ids::new()];
        for id in free {
            let known = self.nodes.get(&id).is_some_and(|nodes| !nodes.is_empty());
            let pool = match order.affinity {
                Some(nodes) if self.on(&id, nodes) => 0,
                Some(_) if known => 1,
                None if known => 0,
                _ => 2,
            };
            pools[pool].insert(id);
        }
        Ok((must, pools))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(names: &[&str]) -> Ids {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// a and b on node 0, c and d on node 1.
    fn devices() -> Devices {
        let place = |(id, node): (&str, u32)| (id.to_owned(), vec![node]);
        Devices {
            nodes: [("a", 0), ("b", 0), ("c", 1), ("d", 1)].map(place).into(),
            healthy: ids(&["a", "b", "c", "d"]),
        }
    }

    #[test]
    fn devices_come_from_the_wanted_node_first_and_the_plugins_choice_counts() {
        let (used, none) = (ids(&["c"]), Ids::new());
        let order = |count| Order {
            resource: "example.com/card",
            count,
            in_use: &used,
            reusable: &none,
            affinity: Some(Nodes::of([0])),
        };
        let devices = devices();
        assert_eq!(devices.choices(&order(1)).unwrap(), Some((ids(&["a", "b"]), Ids::new())));
        assert_eq!(devices.choose(&order(1), &ids(&["b"])).unwrap(), ids(&["b"]));
        assert_eq!(devices.choose(&order(1), &ids(&["d"])).unwrap(), ids(&["a"]), "the wanted node comes first");
        assert_eq!(devices.choose(&order(3), &none).unwrap(), ids(&["a", "b", "d"]));
        let short = devices.choose(&order(4), &none).unwrap_err().to_string();
        assert_eq!(short, "requested number of devices unavailable for example.com/card. Requested: 4, Available: 3");
    }

    #[test]
    fn what_an_init_container_had_is_used_again() {
        let used = ids(&["c"]);
        let order = Order { resource: "r", count: 2, in_use: &used, reusable: &used, affinity: None };
        assert_eq!(devices().choices(&order).unwrap().unwrap().1, used);
        assert!(devices().choose(&order, &Ids::new()).unwrap().contains("c"));
        let sick = Devices { healthy: Ids::new(), ..devices() };
        assert!(matches!(sick.choose(&order, &Ids::new()), Err(DeviceError::NoneHealthy { .. })));
    }

    #[test]
    fn hints_name_nodes_that_have_enough() {
        let (used, none, nodes) = (ids(&["c"]), Ids::new(), BTreeSet::from([0, 1]));
        let hints = |count| {
            let order = Order { resource: "r", count, in_use: &used, reusable: &none, affinity: None };
            devices().hints(&order, &nodes).unwrap()
        };
        let preferred =
            |count| hints(count).iter().filter(|h| h.preferred).map(|h| h.nodes.unwrap()).collect::<Vec<_>>();
        assert_eq!(preferred(2), [Nodes::of([0])]);
        assert_eq!(preferred(3), [Nodes::of([0, 1])]);
        assert_eq!(hints(4), []);
        let unknown = Devices { nodes: [("a".to_owned(), vec![])].into(), healthy: ids(&["a"]) };
        let order = Order { resource: "r", count: 1, in_use: &none, reusable: &none, affinity: None };
        assert_eq!(unknown.hints(&order, &nodes), None);
    }
}
