//! Wires the parts together and keeps them running.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use oarlock_node_api::NodeApi;
use oarlock_plugins::watcher::{Taker, Takers};
use oarlock_probes::{ExecProbe, ProbeManager};
use oarlock_supervise::Tasks;
use oarlock_volumes::VolumeManager;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::assignment::{self, Assignments, PodResources};
use crate::cgroups::PodCgroups;
use crate::credentials::{self, Connection};
use crate::cri::Runtime;
use crate::error::chain;
use crate::images::ImageCollector;
use crate::metrics::Histogram;
use crate::node::capacity::{Capacity, Machine};
use crate::node::status::Identity;
use crate::node::{identity, status, sync};
use crate::objects::Objects;
use crate::pods::{Pods, Source};
use crate::pull_credentials::Providers;
use crate::server::{ApiAuthorizer, Backend};
use crate::shared::{POD_START_SECONDS, PodTable, Shared};
use crate::turns::taking_turns;
use crate::users::UserRanges;
use crate::watched::Watched;
use crate::{
    Config, Error, eviction, inhibitor, logs, memory, pleg, recorder, reserved, shutdown, sources, storage, users,
};

const NEWS: usize = 1024;
const PROBE_UPDATES: usize = 1024;
const DRAIN: Duration = Duration::from_secs(5);

/// Exec probes go to the runtime.
struct RuntimeExec(Runtime);

#[async_trait]
impl ExecProbe for RuntimeExec {
    async fn exec(&self, container_id: &str, command: &[String], timeout: Duration) -> Result<(i32, Vec<u8>), String> {
        let answer = self.0.exec_sync(container_id, command, timeout).await.map_err(|error| error.to_string())?;
        let mut output = answer.stdout;
        output.extend(answer.stderr);
        Ok((answer.exit_code, output))
    }
}

