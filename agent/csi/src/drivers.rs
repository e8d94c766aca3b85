//! [`Drivers`]: the CSI drivers that have registered on this node.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use oarlock_plugins::watcher::{Plugin, Taker};
use parking_lot::Mutex;

use crate::client::{Abilities, Driver};
use crate::cluster::{Cluster, NodeDriver};
use crate::error::CsiError;

/// Versions of the interface that are spoken here.
const SPOKEN: &str = "1.";

struct Known {
    driver: Driver,
    abilities: Abilities,
    plugin: Plugin,
}

/// The registered drivers.
pub struct Drivers {
    cluster: Arc<dyn Cluster>,
    known: Mutex<HashMap<String, Known>>,
}

impl Drivers {
    pub fn new(cluster: Arc<dyn Cluster>) -> Arc<Self> {
        Arc::new(Self { cluster, known: Mutex::default() })
    }

    pub(crate) fn get(&self, name: &str) -> Result<(Driver, Abilities), CsiError> {
        let known = self.known.lock();
        let found = known.get(name).map(|known| (known.driver.clone(), known.abilities.clone()));
        found.ok_or_else(|| CsiError::NoDriver { driver: name.to_owned() })
    }
}

/// The limit as CSINode shows it: no number below one is a limit.
fn limit(most: i64) -> Option<i32> {
    (most > 0).then(|| i32::try_from(most).unwrap_or(i32::MAX))
}

#[async_trait]
impl Taker for Drivers {
    async fn take(&self, plugin: &Plugin) -> Result<(), String> {
        if !plugin.versions.iter().any(|version| version.trim_start_matches('v').starts_with(SPOKEN)) {
            let versions = plugin.versions.join(", ");
            return Err(format!(
                "validation failed for CSI Driver {}: versions [{versions}] are not supported",
                plugin.name
            ));
        }
        let driver = Driver::new(&plugin.endpoint);
        let failed = |error: CsiError| format!("RegisterPlugin error -- plugin registration failed with err: {error}");
        let info = driver.info().await.map_err(failed)?;
        if info.node_id.is_empty() {
            return Err("RegisterPlugin error -- the driver has no id for this node".to_owned());
        }
        let abilities = driver.abilities().await.map_err(failed)?;
        let listed = NodeDriver {
            name: plugin.name.clone(),
            node_id: info.node_id,
            most_volumes: limit(info.max_volumes_per_node),
            topology: info.accessible_topology.unwrap_or_default().segments.into_iter().collect(),
        };
        self.cluster.add_driver(&listed).await.map_err(|error| failed(error.into()))?;
        self.known.lock().insert(plugin.name.clone(), Known { driver, abilities, plugin: plugin.clone() });
        Ok(())
    }

    async fn dismiss(&self, plugin: &Plugin) {
        {
            let mut known = self.known.lock();
            // Another socket of the same driver may have taken its place.
            if known.get(&plugin.name).is_none_or(|known| known.plugin != *plugin) {
                return;
            }
            known.remove(&plugin.name);
        }
        if let Err(error) = self.cluster.remove_driver(&plugin.name).await {
            tracing::warn!(driver = plugin.name, %error, "the driver is still listed on the node");
        }
    }
}
