//! The runtime's side: running the chain of plugins of a network for each CNI command.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::sync::RwLock;
use tracing::debug;

use crate::cache::{Cache, Entry};
use crate::config::{ConfigError, NetworkList, PluginExtra};
use crate::error::CniError;
use crate::exec::{Invocation, run};
use crate::names::{is_valid_id, is_valid_interface};
use crate::types::{CniResult, ValidAttachment};

/// How long one plugin may take for one command.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A container's interface in a network, as the runtime describes it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Attachment {
    pub container_id: String,
    /// The pinned network namespace; DEL works without one.
    pub netns: Option<PathBuf>,
    pub ifname: String,
    /// CNI_ARGS, such as K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID, K8S_POD_INFRA_CONTAINER_ID, IgnoreUnknown.
    pub cni_args: Vec<(String, String)>,
    /// Capability arguments by name, such as portMappings, bandwidth, ipRanges, dns. Each goes only to plugins that
    /// declare it.
    pub capability_args: BTreeMap<String, Value>,
}

impl Attachment {
    /// An attachment with the arguments that Kubernetes runtimes give, as `eth0`.
    pub fn for_pod(container_id: &str, netns: &Path, namespace: &str, name: &str, uid: &str) -> Attachment {
        let argument = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        Attachment {
            container_id: container_id.to_owned(),
            netns: Some(netns.to_owned()),
            ifname: "eth0".to_owned(),
            cni_args: vec![
                argument("IgnoreUnknown", "1"),
                argument("K8S_POD_NAMESPACE", namespace),
                argument("K8S_POD_NAME", name),
                argument("K8S_POD_INFRA_CONTAINER_ID", container_id),
                argument("K8S_POD_UID", uid),
            ],
            capability_args: BTreeMap::new(),
        }
    }

    /// Adds the portMappings capability, unless there are none.
    pub fn with_port_mappings(mut self, mappings: &[PortMapping]) -> Attachment {
        if !mappings.is_empty() {
            self.capability_args.insert("portMappings".to_owned(), serde_json::to_value(mappings).unwrap_or_default());
        }
        self
    }

    fn check(&self) -> Result<(), CniError> {
        let invalid = |what, value: &str| Err(CniError::InvalidName { what, value: value.to_owned() });
        if !is_valid_id(&self.container_id) {
            return invalid("container id", &self.container_id);
        }
        if !is_valid_interface(&self.ifname) {
            return invalid("interface name", &self.ifname);
        }
        match self
            .cni_args
            .iter()
            .find(|(name, value)| format!("{name}{value}").contains([';', '\0']) || name.contains('='))
        {
            Some((name, _)) => invalid("argument", name),
            None => Ok(()),
        }
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let arguments: Vec<String> = self.cni_args.iter().map(|(name, value)| format!("{name}={value}")).collect();
        vec![
            ("CNI_CONTAINERID", self.container_id.clone()),
            ("CNI_NETNS", self.netns.as_ref().map(|path| path.display().to_string()).unwrap_or_default()),
            ("CNI_IFNAME", self.ifname.clone()),
            ("CNI_ARGS", arguments.join(";")),
        ]
    }
}

/// A port of the host that leads to a port of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    pub host_port: u16,
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    #[serde(rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<std::net::IpAddr>,
}

/// Runs the default network's plugins. Cheap to share behind an `Arc`; each call reads the configuration afresh, so a
/// changed network needs no restart.
#[derive(Debug)]
pub struct CniClient {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    cache: Cache,
    timeout: Duration,
    /// GC must not overlap any other command (shared: all others; exclusive: GC).
    gate: RwLock<()>,
}

impl CniClient {
    pub fn new(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>, cache_dir: PathBuf) -> CniClient {
        CniClient { conf_dir, bin_dirs, cache: Cache::new(&cache_dir), timeout: DEFAULT_TIMEOUT, gate: RwLock::new(()) }
    }

    /// Changes how long one plugin may take for one command (30 s).
    pub fn with_timeout(mut self, timeout: Duration) -> CniClient {
        self.timeout = timeout;
        self
    }

    /// The network that pods are attached to: the first usable file of the configuration directory.
    pub fn default_network(&self) -> Result<NetworkList, CniError> {
        NetworkList::load_default(&self.conf_dir).map_err(CniError::Config)
    }

    /// Attaches a container. When a plugin fails, the caller has to call [`CniClient::del`], which is always safe.
    ///
    /// The attachment goes on record before the first plugin runs, so that a crash in between is cleaned up by DEL or GC.
    /// Not cancel safe: a dropped call is a failed one.
    pub async fn add(&self, attachment: &Attachment) -> Result<CniResult, CniError> {
        attachment.check()?;
        let _running = self.gate.read().await;
        let network = self.default_network()?;
        self.cache.store(&Entry::new(&network, attachment, None))?;
        let mut result = None;
        for index in 0..network.plugins.len() {
            let output = self.call(&network, index, "ADD", attachment, result.as_ref()).await?;
            result = Some(decode_value(network.plugin_type(index), &output)?);
        }
        let result = result.unwrap_or_default();
        self.cache.store(&Entry::new(&network, attachment, Some(result.clone())))?;
        let last = network.plugins.len() - 1;
        serde_json::from_value(result)
            .map_err(|source| CniError::Decode { plugin: network.plugin_type(last).to_owned(), source })
    }

    /// Detaches a container with the configuration that it was attached with. Repeating it is fine, and so is a container
    /// that was never attached. Every plugin is called, in reverse order, and the first failure is returned; the record
    /// goes when all have succeeded.
    pub async fn del(&self, attachment: &Attachment) -> Result<(), CniError> {
        attachment.check()?;
        let _running = self.gate.read().await;
        self.del_ungated(attachment).await
    }

