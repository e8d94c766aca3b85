//! All plugins together: who there is, in which order, and every request taken round them one at a time.
//!
//! Nothing is asked of anybody, and no lock taken, while no plugin is connected.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, RwLock, RwLockReadGuard, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::api;
use crate::config::Config;
use crate::error::{Error, chain};
use crate::event::Event;
use crate::merge::{Creation, Update, Updates};
use crate::plugin::{Launched, Plugin};
use crate::{launch, listen};

/// Connections that are registering at once.
const BEGINNING_AT_ONCE_MAX: usize = 16;
/// Plugins at once. Each is asked before every container.
const PLUGINS_MAX: usize = 64;
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the runtime does for plugins. None of these may wait for whoever waits for a plugin's answer.
#[async_trait]
pub trait Host: Send + Sync + 'static {
    /// All pods, and all containers that have not ended.
    async fn state(&self) -> (Vec<api::PodSandbox>, Vec<api::Container>);
    /// Carries updates out and gives back those that failed and were not allowed to. A container that does not exist is
    /// no failure.
    async fn update(&self, updates: Vec<api::ContainerUpdate>) -> Vec<api::ContainerUpdate>;
    /// Ends containers.
    async fn evict(&self, evictions: Vec<api::ContainerEviction>);
}

/// What plugins want of a container that is being made.
pub type Created = api::ContainerAdjustment;

/// What plugins changed of an update; None where they left it alone.
pub type Updated = Option<api::LinuxResources>;

/// The plugins of a runtime.
#[derive(Debug)]
pub struct Plugins {
    config: Config,
    /// In the order in which they are called.
    plugins: Mutex<Vec<Arc<Plugin>>>,
    count: AtomicUsize,
    /// Taken for writing while a plugin is told the state of the runtime: nothing may come to be meanwhile of which it is
    /// neither told then nor later.
    gate: RwLock<()>,
    host: OnceLock<Arc<dyn Host>>,
}

/// The relay needs the host to be known by more than its shape.
impl std::fmt::Debug for dyn Host {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Host")
    }
}

impl Plugins {
    pub fn new(config: Config) -> Arc<Plugins> {
        Arc::new(Plugins {
            config,
            plugins: Mutex::new(Vec::new()),
            count: AtomicUsize::new(0),
            gate: RwLock::new(()),
            host: OnceLock::new(),
        })
    }

    pub fn is_enabled(&self) -> bool {
        self.config.enabled
    }

    /// How many plugins are connected.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// The names of the plugins, in the order in which they are called.
    pub async fn names(&self) -> Vec<String> {
        self.plugins.lock().await.iter().map(|plugin| plugin.name().to_owned()).collect()
    }