/// Runs the agent until it is `asked` to end.
pub(crate) async fn run(mut config: Config, connection: Connection, asked: CancellationToken) -> Result<(), Error> {
    let Connection { client, keeper } = connection;
    let client = taking_turns(client);
    let serving = if config.server_tls_bootstrap { Some(credentials::serving(&config)?) } else { None };
    if let Some(rotation) = &serving {
        config.cert_file = rotation.store.file().to_owned();
        config.key_file = rotation.store.file().to_owned();
    }
    for path in [config.pods_root(), config.state_dir().join("pods"), config.pod_logs_dir.clone()] {
        let io = |source| Error::Io { operation: "create directory", path: path.clone(), source };
        tokio::fs::create_dir_all(&path).await.map_err(io)?;
    }
    if config.fail_swap_on && swap_is_on() {
        return Err(Error::SwapOn);
    }
    for field in config.kubelet.without_effect() {
        tracing::warn!(field, "this field of the kubelet's configuration has no effect here");
    }
    let data_dir = config.data_dir.clone();
    let read = tokio::task::spawn_blocking(move || (Machine::read(&data_dir), identity::read())).await;
    let (machine, identity) = read.unwrap_or_default();
    let assignments = Assignments::open(&config, &machine)?;
    let users = Arc::new(open_users(&config)?);
    let pull_credentials = match config.credential_providers.clone() {
        Some((file, bin_dir)) => Providers::open(&file, bin_dir)?,
        None => Providers::default(),
    };

    let runtime = Runtime::new(&config.runtime_endpoint);
    let (recorder, event_sender) = recorder::recorder(client.clone(), config.node_name.clone());
    let (objects, service_watch) = Objects::new(client.clone());
    let (news, news_receiver) = mpsc::channel(NEWS);
    let (probe_updates, probe_receiver) = mpsc::channel(PROBE_UPDATES);
    let placeholder = status::new_node(&config, &identity, Default::default());
    let capacity = Capacity::of(&machine, &config);
    let cgroups = PodCgroups::of(&config, &capacity);
    let swap_bytes = machine.swap_bytes;
    let limited = config.limited_swap.then_some(swap_bytes);
    let swap = tokio::task::spawn_blocking(move || reserved::swap(limited)).await.unwrap_or_default();
    let cluster = storage::NodeStorage::new(client.clone(), config.node_name.clone(), objects.clone());
    let drivers = oarlock_csi::Drivers::new(cluster.clone());
    let storage = oarlock_csi::Storage::new(config.kubelet_dir.clone(), cluster, drivers.clone());
    let shared = Arc::new(Shared {
        volumes: VolumeManager::new(config.pods_root(), objects.clone()).with_external(storage.clone()),
        storage,
        probes: ProbeManager::new(Arc::new(RuntimeExec(runtime.clone())), probe_updates),
        capacity,
        swap,
        assignments,
        users,
        cgroups: ArcSwap::from_pointee(cgroups),
        table: PodTable::default(),
        id_scheme: ArcSwap::from_pointee("oarlock://".to_owned()),
        node: ArcSwap::from_pointee(placeholder),
        runtime_ok: AtomicBool::new(true),
        pull_credentials,
        pulls: Semaphore::new(config.max_parallel_image_pulls),
        shutting_down: AtomicBool::new(false),
        pressure: Default::default(),
        node_changed: Default::default(),
        node_told: Default::default(),
        pod_starts: Mutex::new(Histogram::new(&POD_START_SECONDS)),
        client: client.clone(),
        runtime,
        recorder,
        watched: Watched::new(client.clone(), news.clone()),
        objects,
        config,
    });
    meet_runtime(&shared).await;
    reserved::enforce(&shared).await?;

    let config = &shared.config;
    // Everything goes on until the pods are seen to.
    let rest = CancellationToken::new();
    let mut tasks = Tasks::new(rest.clone());
    let token = tasks.token();
    tasks.spawn("shutdown lock", finished(inhibitor::hold(shared.clone(), news.clone(), token.clone())));
    tasks.spawn("shutdown", finished(shutdown::follow(shared.clone(), news.clone(), asked, rest)));
    if let Some((rotation, live)) = keeper {
        tasks.spawn("client certificate", finished(credentials::keep_client(rotation, live, token.clone())));
    }
    if let Some(rotation) = serving {
        tasks.spawn("serving certificate", finished(rotation.run(client.clone(), |_| {}, token.clone())));
    }
    let mirror_touched = Arc::new(Notify::new());
    let mut known_sources = HashSet::from([Source::Api]);
    if let Some(path) = config.static_pod_dir.clone() {
        known_sources.insert(Source::Files);
        let (shared, touched) = (shared.clone(), mirror_touched.clone());
        let watch = sources::watch_manifests(path, shared, news.clone(), touched, token.clone());
        tasks.spawn("static pods", finished(watch));
    }
    let api = NodeApi::new(
        oarlock_node_api::Config {
            listen: config.listen,
            cert_file: config.cert_file.clone(),
            key_file: config.key_file.clone(),
            client_ca_file: config.client_ca_file.clone(),
            debugging: config.debugging_handlers,
        },
        Arc::new(Backend::new(shared.clone())),
        Arc::new(ApiAuthorizer::new(client.clone(), config.node_name.clone(), config.review.clone())),
    );
    let pods = Pods::new(shared.clone(), known_sources, token.clone());
    let (node_told, node_news) = mpsc::channel(4);
    let node = sync::NodeSync::new(shared.clone(), Identity { swap_bytes, ..identity }, node_news);
    tasks.spawn("pods", finished(pods.run(news_receiver, probe_receiver)));
    tasks.spawn("events", finished(event_sender.run(token.clone())));
    tasks.spawn("services", finished(service_watch.run(token.clone())));
    tasks.spawn("node status", finished(node.run(token.clone())));
    tasks.spawn("node watch", finished(sync::watch(shared.clone(), node_told, token.clone())));
    tasks.spawn("node lease", finished(sync::keep_lease(shared.clone(), token.clone())));
    tasks.spawn("runtime events", finished(pleg::follow_events(shared.clone(), news.clone(), token.clone())));
    tasks.spawn("runtime relist", finished(pleg::relist(shared.clone(), news.clone(), token.clone())));
    if shared.assignments.cpu_static() {
        tasks.spawn("processors", finished(assignment::keep_processors(shared.clone(), token.clone())));
    }
    serve_plugins(&shared, drivers, &mut tasks);
    let images = ImageCollector::new(shared.clone());
    let evictions = eviction::run(shared.clone(), images.clone(), news.clone(), token.clone());
    tasks.spawn("evictions", finished(evictions));
    tasks.spawn("image collection", finished(images.run(token.clone())));
    tasks.spawn("logs", finished(logs::rotate(shared.clone(), token.clone())));
    tasks.spawn("memory", finished(memory::give_back(token.clone())));
    let watch = sources::watch_api(client, config.node_name.clone(), news, mirror_touched, token.clone());
    tasks.spawn("pod watch", finished(watch));
    tasks.spawn("node API", api.run(token));
    tasks.join(DRAIN).await.map_err(Error::from)
}

