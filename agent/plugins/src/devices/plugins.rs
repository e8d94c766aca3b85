//! [`DevicePlugins`]: the plugins that have registered, their devices, and the registration service.
//!
//! A plugin's devices live as long as its ListAndWatch stream. When the stream ends they are all unhealthy, so that nothing new is
//! given; a plugin that does not come back within [`GRACE`] has no devices any more.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use oarlock_allocation::devices::{Devices, Ids};
use oarlock_proto::deviceplugin as wire;
use oarlock_proto::deviceplugin::registration_server::{Registration, RegistrationServer};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::endpoint::{PluginClient, PluginError};
use crate::socket;
use crate::watcher::{Plugin, Taker};

/// How long the devices of a plugin that went are still counted, all of them unhealthy.
const GRACE: Duration = Duration::from_secs(300);
const VERSION: &str = "v1beta1";
/// Resources at one time.
const RESOURCES: usize = 1024;

#[derive(Default)]
struct Resource {
    devices: Devices,
    plugin: Option<PluginClient>,
    options: wire::DevicePluginOptions,
    /// Tells one registration from the next.
    generation: u64,
    stop: CancellationToken,
    /// When the plugin went.
    since: Option<Instant>,
}

struct State {
    resources: Mutex<BTreeMap<String, Resource>>,
    changed: Notify,
    directory: PathBuf,
}

/// The node's device plugins. Clones share everything.
#[derive(Clone)]
pub struct DevicePlugins {
    state: Arc<State>,
}

impl DevicePlugins {
    /// `directory` is where the registration socket is and where plugins have theirs.
    pub fn new(directory: PathBuf) -> Self {
        Self { state: Arc::new(State { resources: Mutex::default(), changed: Notify::new(), directory }) }
    }

    /// Resources that were registered before a restart: known, with no devices until their plugin comes.
    pub fn expect(&self, resources: Vec<String>) {
        let mut known = self.state.resources.lock();
        for name in resources.into_iter().take(RESOURCES) {
            known.entry(name).or_insert_with(|| Resource { since: Some(Instant::now()), ..Default::default() });
        }
    }

    /// Serves registrations until `shutdown`. Sockets of before are removed first: to plugins that is the sign to register anew.
    pub async fn serve(&self, shutdown: CancellationToken) -> io::Result<()> {
        let directory = self.state.directory.clone();
        std::fs::create_dir_all(&directory)?;
        for entry in std::fs::read_dir(&directory)?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let listener = socket::listen(&directory.join("kubelet.sock"))?;
        socket::serve(listener, RegistrationServer::new(self.clone()), shutdown).await;
        Ok(())
    }

    /// Waits until capacity or health of some device has changed.
    pub async fn changed(&self) {
        self.state.changed.notified().await;
    }

    /// Devices and healthy devices by resource. A resource whose plugin is long gone has none.
    pub fn counts(&self) -> BTreeMap<String, (usize, usize)> {
        let resources = self.state.resources.lock();
        let count = |resource: &Resource| match resource.since {
            Some(since) if since.elapsed() >= GRACE => (0, 0),
            _ => (resource.devices.nodes.len(), resource.devices.healthy.len()),
        };
        resources.iter().map(|(name, resource)| (name.clone(), count(resource))).collect()
    }

    /// Whether a plugin has ever registered the resource.
    pub fn knows(&self, resource: &str) -> bool {
        self.state.resources.lock().contains_key(resource)
    }

    pub fn devices(&self, resource: &str) -> Devices {
        self.state.resources.lock().get(resource).map(|resource| resource.devices.clone()).unwrap_or_default()
    }

    pub fn registered(&self) -> BTreeMap<String, Ids> {
        let resources = self.state.resources.lock();
        resources.iter().map(|(name, resource)| (name.clone(), resource.devices.healthy.clone())).collect()
    }

    fn client(&self, resource: &str) -> Result<(PluginClient, wire::DevicePluginOptions), PluginError> {
        let resources = self.state.resources.lock();
        let found = resources.get(resource).and_then(|found| Some((found.plugin.clone()?, found.options)));
        found.ok_or_else(|| PluginError::NotThere { resource: resource.to_owned() })
    }