    /// Held from before plugins are asked about something new until it shows in [`Host::state`].
    pub async fn hold(&self) -> Option<RwLockReadGuard<'_, ()>> {
        if self.config.enabled { Some(self.gate.read().await) } else { None }
    }

    /// Launches installed plugins and takes connections until `stop`. Neither a plugin nor the socket can keep a runtime
    /// from starting.
    pub async fn start(self: &Arc<Self>, host: Arc<dyn Host>, stop: CancellationToken) {
        if !self.config.enabled || self.host.set(host).is_err() {
            return;
        }
        let config = self.config.clone();
        let installed = tokio::task::spawn_blocking(move || launch::find(&config)).await.unwrap_or_default();
        let launched = installed.into_iter().map(|plugin| async {
            match launch::launch(plugin) {
                Ok((stream, launched)) => self.begin(stream, Some(launched)).await,
                Err(error) => tracing::warn!(error = %chain(&error), "NRI plugin could not be launched"),
            }
        });
        join_all(launched).await;
        let listener = match self.config.socket.as_deref().map(listen::bind) {
            None => None,
            Some(Ok(listener)) => Some(listener),
            Some(Err(error)) => {
                tracing::warn!(error = %chain(&error), "NRI plugins cannot connect");
                None
            }
        };
        let plugins = self.clone();
        tokio::spawn(async move {
            match listener {
                Some(listener) => plugins.accept(listener, stop).await,
                None => stop.cancelled().await,
            }
            plugins.shut_down().await;
        });
    }

    async fn accept(self: &Arc<Self>, listener: UnixListener, stop: CancellationToken) {
        let beginning = Arc::new(Semaphore::new(BEGINNING_AT_ONCE_MAX));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let Ok(permit) = beginning.clone().acquire_owned().await else { break };
                    let plugins = self.clone();
                    tokio::spawn(async move {
                        plugins.begin(stream, None).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "connection of an NRI plugin could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        if let Some(socket) = &self.config.socket {
            let _ = std::fs::remove_file(socket);
        }
    }

    /// Takes a plugin in, or says in the log why not.
    async fn begin(self: &Arc<Self>, stream: UnixStream, launched: Option<Launched>) {
        let Some(host) = self.host.get().cloned() else { return };
        let plugin = match Plugin::begin(stream, launched, &self.config, host.clone()).await {
            Ok(plugin) => Arc::new(plugin),
            Err(error) => return tracing::warn!(error = %chain(&error), "NRI plugin is not taken in"),
        };
        if let Err(error) = self.take_in(&plugin, host).await {
            plugin.connection().close();
            return tracing::warn!(plugin = plugin.name(), error = %chain(&error), "NRI plugin is not taken in");
        }
        tracing::info!(plugin = plugin.name(), "NRI plugin connected and synchronized");
        let plugins = Arc::downgrade(self);
        tokio::spawn(async move {
            plugin.connection().closed().await;
            tracing::info!(plugin = plugin.name(), "NRI plugin is gone");
            if let Some(plugins) = plugins.upgrade() {
                plugins.forget_closed(&mut *plugins.plugins.lock().await);
            }
        });
    }

    async fn take_in(&self, plugin: &Arc<Plugin>, host: Arc<dyn Host>) -> Result<(), Error> {
        let _nothing_new = self.gate.write().await;
        let mut plugins = self.plugins.lock().await;
        if plugins.len() >= PLUGINS_MAX {
            let problem = format!("is one more than the {PLUGINS_MAX} that are taken");
            return Err(Error::Answer { plugin: plugin.name().to_owned(), problem });
        }
        let (pods, containers) = host.state().await;
        let updates = plugin.synchronize(pods, containers).await?;
        plugins.push(plugin.clone());
        // Stable: of plugins with one index the first to come is the first to be called.
        plugins.sort_by(|one, other| one.index().cmp(other.index()));
        self.forget_closed(&mut plugins);
        carry_out(&*host, plugin.name(), updates).await;
        Ok(())
    }

    fn forget_closed(&self, plugins: &mut Vec<Arc<Plugin>>) {
        plugins.retain(|plugin| !plugin.is_closed());
        self.count.store(plugins.len(), Ordering::Release);
    }

    /// Tells every plugin of an event. The first that refuses ends the round.
    pub async fn tell(
        &self,
        event: Event,
        pod: api::PodSandbox,
        container: Option<api::Container>,
    ) -> Result<(), Error> {
        let mut plugins = self.plugins.lock().await;
        let request = api::EventRequest { pod: Some(pod), container };
        let mut result = Ok(());
        for plugin in plugins.iter() {
            result = plugin.tell(event, &request).await;
            if result.is_err() {
                break;
            }
        }
        self.forget_closed(&mut plugins);
        result
    }

    /// Asks about an update of a pod's resources.
    pub async fn update_pod(&self, request: api::UpdatePodSandboxRequest) -> Result<(), Error> {
        let mut plugins = self.plugins.lock().await;
        let mut result = Ok(());
        for plugin in plugins.iter() {
            let event = api::Event::UpdatePodSandbox;
            result = plugin.request::<api::Empty>(event, "UpdatePodSandbox", &request).await.map(drop);
            if result.is_err() {
                break;
            }
        }
        self.forget_closed(&mut plugins);
        result
    }

    /// Asks what is to be adjusted about a container that is being made, and carries out what else plugins want.
    pub async fn create_container(&self, pod: api::PodSandbox, container: api::Container) -> Result<Created, Error> {
        let mut plugins = self.plugins.lock().await;
        let pristine = container.clone();
        let request = api::CreateContainerRequest { pod: Some(pod), container: Some(container) };
        let result = create_round(&plugins, Creation::new(request), pristine).await;
        self.forget_closed(&mut plugins);
        let Creation { adjust, updates, evictions, .. } = result?;
        self.carry_out_for("CreateContainer", updates, evictions).await;
        Ok(adjust)
    }

    /// Asks what is to be changed about an update of a container, and carries out what else plugins want.
    pub async fn update_container(&self, request: api::UpdateContainerRequest) -> Result<Updated, Error> {
        let mut plugins = self.plugins.lock().await;
        let result = update_round(&plugins, Update::new(request)).await;
        self.forget_closed(&mut plugins);
        let update = result?;
        let changed = update.changed();
        self.carry_out_for("UpdateContainer", update.others, update.evictions).await;
        Ok(changed)
    }

    /// Tells that a container has ended, and carries out what plugins want of others.
    pub async fn stop_container(&self, pod: api::PodSandbox, container: api::Container) -> Result<(), Error> {
        let mut plugins = self.plugins.lock().await;
        let request = api::EventRequest { pod: Some(pod), container: Some(container) };
        // The round is the same, though this request has no resources to change.
        let mut answers = Update::new(api::UpdateContainerRequest::default());
        let mut result = Ok(());
        for plugin in plugins.iter() {
            let answer: Result<Option<api::StopContainerResponse>, Error> =
                plugin.request(api::Event::StopContainer, "StopContainer", &request).await;
            result =
                answer.and_then(|answer| answers.add(answer.unwrap_or_default().update, Vec::new(), plugin.name()));
            if result.is_err() {
                break;
            }
        }
        self.forget_closed(&mut plugins);
        result?;
        self.carry_out_for("StopContainer", answers.others, Vec::new()).await;
        Ok(())
    }

    /// Carries out what was asked for beside the answer. A failure is the plugins' to notice, not the caller's.
    async fn carry_out_for(&self, call: &str, updates: Updates, evictions: Vec<api::ContainerEviction>) {
        let Some(host) = self.host.get() else { return };
        if !evictions.is_empty() {
            host.evict(evictions).await;
        }
        carry_out(&**host, call, updates.into_inner()).await;
    }

    /// Says goodbye to all plugins.
    pub async fn shut_down(&self) {
        let plugins = std::mem::take(&mut *self.plugins.lock().await);
        self.count.store(0, Ordering::Release);
        join_all(plugins.iter().map(|plugin| plugin.shut_down())).await;
    }
}

