//! One plugin: registered, configured, and called. A plugin that cannot be worked with any more is closed; one that answers
//! with an error is heard.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use prost::Message;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::mpsc;

use crate::api;
use crate::config::Config;
use crate::connection::{Connection, Service, status};
use crate::error::{CallError, Error};
use crate::event::{Event, Mask};
use crate::relay::Host;
use crate::ttrpc::{self, Status};
use crate::{name, synchronize};

const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
const REGISTER: &str = "nri.pkg.api.v1alpha1.Runtime/RegisterPlugin";
const UPDATE: &str = "nri.pkg.api.v1alpha1.Runtime/UpdateContainers";

/// The version of the interface that is spoken.
const INTERFACE_VERSION: &str = "v0.12.1";

/// What is known of a plugin that the runtime launched itself.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) index: String,
    pub(crate) name: String,
    pub(crate) configuration: String,
    pub(crate) child: Child,
}

/// A plugin that is ready to be called.
#[derive(Debug)]
pub(crate) struct Plugin {
    index: String,
    base: String,
    /// Both, as it is called in messages.
    name: String,
    events: Mask,
    connection: Connection,
    limit: Duration,
    /// For being told the whole state of the runtime, which is part of coming to be known and takes longer than one event.
    state_limit: Duration,
    /// Events that it only knows as state changes.
    by_state_change: AtomicI32,
    /// Killed when the plugin is dropped.
    _child: Option<Child>,
}

impl Plugin {
    /// Waits for the plugin at the other end to register, and configures it.
    pub(crate) async fn begin(
        stream: UnixStream,
        launched: Option<Launched>,
        config: &Config,
        host: Arc<dyn Host>,
    ) -> Result<Plugin, Error> {
        let (registrations, mut registered) = mpsc::channel(1);
        let own = launched.as_ref().map(|launched| (launched.index.clone(), launched.name.clone()));
        let caller = Mutex::new(own.as_ref().map(|(index, name)| format!("{index}-{name}")));
        let service = Served { own, registrations, host, caller };
        let connection = Connection::start(stream, Arc::new(service));
        let close = connection.clone();
        let begun = async {
            let limit = config.registration_timeout;
            let named = tokio::select! {
                named = tokio::time::timeout(limit, registered.recv()) => named.unwrap_or(None),
                () = connection.closed() => None,
            };
            let (index, base) = named.ok_or(Error::NotRegistered { limit })?;
            let configuration = launched.as_ref().map(|launched| launched.configuration.clone()).unwrap_or_default();
            let mut plugin = Plugin {
                name: format!("{index}-{base}"),
                index,
                base,
                events: Mask::ALL,
                connection,
                limit: config.request_timeout,
                state_limit: config.request_timeout.max(config.registration_timeout),
                by_state_change: AtomicI32::new(0),
                _child: launched.map(|launched| launched.child),
            };
            plugin.configure(config, configuration).await?;
            Ok(plugin)
        };
        let begun = begun.await;
        if begun.is_err() {
            close.close();
        }
        begun
    }