    async fn del_ungated(&self, attachment: &Attachment) -> Result<(), CniError> {
        let entry = self.cache.find(&attachment.container_id, &attachment.ifname)?;
        let network = match entry.as_ref().and_then(Entry::network) {
            Some(network) => network,
            None => match self.default_network() {
                Ok(network) => network,
                // Nothing on record and no network: there is nothing to take away.
                Err(CniError::Config(ConfigError::NoNetwork { .. })) => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        let mut whole = entry.as_ref().map_or_else(|| attachment.clone(), Entry::attachment);
        whole.netns = attachment.netns.clone().or(whole.netns).filter(|path| path.exists());
        let result = entry.as_ref().and_then(|entry| entry.result.as_ref()).filter(|_| network.version.has_check());
        let mut outcome = Ok(());
        for index in (0..network.plugins.len()).rev() {
            let deleted = self.call(&network, index, "DEL", &whole, result).await.map(drop);
            outcome = outcome.and(deleted);
        }
        outcome?;
        self.cache.remove(&network.name, &attachment.container_id, &attachment.ifname)
    }

    /// Asks every plugin whether the attachment is still as ADD left it. Without CHECK in the network's version, or with
    /// `disableCheck`, it succeeds.
    pub async fn check(&self, attachment: &Attachment) -> Result<(), CniError> {
        attachment.check()?;
        let _running = self.gate.read().await;
        let missing = || CniError::NotAttached {
            container_id: attachment.container_id.clone(),
            ifname: attachment.ifname.clone(),
        };
        let entry = self.cache.find(&attachment.container_id, &attachment.ifname)?.ok_or_else(missing)?;
        let network = entry.network().ok_or_else(missing)?;
        if !network.version.has_check() || network.disable_check {
            return Ok(());
        }
        let mut whole = entry.attachment();
        whole.netns = attachment.netns.clone().or(whole.netns);
        for index in 0..network.plugins.len() {
            self.call(&network, index, "CHECK", &whole, entry.result.as_ref()).await?;
        }
        Ok(())
    }

    /// Whether the default network can serve ADD now. A network below 1.1.0 can as soon as its plugins exist.
    pub async fn status(&self) -> Result<(), CniError> {
        let _running = self.gate.read().await;
        let network = self.default_network()?;
        for index in 0..network.plugins.len() {
            let plugin = network.plugin_type(index);
            if !self.bin_dirs.iter().any(|directory| directory.join(plugin).is_file()) {
                return Err(CniError::PluginNotFound { plugin: plugin.to_owned(), directories: self.bin_dirs.clone() });
            }
            if network.version.has_gc_and_status() {
                self.invoke(&network, index, "STATUS", &[], &PluginExtra::default()).await?;
            }
        }
        Ok(())
    }

    /// Detaches every attachment on record that is not in `valid`, then lets the plugins free what belongs to none of
    /// `valid`. Everything is tried; all failures are returned together.
    pub async fn gc(&self, valid: &[ValidAttachment]) -> Result<(), CniError> {
        let _alone = self.gate.write().await;
        let mut failures = Vec::new();
        let keep: HashSet<(&str, &str)> =
            valid.iter().map(|one| (one.container_id.as_str(), one.ifname.as_str())).collect();
        for entry in self.cache.all()? {
            if !keep.contains(&(entry.container_id.as_str(), entry.if_name.as_str())) {
                debug!(container.id = %entry.container_id, "CNI attachment without a container is removed");
                failures.extend(self.del_ungated(&entry.attachment()).await.err());
            }
        }
        match self.default_network() {
            Ok(network) if network.version.has_gc_and_status() && !network.disable_gc => {
                let extra = PluginExtra { valid_attachments: Some(valid), ..PluginExtra::default() };
                for index in 0..network.plugins.len() {
                    failures.extend(self.invoke(&network, index, "GC", &[], &extra).await.err());
                }
            }
            Ok(_) | Err(CniError::Config(ConfigError::NoNetwork { .. })) => {}
            Err(error) => failures.push(error),
        }
        if failures.is_empty() { Ok(()) } else { Err(CniError::Gc { failures }) }
    }

    /// The result that ADD had, from the record.
    pub fn cached_result(&self, attachment: &Attachment) -> Option<CniResult> {
        let network = self.default_network().ok();
        let entry = network
            .and_then(|network| self.cache.load(&network.name, &attachment.container_id, &attachment.ifname))
            .or_else(|| self.cache.find(&attachment.container_id, &attachment.ifname).ok().flatten())?;
        serde_json::from_value(entry.result?).ok()
    }

    async fn call(
        &self,
        network: &NetworkList,
        index: usize,
        command: &'static str,
        attachment: &Attachment,
        prev_result: Option<&Value>,
    ) -> Result<Vec<u8>, CniError> {
        let extra =
            PluginExtra { capability_args: attachment.capability_args.clone(), prev_result, valid_attachments: None };
        let output = self.invoke(network, index, command, &attachment.environment(), &extra).await?;
        oarlock_failpoint::step(&format!("{} has done {command}", network.plugin_type(index)));
        Ok(output)
    }

    async fn invoke(
        &self,
        network: &NetworkList,
        index: usize,
        command: &'static str,
        environment: &[(&'static str, String)],
        extra: &PluginExtra<'_>,
    ) -> Result<Vec<u8>, CniError> {
        run(Invocation {
            plugin: network.plugin_type(index),
            bin_dirs: &self.bin_dirs,
            command,
            environment,
            config: network.plugin_config(index, extra),
            timeout: self.timeout,
        })
        .await
    }
}

fn decode_value(plugin: &str, output: &[u8]) -> Result<Value, CniError> {
    serde_json::from_slice(output).map_err(|source| CniError::Decode { plugin: plugin.to_owned(), source })
}