    /// What the plugin would choose; nothing where it does not care or does not answer.
    pub async fn preferred(&self, resource: &str, among: &Ids, must: &Ids, count: usize) -> Ids {
        let Ok((plugin, options)) = self.client(resource) else { return Ids::new() };
        if !options.get_preferred_allocation_available {
            return Ids::new();
        }
        plugin.preferred(among, must, count).await.unwrap_or_else(|error| {
            tracing::warn!(resource, %error, "the device plugin did not say what it prefers");
            Ids::new()
        })
    }

    pub async fn allocate(&self, resource: &str, ids: &Ids) -> Result<wire::ContainerAllocateResponse, PluginError> {
        self.client(resource)?.0.allocate(ids).await
    }

    /// Tells the plugin that a container starts, where the plugin wants to know.
    pub async fn pre_start(&self, resource: &str, ids: &Ids) -> Result<(), PluginError> {
        let (plugin, options) = self.client(resource)?;
        if options.pre_start_required { plugin.pre_start(ids).await } else { Ok(()) }
    }

    /// Whether the plugin must be told before a container starts.
    pub fn wants_pre_start(&self, resource: &str) -> bool {
        self.state.resources.lock().get(resource).is_some_and(|resource| resource.options.pre_start_required)
    }

    /// Takes a plugin up in the place of an older one of its resource, and follows it in the background.
    fn follow(&self, name: String, path: &Path, options: Option<wire::DevicePluginOptions>) -> Result<(), String> {
        let plugin = PluginClient::new(path);
        let stop = CancellationToken::new();
        let generation = {
            let mut resources = self.state.resources.lock();
            if resources.len() >= RESOURCES && !resources.contains_key(&name) {
                return Err("too many resources".to_owned());
            }
            let resource = resources.entry(name.clone()).or_default();
            resource.stop.cancel();
            resource.stop = stop.clone();
            resource.options = options.unwrap_or_default();
            resource.generation += 1;
            resource.generation
        };
        let plugins = self.clone();
        tokio::spawn(async move {
            let followed = tokio::select! {
                () = stop.cancelled() => return,
                followed = plugins.take_in(&name, generation, &plugin, options.is_none()) => followed,
            };
            match followed {
                Ok(()) => tracing::info!(resource = name, "the device plugin ended"),
                Err(error) => tracing::warn!(resource = name, %error, "the device plugin cannot be followed"),
            }
            plugins.ended(&name, generation);
        });
        Ok(())
    }

    /// Takes in lists of devices until the plugin ends.
    async fn take_in(&self, name: &str, generation: u64, plugin: &PluginClient, ask: bool) -> Result<(), PluginError> {
        if ask {
            let options = plugin.options().await?;
            self.update(name, generation, |resource| resource.options = options);
        }
        let mut lists = plugin.watch().await?;
        loop {
            let list = lists.message().await.map_err(|status| PluginError::Status { status: Box::new(status) })?;
            let Some(list) = list else { return Ok(()) };
            let mut devices = Devices::default();
            for device in list.devices {
                let nodes = device.topology.unwrap_or_default().nodes;
                let nodes = nodes.into_iter().filter_map(|node| u32::try_from(node.id).ok()).collect();
                if device.health == "Healthy" {
                    devices.healthy.insert(device.id.clone());
                }
                devices.nodes.insert(device.id, nodes);
            }
            tracing::info!(resource = name, devices = devices.nodes.len(), healthy = devices.healthy.len(), "devices");
            self.update(name, generation, |resource| {
                resource.devices = devices;
                resource.plugin = Some(plugin.clone());
                resource.since = None;
            });
        }
    }

    fn update(&self, name: &str, generation: u64, change: impl FnOnce(&mut Resource)) {
        let mut resources = self.state.resources.lock();
        if let Some(resource) = resources.get_mut(name).filter(|resource| resource.generation == generation) {
            change(resource);
            drop(resources);
            self.state.changed.notify_one();
        }
    }