    async fn configure(&mut self, config: &Config, configuration: String) -> Result<(), Error> {
        let milliseconds = |limit: Duration| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let request = api::ConfigureRequest {
            config: configuration,
            runtime_name: config.runtime_name.clone(),
            runtime_version: config.runtime_version.clone(),
            registration_timeout: milliseconds(config.registration_timeout),
            request_timeout: milliseconds(config.request_timeout),
            nri_version: INTERFACE_VERSION.to_owned(),
        };
        let answer: api::ConfigureResponse =
            self.call("Configure", &request).await.map_err(|source| self.failed("Configure", source))?;
        self.events = Mask::of(answer.events).map_err(|unknown| Error::Answer {
            plugin: self.name.clone(),
            problem: format!("subscribed to events that do not exist: {unknown:#x}"),
        })?;
        Ok(())
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn index(&self) -> &str {
        &self.index
    }

    pub(crate) fn instance(&self) -> api::PluginInstance {
        api::PluginInstance { name: self.base.clone(), index: self.index.clone() }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn is_validator(&self) -> bool {
        self.events.has(api::Event::ValidateContainerAdjustment)
    }

    pub(crate) async fn call<A: Message + Default>(
        &self,
        method: &'static str,
        request: &impl Message,
    ) -> Result<A, CallError> {
        self.connection.call(PLUGIN_SERVICE, method, request, self.limit).await
    }

    pub(crate) fn failed(&self, call: &'static str, source: CallError) -> Error {
        match source {
            CallError::Status { message, .. } => Error::Refused { plugin: self.name.clone(), call, message },
            source => Error::Call { plugin: self.name.clone(), call, source },
        }
    }

    /// Makes a request if the plugin is subscribed to it. A plugin that cannot be worked with is closed and has nothing to
    /// say; what it answers is None too if it is not subscribed.
    pub(crate) async fn request<A: Message + Default>(
        &self,
        event: api::Event,
        method: &'static str,
        request: &impl Message,
    ) -> Result<Option<A>, Error> {
        if !self.events.has(event) || self.is_closed() {
            return Ok(None);
        }
        self.heard(method, self.call(method, request).await)
    }

    /// Tells of an event. Plugins from before an event had a call of its own are told in the old way.
    pub(crate) async fn tell(&self, event: Event, request: &api::EventRequest) -> Result<(), Error> {
        let kind = event.on_the_wire();
        if !self.events.has(kind) || self.is_closed() {
            return Ok(());
        }
        let bit = 1 << (kind as i32 - 1);
        if self.by_state_change.load(Ordering::Relaxed) & bit == 0 {
            match self.call::<api::Empty>(event.call(), request).await {
                Err(CallError::Status { code: ttrpc::UNIMPLEMENTED, .. }) => {
                    self.by_state_change.fetch_or(bit, Ordering::Relaxed);
                }
                other => return self.heard(event.call(), other).map(drop),
            }
        }
        let change = api::StateChangeEvent {
            event: kind as i32,
            pod: request.pod.clone(),
            container: request.container.clone(),
        };
        self.heard(event.call(), self.call::<api::Empty>("StateChange", &change).await).map(drop)
    }

    fn heard<A>(&self, call: &'static str, outcome: Result<A, CallError>) -> Result<Option<A>, Error> {
        match outcome {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error.is_fatal() => {
                tracing::error!(plugin = %self.name, call, %error, "NRI plugin is closed");
                self.connection.close();
                Ok(None)
            }
            Err(error) => Err(self.failed(call, error)),
        }
    }

    /// Asks the plugin, as a validator, about the adjustments of all. Without its word nothing is made.
    pub(crate) async fn validate(&self, request: &api::ValidateContainerAdjustmentRequest) -> Result<(), Error> {
        let method = "ValidateContainerAdjustment";
        let outcome: Result<api::ValidateContainerAdjustmentResponse, CallError> = self.call(method, request).await;
        match outcome {
            Ok(answer) if answer.reject => {
                let reason =
                    if answer.reason.is_empty() { "unknown rejection reason".to_owned() } else { answer.reason };
                Err(Error::Rejected { plugin: self.name.clone(), reason })
            }
            Ok(_) => Ok(()),
            Err(error) => {
                if error.is_fatal() {
                    self.connection.close();
                }
                Err(Error::Validator { plugin: self.name.clone(), message: error.to_string() })
            }
        }
    }

    /// Tells the plugin all there is, and hears what it wants changed of it.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<api::PodSandbox>,
        containers: Vec<api::Container>,
    ) -> Result<Vec<api::ContainerUpdate>, Error> {
        let method = "Synchronize";
        let mut updates = Vec::new();
        for request in synchronize::cut(pods, containers) {
            let answer = self.connection.call(PLUGIN_SERVICE, method, &request, self.state_limit).await;
            let answer: api::SynchronizeResponse = answer.map_err(|source| self.failed(method, source))?;
            if request.more && (!answer.update.is_empty() || !answer.more) {
                let problem = "does not take its state in several messages".to_owned();
                return Err(Error::Answer { plugin: self.name.clone(), problem });
            }
            updates = answer.update;
        }
        Ok(updates)
    }

    /// Says goodbye to a plugin that listens.
    pub(crate) async fn shut_down(&self) {
        if !self.is_closed() {
            let _: Result<api::Empty, CallError> = self.call("Shutdown", &api::Empty {}).await;
        }
        self.connection.close();
    }
}

/// What a plugin may call: it registers once, and may ask for updates at any time.
struct Served {
    /// A plugin that was launched has its name already.
    own: Option<(String, String)>,
    registrations: mpsc::Sender<(String, String)>,
    host: Arc<dyn Host>,
    caller: Mutex<Option<String>>,
}

#[async_trait]
impl Service for Served {
    async fn serve(&self, call: &str, payload: &[u8]) -> Result<Vec<u8>, Status> {
        match call {
            REGISTER => self.register(decode(payload)?).map(|answer| answer.encode_to_vec()),
            UPDATE => self.update(decode(payload)?).await.map(|answer| answer.encode_to_vec()),
            unknown => Err(status(ttrpc::UNIMPLEMENTED, format!("there is no call {unknown}"))),
        }
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, Status> {
    M::decode(payload).map_err(|error| status(ttrpc::UNKNOWN, format!("the request cannot be read: {error}")))
}

impl Served {
    fn register(&self, request: api::RegisterPluginRequest) -> Result<api::Empty, Status> {
        let (index, base) = match &self.own {
            Some(own) => own.clone(),
            None => {
                name::check(&request.plugin_idx, &request.plugin_name)
                    .map_err(|error| status(ttrpc::UNKNOWN, error.to_string()))?;
                (request.plugin_idx, request.plugin_name)
            }
        };
        *self.caller.lock() = Some(format!("{index}-{base}"));
        tracing::debug!(plugin = %format!("{index}-{base}"), version = %request.nri_version, "NRI plugin registers");
        let again = || status(ttrpc::UNKNOWN, "the plugin is registered already");
        self.registrations.try_send((index, base)).map_err(|_| again())?;
        Ok(api::Empty {})
    }

    async fn update(&self, request: api::UpdateContainersRequest) -> Result<api::UpdateContainersResponse, Status> {
        let plugin = self.caller.lock().clone();
        let plugin = plugin.ok_or_else(|| status(ttrpc::UNKNOWN, "the plugin has not registered"))?;
        tracing::debug!(plugin, updates = request.update.len(), "NRI plugin asks for updates");
        self.host.evict(request.evict).await;
        let failed = self.host.update(request.update).await;
        Ok(api::UpdateContainersResponse { failed })
    }
}