async fn carry_out(host: &dyn Host, cause: &str, updates: Vec<api::ContainerUpdate>) {
    if updates.is_empty() {
        return;
    }
    for failed in host.update(updates).await {
        tracing::warn!(cause, container.id = %failed.container_id, "update asked for by an NRI plugin failed");
    }
}

async fn create_round(
    plugins: &[Arc<Plugin>],
    mut creation: Creation,
    pristine: api::Container,
) -> Result<Creation, Error> {
    for plugin in plugins {
        let answer: Option<api::CreateContainerResponse> =
            plugin.request(api::Event::CreateContainer, "CreateContainer", &creation.request).await?;
        creation.add(answer.unwrap_or_default(), plugin.name())?;
    }
    let validators: Vec<&Arc<Plugin>> = plugins.iter().filter(|plugin| plugin.is_validator()).collect();
    if !validators.is_empty() {
        let instances = plugins.iter().map(|plugin| plugin.instance()).collect();
        let request = creation.validation(pristine, instances);
        let verdicts = join_all(validators.iter().map(|validator| validator.validate(&request))).await;
        verdicts.into_iter().collect::<Result<(), Error>>()?;
    }
    Ok(creation)
}

async fn update_round(plugins: &[Arc<Plugin>], mut update: Update) -> Result<Update, Error> {
    for plugin in plugins {
        let answer: Option<api::UpdateContainerResponse> =
            plugin.request(api::Event::UpdateContainer, "UpdateContainer", &update.request).await?;
        let answer = answer.unwrap_or_default();
        update.add(answer.update, answer.evict, plugin.name())?;
    }
    Ok(update)
}