    fn ended(&self, name: &str, generation: u64) {
        self.update(name, generation, |resource| {
            resource.plugin = None;
            resource.devices.healthy.clear();
            resource.since = Some(Instant::now());
        });
        let plugins = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(GRACE).await;
            plugins.state.changed.notify_one();
        });
    }
}

/// Whether the name is one that plugins may give: `<domain>/<name>`, not of Kubernetes' own domain.
fn is_extended(resource: &str) -> bool {
    let Some((domain, name)) = resource.split_once('/') else { return false };
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let ends = |text: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        edge(text.chars().next()) && edge(text.chars().last())
    };
    let own = domain == "kubernetes.io" || domain.ends_with(".kubernetes.io") || resource.starts_with("requests.");
    let domain_ok =
        domain.len() <= 253 && ends(domain) && domain.chars().all(|c| inner(c) && c != '_' && !c.is_ascii_uppercase());
    !own && domain_ok && name.len() <= 63 && ends(name) && name.chars().all(inner)
}

fn check(resource: &str, versions: &[&str]) -> Result<(), String> {
    if !versions.contains(&VERSION) {
        let shown = versions.first().copied().unwrap_or_default();
        return Err(format!(
            "requested API version {shown:?} is not supported by kubelet. Supported version is [{VERSION:?}]"
        ));
    }
    if !is_extended(resource) {
        return Err(format!("the ResourceName {resource:?} is invalid"));
    }
    Ok(())
}

#[tonic::async_trait]
impl Registration for DevicePlugins {
    async fn register(&self, request: Request<wire::RegisterRequest>) -> Result<Response<wire::Empty>, Status> {
        let request = request.into_inner();
        tracing::info!(resource = request.resource_name, endpoint = request.endpoint, "a device plugin registers");
        check(&request.resource_name, &[&request.version]).map_err(Status::unknown)?;
        let plain =
            !request.endpoint.is_empty() && !request.endpoint.contains('/') && !request.endpoint.starts_with('.');
        if !plain {
            return Err(Status::unknown(format!("the endpoint {:?} is not the name of a socket", request.endpoint)));
        }
        let path = self.state.directory.join(&request.endpoint);
        self.follow(request.resource_name, &path, Some(request.options.unwrap_or_default()))
            .map_err(Status::unknown)?;
        Ok(Response::new(wire::Empty {}))
    }
}

#[async_trait]
impl Taker for DevicePlugins {
    async fn take(&self, plugin: &Plugin) -> Result<(), String> {
        let versions: Vec<&str> = plugin.versions.iter().map(String::as_str).collect();
        check(&plugin.name, &versions)?;
        self.follow(plugin.name.clone(), &plugin.endpoint, None)
    }

    async fn dismiss(&self, plugin: &Plugin) {
        let generation = {
            let resources = self.state.resources.lock();
            let Some(resource) = resources.get(&plugin.name) else { return };
            resource.stop.cancel();
            resource.generation
        };
        self.ended(&plugin.name, generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_extended_resources_can_be_registered() {
        for good in ["example.com/gpu", "a.b-c.io/x_1.y"] {
            assert!(is_extended(good), "{good}");
        }
        for bad in [
            "gpu",
            "kubernetes.io/x",
            "a.kubernetes.io/x",
            "requests.example.com/x",
            "x.io/",
            "/x",
            "X.io/a",
            "x.io/a/b",
        ] {
            assert!(!is_extended(bad), "{bad}");
        }
        let old = check("example.com/gpu", &["v1alpha1"]).unwrap_err();
        assert_eq!(
            old,
            "requested API version \"v1alpha1\" is not supported by kubelet. Supported version is [\"v1beta1\"]"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_resource_that_is_only_expected_goes_after_a_while() {
        let plugins = DevicePlugins::new("/nowhere".into());
        plugins.expect(vec!["example.com/gpu".into()]);
        assert_eq!(plugins.counts()["example.com/gpu"], (0, 0));
        assert!(plugins.knows("example.com/gpu"));
        assert!(matches!(plugins.allocate("example.com/gpu", &Ids::new()).await, Err(PluginError::NotThere { .. })));
    }
}