/// The sockets by which plugins and monitors on the node find the agent. A node where they cannot be made goes without.
fn serve_plugins(shared: &Arc<Shared>, drivers: Arc<oarlock_csi::Drivers>, tasks: &mut Tasks) {
    let token = tasks.token();
    let plugins = shared.assignments.plugins.clone();
    let (state, end) = (shared.clone(), token.clone());
    tasks.spawn("device plugins", async move {
        let told = || state.node_changed.notify_one();
        tokio::select! {
            () = end.cancelled() => {}
            () = state.assignments.follow_plugins(told) => {}
        }
        Ok::<_, std::convert::Infallible>(())
    });
    let end = token.clone();
    tasks.spawn("device plugin registration", async move {
        if let Err(error) = plugins.serve(end.clone()).await {
            tracing::warn!(%error, "device plugins cannot register");
            end.cancelled().await;
        }
        Ok::<_, std::convert::Infallible>(())
    });
    let directory = shared.config.kubelet_dir.join("plugins_registry");
    let devices: Arc<dyn Taker> = Arc::new(shared.assignments.plugins.clone());
    let takers = Takers::from([("DevicePlugin", devices), ("CSIPlugin", drivers)]);
    tasks.spawn("plugin registration", finished(oarlock_plugins::watcher::watch(directory, takers, token.clone())));
    tasks.spawn("volumes", finished(storage::give_back_leftovers(shared.clone(), token.clone())));
    let socket = shared.config.kubelet_dir.join("pod-resources/kubelet.sock");
    let source = Arc::new(PodResources { shared: shared.clone() });
    tasks.spawn("pod resources", async move {
        if let Err(error) = oarlock_plugins::pod_resources::serve(socket, source, token.clone()).await {
            tracing::warn!(%error, "the pod resources API cannot be served");
            token.cancelled().await;
        }
        Ok::<_, std::convert::Infallible>(())
    });
}

/// Learns the runtime's name and cgroup driver, if it is there; later is early enough otherwise.
async fn meet_runtime(shared: &Shared) {
    let hello = async {
        if let Ok(version) = shared.runtime.version().await {
            shared.id_scheme.store(Arc::new(format!("{}://", version.runtime_name)));
        }
        if let Ok(systemd) = shared.runtime.systemd_cgroups().await {
            let cgroups = PodCgroups { systemd, ..(**shared.cgroups.load()).clone() };
            shared.cgroups.store(Arc::new(cgroups));
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(5), hello).await;
    prepare_cgroups(shared).await;
}

/// How long systemd may keep the agent waiting at its start.
const SYSTEMD_PATIENCE: Duration = Duration::from_secs(10);

/// Makes what pods' own cgroups lie in, as the runtime makes cgroups.
pub(crate) async fn prepare_cgroups(shared: &Shared) {
    let cgroups = shared.cgroups.load_full();
    let patience = tokio::time::Instant::now() + SYSTEMD_PATIENCE;
    loop {
        let made = {
            let cgroups = cgroups.clone();
            tokio::task::spawn_blocking(move || cgroups.ensure_tree()).await
        };
        let Ok(Err(error)) = made else { return };
        // A systemd that is busy, as it is while a machine starts, is asked again.
        if cgroups.systemd && tokio::time::Instant::now() < patience {
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        let error = chain(&error);
        tracing::warn!(error, "the cgroups for pods could not be made; they go without limits of their own");
        let without = PodCgroups { enabled: false, ..(**shared.cgroups.load()).clone() };
        shared.cgroups.store(Arc::new(without));
        return;
    }
}

/// Reads which ids of the node are for pods, and which pods have some.
fn open_users(config: &Config) -> Result<UserRanges, Error> {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let host = users::subordinate(&read("/etc/subuid"), &read("/etc/subgid"))?;
    let pool = users::Pool::new(host, config.ids_per_pod, config.max_pods)?;
    Ok(UserRanges::open(config.pods_root(), pool)?)
}

/// Whether the kernel swaps anywhere: `/proc/swaps` has a line under its heading.
fn swap_is_on() -> bool {
    std::fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}

/// A task that ends without an error when it ends.
async fn finished(task: impl Future<Output = ()>) -> Result<(), std::convert::Infallible> {
    task.await;
    Ok(())
}
